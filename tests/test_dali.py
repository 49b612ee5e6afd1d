"""The loader dali: the store's pixels from files, what it refuses, and its threads' end."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from synthetic import assembled, photograph

from fastidmm.batch import Batch
from fastidmm.chance import Counters
from fastidmm.datasets.folder import Folder
from fastidmm.errors import DataError, UsageError
from fastidmm.loaders import dali
from fastidmm.loaders.dali import Dali, DaliOptions, Decoder, Places
from fastidmm.loaders.resident import Resident
from fastidmm.preparing.prepare import prepare
from fastidmm.store import Store, folder_of, open_store

if problem := Dali.unusable():
    pytest.skip(problem, allow_module_level=True)

BATCH = 5
CPU = torch.device("cpu")
Prepare = Callable[..., Store]


@pytest.fixture
def prepared(home: Path, tmp_path: Path) -> Prepare:
    """Prepare what lies in photos/, and open it."""

    def prepared(max_side: int = 0, split: str = "train") -> Store:
        source = Folder().open(from_=tmp_path / "photos", seed=0)
        prepare(source, "photos", max_side=max_side, workers=0, quiet=True)
        return open_store(folder_of("photos"), split)

    return prepared


def picture(number: int) -> Image.Image:
    """A photograph of an awkward size."""
    return Image.fromarray(photograph(20 + 13 * number % 37, 24 + 17 * number % 41, number))


@pytest.fixture
def jpegs(tmp_path: Path) -> list[Path]:
    """Twelve of them, in the order that a store has them in."""
    folder = tmp_path / "photos"
    folder.mkdir()
    paths = [folder / f"{number:02d}.jpg" for number in range(12)]
    for number, path in enumerate(paths):
        picture(number).save(path, quality=90)
    return paths


def loader(store: Store, **options: int) -> Dali:
    """Of IDMM's views of a store."""
    method, _ = assembled("idmm")
    return Dali(store, method, Counters(3), batch_size=BATCH, options=DaliOptions(**options))


def taken(source: Dali | Resident, num: int, start: int = 0) -> list[Batch]:
    """Some batches, and the loader at rest again."""
    with closing(source.batches(start)) as batches:
        return list(islice(batches, num))


def decoded(store: Store) -> list[torch.Tensor]:
    """Every picture as the loader's decoder gives it, (height, width, 3) uint8."""
    source = loader(store)
    memory = torch.empty(int(store.height.long().dot(store.width.long())) * 3, dtype=torch.uint8)
    with closing(source._decoder(iter([torch.arange(len(store))]), len(store))) as decoder:
        pixels, _ = decoder.next()
        decoder.copy(pixels, memory)
    sizes = torch.stack((store.height, store.width), dim=1).tolist()
    parts = memory.split([3 * high * wide for high, wide in sizes])
    return [part.view(*size, 3) for part, size in zip(parts, sizes, strict=True)]


def save_kinds(folder: Path) -> int:
    """One file of every kind that is let pass; how many."""
    folder.mkdir(parents=True)
    image = picture(1)
    for turn in range(1, 9):
        exif = Image.Exif()
        exif[274] = turn
        image.save(folder / f"turn{turn}.jpg", exif=exif)
        image.save(folder / f"turn{turn}.png", exif=exif)
    for mode in ("L", "CMYK"):
        image.convert(mode).save(folder / f"{mode}.jpg")
        image.convert(mode).save(folder / f"{mode}.tif")
    for mode in ("L", "1", "P"):
        image.convert(mode).save(folder / f"{mode}.png")
        image.convert(mode).save(folder / f"{mode}.bmp")
    gray = np.asarray(image.convert("L")).astype(np.uint16)
    Image.fromarray((gray * 257 - 3 * (gray > 9)).astype(np.uint16)).save(folder / "16bit.png")
    image.save(folder / "progressive.jpg", progressive=True)
    for sampling in range(3):
        image.save(folder / f"sampling{sampling}.jpeg", subsampling=sampling)
    image.save(folder / "several.mpo", save_all=True, append_images=[picture(2)])
    image.save(folder / "several.tif", save_all=True, append_images=[picture(2)])
    image.save(folder / "moving.png", save_all=True, append_images=[image.rotate(180)])
    image.save(folder / "lzw.tif", compression="tiff_lzw")
    image.save(folder / "rgb.ppm")
    image.convert("L").save(folder / "gray.pgm")
    image.crop((0, 0, 1, 1)).save(folder / "dot.jpg")
    return len(list(folder.iterdir()))


def test_every_kind_that_passes_is_decoded_as_prepare_does(
    prepared: Prepare, tmp_path: Path
) -> None:
    num = save_kinds(tmp_path / "photos")
    store = prepared()
    assert len(store) == num
    for row, pixels in enumerate(decoded(store)):
        assert torch.equal(pixels, store.image(row)), row


