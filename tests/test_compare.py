"""Runs side by side: their scores, what is claimed of them, and where their budgets differ."""

import json
import re
from dataclasses import replace
from itertools import product
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
from conftest import prepare_toy
from made_runs import made_run
from test_cli import Type, sentence
from test_cli import typed as typed
from toy_runs import recipe

from fastidmm import compare, scoring, stages
from fastidmm.record import Record
from fastidmm.reporting.beside import others

STAGE = {"run.resolution": 16, "run.epochs": 2, "run.batch_size": 8}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a dataset and three runs: two of three epochs, one of one, fine-tuned alike.

    The first is evaluated. In the second, too, more differs than the seed.
    """
    place = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTIDMM_HOME", str(place / "home"))
        patch.chdir(place)
        prepare_toy(place)
        folders = [Path("runs") / name for name in ("one", "two", "short")]
        for seed, (folder, epochs) in enumerate(zip(folders, (3, 3, 1), strict=True)):
            stages.pretrain(recipe(epochs=epochs, seed=seed, score_every=20 + seed), folder.name)
            stages.finetune(folder, STAGE, [])
        stages.finetune(folders[0], STAGE, [], pretrained=False)  # no part of the comparison
        scoring.evaluate(folders[0])
    return place


@pytest.fixture
def runs(home: Path, trained: Path, tmp_path: Path) -> list[Path]:
    """The three, a test's own."""
    copytree(trained, tmp_path, dirs_exist_ok=True)
    return [Path("runs") / name for name in ("one", "two", "short")]


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
    run = compare.Compared.of(Path("runs/one"))
    one, near, far = (
        compare.Group((replace(run, folder=Path("runs") / name, seconds=seconds),))
        for name, seconds in (("one", 100.0), ("two", 105.0), ("two", 120.0))
    )
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
    assert words.count("one run each: what another seed would change is not in this") == 1


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
        more = {**asked, "score_every": 20 + seed}  # or they were two seeds of one setting
        stages.pretrain(recipe(epochs=1, seed=seed, **more), folder.name)
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


# --- several seeds of one setting ---------------------------------------------------------------

MEASURE = "fine-tuned accuracy at 16 px"


def by_seeds(name: str, seeds: tuple[int, ...], **changes: Any) -> list[Path]:
    """A run of each seed, fine-tuned alike: `NAME-SEED`."""
    folders = [Path("runs") / f"{name}-{seed}" for seed in seeds]
    for folder, seed in zip(folders, seeds, strict=True):
        stages.pretrain(recipe(**{"epochs": 1, "seed": seed, **changes}), folder.name)
        stages.finetune(folder, {**STAGE, "run.epochs": 1}, [])
    return folders


def grouped(folders: list[Path]) -> list[list[str]]:
    return [[Path(run).name for run in g["runs"]] for g in compare.compare(folders)["groups"]]


# Right answers of three seeds each, of 100. Welch's test by scipy: p = 0.021, 0.021, 0.070, 0.094.
# By that of 100 images the last two, of 20 and of 16 points, would be claimed, and not the first.
BY_WELCH = [
    (((40, 42, 44), (46, 48, 50)), "higher"),
    (((46, 48, 50), (40, 42, 44)), "lower"),
    (((30, 40, 50), (50, 60, 70)), "open"),
    (((40, 50, 60), (62, 66, 70)), "open"),
]


def test_settings_are_told_apart_by_their_seeds(toy: str) -> None:
    """Given by turns, and out of order."""
    one, other = by_seeds("a", (2, 0, 1)), by_seeds("b", (0, 1, 2), epochs=2)
    for right, outcome in BY_WELCH:
        for folder, number in zip([*one, *other], [*right[0], *right[1]], strict=True):
            tell(folder / "finetune-16", number, 100)
        found = compare.compare([f for pair in zip(one, other, strict=True) for f in pair])
        assert [g["runs"] for g in found["groups"]] == [list(map(str, one)), list(map(str, other))]
        for group, numbers in zip(found["groups"], right, strict=True):
            told, middle = group["scores"][MEASURE], sum(numbers) / 300
            # Student's t of two degrees of freedom; numbers are equally far apart.
            half = 4.3027 * abs(numbers[1] - numbers[0]) / 100 / 3**0.5
            assert (told["value"], told["seeds"]) == (pytest.approx(middle), 3)
            assert told["interval"] == pytest.approx([middle - half, middle + half], abs=1e-5)
        (claim,) = found["claims"]
        assert (claim["outcome"], claim["seeds"], claim["why"]) == (outcome, [3, 3], "")
        assert claim["points"] == pytest.approx((sum(right[1]) - sum(right[0])) / 3)
    assert [group["seeds"] for group in found["groups"]] == [[2, 0, 1], [0, 1, 2]]
    assert [run["run"] for run in found["runs"]][:2] == [str(one[0]), str(other[0])]
    head, *lines = compare.as_text(found).splitlines()
    assert re.split(r"\s{2,}", head.strip()) == ["a-2 (3 seeds)", "b-0 (3 seeds)"]
    assert "a-2 (3 seeds): the mean, and its 95 % interval over seeds, of a-2, a-0, a-1" in lines
    assert not any("one run" in line for line in lines)
    assert "pretraining epochs: 1 in runs/a-2, 2 in runs/b-0" in found["unequal"]


