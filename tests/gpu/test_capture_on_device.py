"""Captured steps on a GPU: the plain ones' bits, no waiting, and a run that resumes within them."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from synthetic import small_store
from torch import Tensor

from fastidmm.assemble import Parts
from fastidmm.bench.training import assembled
from fastidmm.capture import Captured
from fastidmm.loaders.planned import Planned
from fastidmm.registry import METHODS
from fastidmm.step import Stepped, step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
NUM, BATCH = 45, 16  # steps of 16, 16 and 13 rows
STEPS = 24  # eight epochs: of each kind some are replayed
BACKBONE = "deit_tiny"
AHEAD_PX = 112  # of views that another stream makes: large enough to be late


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    """`--exact` is the whole process's."""
    yield
    torch.use_deterministic_algorithms(False)


def parts_of(method: str, place: Path, backbone: str = "", **run: object) -> Parts:
    run = {
        "dataset": "made", "method": method, "backbone": backbone or BACKBONE, "resolution": 32,
        "epochs": 8, "batch_size": BATCH, "loader": "resident", "device": "cuda",
        "exact": True, **run,
    }  # fmt: skip
    place.mkdir()
    return assembled({"run": run, "backbone": {"drop_path": 0.3}}, small_store(NUM), place)


def told(made: Stepped) -> dict[str, Tensor]:
    """What a metric line takes from a step, before the next one overwrites it."""
    return {name: value.clone() for name, value in (made.numbers() | {"s": made.skipped}).items()}


def state(parts: Parts) -> list[Tensor]:
    """Everything that training moves."""
    tables = parts.optimizer.state.values()
    moments = [t for table in tables for t in table.values() if isinstance(t, Tensor)]
    return [*parts.method.state_dict().values(), *moments]


@pytest.mark.parametrize("backbone", ["deit_tiny", "pvtv2_b0"])
@pytest.mark.parametrize("method", sorted(METHODS))
def test_replays_are_the_steps_themselves(method: str, backbone: str, tmp_path: Path) -> None:
    plain = parts_of(method, tmp_path / "plain", backbone)
    caught = parts_of(method, tmp_path / "caught", backbone)
    captured, loader = Captured(caught), plain.loader
    assert isinstance(loader, Planned)
    found = [told(captured.step(number)) for number in range(STEPS)]
    expected = [told(step(plain, loader.batch(number))) for number in range(STEPS)]
    assert captured.num_kinds, "nothing was captured"
    for number, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        for name in theirs:
            assert torch.equal(ours[name], theirs[name]), (number, name)
    assert all(torch.equal(a, b) for a, b in zip(state(caught), state(plain), strict=True))


@pytest.mark.parametrize("method", sorted(METHODS))
def test_ordinary_steps_are_captured_too(method: str, tmp_path: Path) -> None:
    """Without `--exact` attention is another implementation's, whose bits may vary."""
    captured = Captured(parts_of(method, tmp_path / "run", exact=False))
    found = [told(captured.step(number)) for number in range(STEPS)]
    assert captured.num_kinds, "nothing was captured"
    assert all(bool(value.isfinite().all()) for values in found for value in values.values())


@pytest.mark.parametrize("method", ["idmm", "supervised"])
def test_views_made_ahead_are_those_of_their_step(method: str, tmp_path: Path) -> None:
    """By another stream, while this one trains: whatever either overtakes shows in the bits."""
    plain = parts_of(method, tmp_path / "plain", resolution=AHEAD_PX)
    caught = parts_of(method, tmp_path / "caught", resolution=AHEAD_PX, views_ahead=True)
    captured, loader = Captured(caught), plain.loader
    assert isinstance(loader, Planned)
    for number in range(STEPS):
        ours = told(captured.step(number))
        theirs = told(step(plain, loader.batch(number)))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs), number
    assert captured.num_kinds >= 2, "nothing was captured"
    assert all(torch.equal(a, b) for a, b in zip(state(caught), state(plain), strict=True))


@pytest.mark.parametrize("ahead", [False, True])
def test_a_replayed_step_never_waits(ahead: bool, tmp_path: Path) -> None:
    captured = Captured(parts_of("idmm", tmp_path / "run", views_ahead=ahead))
    for number in range(12):
        captured.step(number)
    try:
        torch.cuda.set_sync_debug_mode("error")
        for number in range(12, 32):
            captured.step(number)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_plain_step_never_waits(tmp_path: Path) -> None:
    parts = parts_of("idmm", tmp_path / "run")
    assert isinstance(parts.loader, Planned)
    for number in range(4):
        step(parts, parts.loader.batch(number))
    try:
        torch.cuda.set_sync_debug_mode("error")
        for number in range(4, 24):
            step(parts, parts.loader.batch(number))
    finally:
        torch.cuda.set_sync_debug_mode("default")
