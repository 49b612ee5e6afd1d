"""Damage is noticed: some of the trials that tests/faults/corruption.py makes."""

from pathlib import Path

import corruption
import pytest
import torch
import trials

from fastidmm import checkpoint, stages
from fastidmm.errors import DataError
from fastidmm.folders import RECIPE
from fastidmm.scoring import evaluate


def test_a_damaged_checkpoint_is_noticed(tmp_path: Path) -> None:
    with trials.toy(tmp_path):
        for found in corruption.checkpoints(15):
            assert found.trials and not found.broken, str(found)


def test_a_damaged_store_is_noticed(tmp_path: Path) -> None:
    with trials.toy(tmp_path):
        for found in corruption.stores(25):
            assert found.trials and not found.broken, str(found)


def test_damage_to_what_a_run_began_with_or_told_is_noticed(tmp_path: Path) -> None:
    with trials.toy(tmp_path):
        for found in (corruption.refused(25), corruption.told(4)):
            assert found.trials and not found.broken, str(found)


def test_an_edited_recipe_is_refused_with_what_to_do(tmp_path: Path) -> None:
    """By what trains from it, too: until it is put back."""
    with trials.toy(tmp_path):
        trials.whole("run")
        run = Path("runs/run")
        path = run / RECIPE
        before = path.read_text()
        path.write_text(before.replace("epochs = 3\n", "epochs = 4\n", 1))
        for command in (stages.resume, lambda run: stages.finetune(run, {}, []), evaluate):
            with pytest.raises(DataError, match=r"recipe\.toml .*put it back, or start a new run"):
                command(run)
        path.write_text(before)
        assert stages.resume(run)[0]["steps"] == 6


def test_a_save_keeps_two_that_are_whole(tmp_path: Path) -> None:
    """What lies past its step was passed over when the run went on, and counts as neither."""
    tensors = {checkpoint.MODEL: {"weight": torch.arange(9.0)}}
    for step in (1, 2, 4):
        checkpoint.save(tmp_path, step, tensors, {})
    (checkpoint.at(tmp_path, 4) / checkpoint.MODEL).write_bytes(b"")
    assert checkpoint.newest(tmp_path) == checkpoint.at(tmp_path, 2)
    checkpoint.save(tmp_path, 3, tensors, {})
    assert checkpoint.found(tmp_path) == [checkpoint.at(tmp_path, step) for step in (2, 3)]
    (checkpoint.at(tmp_path, 3) / checkpoint.STATE).write_text("[]")
    assert checkpoint.newest(tmp_path) == checkpoint.at(tmp_path, 2)
