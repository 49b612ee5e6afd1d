"""Paths that are no UTF-8: refused before anything is made, or written to all the same."""

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from test_bench import made_result
from test_cli import TINY, Type, sentence
from test_cli import typed as typed

from fastidmm.bench import answers

ODD = os.fsdecode(b"odd\xff")
SHOWN = "odd\\udcff"


@pytest.fixture
def run(typed: Type, toy: str) -> Path:
    """A finished run, and the same in a folder with a name that is no UTF-8."""
    Path(ODD).mkdir()
    assert typed("pretrain", *TINY, "--run", "run")[0] == 0
    Path(ODD, "run").symlink_to(Path("runs/run").resolve())
    return Path("runs/run")


CASES: dict[str, Callable[[str], list[str]]] = {
    "run.init": lambda checkpoint: [
        "pretrain", *TINY, "--run", "new", "--init", f"../../{ODD}/run/checkpoints/{checkpoint}",
    ],
    "the run's folder": lambda _: ["pretrain", *TINY, "--run", f"{ODD}/new"],
    "--out": lambda _: ["export", "run", "--out", f"{ODD}/out"],
}  # fmt: skip


def test_weights_are_neither_kept_nor_looked_for_where_they_cannot_be_read(
    typed: Type, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = max(path.name for path in (run / "checkpoints").iterdir())
    for named, command in CASES.items():
        status, _, err = typed(*command(checkpoint))
        assert status == 2, err
        assert named in sentence(err) and SHOWN in sentence(err) and "rename" in sentence(err)
    for word in ("report", "resume", "evaluate"):
        status, _, err = typed(word, f"{ODD}/run")
        assert status == 2 and f"{SHOWN}/run is not UTF-8" in sentence(err)
    monkeypatch.setenv("FASTIDMM_HOME", os.path.abspath(ODD))
    status, _, err = typed("prepare", "--dataset", "folder", "--from", "photos")
    assert status == 2 and "FASTIDMM_HOME" in sentence(err)
    assert os.listdir("runs") == ["run"] and os.listdir(ODD) == ["run"]


def test_features_and_measurements_are_written_there(typed: Type, run: Path) -> None:
    for kind in ("npz", "parquet"):
        out = Path(ODD, f"features.{kind}")
        assert typed("embed", "run", "--from", "photos", "--out", out)[0] == 0
        assert out.stat().st_size > 28 * 4
    page = Path(ODD, "page.html")
    found = made_result()
    found["surroundings"]["command"] = f"bench --html {page}"
    answers.tell(found, json_file=None, html_file=page)
    assert SHOWN in page.read_text()


CHECKPOINT = "run/checkpoints/step_000000003"


@pytest.mark.parametrize("init", ["../run", "runs/run", f"runs/{CHECKPOINT}", "run"])
def test_a_start_that_is_no_checkpoint_is_told_the_one_it_may_mean(
    typed: Type, run: Path, init: str
) -> None:
    status, _, err = typed("pretrain", *TINY, "--run", "new", "--init", init)
    assert status == 2 and f"run.init names {os.path.normpath(f'runs/new/{init}')}," in sentence(
        err
    )
    told = re.search(r": name (\S+) as seen from runs/new, or", sentence(err))
    assert told and typed("pretrain", *TINY, "--run", "new", "--init", told[1])[0] == 0
    assert told[1] == f"../{CHECKPOINT}"
