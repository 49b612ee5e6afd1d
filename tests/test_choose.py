"""`--loader auto` takes the best memory a store fits in, else what can stream it, and says why."""

import re
from dataclasses import replace
from typing import get_args

import pytest
import torch
from synthetic import small_store

from fastidmm.errors import DataError, UsageError
from fastidmm.loaders import choose, memory
from fastidmm.loaders.planned import Planned
from fastidmm.options import LoaderOption
from fastidmm.recipe import Recipe, Tables
from fastidmm.registry import LOADERS
from fastidmm.store import Store

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def big(num_bytes: int) -> Store:
    """A store that says it holds so many bytes."""
    pixels = torch.empty(num_bytes, dtype=torch.uint8, device="meta")
    high, wide = torch.tensor([num_bytes // 3], dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    return replace(small_store(1), pixels=pixels, height=high, width=wide)


def machine(monkeypatch: pytest.MonkeyPatch, *, gpu: float, host: float) -> None:
    """A GPU and a host with so many free bytes."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(gpu), int(2 * gpu)))
    monkeypatch.setattr(memory, "available_memory", lambda: int(host))


def streaming(monkeypatch: pytest.MonkeyPatch, **problems: str | None) -> None:
    """Loaders that have these problems, or none."""

    def kind(name: str, problem: str | None) -> type[Planned]:
        return type(name.title(), (Planned,), {"unusable": staticmethod(lambda: problem)})

    kinds = {name: kind(name, problem) for name, problem in problems.items()}
    monkeypatch.setattr(choose, "STREAMING", tuple(problems))
    monkeypatch.setattr(choose, "find", lambda _, name: kinds[name])


@pytest.mark.parametrize(
    ("num_bytes", "gpu", "host", "tier"),
    [
        (999, 1998, 0, "device"),
        (1002, 1998, 2048, "host"),
        (1023, 1998, 2048, "host"),  # torch pins a power of two
        (1026, 1998, 4095, None),
        (1026, 1998, 4096, "host"),
    ],
)
def test_memory_is_half_of_what_is_free(
    monkeypatch: pytest.MonkeyPatch, num_bytes: int, gpu: float, host: float, tier: str | None
) -> None:
    machine(monkeypatch, gpu=gpu, host=host)
    assert memory.tier_of(big(num_bytes), GPU) == tier
    assert memory.tier_of(big(num_bytes), CPU) == "device"


@pytest.mark.parametrize("tier", ["device", "host"])
def test_a_selection_takes_the_bytes_it_was_counted_as(
    monkeypatch: pytest.MonkeyPatch, tier: memory.Tier
) -> None:
    """Whatever its share: a tenth held out leaves nine, and no more is there."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, dtype, **_: empty(*size, dtype=dtype))
    monkeypatch.setattr(Store, "tables_to", lambda store, _: store)
    store = small_store(10)
    for rows in (range(1, 10), range(0, 10, 4)):
        few = store.select(torch.tensor(rows))
        placed = memory.place(few, GPU, tier)
        assert placed.pixels.numel() == few.num_bytes < store.pixels.numel()
        for row in range(len(few)):
            assert torch.equal(placed.image(row), few.image(row))


def test_without_kernels_the_hosts_memory_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, gpu=10, host=10_000)
    monkeypatch.setattr(memory, "HAS_KERNELS", False)
    assert memory.tier_of(big(999), GPU) is None


def test_the_choice_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    store = big(3_000_000_000)
    assert choose.choose(store, CPU) == (
        "resident",
        "3.0 GB of pixels are read from the store's memory map",
    )
    machine(monkeypatch, gpu=8e9, host=0)
    assert choose.choose(store, GPU) == ("resident", "3.0 GB of pixels fit the GPU's memory")
    machine(monkeypatch, gpu=4e9, host=9e9)
    assert choose.choose(store, GPU) == (
        "resident",
        "3.0 GB of pixels fit the host's memory, not the GPU's",
    )
    machine(monkeypatch, gpu=4e9, host=4e9)
    streaming(monkeypatch, dali="it is not installed", torch=None)
    assert choose.choose(store, GPU) == (
        "torch",
        "3.0 GB of pixels fit neither the GPU's nor the host's memory; not dali, since it is not "
        "installed",
    )
    streaming(monkeypatch, dali="x", torch="y")
    with pytest.raises(DataError, match=r"no loader can deliver .*; not dali, since x; not torch,"):
        choose.choose(store, GPU)
    words = r"3\.0 GB of pixels fit neither .*: choose --loader dali or ffcv or torch, or prepare"
    with pytest.raises(DataError, match=words):
        memory.place(store, GPU)


def test_every_loader_is_chosen_among_and_named_in_the_help() -> None:
    """How fast one decodes is known to whoever adds it: `auto` takes the first that can."""
    unplaced = LOADERS.keys() - {"resident", *choose.STREAMING}
    assert not unplaced, f"give {unplaced} a place in STREAMING of fastidmm/loaders/choose.py"
    assert set(choose.STREAMING) <= LOADERS.keys()
    told = get_args(LoaderOption)[1].help
    assert {"auto", *LOADERS} <= set(re.findall(r"\w+", told)), told


def test_a_recipe_is_settled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe.of({"run": {"dataset": "x", "backbone": "vit_micro"}})
    assert recipe.run.loader == "auto" and recipe.tables()["loader"] == {}
    found, why = choose.settled(recipe, small_store(2), CPU)
    assert found.run.loader == "resident" and why.startswith("loader resident: 0.0 GB")
    assert found.tables()["loader"] == {"tier": "auto"}
    assert choose.settled(found, big(3 * 10**9), GPU) == (found, "")
    tables: Tables = {"run": {"dataset": "x", "loader": "torch"}, "loader": {"workers": 3}}
    assert Recipe.of(tables).tables()["loader"] == {"workers": 3}
    with pytest.raises(UsageError, match=r"unknown key loader\.tier"):
        Recipe.of({"run": {"dataset": "x", "loader": "torch"}, "loader": {"tier": "host"}})
    with pytest.raises(UsageError, match="holds settings of one loader: name it, too"):
        Recipe.of({"run": {"dataset": "x"}, "loader": {"tier": "host"}})
