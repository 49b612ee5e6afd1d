"""Runs side by side: their scores, what is claimed of them, and where their budgets differ."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from made_runs import made_run
from test_cli import Type, sentence
from test_cli import typed as typed
from toy_runs import recipe

from fastidmm import compare, scoring, stages
from fastidmm.record import Record
from fastidmm.reporting.beside import others

STAGE = {"run.resolution": 16, "run.epochs": 2, "run.batch_size": 8}


@pytest.fixture
def runs(toy: str) -> list[Path]:
    """Two runs of three epochs and one of one, each fine-tuned alike; the first is evaluated."""
    folders = [Path("runs") / name for name in ("one", "two", "short")]
    for seed, (folder, epochs) in enumerate(zip(folders, (3, 3, 1), strict=True)):
        stages.pretrain(recipe(epochs=epochs, seed=seed), folder.name)
        stages.finetune(folder, STAGE, [])
    stages.finetune(folders[0], STAGE, [], pretrained=False)  # no part of the comparison
    scoring.evaluate(folders[0])
    return folders


def tell(folder: Path, right: int, num: int) -> None:
    """Have a stage's last metric line, and nothing else, say how many test images were right."""
    evaluated = folder.parent / "evaluation.json"
    if evaluated.exists():
        found = json.loads(evaluated.read_text())
        del found["scores"]["pretrained"]["finetuned_16"]
        evaluated.write_text(json.dumps(found))
    path = folder / "metrics.jsonl"
    *before, last = path.read_text().splitlines()
    told = {**json.loads(last), "test_top1": right / num, "test_num": num}
    path.write_text("\n".join([*before, json.dumps(told)]) + "\n")


def test_scores_and_budgets_are_the_runs_own(runs: list[Path]) -> None:
    found = compare.compare(runs)
    one, two, short = found["runs"]
    assert set(one["scores"]) == {
        "kNN accuracy on frozen features",
        "linear-probe accuracy on frozen features",
        "fine-tuned accuracy at 16 px",
    }
    evaluation = json.loads((runs[0] / "evaluation.json").read_text())["scores"]["pretrained"]
    assert one["scores"]["kNN accuracy on frozen features"]["value"] == evaluation["knn"]["value"]
    tuned = one["scores"]["fine-tuned accuracy at 16 px"]
    assert tuned["value"] == evaluation["finetuned_16"]["value"] and tuned["epochs"] == 2
    assert set(two["scores"]) == {"fine-tuned accuracy at 16 px"}
    assert one["budget"] == two["budget"] == {
        "training images": 20,
        "pretraining epochs": 3,
        "pretraining px": 16,
        "fine-tuning epochs": {16: 2},
    }  # fmt: skip
    spent = sum(Record(f).state["seconds"] for f in (runs[0], runs[0] / "finetune-16"))
    assert one["seconds"] == round(spent, 1)
    assert short["budget"]["pretraining epochs"] == 1
    assert "pretraining epochs: 3 in runs/one, 1 in runs/short" in found["unequal"]
    assert not any("epochs" in line and "runs/two" in line for line in found["unequal"])


def test_a_twentieth_longer_is_no_other_budget_and_a_fifth_is(toy: str) -> None:
    """Whichever of the two it is."""
    made_run(Path("runs/one"))
    one = replace(compare.Compared.of(Path("runs/one")), seconds=100.0)
    near, far = (replace(one, folder=Path("runs/two"), seconds=s) for s in (105.0, 120.0))
    assert compare._unequal(one, near) == compare._unequal(near, one) == []
    assert compare._unequal(one, far) == ["training time: 100 s in runs/one, 120 s in runs/two"]
    assert compare._unequal(far, one) == ["training time: 120 s in runs/two, 100 s in runs/one"]


def test_what_learnt_by_labels_alone_has_no_pretraining_to_tell(toy: str) -> None:
    made_run(Path("runs/plain"), method="supervised")
    assert compare.Compared.of(Path("runs/plain")).budget == {
        "training images": 20,
        "pretraining epochs": 0,
        "pretraining px": None,
        "fine-tuning epochs": {32: 2},
    }