@pytest.mark.parametrize(
    ("name", "mode", "words"),
    [
        ("x.gif", "RGB", r"DALI does not read .*x\.gif"),
        ("x.webp", "RGB", r"DALI does not read .*x\.webp"),
        ("x.png", "RGBA", r"x\.png is transparent"),
        ("x.png", "LA", r"x\.png is transparent"),
        ("x.tif", "LAB", r"x\.tif is in LAB"),
    ],
)
def test_what_dali_reads_otherwise_is_refused_by_name(
    prepared: Prepare, tmp_path: Path, name: str, mode: str, words: str
) -> None:
    for split in ("train", "test"):
        for number in range(3):
            path = tmp_path / "photos" / split / "kind" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture(number).save(path)
    picture(3).convert(mode).save(tmp_path / "photos" / "test" / "kind" / name)
    loader(prepared())  # of what is in the test split nothing is read
    with pytest.raises(DataError, match=rf"^--loader dali: .*{words}.*: choose --loader resident"):
        loader(prepared(split="test"))


def test_without_dali_the_error_says_what_to_install(
    prepared: Prepare, jpegs: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = prepared()
    monkeypatch.setattr(dali, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"^--loader dali: .*: pip install 'fastidmm\[dali\]'\.$"):
        loader(store)


def test_a_gpu_that_dali_cannot_use_is_named() -> None:
    with pytest.raises(UsageError, match=r"DALI cannot use cuda:99 \(.*\): with a driver .*cuda12"):
        Decoder(iter([]), torch.device("cuda", 99), batch_size=1, threads=1)


def test_views_are_those_of_the_store(prepared: Prepare, jpegs: list[Path]) -> None:
    store = prepared()
    plain = Resident(store, loader(store).method, Counters(3), batch_size=BATCH)
    for mine, theirs in zip(taken(loader(store), 7), taken(plain, 7), strict=True):
        for ours, group in zip(mine.groups, theirs.groups, strict=True):
            assert torch.equal(ours.rows, group.rows)
            torch.testing.assert_close(ours.pixels, group.pixels)


def test_pictures_made_smaller_are_made_so_again(prepared: Prepare, jpegs: list[Path]) -> None:
    """Those alone; some have more than 45 px a side, one that lies on its side among them."""
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(photograph(90, 160, 12)).save(jpegs[7], exif=exif)
    store = prepared(max_side=45)
    smaller = []
    for row, (pixels, path) in enumerate(zip(decoded(store), jpegs, strict=True)):
        apart = (pixels.int() - store.image(row).int()).abs()
        with Image.open(path) as image:
            smaller.append(max(image.size) > 45)
        assert (float(apart.float().mean()) < 0.5) if smaller[-1] else not apart.any()
    assert store.height[7] == 45 and 2 < sum(smaller) < 10
    taken(loader(store), 4)


@pytest.mark.parametrize(
    ("now", "then", "side", "same"),
    [
        ((37, 53), (37, 53), 0, True),
        ((37, 53), (53, 37), 0, False),
        ((37, 53), (37, 53), 100, True),
        ((100, 53), (100, 53), 100, True),
        ((99, 53), (100, 53), 100, False),
        ((1000, 530), (100, 53), 100, True),
        ((3001, 4001), (768, 1024), 1024, True),
        ((1000, 560), (100, 53), 100, False),
        ((530, 1000), (100, 53), 100, False),
        ((1000, 530), (99, 53), 100, False),  # nothing would make it smaller
    ],
)
def test_a_size_that_cannot_be_of_the_same_picture(
    now: tuple[int, int], then: tuple[int, int], side: int, same: bool
) -> None:
    assert dali._as_prepared(now, list(then), side) == same


def spoil(path: Path, how: str) -> None:
    """Change a file under the loader."""
    whole = path.read_bytes()
    if how == "gone":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    elif how == "a GIF":
        picture(0).save(path, format="GIF")
    else:
        picture(5).crop((0, 0, 200, 19)).resize((300, 200)).save(path)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("gone", r"can no longer be read \(no such file.*\): prepare the dataset again\.$"),
        ("truncated", r"can no longer be read \(.*runcated.*\): prepare the dataset again\.$"),
        ("a GIF", r"choose --loader resident"),
        ("larger", r"has changed since it was prepared: prepare the dataset again\.$"),
    ],
)
def test_a_file_spoilt_meanwhile_is_named(
    prepared: Prepare, jpegs: list[Path], capfd: pytest.CaptureFixture[str], how: str, words: str
) -> None:
    source = loader(prepared())
    second = source.rows(1).tolist()
    path = jpegs[second[3]]
    spoil(path, how)
    with closing(source.batches(0)) as batches:
        assert next(batches).num_images == BATCH
        with pytest.raises(DataError, match=rf"{path.name}.*{words}"):
            next(batches)
    capfd.readouterr()


def threads() -> int:
    """Of this process, DALI's own among them."""
    return len(os.listdir("/proc/self/task"))


