"""Damage is noticed: some of the trials that tests/faults/corruption.py makes."""

from pathlib import Path

import corruption
import trials


def test_a_damaged_checkpoint_is_noticed(tmp_path: Path) -> None:
    with trials.toy(tmp_path):
        for found in corruption.checkpoints(15):
            assert found.trials and not found.broken, str(found)


def test_a_damaged_store_is_noticed(tmp_path: Path) -> None:
    with trials.toy(tmp_path):
        for found in corruption.stores(25):
            assert found.trials and not found.broken, str(found)
