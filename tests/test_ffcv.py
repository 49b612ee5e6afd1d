"""FFCV's file of a store."""

import errno
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from fastidmm import cli, store
from fastidmm.datasets.folder import Folder
from fastidmm.errors import DataError, Interrupted, UsageError
from fastidmm.preparing import beton
from fastidmm.preparing import prepare as module
from fastidmm.preparing.prepare import prepare
from fastidmm.preparing.summary import Summary
from fastidmm.store import Store

MakePhotos = Callable[..., Path]
MakeStore = Callable[..., Summary]
needs_ffcv = pytest.mark.skipif(beton.unusable() is not None, reason=str(beton.unusable()))


@pytest.fixture
def mine(home: Path, photos: MakePhotos, tmp_path: Path) -> MakeStore:
    """Prepare photographs of two classes, training and test, as the store `mine`."""
    photos(tmp_path / "photos" / "train", per_class=11, side=21)
    photos(tmp_path / "photos" / "test", per_class=2, side=8)

    def make(**options: Any) -> Summary:
        source = Folder().open(from_=tmp_path / "photos", seed=0)
        return prepare(source, "mine", quiet=True, **options)

    return make


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- the file -----------------------------------------------------------------------------------


@needs_ffcv
@pytest.mark.parametrize("shard_bytes", [0, 4000])
def test_a_beton_holds_the_stores_pixels_in_order(mine: MakeStore, shard_bytes: int) -> None:
    from ffcv.reader import Reader

    told = mine(beton=True, shard_bytes=shard_bytes)
    path = told.folder / "train.beton"
    assert told.beton_bytes == path.stat().st_size
    assert "train.beton: 4 MB, for --loader ffcv" in told.lines()
    assert (told.folder / "train-00002.safetensors").exists() == bool(shard_bytes)
    opened = store.open_store(told.folder, "train")
    images = [opened.image(row).numpy() for row in range(22)]
    samples, content = Reader(str(path)).metadata["f0"], path.read_bytes()
    for sample, image in zip(samples, images, strict=True):
        start = int(sample["data_ptr"])
        assert (sample["mode"], sample["height"], sample["width"]) == (1, *image.shape[:2])
        assert content[start : start + image.size] == image.tobytes()


@needs_ffcv
def test_a_beton_is_made_where_it_is_missing_and_goes_with_its_store(
    mine: MakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = mine()
    before = names(plain.folder)
    assert plain.beton_bytes == 0 and "train.beton" not in before
    monkeypatch.setattr(module, "decode_all", not_to_be_called)
    made = mine(beton=True)
    assert not made.fresh and made.beton_bytes > 0
    assert names(made.folder) == sorted([*before, "train.beton"])
    when = (made.folder / "train.beton").stat().st_mtime_ns
    monkeypatch.setattr(beton, "_write", not_to_be_called)
    assert mine(beton=True) == made == mine()
    assert (made.folder / "train.beton").stat().st_mtime_ns == when
    monkeypatch.undo()
    monkeypatch.setenv("FASTIDMM_HOME", str(made.folder.parents[1]))
    again = mine(max_side=16)
    assert again.beton_bytes == 0 and "train.beton" not in names(again.folder)


def not_to_be_called(*_: object, **__: object) -> NoReturn:
    raise AssertionError("called")


def test_without_ffcv_nothing_is_decoded(
    mine: MakeStore, monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    monkeypatch.setattr(beton, "find_spec", lambda _: None)
    monkeypatch.setattr(module, "decode_all", not_to_be_called)
    words = r"not installed: `apt-get install .*pkg-config`, then `pip install 'fastidmm\[ffcv\]'`"
    with pytest.raises(UsageError, match=words):
        mine(beton=True)
    assert names(home / "stores") == []


def test_an_ffcv_that_does_not_import(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beton, "find_spec", lambda _: object())
    monkeypatch.setitem(sys.modules, "ffcv.loader", None)
    with pytest.raises(UsageError, match=r"cannot be imported \(.*ffcv.*\): `apt-get install"):
        beton.load()


def no_space(*_: object) -> NoReturn:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def no_permission(*_: object) -> NoReturn:
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


@needs_ffcv
@pytest.mark.parametrize(
    ("act", "error", "words"),
    [
        (no_space, DataError, "no space left for .*mine: free some"),
        (no_permission, UsageError, "mine cannot be written .Permission denied.: set FASTIDMM"),
    ],
)
def test_a_disk_that_refuses_leaves_the_store(
    mine: MakeStore,
    monkeypatch: pytest.MonkeyPatch,
    act: Callable[..., NoReturn],
    error: type[Exception],
    words: str,
) -> None:
    told = mine()
    before = names(told.folder)
    with monkeypatch.context() as patch, pytest.raises(error, match=words):
        patch.setattr("ffcv.writer.handle_sample", act)
        mine(beton=True)
    assert names(told.folder) == before and not mine().fresh
    assert mine(beton=True).beton_bytes > 0


@needs_ffcv
def test_a_write_cut_short_is_noticed(mine: MakeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk takes a part of a page and says so to nobody."""
    from ffcv.memory_allocator import MemoryAllocator

    real = MemoryAllocator.flush_page

    def short(pages: Any) -> None:
        real(pages)
        os.truncate(pages.fname, os.path.getsize(pages.fname) - 1)

    monkeypatch.setattr(MemoryAllocator, "flush_page", short)
    with pytest.raises(DataError, match="no space left"):
        mine(beton=True)


@needs_ffcv
def test_stopped_while_the_beton_is_written(
    mine: MakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ffcv.writer

    told, real, num = mine(), ffcv.writer.handle_sample, 0

    def stopping(*arguments: Any) -> None:
        nonlocal num
        num += 1
        if num == 3:
            signal.raise_signal(signal.SIGTERM)
        real(*arguments)

    monkeypatch.setattr("ffcv.writer.handle_sample", stopping)
    with pytest.raises(Interrupted, match="stopped after 3 of 22 images of train"):
        mine(beton=True)
    assert not [name for name in names(told.folder) if "beton" in name]


@pytest.mark.parametrize(
    ("high", "wide", "page"),
    [(1, 1, 2**21), (295, 296, 2**21), (296, 296, 2**22), (1, 65535, 2**21)],
)
def test_pages_hold_eight_of_the_largest(high: int, wide: int, page: int) -> None:
    assert beton._page_size(of_sizes((7, 5), (high, wide))) == page


@pytest.mark.parametrize(("high", "wide"), [(1, 65536), (9460, 9460)])
def test_pictures_that_ffcv_does_not_hold(high: int, wide: int) -> None:
    with pytest.raises(DataError, match=r"largest picture .* --max-side 8192 or less"):
        beton._page_size(of_sizes((high, wide), (7, 5)))


def of_sizes(*sizes: tuple[int, int]) -> Store:
    """A store that says so of itself; no pixel is there."""
    heights, widths = (torch.tensor(each, dtype=torch.int32) for each in zip(*sizes, strict=True))
    none = torch.zeros(len(sizes), dtype=torch.int64)
    return Store(torch.zeros(0, dtype=torch.uint8), none, heights, widths, none, (), "")


@needs_ffcv
def test_the_command(
    mine: MakeStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["prepare", "--dataset", "folder", "--from", "photos", "--name", "mine", "--format"]
    monkeypatch.setattr(sys, "argv", ["fastidmm", *words, "beton", "--json"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    shown = capsys.readouterr()
    assert not ended.value.code and '"beton_bytes": 4' in shown.out and shown.err == ""
