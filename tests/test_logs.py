"""Metric lines in TensorBoard and in Weights & Biases are those of metrics.jsonl."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_cli import Type
from test_cli import typed as typed
from toy_runs import RUN, Killed, kill_before_update

from fastidmm import logs, stages
from fastidmm.record import METRICS, Record

WORDS = "--backbone vit_micro --resolution 16 --batch-size 8 --epochs 3 --run run"


def lines() -> list[dict[str, Any]]:
    return Record(RUN).metrics()


def test_tensorboard_has_every_number_once(
    typed: Type, toy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of a run that was killed behind its newest checkpoint, and went on."""
    reader = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="tensorboard is not installed: pip install 'fastidmm[logging]'; CI has it",
    )
    keep = ("--set", "run.checkpoint_every=1")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_before_update(patch, 5)
        typed("pretrain", "--dataset", toy, *WORDS.split(), *keep, "--log", "tensorboard")
    assert [line["step"] for line in lines()][-1] > Record(RUN).steps == 3
    stages.resume(RUN)
    found = reader.EventAccumulator(str(RUN / "tensorboard"))
    found.Reload()
    assert [line["step"] for line in lines()] == list(range(1, 10))
    for name in ("loss", "instance_top1", "lr", "grad_norm", "knn_top1", "images_per_second"):
        told = {event.step: event.value for event in found.Scalars(name)}
        kept = {line["step"]: line[name] for line in lines() if name in line}
        assert told == pytest.approx(kept, rel=1e-6), name
        assert len(found.Scalars(name)) == len(kept)


def test_what_weights_and_biases_is_told(
    typed: Type, toy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[dict[str, Any]] = []
    told: list[tuple[int, dict[str, float]]] = []
    ended: list[bool] = []

    def init(**asked: Any) -> Any:
        begun.append(asked)
        return SimpleNamespace(
            id=f"id{len(begun)}" if asked["id"] is None else asked["id"],
            log=lambda values, step: told.append((step, values)),
            finish=lambda: ended.append(True),
        )

    stand_in = SimpleNamespace(init=init, Settings=lambda **given: given)
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    monkeypatch.setattr(logs, "find_spec", lambda name: stand_in)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_before_update(patch, 5)
        typed("pretrain", "--dataset", toy, *WORDS.split(), "--log", "wandb")
    before = len(told)
    stages.resume(RUN)
    stages.finetune(RUN, {"run.resolution": 16, "run.epochs": 1}, [])
    assert [b["id"] for b in begun] == [None, "id1", None] and len(ended) == 3
    assert [b["name"] for b in begun] == ["run", "run", "run/finetune-16"]
    assert begun[0]["config"]["run"]["dataset"] == toy and begun[0]["project"] == "fastidmm"
    # From its checkpoint on; what it was told before the kill is equal to the bit.
    again = dict(told[before : before + 6])
    assert again.keys() == {4, 5, 6, 7, 8, 9}
    assert dict(told[:before]).keys() == {1, 2, 3, 4, 5}
    for line, (step, values) in zip(lines()[3:], again.items(), strict=True):
        assert step == line["step"] and values == {k: v for k, v in line.items() if k != "step"}


def test_weights_and_biases_itself_offline(
    typed: Type, toy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = "wandb is not installed: pip install 'fastidmm[logging]'; CI has it"
    pytest.importorskip("wandb", reason=reason)
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert typed("pretrain", "--dataset", toy, *WORDS.split(), "--log", "wandb")[0] == 0
    (kept,) = (RUN / "wandb").glob("offline-run-*/*.wandb")
    text = kept.read_bytes()
    for line in lines():
        assert str(line["loss"])[:12].encode() in text
    assert (RUN / "wandb" / "id").read_text() in kept.name


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_library_that_is_missing_is_said_before(
    name: str, typed: Type, toy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "find_spec", lambda name: None)
    status, _, err = typed("pretrain", "--dataset", toy, *WORDS.split(), "--log", name)
    assert status == 2 and f"--log {name} needs its library: pip install 'fastidmm[" in err
    assert not Path("runs").exists()


def test_no_log_leaves_nothing(typed: Type, toy: str) -> None:
    assert typed("pretrain", "--dataset", toy, *WORDS.split())[0] == 0
    assert {path.name for path in RUN.iterdir()} >= {METRICS, "checkpoints"}
    assert not (RUN / "tensorboard").exists() and not (RUN / "wandb").exists()
