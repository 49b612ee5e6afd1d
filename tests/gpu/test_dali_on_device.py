"""The loader dali on a GPU: nvJPEG beside libjpeg-turbo, steps that never wait, streams."""

from contextlib import closing
from itertools import islice
from pathlib import Path

import pytest
import torch
from PIL import Image
from synthetic import assembled, photograph

from fastidmm.batch import Batch
from fastidmm.chance import Counters
from fastidmm.datasets.folder import Folder
from fastidmm.loaders.dali import Dali, DaliOptions
from fastidmm.loaders.resident import Resident
from fastidmm.preparing.prepare import prepare
from fastidmm.store import Store, folder_of, open_store

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
if problem := Dali.unusable():
    pytest.skip(problem, allow_module_level=True)

BATCH = 13


@pytest.fixture
def photographs(home: Path, tmp_path: Path) -> Store:
    """41 JPEGs: plain, progressive, gray, every sampling, some lying on their side."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(41):
        high, wide = 150 + 31 * number % 200, 170 + 47 * number % 230
        small = Image.fromarray(photograph(high // 4, wide // 4, number))
        image = small.resize((wide, high), Image.Resampling.BICUBIC)
        gray, exif = number % 10 == 9, Image.Exif()
        exif[274] = 1 + number % 8
        (image.convert("L") if gray else image).save(
            folder / f"{number:02d}.jpg",
            quality=90,
            progressive=number % 7 == 6,
            exif=exif,
            subsampling=0 if gray else number % 3,
        )
    prepare(Folder().open(from_=folder, seed=0), "photos", quiet=True)
    return open_store(folder_of("photos"), "train")


def loader(store: Store, device: str = "cuda", **options: int) -> Dali:
    method, _ = assembled("idmm")
    return Dali(
        store, method, Counters(3), batch_size=BATCH,
        device=torch.device(device), options=DaliOptions(**options),
    )  # fmt: skip


def first(source: Dali | Resident, num: int, start: int = 0) -> list[Batch]:
    with closing(source.batches(start)) as batches:
        return list(islice(batches, num))


def equal(one: list[Batch], other: list[Batch]) -> bool:
    """Whether the views are the same to the bit."""
    return all(
        torch.equal(a.pixels, b.pixels) and torch.equal(a.rows, b.rows)
        for x, y in zip(one, other, strict=True)
        for a, b in zip(x.groups, y.groups, strict=True)
    )


def test_nvjpegs_pixels_are_near_those_of_the_store(photographs: Store) -> None:
    """Per picture: 1/255 on average, one value in a thousand more than 8 off."""
    source = loader(photographs)
    memory = torch.empty(photographs.pixels.numel(), dtype=torch.uint8, device="cuda")
    rows = torch.arange(len(photographs))
    with closing(source._decoder(iter([rows]), len(rows))) as decoder:
        pixels, _ = decoder.next()
        decoder.copy(pixels, memory)
    found = memory.cpu()
    at = 0
    for row in rows.tolist():
        image = photographs.image(row).flatten().int()
        apart = (found[at : at + len(image)].int() - image).abs()
        at += len(image)
        assert float(apart.float().mean()) <= 1, row
        assert float((apart > 8).float().mean()) <= 1e-3, row


def test_views_are_near_the_resident_ones(photographs: Store) -> None:
    source = loader(photographs)
    plain = Resident(
        photographs, source.method, Counters(3), batch_size=BATCH, device=torch.device("cuda")
    )
    for mine, theirs in zip(first(source, 5), first(plain, 5), strict=True):
        for ours, group, told in zip(mine.groups, theirs.groups, source.method.views, strict=True):
            assert torch.equal(ours.rows, group.rows) and torch.equal(ours.weights, group.weights)
            spread = torch.tensor(told.std, device="cuda")[:, None, None]
            apart = (ours.pixels - group.pixels) * spread * 255
            assert float(apart.abs().mean()) <= Dali.deviation


def test_a_restart_gives_the_same_bits(photographs: Store) -> None:
    source = loader(photographs)
    found = first(source, 6)
    assert equal(first(source, 3, 3), found[3:])


@pytest.mark.parametrize("cache", [1, 4, 1000])
def test_pictures_that_are_kept_are_the_same(photographs: Store, cache: int) -> None:
    """To the bit after a restart, when each is decoded in another batch; and near those anew."""
    source, plain = loader(photographs, cache=cache), loader(photographs)
    found = first(source, 12)
    assert equal(first(source, 7, 5), found[5:])
    for mine, theirs in zip(found, first(plain, 12), strict=True):
        for ours, group in zip(mine.groups, theirs.groups, strict=True):
            assert float((ours.pixels - group.pixels).abs().mean()) * 255 * 0.226 <= 0.5


@pytest.mark.parametrize("cache", [0, 4])
def test_a_step_never_waits_for_the_device(photographs: Store, cache: int) -> None:
    with closing(loader(photographs, cache=cache).batches(0)) as batches:
        held = list(islice(batches, 3))  # programs are compiled, pinned memory is there
        try:
            torch.cuda.set_sync_debug_mode("error")
            held += islice(batches, 6)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert equal(held, first(loader(photographs, cache=cache), 9))


@pytest.mark.parametrize("own_stream", [False, True])
def test_a_device_that_lags_behind_sees_the_same_pixels(
    photographs: Store, own_stream: bool
) -> None:
    """Nothing that a step reads is written to before it is read."""
    expected = first(loader(photographs), 8)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream() if own_stream else torch.cuda.current_stream()
    with torch.cuda.stream(stream), closing(loader(photographs).batches(0)) as batches:
        found = []
        for _ in range(8):
            torch.cuda._sleep(200_000_000)  # clock cycles, about a tenth of a second
            found.append(next(batches))
    torch.cuda.synchronize()
    assert equal(found, expected)


def test_its_threads_and_memory_end_with_its_batches(photographs: Store) -> None:
    source = loader(photographs)
    first(source, 2)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for start in range(5):
        first(source, 1, start)
    assert torch.cuda.memory_allocated() == before