@pytest.mark.parametrize(("single", "outcome"), [(70, "open"), (100, "higher")])
def test_one_run_is_not_claimed_to_differ_from_seeds_as_far_apart(
    toy: str, single: int, outcome: str
) -> None:
    """By 100 images 70 differ from 50 (z = 2.9); seeds of 40, 50 and 60 have 50 +- 49.7."""
    folders = by_seeds("a", (0, 1, 2))
    for folder, number in zip(folders, (40, 50, 60), strict=True):
        tell(folder / "finetune-16", number, 100)
    (other,) = by_seeds("b", (0,), epochs=2)
    tell(other / "finetune-16", single, 100)
    found = compare.compare([*folders, other])
    (claim,) = found["claims"]
    assert (claim["outcome"], claim["seeds"]) == (outcome, [1, 3])
    words = compare.as_text(found)
    assert "one run beside several" in words and "one run each" not in words


def test_seeds_of_one_setting_are_no_settings_to_compare(toy: str) -> None:
    """Where they are alike their interval is of the test images: Wilson's of 8 of 8, from 0.676."""
    folders = by_seeds("a", (0, 1))
    for folder in folders:
        tell(folder / "finetune-16", 8, 8)
    found = compare.compare(folders)
    (group,) = found["groups"]
    assert group["scores"][MEASURE]["interval"] == pytest.approx([0.6756, 1], abs=1e-4)
    assert len(found["runs"]) == 2 and len(found["groups"]) == 1 and not found["claims"]
    assert "seeds of one setting: name runs of another to compare it with" in compare.as_text(found)


def test_a_setting_is_all_that_changes_results(toy: str) -> None:
    """And every seed counts once; a run that a fine-tuned one began with is part of its setting."""
    one, two = by_seeds("a", (0, 1), device="cpu")
    (idle,) = by_seeds("idle", (2,), log_every=1, checkpoint_every=1, micro_batches=1)
    (again,) = by_seeds("again", (1,))
    (other,) = by_seeds("other", (3,), holdout=0.2)
    assert grouped([one, two, idle, again, other]) == [
        ["a-0", "a-1", "idle-2"], ["again-1"], ["other-3"]
    ]  # fmt: skip
    stages.finetune(idle, {**STAGE, "run.epochs": 2}, [])
    assert grouped([one, two, idle]) == [["a-0", "a-1"], ["idle-2"]]
    begun = [Path("runs") / f"begun-{start.name}" for start in (one, two, other)]
    for seed, (folder, start) in enumerate(zip(begun, (one, two, other), strict=True)):
        init = f"../{start.name}/checkpoints/{Record(start).result.name}"
        stages.pretrain(recipe(epochs=1, seed=seed, init=init), folder.name)
    assert grouped(begun) == [["begun-a-0", "begun-a-1"], ["begun-other-3"]]


def test_a_run_that_is_not_finished_is_no_seed_of_a_setting(
    toy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = by_seeds("a", (0, 1))
    assert grouped(folders) == [["a-0", "a-1"]]
    stopped = property(lambda record: record.folder.name != "a-1")
    monkeypatch.setattr(Record, "finished", stopped)
    assert grouped(folders) == [["a-0"], ["a-1"]]


def test_seeds_that_choose_their_images_compare_with_the_same_seeds(toy: str) -> None:
    of = {
        (name, seed): by_seeds(f"{name}{seed}", (seed,), epochs=epochs, num_images=12)[0]
        for (name, epochs), seed in product((("a", 1), ("b", 2)), (0, 1, 2))
    }
    ours = [of["a", 0], of["a", 1]]
    for seeds, why in (((1, 0), ""), ((1, 2), "other images of the same dataset")):
        found = compare.compare([*ours, *(of["b", seed] for seed in seeds)])
        assert [len(group["runs"]) for group in found["groups"]] == [2, 2]
        assert {claim["why"] for claim in found["claims"]} == {why}


def test_wrong_uses(typed: Type, runs: list[Path]) -> None:
    for words, message in (
        (("one",), "two or more runs"),
        (("one", "one"), "two or more runs"),
        (("one", "nothing"), "no run at runs/nothing"),
        (("one", "runs/two/finetune-16"), "is a stage; name its run: runs/two"),
    ):
        status, _, err = typed("compare", *words)
        assert (status, message in sentence(err)) == (2, True), err