@pytest.mark.parametrize(
    ("right", "outcome"), [((60, 40), "lower"), ((40, 60), "higher"), ((50, 55), "open")]
)
def test_only_what_a_test_finds_is_claimed(
    runs: list[Path], right: tuple[int, int], outcome: str
) -> None:
    """Of 100 images, 60 and 40 differ at 5 % (z = 2.8), 50 and 55 do not (z = 0.7)."""
    for folder, number in zip(runs, right, strict=False):
        tell(folder / "finetune-16", number, 100)
    found = compare.compare(runs[:2])
    claims = {c["measure"]: c for c in found["claims"]}
    tuned = claims["fine-tuned accuracy at 16 px"]
    assert tuned["outcome"] == outcome
    assert tuned["points"] == pytest.approx(right[1] - right[0])
    assert claims["kNN accuracy on frozen features"]["outcome"] == "missing"
    words = compare.as_text(found)
    assert ("no difference can be claimed" in words) == (outcome == "open")


def test_unequal_fine_tuning_and_other_images_are_no_comparison(runs: list[Path]) -> None:
    stages.finetune(runs[1], {**STAGE, "run.epochs": 1}, [])
    (claim,) = (c for c in compare.compare(runs[:2])["claims"] if "fine-tuned" in c["measure"])
    assert claim["outcome"] == "unequal"
    path = runs[2] / "environment.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "train_fingerprint": "other"}))
    found: dict[str, Any] = compare.compare([runs[0], runs[2]])
    claims = {c["why"] for c in found["claims"] if c["outcome"] != "missing"}
    assert claims == {"other images"} and "not comparable: other images" in compare.as_text(found)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"num_train": 12}, "trained on 12 and on 20 images"),
        ({"test_fingerprint": "other"}, "other test images"),
        ({"test_fingerprint": None}, ""),  # of a version that kept none
    ],
)
def test_the_same_images_are_as_many_and_tested_on_the_same(
    runs: list[Path], changes: dict[str, Any], why: str
) -> None:
    scoring.evaluate(runs[1])
    kept = "environment.json" if "num_train" in changes else scoring.EVALUATION
    path = runs[1] / kept
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    found = compare.compare(runs[:2])
    assert len(found["claims"]) == 3 and {c["why"] for c in found["claims"]} == {why}
    two = [row for row in others(runs[0]).rows if row.name == "two"]
    assert len(two) == ("num_train" not in changes)  # the report has runs on the same images only
    assert {cell.why for row in two for cell in row.cells if cell} == ({why} if two else set())


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({"num_images": 8}, "other images of the same dataset"),
        ({"holdout": 0.3}, "other images of the same dataset"),
        ({}, ""),
    ],
)
def test_images_that_another_seed_chose_are_others(
    toy: str, asked: dict[str, Any], why: str
) -> None:
    """As many of the same dataset, but where all of it was learnt from."""
    folders = [Path("runs") / name for name in ("one", "two", "same")]
    for folder, seed in zip(folders, (0, 1, 0), strict=True):
        stages.pretrain(recipe(epochs=1, seed=seed, **asked), folder.name)
        scoring.evaluate(folder)
    two, same = (
        {c["why"] for c in compare.compare([folders[0], f])["claims"]} for f in folders[1:]
    )
    assert two == {why} and same == {""}
    shown = {row.name for row in others(folders[0]).rows}
    assert shown == ({"one", "same"} if why else {"one", "two", "same"})


def test_the_command_prints_a_column_a_run(typed: Type, runs: list[Path]) -> None:
    status, out, _ = typed("compare", "one", "two", "short")
    head, *rows = out.splitlines()
    assert status == 0 and head.split() == ["one", "two", "short"]
    assert any(
        r.startswith("pretraining epochs") and r.split()[-3:] == ["3", "3", "1"] for r in rows
    )
    assert "budgets differ:" in rows
    assert "frozen features not scored: fastidmm evaluate runs/two" in rows
    status, out, _ = typed("compare", "one", "two", "--json")
    assert status == 0 and [r["run"] for r in json.loads(out)["runs"]] == ["runs/one", "runs/two"]


def test_wrong_uses(typed: Type, runs: list[Path]) -> None:
    for words, message in (
        (("one",), "two or more runs"),
        (("one", "one"), "two or more runs"),
        (("one", "nothing"), "no run at runs/nothing"),
        (("one", "runs/two/finetune-16"), "is a stage; name its run: runs/two"),
    ):
        status, _, err = typed("compare", *words)
        assert (status, message in sentence(err)) == (2, True), err
