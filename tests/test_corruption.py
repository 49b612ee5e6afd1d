"""Damage is noticed: some of the trials that tests/faults/corruption.py makes."""

from pathlib import Path

import corruption
import torch
import trials

from fastidmm import checkpoint


def test_a_damaged_checkpoint_is_noticed(tmp_path: Path) -> None:
    with trials.toy(tmp_path):
        for found in corruption.checkpoints(15):
            assert found.trials and not found.broken, str(found)


def test_a_damaged_store_is_noticed(tmp_path: Path) -> None:
    with trials.toy(tmp_path):
        for found in corruption.stores(25):
            assert found.trials and not found.broken, str(found)


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
