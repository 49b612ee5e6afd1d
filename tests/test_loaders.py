"""Every registered loader delivers what the plan says, wherever it starts."""

from dataclasses import fields
from itertools import islice

import pytest
import torch
from synthetic import assembled, small_store

from fastidmm.augment import render
from fastidmm.batch import Batch, Views
from fastidmm.chance import Counters
from fastidmm.loaders.resident import Resident
from fastidmm.plan import draw
from fastidmm.registry import LOADERS, find

NUM, BATCH = 17, 7  # three steps an epoch, the last of three images; parts of up to two


def loader(name: str, *, attempt: int = 0, dtype: torch.dtype = torch.float32) -> Resident:
    """A loader of that name for IDMM's views; `Resident` stands for the seam."""
    method, _ = assembled("idmm")
    kind: type[Resident] = find("loader", name)
    return kind(small_store(NUM), method, Counters(5, attempt), batch_size=BATCH, dtype=dtype)


def equal(one: Batch, other: Batch) -> bool:
    """Whether two batches are the same to the bit."""
    pairs = zip(one.groups, other.groups, strict=True)
    names = [f.name for f in fields(Views) if f.name != "total"]
    return one.step == other.step and all(
        torch.equal(getattr(a, name), getattr(b, name)) for a, b in pairs for name in names
    )


every_loader = pytest.mark.parametrize("name", list(LOADERS))


@every_loader
def test_a_restart_gives_the_same_batches(name: str) -> None:
    made = list(islice(loader(name).batches(0), 5))
    assert loader(name).steps_per_epoch == 3
    assert [batch.step for batch in made] == list(range(5))
    assert [batch.num_images for batch in made] == [7, 7, 3, 7, 7]
    for start in (1, 2, 4):
        assert equal(next(loader(name).batches(start)), made[start])
    assert not equal(next(loader(name, attempt=1).batches(0)), made[0])


@every_loader
@pytest.mark.parametrize("step", [0, 2])
def test_batches_follow_the_plan(name: str, step: int) -> None:
    source = loader(name)
    store, method = source.store, source.method
    plan = draw(
        (store.height, store.width),
        method.views,
        Counters(5),
        step=step,
        batch_size=BATCH,
        cutmix_groups=method.cutmix_groups,
    )
    batch = next(source.batches(step))
    assert batch.num_crops == 6 * plan.rows.numel()
    first = 0
    for views, group, drawn in zip(batch.groups, method.views, plan.groups, strict=True):
        rows = plan.rows.repeat(group.count)  # crop-major: view 1 of all images, then view 2
        assert torch.equal(views.rows, rows)
        assert torch.equal(views.partners, rows[drawn.partner])
        assert torch.equal(views.labels, rows % 3)
        assert torch.equal(views.partner_labels, rows[drawn.partner] % 3)
        assert torch.equal(views.weights, drawn.weight)
        assert views.place.tolist() == list(range(first, first + len(rows)))
        assert views.total == len(rows)
        assert views.pixels.is_contiguous(memory_format=torch.channels_last)
        apart = (views.pixels - render(store, drawn, group)) * torch.tensor(group.std).view(3, 1, 1)
        # A resize rounds to 8 bits on a CPU: a misplaced box would show more.
        assert float(apart.abs().mean()) < 0.5 / 255
        first += len(rows)


@every_loader
def test_pixels_have_the_type_asked_for(name: str) -> None:
    full, half = loader(name).batch(0), loader(name, dtype=torch.bfloat16).batch(0)
    for one, other in zip(full.groups, half.groups, strict=True):
        assert other.pixels.dtype == torch.bfloat16
        assert torch.equal(one.pixels.bfloat16(), other.pixels)
