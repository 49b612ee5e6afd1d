"""Exit statuses: one table in docs/reliability.md, and each of its rows by the command itself."""

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import TINY, Type, sentence
from test_cli import typed as typed
from test_train import fail_at

from fastidmm import errors
from fastidmm.batch import Batch, Loss
from fastidmm.methods.idmm import IDMM
from fastidmm.record import Record

DOCS = Path(__file__).parents[1] / "docs" / "reliability.md"


def test_the_table_is_of_the_errors_there_are() -> None:
    section = DOCS.read_text().split("## Exit statuses")[1].split("\n## ")[0]
    told = [int(row) for row in re.findall(r"(?m)^\| (\d+) \|", section)]
    kinds = [k for k in vars(errors).values() if isinstance(k, type)]
    raised = {k.status for k in kinds if issubclass(k, errors.FastidmmError)}
    assert told == [0, *sorted(raised)] == [0, 2, 3, 4, 5, 75]


def test_done_and_wrong_use(typed: Type, home: Path) -> None:
    assert typed("list")[0] == 0
    assert typed("pretrain", "--epochs", "none")[0] == 2
    assert typed("pretrain", "--no-such-flag")[0] == 2
    assert typed("no-such-command")[0] == 2
    assert typed("report", "nothing")[0] == 2
    assert typed("export", "nothing", "--out", "out")[0] == 2
    assert typed("export")[0] == typed("embed", "--from", "photos")[0] == typed("predict")[0] == 2


def test_bad_data(typed: Type, toy: str) -> None:
    Path("empty").mkdir()
    assert typed("pretrain", *TINY, "--run", "mine")[0] == 0
    assert typed("embed", "mine", "--from", "empty", "--out", "features.npz")[0] == 3
    assert typed("finetune", "mine", *TINY[2:])[0] == 0
    assert typed("predict", "mine", "--from", "empty")[0] == 3
    assert typed("prepare", "--dataset", "folder", "--from", "empty")[0] == 3


def test_numbers_that_are_not_finite(
    typed: Type, toy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_at(monkeypatch, lambda attempt, step: True)
    status, _, err = typed("pretrain", *TINY)
    assert status == 4 and "--set optim.lr" in sentence(err)


def test_weights_that_diverge_are_looked_at_and_end_as_numbers_do(typed: Type, toy: str) -> None:
    """Features that are not finite are null in their line; the run goes back, and ends with 4."""
    words = "--backbone vit_micro --resolution 16 --batch-size 8 --precision fp16 --epochs 40"
    keys = ("optim.lr=3", "optim.warmup_epochs=0", "run.knn_every=1")
    sets = [word for key in keys for word in ("--set", key)]
    status, _, err = typed("pretrain", *words.split(), *sets, "--run", "mine")
    assert status == 4 and "--set optim.lr" in sentence(err) and "attempt 1" in err
    lines = Record(Path("runs/mine")).metrics()
    assert any("rankme" in line and line["rankme"] is None for line in lines)


@pytest.mark.parametrize(
    ("problem", "remedy"),
    [
        (torch.OutOfMemoryError("no"), "lower --resolution or --batch-size"),
        (MemoryError(), "lower --batch-size"),
    ],
)
def test_out_of_memory(
    typed: Type, toy: str, monkeypatch: pytest.MonkeyPatch, problem: Exception, remedy: str
) -> None:
    def scarce(self: IDMM, batch: Batch) -> Loss:
        raise problem

    monkeypatch.setattr(IDMM, "forward", scarce)
    status, _, err = typed("pretrain", *TINY)
    assert status == 5 and remedy in sentence(err)


def test_memory_that_ends_elsewhere(typed: Type, toy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastidmm import scoring

    assert typed("pretrain", *TINY, "--run", "mine")[0] == 0

    def scarce(*given: Any) -> Any:
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(scoring, "evaluate", scarce)
    status, _, err = typed("evaluate", "mine")
    assert status == 5 and "the GPU's memory is full" in sentence(err)
    monkeypatch.setattr(IDMM, "forward", scarce)
    status, _, err = typed("verify", "mine")
    assert status == 5 and "close what else runs there" in sentence(err)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_interrupted_and_resumable(
    typed: Type, toy: str, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    forward: Callable[[IDMM, Batch], Loss] = IDMM.forward

    def signalled(self: IDMM, batch: Batch) -> Loss:
        if batch.step == 1:
            os.kill(os.getpid(), number)
        return forward(self, batch)

    monkeypatch.setattr(IDMM, "forward", signalled)
    before = signal.signal(number, signal.SIG_DFL)  # a shell may have it ignored
    try:
        status, _, err = typed("pretrain", *TINY, "--run", "mine")
    finally:
        signal.signal(number, before)
    assert status == 75 and "`fastidmm resume runs/mine` goes on" in sentence(err)
    assert typed("resume", "mine")[0] == 0
