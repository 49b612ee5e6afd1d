"""FFCV's file of a store, and the loader that reads it."""

import errno
import gc
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from power import Disk
from synthetic import assembled, photograph

from fastidmm import cli, store
from fastidmm.batch import ViewGroup
from fastidmm.chance import Counters
from fastidmm.datasets.folder import Folder
from fastidmm.errors import DataError, Interrupted, UsageError
from fastidmm.loaders.ffcv import FFCV, FFCVOptions
from fastidmm.plan import draw
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


@needs_ffcv
def test_a_beton_is_on_disk_before_it_has_its_name(
    mine: MakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = mine().folder
    disk = Disk(folder, monkeypatch)
    mine(beton=True)
    assert disk.renamed == [folder / "train.beton"] and disk.amiss() == []


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


# --- the loader ---------------------------------------------------------------------------------

NUM, BATCH = 23, 4  # six steps an epoch, the last of three images
PLAIN = ViewGroup(count=2, size=8, scale=(0.3, 1), flip=0, mean=(0, 0, 0), std=(1, 1, 1))


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """Pictures that say where they are looked at: red is 2 y, green 2 x, blue 10 times the row."""
    home = tmp_path_factory.mktemp("places")
    (home / "photos").mkdir()
    for row in range(NUM):
        y, x = np.mgrid[0 : 40 + 7 * row % 31, 0 : 50 + 11 * row % 29]
        pixels = np.stack((2 * y, 2 * x, np.full_like(y, 10 * row)), axis=2).astype(np.uint8)
        Image.fromarray(pixels).save(home / "photos" / f"{row:02d}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTIDMM_HOME", str(home / "home"))
        source = Folder().open(from_=home / "photos", seed=0)
        told = prepare(source, "places", quiet=True, beton=True)
        yield store.open_store(told.folder, "train")


def loader(places: Store, *groups: ViewGroup, threads: int = 1) -> FFCV:
    method, _ = assembled("idmm")
    method.views = list(groups or (PLAIN,))
    options = FFCVOptions(threads=threads)
    return FFCV(places, method, Counters(7), batch_size=BATCH, options=options)


@needs_ffcv
@pytest.mark.parametrize("threads", [1, 2])
def test_every_box_of_many_small_batches_is_the_plans(places: Store, threads: int) -> None:
    """Averages over a slope are the slope at the middle: where each pixel lies, by no resize."""
    made = loader(places, threads=threads)
    middle = torch.arange(PLAIN.size) + 0.5
    with closing(made.batches(3)) as batches:
        for step, batch in enumerate(islice(batches, 50), 3):
            plan = draw(
                (places.height, places.width), [PLAIN], Counters(7), step=step, batch_size=4
            )
            crops, (views,) = plan.groups[0].crops, batch.groups
            assert batch.step == step and torch.equal(views.rows, crops.rows)
            lies = crops.origin[:, :, None] + middle * crops.scale[:, :, None] - 0.5
            red, green, blue = (255 * views.pixels).unbind(dim=1)
            assert float((red - 2 * lies[:, 0, :, None]).abs().max()) < 0.51
            assert float((green - 2 * lies[:, 1, None, :]).abs().max()) < 0.51
            assert torch.get_num_threads() == 1  # FFCV would set its own number for torch, too
            assert torch.equal(blue.round().long(), 10 * crops.rows[:, None, None].expand(-1, 8, 8))


@needs_ffcv
def test_crops_that_are_not_resized_are_the_pixels(home: Path, tmp_path: Path) -> None:
    from fastidmm.loaders import ffcv_crops

    for row in range(9):
        path = tmp_path / "photos" / f"{row}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(photograph(31 + 7 * row, 70 - 4 * row, row)).save(path)
    told = prepare(Folder().open(from_=path.parent, seed=0), "mine", quiet=True, beton=True)
    opened, groups = store.open_store(told.folder, "train"), [(1, 31), (3, 5)]
    chance, asked = np.random.default_rng(0), []

    def tables() -> Iterator[NDArray[np.int64]]:
        while True:
            rows = chance.integers(0, 9, chance.integers(1, 6))
            table = [
                (row, *(edge for side in (31, 5, 5, 5) for edge in box(opened.image(row), side)))
                for row in rows
            ]
            asked.append(np.array(table))
            yield asked[-1]

    def box(image: torch.Tensor, side: int) -> tuple[int, int, int, int]:
        top, left = (int(chance.integers(0, extent - side + 1)) for extent in image.shape[:2])
        return top, left, top + side, left + side

    source = ffcv_crops.source(told.folder / "train.beton", groups, batch_size=5, threads=2)
    cut = ffcv_crops.Cut(source, tables())
    for step, (large, small) in enumerate(islice(cut, 40)):
        for image, (row, *boxes) in enumerate(asked[step]):
            crops = [*large[image], *small[image]]
            for crop, corner in zip(crops, np.reshape(boxes, (4, 4)), strict=True):
                top, left, bottom, right = corner
                assert np.array_equal(crop, opened.image(row)[top:bottom, left:right])
    cut.end()
    assert not cut.is_alive() and len(asked) > 40


@needs_ffcv
def test_dropped_batches_end_their_thread(places: Store) -> None:
    made, before = loader(places), threading.active_count()
    for begun in (1, 2, 9):
        batches = made.batches(0)
        for _ in range(begun):
            next(batches)
        assert threading.active_count() > before
        del batches
        gc.collect()
        assert threading.active_count() == before


@needs_ffcv
def test_what_goes_wrong_in_ffcvs_thread_is_told(
    places: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, before = loader(places), threading.active_count()
    real = made.plan

    def failing(step: int, *sizes: Any) -> Any:
        if step == 4:
            raise ValueError("no plan of step 4")
        return real(step, *sizes)

    monkeypatch.setattr(made, "plan", failing)
    with closing(made.batches(1)) as batches:
        assert [next(batches).step for _ in range(3)] == [1, 2, 3]
        with pytest.raises(ValueError, match="no plan of step 4"):
            next(batches)
    assert threading.active_count() == before


def test_importing_ffcv_leaves_torch_its_threads(tmp_path: Path) -> None:
    (tmp_path / "ffcv").mkdir()
    (tmp_path / "ffcv" / "loader.py").write_text("import torch; torch.set_num_threads(1)")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import torch\n"
        "from fastidmm.preparing import beton\n"
        "torch.set_num_threads(3); beton.load(); print(torch.get_num_threads())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "3\n"


@needs_ffcv
def test_what_the_loader_refuses(places: Store, mine: MakeStore, tmp_path: Path) -> None:
    bare = store.open_store(mine().folder, "train")
    words = r"--loader ffcv: .*mine holds no train.beton: repeat the `fastidmm prepare` .* --format"
    with pytest.raises(DataError, match=words):
        loader(bare)
    with pytest.raises(DataError, match="not prepared into a folder: choose --loader resident"):
        loader(of_sizes((7, 5)))
    assert places.folder and bare.folder
    (bare.folder / "train.beton").symlink_to(places.folder / "train.beton")
    with pytest.raises(DataError, match=r"train.beton is not of this store: delete it, and repeat"):
        loader(bare)
    with pytest.raises(UsageError, match=r"loader.threads = 9999: .* at most \d+ here"):
        loader(places, threads=9999)
