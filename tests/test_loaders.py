"""Every registered loader delivers what the plan says, wherever it starts."""

import gc
import multiprocessing
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import fields, replace
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from synthetic import assembled, photograph

from fastidmm.augment import render
from fastidmm.batch import Batch, Views
from fastidmm.chance import Counters
from fastidmm.datasets.folder import Folder
from fastidmm.errors import DataError, OutOfMemoryError, UsageError
from fastidmm.loaders import planned
from fastidmm.loaders.files import Files
from fastidmm.loaders.planned import Planned
from fastidmm.plan import draw
from fastidmm.preparing import beton
from fastidmm.preparing.prepare import prepare
from fastidmm.ranks import World
from fastidmm.registry import LOADERS, find
from fastidmm.store import Store, folder_of, open_store

NUM, BATCH = 17, 7  # three steps an epoch, the last of three images; parts of up to two
TENSORS = [field.name for field in fields(Views) if field.name != "total"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """17 of 20 prepared JPEGs in 3 classes: awkward sizes, not in the order of their files."""
    home = tmp_path_factory.mktemp("loaders")
    for number in range(20):
        path = home / "photos" / "train" / f"class{number % 3}" / f"{number:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        high, wide = 40 + 7 * number % 31, 50 + 11 * number % 29
        small = Image.fromarray(photograph(high // 3, wide // 3, number))
        small.resize((wide, high), Image.Resampling.BICUBIC).save(path, quality=92)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTIDMM_HOME", str(home / "home"))
        source = Folder().open(from_=home / "photos", seed=0)
        prepare(source, "photos", quiet=True, beton=beton.unusable() is None)
        yield open_store(folder_of("photos"), "train").select(
            torch.tensor([*range(19, 10, -1), *range(8)])
        )


@pytest.fixture(
    params=[
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
            ],
        ),
    ]
)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where batches are delivered."""
    return torch.device(request.param)


@pytest.fixture(params=list(LOADERS))
def kind(request: pytest.FixtureRequest) -> type[Planned]:
    """A registered loader."""
    found: type[Planned] = find("loader", request.param)
    if problem := found.unusable():
        pytest.skip(problem)
    return found


def made(
    kind: type[Planned],
    store: Store,
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
) -> Planned:
    """A loader of IDMM's views of a store."""
    method, _ = assembled("idmm")
    # A process for each core of a large machine would take longer to start than its batches.
    few = {"workers": 2} if "workers" in kind.Options.model_fields else {}
    options = kind.Options.model_validate(few)
    return kind(
        store, method, Counters(5), batch_size=BATCH, dtype=dtype, device=device, options=options
    )


Make = Callable[..., Planned]


@pytest.fixture
def make(kind: type[Planned], photographs: Store, device: torch.device) -> Make:
    """A function that makes such a loader of the photographs, on the device."""
    return partial(made, kind, photographs, device)


def first(loader: Planned, num: int, start: int = 0) -> list[Batch]:
    """Some batches, and the loader at rest again."""
    with closing(loader.batches(start)) as batches:
        return list(islice(batches, num))


def equal(one: Batch, other: Batch) -> bool:
    """Whether two batches are the same to the bit."""
    pairs = zip(one.groups, other.groups, strict=True)
    return bool(one.step == other.step) and all(
        torch.equal(getattr(a, name), getattr(b, name)) for a, b in pairs for name in TENSORS
    )


def test_a_restart_gives_the_same_batches(make: Make) -> None:
    loader = make()
    found = first(loader, 5)
    assert loader.steps_per_epoch == 3
    assert [batch.step for batch in found] == list(range(5))
    assert [batch.num_images for batch in found] == [7, 7, 3, 7, 7]
    for start in (1, 2, 4):
        assert equal(first(loader, 1, start)[0], found[start])
    assert equal(first(make(), 1, 3)[0], found[3])
    loader.counters.attempt = 1
    assert not equal(first(loader, 1)[0], found[0])


def test_ranks_share_the_one_batch(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks read the photographs of their own shares, and make the crops of one process."""
    whole = first(make(), 3)
    for rank in range(2):
        monkeypatch.setattr(planned, "world", partial(World, rank, 2))
        for ours, batch in zip(first(make(), 3), whole, strict=True):
            assert ours.shares == {7: (4, 3), 3: (2, 1)}[batch.num_images]
            begin = 0
            for mine, views in zip(ours.groups, batch.groups, strict=True):
                at = mine.place - begin
                begin += views.total
                assert len(at) == views.total // batch.num_images * ours.shares[rank]
                for name in ("pixels", "rows", "partners", "weights", "labels"):
                    assert torch.equal(getattr(mine, name), getattr(views, name)[at]), name


def test_every_row_comes_once_an_epoch(make: Make) -> None:
    found = first(make(), 6)
    for epoch in (found[:3], found[3:]):
        for group in range(2):
            rows = torch.cat([b.groups[group].rows[: b.num_images] for b in epoch])
            assert sorted(rows.tolist()) == list(range(NUM))
    assert not torch.equal(found[0].groups[0].rows, found[3].groups[0].rows)


@pytest.mark.parametrize("step", [2, 3])  # the short one; one that mixes images of two classes
def test_batches_follow_the_plan(make: Make, photographs: Store, step: int) -> None:
    loader, store = make(), photographs
    method = loader.method
    plan = draw(
        (store.height, store.width),
        method.views,
        Counters(5),
        step=step,
        batch_size=BATCH,
        cutmix_groups=method.cutmix_groups,
    )
    (batch,) = first(loader, 1, step)
    assert batch.num_crops == 6 * plan.rows.numel()
    begins = 0
    for there, group, drawn in zip(batch.groups, method.views, plan.groups, strict=True):
        views = replace(there, **{name: getattr(there, name).cpu() for name in TENSORS})
        rows = plan.rows.repeat(group.count)  # crop-major: view 1 of all images, then view 2
        assert torch.equal(views.rows, rows)
        assert torch.equal(views.partners, rows[drawn.partner])
        assert torch.equal(views.labels, store.label[rows])
        assert torch.equal(views.partner_labels, store.label[rows[drawn.partner]])
        assert step == 2 or not torch.equal(views.labels, views.partner_labels)
        assert torch.equal(views.weights, drawn.weight)
        assert views.place.tolist() == list(range(begins, begins + len(rows)))
        assert views.total == len(rows)
        assert views.pixels.is_contiguous(memory_format=torch.channels_last)
        apart = (views.pixels - render(store, drawn, group)) * torch.tensor(group.std)[
            :, None, None
        ]
        assert float(apart.abs().mean()) * 255 <= loader.deviation
        begins += len(rows)


def test_pixels_have_the_type_asked_for(make: Make) -> None:
    (full,) = first(make(), 1)
    (half,) = first(make(torch.bfloat16), 1)
    for one, other in zip(full.groups, half.groups, strict=True):
        assert other.pixels.dtype == torch.bfloat16
        if one.pixels.is_cuda:  # resized crops are kept in half precision there
            torch.testing.assert_close(other.pixels.float(), one.pixels, rtol=2**-7, atol=2**-6)
        else:
            assert torch.equal(one.pixels.bfloat16(), other.pixels)


def test_batches_are_not_written_to_again(make: Make) -> None:
    with closing(make().batches(0)) as batches:
        held = next(batches)
        before = [views.pixels.clone() for views in held.groups]
        for _ in range(5):
            next(batches)
    for views, pixels in zip(held.groups, before, strict=True):
        assert torch.equal(views.pixels, pixels)


def test_closing_ends_threads_and_processes(make: Make) -> None:
    loader = make()
    first(loader, 1)  # whatever stays for good is there now
    before = threading.active_count()
    for begun in (1, 2, 4):
        first(loader, begun)
    del loader
    gc.collect()
    for _ in range(100):  # the feeders of a DataLoader's queues are told to end, not waited for
        if threading.active_count() <= before:
            break
        time.sleep(0.1)
    assert threading.active_count() <= before
    assert not multiprocessing.active_children()


def test_nothing_optional_is_imported_unless_chosen() -> None:
    names = ("nvidia.dali", "ffcv", "numba", "cv2")
    code = (
        "import sys, fastidmm.run, fastidmm.loaders.resident, fastidmm.loaders.choose\n"
        "from fastidmm.registry import LOADERS, find\n"
        "for name in LOADERS: find('loader', name).unusable()\n"
        f"print([name for name in {names} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_torch_loader_reads_files_that_are_as_they_were(
    photographs: Store, tmp_path: Path
) -> None:
    kind: type[Planned] = find("loader", "torch")
    files = Files.of(photographs).paths
    kept = tmp_path / "kept.jpg"
    Path(files[3]).rename(kept)
    try:
        with pytest.raises(DataError, match=r"--loader torch: .*jpg is not there any more: choose"):
            made(kind, photographs)
        kept.rename(files[3])
        loader = made(kind, photographs)
        Path(files[3]).rename(kept)
        with pytest.raises(DataError, match=r"can no longer be read .*: prepare the dataset again"):
            first(loader, 3)
        Image.new("RGB", (9, 8)).save(files[3])
        with pytest.raises(DataError, match=r"has changed since it was prepared"):
            first(loader, 3)
    finally:
        kept.rename(files[3])
    with pytest.raises(DataError, match="not prepared from files: choose --loader resident"):
        made(kind, replace(photographs, folder=None))


def test_workers_need_shared_memory_and_may_be_killed(
    photographs: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker hands three batches over: 3 * 7 images * 6 views of 32 px = 387,072 bytes."""
    kind: type[Planned] = find("loader", "torch")
    options = kind.Options.model_validate({"workers": 2})
    full = SimpleNamespace(f_bavail=774_143, f_frsize=1)
    monkeypatch.setattr("os.statvfs", lambda path: full)
    method, _ = assembled("idmm")
    with pytest.raises(UsageError, match=r"hand over 1 MB .*where 1 MB are free: lower --batch-s"):
        kind(photographs, method, Counters(5), batch_size=BATCH, options=options)
    full.f_bavail += 1
    loader = kind(photographs, method, Counters(5), batch_size=BATCH, options=options)
    with closing(loader.batches(0)) as batches:
        next(batches)
        for worker in multiprocessing.active_children():
            worker.kill()
        with pytest.raises(OutOfMemoryError, match=r"was killed .*: lower loader\.workers"):
            for _ in range(20):
                next(batches)


@pytest.mark.parametrize(
    "death", [RuntimeError, ConnectionResetError, ConnectionRefusedError, EOFError]
)
def test_a_worker_dies_while_it_hands_a_batch_over(
    death: type[Exception], photographs: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What torch and multiprocessing raise depends on the moment, the sentence does not."""

    def dies(*_: object, **__: object) -> Generator[None]:
        yield from ()
        raise death

    monkeypatch.setattr("fastidmm.loaders.torch.DataLoader", dies)
    loader = made(find("loader", "torch"), photographs)
    with (
        closing(loader.batches(0)) as batches,
        pytest.raises(OutOfMemoryError, match=r"killed \(it is gone\): lower loader\.workers"),
    ):
        next(batches)


def test_a_selection_is_gathered_with_its_own_numbers(photographs: Store) -> None:
    few = photographs.select(torch.tensor([3, 11]))
    assert few.num_bytes == sum(few.image(row).numel() for row in range(2))
    alone = few.gathered(torch.arange(2))
    assert alone.pixels.numel() == alone.num_bytes == few.num_bytes
    for row in range(2):
        assert torch.equal(alone.image(row), few.image(row))
    assert alone.row is not None and few.row is not None and torch.equal(alone.row, few.row)
