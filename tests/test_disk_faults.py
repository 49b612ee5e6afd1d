"""A disk that refuses costs no run: some of the trials that tests/faults/disk.py makes."""

import errno
import os
from pathlib import Path
from typing import NoReturn

import disk
import pytest
import torch
import trials

from fastidmm import checkpoint
from fastidmm.errors import DataError
from fastidmm.preparing import files


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


def test_a_text_that_cannot_be_written_leaves_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: int) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    files.write_whole(tmp_path / "kept", "before\n")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=f"No space .*'{tmp_path}/kept'"):
        files.write_whole(tmp_path / "kept", "after\n")
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert (tmp_path / "kept").read_text() == "before\n"


def test_the_bytes_are_those_of_the_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(checkpoint, "sync", full)
    tensors = {"a": {"x": torch.zeros(300), "y": torch.zeros(5, dtype=torch.int64)}, "b": {}}
    with pytest.raises(DataError, match=r"step_000000007: No space .*and 1,240 bytes are needed"):
        checkpoint.save(tmp_path, 7, tensors, {})
    assert not list(tmp_path.iterdir())
