"""Captured steps against plain ones, by a stand-in for CUDA's graphs that replays on the CPU."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from recorded import NotCapturable, Recorded
from synthetic import SMALL, small_store
from test_train import fail_at
from torch import Tensor
from toy_runs import recipe

from fastidmm import capture, chance, colour, train
from fastidmm.assemble import Parts
from fastidmm.batch import Batch
from fastidmm.bench.training import assembled
from fastidmm.capture import WARM_UP, Captured, left_uncaptured
from fastidmm.kernels import views, words
from fastidmm.loaders import resident
from fastidmm.loaders.planned import Planned
from fastidmm.ranks import World
from fastidmm.registry import METHODS
from fastidmm.stages import pretrain
from fastidmm.step import Stepped, step

NUM, BATCH = 5, 2  # steps of 2, 2 and 1 rows
STEPS = 18  # six epochs, with Mixup and CutMix by turns


@pytest.fixture(autouse=True)
def plain_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a CPU does by NumPy and crop by crop, as a GPU without kernels does it."""
    monkeypatch.setattr(colour, "on_gpu", lambda x: True)
    monkeypatch.setattr(chance, "words", words.reference)
    monkeypatch.setattr(resident, "views", views.reference)


def parts_of(method: str, place: Path, **run: object) -> Parts:
    run = {
        "dataset": "made", "method": method, "backbone": "vit_micro", "resolution": 16,
        "epochs": 8, "batch_size": BATCH, "loader": "resident", "device": "cpu", **run,
    }  # fmt: skip
    place.mkdir()
    tables = {"run": run, "backbone": {"drop_path": 0.3}, "method": SMALL.get(method, {})}
    return assembled(tables, small_store(NUM), place)


def told(made: Stepped) -> list[float]:
    """All that a metric line takes from a step."""
    tensors = [made.loss, made.norm, made.lr, made.skipped, *made.parts.values()]
    return [float(t) for t in tensors]


def state(parts: Parts) -> Iterator[Tensor]:
    """Everything that training moves."""
    yield from parts.method.state_dict().values()
    for table in parts.optimizer.state.values():
        yield from (value for value in table.values() if isinstance(value, Tensor))


def plainly(parts: Parts, num: int = STEPS) -> list[list[float]]:
    """Steps with numbers of the host."""
    assert isinstance(parts.loader, Planned)
    return [told(step(parts, parts.loader.batch(number))) for number in range(num)]


def same(one: Parts, other: Parts) -> bool:
    """Whether no bit of weights and moments differs."""
    return all(torch.equal(a, b) for a, b in zip(state(one), state(other), strict=True))


@pytest.mark.parametrize("method", sorted(METHODS))
def test_replays_are_the_steps_themselves(method: str, tmp_path: Path) -> None:
    """To the bit: tail batches, Mixup and CutMix epochs, drop-path, from the very start."""
    plain = parts_of(method, tmp_path / "plain")
    caught = parts_of(method, tmp_path / "caught")
    for parts in (plain, caught):
        parts.state.micro_batches = 2 if parts.method.can_be_cut() else 1
    captured = Captured(caught, Recorded)
    found = [told(captured.step(number)) for number in range(STEPS)]
    assert found == plainly(plain)
    assert same(caught, plain)
    mixes = {group.mix for group in caught.method.views}
    kinds = 4 if "alternate" in mixes else 2
    assert captured.num_kinds == kinds  # of rows and of mixing: all were replayed


@pytest.mark.parametrize("method", ["idmm", "supervised", "dino"])
def test_views_made_ahead_are_those_of_their_step(method: str, tmp_path: Path) -> None:
    """To the bit, whatever comes between: other batches, memory given back, and a step back."""
    plain = parts_of(method, tmp_path / "plain")
    caught = parts_of(method, tmp_path / "caught", views_ahead=True)
    captured, numbers = Captured(caught, Recorded), [*range(30), 27, 28, 27, 30, 31]
    assert isinstance(plain.loader, Planned)
    for place, number in enumerate(numbers):
        if place == 25:
            captured.release()
        given = plain.loader.batch(number) if place in (20, 21, 22) else None
        found = told(captured.step(number, given))
        assert found == told(step(plain, plain.loader.batch(number))), (place, number)
    assert same(caught, plain)


