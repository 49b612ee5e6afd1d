"""A disk that refuses costs no run: some of the trials that tests/faults/disk.py makes."""

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import disk
import pytest
import torch
import trials
from test_bench import made_result
from test_cli import TINY, Type, sentence
from test_cli import typed as typed

from fastidmm import checkpoint
from fastidmm.bench import answers, figures
from fastidmm.errors import DataError
from fastidmm.preparing.files import write_whole


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

    write_whole(tmp_path / "kept", "before\n")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=f"No space .*'{tmp_path}/kept'"):
        write_whole(tmp_path / "kept", "after\n")
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


@contextmanager
def small_files() -> Iterator[None]:
    """No file may grow beyond 100 bytes, and the system says so of writes that name no file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_whatever_cannot_be_written_is_named_and_nothing_of_it_is_left(
    typed: Type, toy: str
) -> None:
    for words in (["pretrain", *TINY, "--run", "run"], ["finetune", "run", *TINY[2:]]):
        assert typed(*words)[0] == 0
    before = sorted(map(str, Path().rglob("*")))
    made = {
        "runs/run/report.html": ["report", "run"],
        "runs/run/evaluation.json": ["evaluate", "run"],
        "classes.csv": ["predict", "run", "--from", "photos", "--out", "classes.csv"],
        "features.npz": ["embed", "run", "--from", "photos", "--out", "features.npz"],
        "features.parquet": ["embed", "run", "--from", "photos", "--out", "features.parquet"],
    }
    for file, words in made.items():
        with small_files():
            status, _, err = typed(*words)
        assert status == 3
        assert sentence(err).startswith(f"fastidmm: cannot write {file}: File too large; free"), err
    assert sorted(map(str, Path().rglob("*"))) == before


def test_a_measurement_is_told_though_its_file_cannot_be_written(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = made_result()
    with small_files(), pytest.raises(OSError, match=r"File too large: 'a.json'"):
        answers.tell(found, json_file=Path("a.json"), html_file=None)
    assert capsys.readouterr().out == figures.text(found) + "\n"
    assert not list(Path().iterdir())


def test_a_disk_that_cannot_be_written_is_named_by_the_file(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not by the one beside it, which cannot be taken away either."""

    def refusing(path: Path, *given: object, **named: object) -> NoReturn:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(Path, "open", refusing)
    monkeypatch.setattr(Path, "unlink", refusing)
    with pytest.raises(OSError, match=r"Read-only file system: 'report.html'"):
        write_whole(Path("report.html"), "page")
