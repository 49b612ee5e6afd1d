"""What `fastidmm runs` tells of runs against what lies in their folders."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_cli import Type
from test_cli import typed as typed
from toy_runs import recipe

from fastidmm import runs, stages
from fastidmm.errors import UsageError
from fastidmm.record import Record

SHORT = {"run.epochs": 1, "run.resolution": 16}


@pytest.fixture
def three(toy: str) -> Iterator[None]:
    """One pretrained and fine-tuned, one stopped amid, one whose recipe is wrong."""
    stages.pretrain(recipe(epochs=2), "one")
    stages.finetune(Path("runs/one"), SHORT, [])
    stages.pretrain(recipe(epochs=4, seed=5, optimizer="adamw"), "half")
    shutil.rmtree("runs/half/checkpoints/step_000000012")
    Path("runs/broken").mkdir()
    Path("runs/broken/recipe.toml").write_text("[run]\nepoch = 3\n")
    yield


def test_a_row_for_each(three: None, typed: Type) -> None:
    one, half, broken = runs.listed()
    record = Record(Path("runs/one"))
    assert one["state"] == "finished" and one["epochs"] == 2 and one["dataset"] == "toy"
    assert one["knn_top1"] == record.metrics()[-1]["knn_top1"]
    stage = Record(Path("runs/one/finetune-16"))
    assert one["seconds"] == pytest.approx(
        record.state["seconds"] + stage.state["seconds"], abs=0.1
    )
    ((name, score),) = one["finetuned"].items()
    assert score["value"] == stage.metrics()[-1]["test_top1"] and "16 px" in name
    assert half["state"] == "step 9 of 12" and half["finetuned"] == {}
    assert broken["run"] == "broken" and broken["state"].startswith("broken: ")
    assert runs.listed("other") == [] and len(runs.listed("toy")) == 2

    status, out, _ = typed("runs", "list")
    lines = out.splitlines()
    assert status == 0 and [line.split()[0] for line in lines] == ["run", "one", "half", "broken"]
    assert f"{100 * score['value']:.1f} % at 16 px" in lines[1] and "step 9 of 12" in lines[2]
    assert json.loads(typed("runs", "list", "--json")[1]) == runs.listed()


def test_what_one_says(three: None, typed: Type) -> None:
    found = json.loads(typed("runs", "show", "one", "--json")[1])
    assert [each["run"] for each in found] == ["runs/one", "runs/one/finetune-16"]
    assert (
        found[1]["test_top1"]["num"]
        == Record(Path("runs/one/finetune-16")).metrics()[-1]["test_num"]
    )
    status, out, _ = typed("runs", "show", "one")
    assert status == 0 and "run: runs/one\n" in out and "\n\nrun: runs/one/finetune-16\n" in out


def test_the_best_first(three: None, typed: Type, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [row["run"] for row in runs.best("toy")] == ["one", "half"]
    rows: list[dict[str, Any]] = [
        {"run": str(value), "dataset": "toy", "finetuned": {"at 16 px": {"value": value}}}
        for value in (0.3, 0.9, 0.5)
    ]
    monkeypatch.setattr(runs, "listed", lambda dataset: [*rows, {"run": "broken"}])
    assert [row["run"] for row in runs.best("toy")] == ["0.9", "0.5", "0.3"]
    monkeypatch.setattr(runs, "listed", lambda dataset: [])
    with pytest.raises(UsageError, match="no runs of 'toy'"):
        runs.best("toy")


def test_what_sets_two_apart(three: None, typed: Type) -> None:
    found = json.loads(typed("runs", "diff", "one", "half", "--json")[1])
    assert found["recipe"]["run.epochs"] == [2, 4] and found["recipe"]["run.seed"] == [0, 5]
    assert "run.optimizer" not in found["recipe"] and found["environment"] == {}
    assert "recipe: run.seed: 0 | 5\n" in typed("runs", "diff", "one", "half")[1]
    assert typed("runs", "diff", "one", "one")[1] == "the same recipe in the same environment\n"
    status, _, err = typed("runs", "diff", "one", "two")
    assert status == 2 and "no run at runs/two" in err


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("environment.json", "{}", "broken: runs/half/environment.json cannot be read"),
        ("evaluation.json", "[]", "broken: runs/half/evaluation.json cannot be read"),
        ("metrics.jsonl", None, "broken: IsADirectoryError: "),
    ],
)
def test_one_odd_folder_costs_the_others_nothing(
    three: None, typed: Type, name: str, text: str | None, told: str
) -> None:
    path = Path("runs/half") / name
    if text is None:
        path.unlink()
        path.mkdir()
    else:
        path.write_text(text)
    one, half, _ = runs.listed()
    assert one["state"] == "finished" and half["state"].startswith(told)
    assert typed("runs", "list")[0] == 0 and typed("runs", "best", "toy")[0] == 0


def test_nothing_yet(typed: Type, home: Path) -> None:
    assert typed("runs", "list")[1] == "no runs in ./runs yet: begin with `fastidmm pretrain`\n"