@pytest.mark.parametrize(("method", "kinds"), [("idmm", 3), ("supervised", 6)])
def test_views_are_made_once_a_step_and_ahead(
    method: str, kinds: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Graphs by what comes next, too: a full batch, a tail, a full one of the next epoch."""
    captured = Captured(parts_of(method, tmp_path / "run", views_ahead=True), Recorded)
    made, views_of = list[int](), Captured._views

    def noted(self: Captured, number: int, counter: Tensor | None = None) -> Batch:
        made.append(number)
        return views_of(self, number, counter)

    monkeypatch.setattr(Captured, "_views", noted)
    for number in range(24):
        captured.step(number)
    assert captured.num_kinds == kinds
    before = made.copy()
    for number in range(24, 30):
        captured.step(number)
    assert made == before  # by the graphs alone


@pytest.mark.parametrize("ahead", [False, True])
def test_a_run_goes_on_from_any_step(ahead: bool, tmp_path: Path) -> None:
    """What is captured after a resume is what was captured before."""
    whole, cut = (parts_of("idmm", tmp_path / name, views_ahead=ahead) for name in ("whole", "cut"))
    captured = Captured(whole, Recorded)
    found = [told(captured.step(number)) for number in range(11)]
    one, other = Captured(cut, Recorded), Captured(cut, Recorded)
    again = [told((one if number < 5 else other).step(number)) for number in range(11)]
    assert again == found and same(whole, cut)


def test_batches_that_a_loader_brings(tmp_path: Path) -> None:
    """They are copied to where the graph reads; their own memory is free again."""
    plain, caught = (parts_of("supervised", tmp_path / name) for name in ("plain", "caught"))
    captured, loader = Captured(caught, Recorded), caught.loader
    assert isinstance(loader, Planned)
    found = []
    for number in range(STEPS):
        batch = loader.batch(number)
        found.append(told(captured.step(number, batch)))
        for tensor in batch.tensors():
            tensor.zero_()
    assert found == plainly(plain) and same(caught, plain)
    assert captured.num_kinds == 2


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_step_that_is_not_finite_moves_nothing(method: str, tmp_path: Path) -> None:
    """Nor its teacher, queue or centre, though the student is not finite itself."""
    parts = parts_of(method, tmp_path / "run")
    captured = Captured(parts, Recorded)
    for number in range(9):
        captured.step(number)
    before = [t.clone() for t in state(parts)]
    scale = parts.method.get_parameter("backbone.model.norm.weight")
    kept = scale.detach().clone()
    scale.data[3] = float("nan")
    made = captured.step(9)
    scale.data.copy_(kept)
    assert bool(made.skipped)
    assert all(torch.equal(a, b) for a, b in zip(before, state(parts), strict=True))
    assert not captured.step(10).skipped


def test_what_cannot_be_captured_is_said_and_made_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, caught = (parts_of("idmm", tmp_path / name) for name in ("plain", "caught"))
    kind = type(caught.method)
    forward = kind.forward

    def asking(self: object, batch: Batch) -> object:
        loss = forward(self, batch)  # type: ignore[arg-type]
        return loss if loss.total.detach() > 0 else None

    monkeypatch.setattr(kind, "forward", asking)
    captured = Captured(caught, Recorded)
    found = [told(captured.step(number)) for number in range(STEPS)]
    assert found == plainly(plain) and same(caught, plain)
    assert not captured.num_kinds and not captured.is_emptied
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "steps are not captured (aten::_local_scalar_dense waits for the device): they are made "
        "one operation at a time."
    ]


@pytest.mark.parametrize(
    ("device", "asked", "ranks", "said"),
    [("cuda", True, 2, 1), ("cuda", True, 1, 0), ("cuda", False, 2, 0), ("cpu", True, 2, 0)],
)
def test_that_steps_of_several_ranks_are_not_captured_is_said(
    device: str, asked: bool, ranks: int, said: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capture, "world", lambda: World(0, ranks))
    parts: Any = SimpleNamespace(
        store=SimpleNamespace(device=torch.device(device)),
        recipe=SimpleNamespace(run=SimpleNamespace(capture=asked)),
    )
    assert left_uncaptured(parts).count("steps of several ranks are not captured") == said


def test_a_run_says_once_why_it_is_not_captured(
    toy: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train, "left_uncaptured", lambda parts: "not captured, on purpose")
    fail_at(monkeypatch, lambda attempt, step: attempt == 0 and step in (4, 5))
    pretrain(recipe(device="cpu", epochs=3), None)
    said = capsys.readouterr().err
    assert said.count("not captured, on purpose") == 1 and "attempt 1" in said


def test_kinds_are_captured_when_they_have_warmed_up(tmp_path: Path) -> None:
    captured = Captured(parts_of("idmm", tmp_path / "run"), Recorded)
    graphs = []
    for number in range(9):  # two full batches and a tail, by turns
        captured.step(number)
        graphs.append(captured.num_kinds)
    assert graphs == [0] * 3 + [1] * 5 + [2] and WARM_UP == 2


@pytest.mark.parametrize(
    "work",
    [
        lambda x: x[0].item(),
        lambda x: torch.tensor([1.0, 2.0]) + x,
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: 1 if x.sum() > 0 else 0,
    ],
)
def test_the_stand_in_refuses_what_cuda_does(work: object) -> None:
    with pytest.raises(NotCapturable):
        Recorded().record(lambda: work(torch.ones(3)))  # type: ignore[operator]


def test_the_stand_in_replays_on_the_same_memory() -> None:
    x, total = torch.arange(3.0), torch.zeros(3)
    graph = Recorded()

    def work() -> Tensor:
        total.add_(x)
        return (x * 2).view(-1)[1:]

    found = graph.record(work)
    assert total.tolist() == [0, 0, 0]
    x.fill_(5)
    graph.replay()
    graph.replay()
    assert total.tolist() == [10, 10, 10] and found.tolist() == [10, 10]
