"""What README and docs tell to type is typed here, line after line, on less of everything."""

import shlex
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import MakePhotos
from test_docs import ROOT, commands
from typer.testing import CliRunner

from fastidmm import stages
from fastidmm.cli import app
from fastidmm.recipe import Recipe
from fastidmm.registry import TABLES

LESS = {"epochs": 1, "batch_size": 2, "num_images": 4}
# Which test types what would take minutes here, or asks the network.
ELSEWHERE = {
    "plan": "test_plan", "bench": "test_bench", "doctor": "test_doctor",
    "prepare --dataset flowers": "test_datasets", "prepare --weights": "test_weights",
}  # fmt: skip
STAND_INS = {"one_run": "mine_pvtv2_b3_idmm", "other_run": "mine_deit_tiny_idmm"}
if find_spec("onnx") is None:  # CI has it
    STAND_INS["onnx"] = "pt2"


@pytest.fixture
def typed(
    home: Path, photos: MakePhotos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], None]:
    """Types a line, where photographs lie; fails unless it ends with 0."""
    place = stages._placed

    def less(folder: Path, recipe: Recipe, **how: bool) -> Path:
        run = recipe.run.model_copy(update=LESS)
        optim = recipe.optim.model_copy(update={"warmup_epochs": 0.0})
        cut = recipe.model_copy(update={"run": run, "optim": optim})
        return place(folder, cut, **how)

    monkeypatch.setattr(stages, "_placed", less)
    monkeypatch.setitem(TABLES["backbone"], "pvtv2_b3", TABLES["backbone"]["pvtv2_b0"])
    monkeypatch.setenv("HOME", str(tmp_path))
    for split in ("train", "test"):
        photos(tmp_path / "photos" / split, per_class=3)
    photos(tmp_path / "new", per_class=1)

    def type_it(line: str) -> None:
        words = [STAND_INS.get(word, word) for word in shlex.split(line)]
        words = [str(Path(word).expanduser()) for word in words]
        if words[1] == "reproduce" and "--dry-run" not in words:
            words.append("--dry-run")
        done = CliRunner().invoke(app, words[1:])
        assert done.exit_code == 0, f"{line}: {done.exception}"

    for name in ("flowers", "demo", "yours"):
        type_it(f"fastidmm prepare --dataset folder --from ~/photos --name {name}")
    return type_it


def lines(page: str) -> list[str]:
    """Those of a page that are typed here; words in capitals stand for any."""
    found = commands(ROOT / page)
    return [
        line
        for line in found
        if not any(line.startswith(f"fastidmm {known}") for known in ELSEWHERE)
        and not any(word.isupper() and len(word) > 2 for word in line.split())
    ]


def test_readme(typed: Callable[[str], None]) -> None:
    found = lines("README.md")
    assert len(found) > 15
    for line in found:
        typed(line)


@pytest.mark.parametrize("page", ["log.md", "results.md"])
def test_measurements(typed: Callable[[str], None], page: str) -> None:
    Path("flowers").symlink_to(Path("~/photos").expanduser())
    rows = [  # of three photographs of a class two have their label
        f"photos/{split}/class{label}/00{number}.png,{label if number else ''},{split}"
        for split, numbers in (("train", (0, 1, 2)), ("test", (1, 2)))
        for label in range(2)
        for number in numbers
    ]
    Path("some.csv").write_text("\n".join(["path,label,split", *rows]))
    found = lines(f"docs/{page}")
    assert len(found) > 3
    for line in found:
        typed(line)