def threads_end(num: int) -> bool:
    """Whether no more than `num` are left; the system forgets one a moment after it was joined."""
    for _ in range(100):
        if threads() <= num:
            return True
        time.sleep(0.1)
    return False


def test_threads_are_as_many_as_asked_and_end_with_the_batches(
    prepared: Prepare, jpegs: list[Path]
) -> None:
    store = prepared()
    taken(loader(store), 1)
    before, most = threads(), {}
    for asked in (1, 9):
        source = loader(store, threads=asked)
        for start in range(3):
            with closing(source.batches(start)) as batches:
                next(batches)
                most[asked] = threads()
            assert threads_end(before)
    assert most[9] >= most[1] + 8 > before + 8
    next(source.batches(0))  # dropped
    assert threads_end(before)
    spoil(jpegs[0], "gone")
    with pytest.raises(DataError, match=r"00\.jpg"):
        taken(source, 3)
    assert threads_end(before)


@pytest.mark.parametrize("share", [0.3, 0.8, 2.0])
def test_pictures_that_are_kept_are_the_same(
    prepared: Prepare, jpegs: list[Path], monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    store = prepared()
    given = int(share * store.pixels.numel())
    monkeypatch.setattr(dali, "Places", lambda each, _, batch: Places(each, given, batch))
    kept, plain = taken(loader(store, cache=1), 10, 1), taken(loader(store), 10, 1)
    for mine, theirs in zip(kept, plain, strict=True):
        for ours, group in zip(mine.groups, theirs.groups, strict=True):
            assert torch.equal(ours.pixels, group.pixels) and torch.equal(ours.rows, group.rows)


def test_once_all_are_kept_no_file_is_read(prepared: Prepare, jpegs: list[Path]) -> None:
    with closing(loader(prepared(), cache=1).batches(0)) as batches:
        first = list(islice(batches, 6))
        for path in jpegs:
            path.unlink()
        more = list(islice(batches, 6))
    assert [batch.step for batch in [*first, *more]] == list(range(12))


@pytest.mark.parametrize("room", [0, 1, 200, 1000, 2000, 10**6])
def test_places_never_give_away_what_is_still_wanted(room: int) -> None:
    """Against a memory that is written to as the shares say, and read by row."""
    chance = np.random.default_rng(room)
    sizes = 3 * torch.from_numpy(chance.integers(1, 30, 23))
    places = Places(sizes, room, 4)
    assert places.num_bytes <= room + sum(sorted(sizes.tolist())[-4:])
    memory = np.full(places.num_bytes, -1)
    read = 0
    for _ in range(10):
        order = torch.from_numpy(chance.permutation(23))
        for rows in order.split(4):
            share = places.share(rows)
            at = share.start
            for row in share.fresh.tolist():
                memory[at : at + sizes[row]] = row
                at += int(sizes[row])
            assert at <= places.num_bytes
            read += len(share.fresh)
            for row, offset in zip(rows.tolist(), share.offset.tolist(), strict=True):
                assert offset % 3 == 0 and (memory[offset : offset + sizes[row]] == row).all()
    total = int(sizes.sum())
    assert places.complete == (room >= total)
    assert read == 23 if room >= total else read == 230 if room < 100 else 23 < read < 230


def test_options_are_checked() -> None:
    for wrong in ({"threads": -1}, {"cache": -1}, {"shuffle": True}):
        with pytest.raises(ValidationError):
            DaliOptions(**wrong)


def test_it_begins_where_the_store_was_cut(prepared: Prepare, jpegs: list[Path]) -> None:
    """Rows of a part of a split are files of that part."""
    store = prepared()
    part = store.select(torch.tensor([9, 2, 5, 11, 0, 7]))
    for row, pixels in enumerate(decoded(part)):
        assert torch.equal(pixels, part.image(row))
    with pytest.raises(DataError, match="not prepared from files: choose --loader resident"):
        loader(replace(store, folder=None))


def test_a_restart_at_a_short_step_begins_with_a_whole_batch(
    prepared: Prepare, jpegs: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU's engines take of every batch is fixed by the first; what is delivered stays."""
    source = loader(prepared())  # twelve rows by five: the third step is of two
    asked: list[list[int]] = []
    begun = Dali._decoder

    def noted(self: Dali, wanted: Iterator[torch.Tensor], batch_size: int) -> Decoder:
        def rows() -> Iterator[torch.Tensor]:
            for each in wanted:
                asked.append(each.tolist())
                yield each

        return begun(self, rows(), batch_size)

    whole = taken(source, 6)
    monkeypatch.setattr(Dali, "_decoder", noted)
    for start in (2, 3, 5):
        asked.clear()
        for ours, theirs in zip(taken(source, 6 - start, start), whole[start:], strict=True):
            for one, other in zip(ours.tensors(), theirs.tensors(), strict=True):
                assert torch.equal(one, other)
        first = start - (start != 3)
        assert [len(rows) for rows in asked[:2]] == ([5, 5] if start == 3 else [5, 2])
        assert asked[0] == source.rows(first).tolist()
