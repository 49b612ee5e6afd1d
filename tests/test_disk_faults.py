"""A disk that refuses costs no run: some of the trials that tests/faults/disk.py makes."""

from pathlib import Path

import disk
import pytest
import trials


def test_a_refused_call_costs_nothing(tmp_path: Path) -> None:
    with trials.toy(tmp_path):
        found = disk.refused(12)
    assert found.trials >= 12 and not found.broken, str(found)


def test_a_full_disk_costs_nothing(tmp_path: Path) -> None:
    with trials.toy(tmp_path):
        found = disk.on_a_small_disk(2)
    if not found.trials:
        pytest.skip(found.found)
    assert not found.broken, str(found)
