"""Several ranks make what one process makes: every method, every share of a batch."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from ranked import by
from synthetic import SMALL, assembled, small_store
from torch import Tensor, nn
from toy_runs import recipe

from fastidmm import stages
from fastidmm import step as stepping
from fastidmm.assemble import Parts
from fastidmm.batch import Batch, Loss
from fastidmm.bench import training
from fastidmm.chance import Counters
from fastidmm.errors import UsageError
from fastidmm.loaders import planned
from fastidmm.loaders.resident import Resident
from fastidmm.loaders.torch import Torch
from fastidmm.methods.idmm import IDMM
from fastidmm.methods.supervised import Supervised
from fastidmm.norms import SharedBatchNorm, batch_norm, share_norms
from fastidmm.ranks import World, world
from fastidmm.record import Record
from fastidmm.registry import METHODS
from fastidmm.shares import shares_of
from fastidmm.step import backward, step, together

NUM, BATCH, STEPS = 11, 8, 3  # of 8, 3 and 8 images: one of four ranks has none of the 3
SIZES = (2, 4)
# MoCo v3's BatchNorm makes so much of the roundings of 3 rows that one process is 4e-6 from float64
# itself: there, float64 alone says whether ranks do the same.
TOO_FEW = {"mocov3": (1,)}
Exact = tuple[Tensor, Tensor]
Made = tuple[list[list[float]], Tensor, Exact]
T = TypeVar("T")


def parts_of(method: str, place: Path, **options: Any) -> Parts:
    run = {
        "dataset": "made", "method": method, "backbone": "vit_micro", "resolution": 16,
        "epochs": 8, "batch_size": BATCH, "loader": "resident", "device": "cpu",
    }  # fmt: skip
    folder = place / f"{method} {world().rank} of {world().size}"
    folder.mkdir()
    tables = {"run": run, "backbone": {"drop_path": 0.3}, "method": SMALL.get(method, {}) | options}
    return training.assembled(tables, small_store(NUM), folder)


def batch_of(parts: Parts, number: int) -> Batch:
    assert isinstance(parts.loader, Resident)
    return parts.loader.batch(number)


def made(method: str, place: Path) -> Made:
    """Numbers of some steps of a method, its state after, and what float64 gives."""
    torch.set_num_threads(1)
    parts = parts_of(method, place)
    parts.state.micro_batches = 2 if parts.method.can_be_cut() else 1
    exact = in_float64(parts)
    numbers = []
    for number in range(STEPS):
        now = step(parts, batch_of(parts, number))
        numbers.append([float(now.loss), *map(float, now.parts.values()), float(now.norm)])
    state = torch.cat([t.double().flatten() for t in parts.method.state_dict().values()])
    return numbers, state, exact


def tried(work: Callable[[], T]) -> T | Exception:
    """What it gives, or why it gives nothing, for that method's own test to tell."""
    try:
        return work()
    except Exception as problem:
        return problem


def given(found: T | Exception) -> T:
    """What was tried; its exception otherwise."""
    if isinstance(found, Exception):
        raise found
    return found


def each(methods: list[str], place: Path) -> dict[str, Made]:
    """Of every method, one after the other."""
    return {method: made(method, place) for method in methods}


def made_by(ranks: int, methods: list[str], place: Path) -> dict[str, list[Made] | Exception]:
    """Of every method, what each rank made."""
    (place / "all").mkdir()
    together = tried(lambda: by(ranks, partial(each, methods, place / "all")))
    if not isinstance(together, Exception):
        return {method: [rank[method] for rank in together] for method in methods}
    # Ranks of which one has failed wait for each other in different places: new ones for each.
    return {
        method: tried(lambda method=method: by(ranks, partial(made, method, place)))  # type: ignore[misc]
        for method in methods
    }


def in_float64(parts: Parts) -> Exact:
    """Loss and gradient of the shorter batch, in double precision where the method leaves it so."""
    assert isinstance(parts.loader, Resident)
    parts.method.double()
    parts.loader.dtype = torch.float64
    batch = batch_of(parts, 1)
    loss = together(parts, batch, backward(parts, batch)).total.detach()
    found = [p.grad.flatten() for p in parts.method.parameters() if p.grad is not None]
    parts.optimizer.zero_grad(set_to_none=True)
    parts.method.float()
    parts.loader.dtype = torch.float32
    return loss, torch.cat(found)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made | Exception]:
    place = tmp_path_factory.mktemp("alone")
    return {method: tried(partial(made, method, place)) for method in sorted(METHODS)}


@pytest.fixture(scope="module", params=SIZES)
def by_ranks(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    alone: dict[str, Made | Exception],  # what children use is imported by then
) -> dict[str, list[Made] | Exception]:
    whole = [method for method, found in alone.items() if not isinstance(found, Exception)]
    return made_by(request.param, whole, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("method", sorted(METHODS))
def test_losses_and_gradients_are_those_of_one_process(
    method: str,
    alone: dict[str, Made | Exception],
    by_ranks: dict[str, list[Made] | Exception],
) -> None:
    """Uneven tails, a rank without images, micro-batches, drop-path, CutMix across ranks."""
    numbers, _, (loss, gradient) = given(alone[method])
    ranks = given(by_ranks[method])
    for ours_all, state, (our_loss, our_gradient) in ranks:
        for number, (ours, theirs) in enumerate(zip(ours_all, numbers, strict=True)):
            if number not in TOO_FEW.get(method, ()):
                assert ours[:-1] == pytest.approx(theirs[:-1], rel=1e-6, abs=1e-6)
                assert ours[-1] == pytest.approx(theirs[-1], rel=1e-5)
        # The contrastive losses are in float32 whatever their features are.
        in_float32 = loss.dtype == torch.float32
        assert float(our_loss) == pytest.approx(float(loss), rel=1e-6 if in_float32 else 1e-12)
        apart = (our_gradient - gradient).norm()
        assert apart < (1e-5 if in_float32 else 1e-11) * gradient.norm()
        assert torch.equal(state, ranks[0][1])


def test_a_broken_method_fails_its_own_test_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broken where it is shared, on one rank: the others' numbers are there all the same."""
    forward = Supervised.forward

    def broken(self: Supervised, batch: Batch) -> Loss:
        if world().rank == 1:
            raise RuntimeError("on purpose")
        return forward(self, batch)

    monkeypatch.setattr(Supervised, "forward", broken)
    alone = {method: made(method, tmp_path) for method in ("mocov2", "supervised")}
    found = made_by(2, ["supervised", "mocov2"], tmp_path)
    with pytest.raises(AssertionError, match="on purpose"):
        given(found["supervised"])
    for numbers, *_ in given(found["mocov2"]):
        assert numbers[0] == pytest.approx(alone["mocov2"][0][0], rel=1e-5)


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("method", ["idmm", "supervised", "dino"])
def test_each_rank_makes_its_crops_of_the_one_batch(
    method: str, parts: int, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, and every crop once, in whatever parts of it CutMix and Mixup mix."""
    built, loader = assembled(method, num=NUM, batch_size=BATCH)
    monkeypatch.setattr(type(built), "cutmix_groups", parts, raising=False)
    built.cutmix_groups = parts
    for number in (0, 1, 2, 3):
        loader.part = 0, 1
        whole = loader.batch(number)
        shares = shares_of(whole.num_images, ranks, parts)
        placed: list[list[int]] = [[] for _ in whole.groups]
        first = [int(views.place[0]) for views in whole.groups]
        for rank in range(ranks):
            loader.part = rank, ranks
            batch = loader.batch(number)
            assert batch.shares == shares and batch.num_images == whole.num_images
            assert batch.num_crops == sum(shares[rank] * group.count for group in built.views)
            assert loader.rows(number).tolist() == loader.plan(number).rows.tolist()
            for index, (ours, theirs) in enumerate(zip(batch.groups, whole.groups, strict=True)):
                at = ours.place - first[index]
                placed[index] += at.tolist()
                assert ours.total == theirs.total == theirs.rows.numel()
                for name in ("pixels", "rows", "partners", "weights", "labels", "partner_labels"):
                    assert torch.equal(getattr(ours, name), getattr(theirs, name)[at]), name
        for places, views in zip(placed, whole.groups, strict=True):
            assert sorted(places) == list(range(views.total))


def test_shares_are_whole_parts_of_cutmix_where_these_can_be_dealt() -> None:
    assert shares_of(10, 2, 4) == (6, 4)  # of 3, 3, 2 and 2
    assert shares_of(10, 4, 4) == (3, 3, 2, 2)
    assert shares_of(10, 4, 1) == (3, 3, 2, 2)
    assert shares_of(2, 4, 4) == (1, 1, 0, 0)
    assert shares_of(7, 1, 4) == (7,)


def test_loaders_that_read_photographs_refuse_those_of_other_ranks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    built, _ = assembled("idmm", num=NUM, batch_size=BATCH)
    monkeypatch.setattr(planned, "world", lambda: World(0, 3))
    monkeypatch.setattr(Torch, "unfit", classmethod(lambda *_: None))
    with pytest.raises(UsageError, match="must be a multiple of the 3 ranks"):
        Torch(small_store(NUM), built, Counters(1), batch_size=BATCH)
    monkeypatch.setattr(planned, "world", lambda: World(0, 4))
    with pytest.raises(UsageError, match="last batch has 3 images, too few for 4 ranks"):
        Torch(small_store(NUM), built, Counters(1), batch_size=BATCH)


def rows_of(rank: int) -> slice:
    """Rows 0, 1 and 2 are the first rank's, none is the second's, the others are the third's."""
    return [slice(0, 3), slice(3, 3), slice(3, 8)][rank]


def exchanged() -> dict[str, Any]:
    """What each of three ranks gets for its rows of the same tensors."""
    chance, mine = torch.Generator().manual_seed(0), rows_of(world().rank)
    x = torch.randn(8, 3, dtype=torch.float64, generator=chance)
    weights = torch.randn(3, 8, 3, dtype=torch.float64, generator=chance)
    own = x[mine].clone().requires_grad_()
    every = world().gather(own, (3, 0, 5))
    (every.square() * weights[world().rank]).sum().backward()
    images = torch.randn(8, 5, 4, 4, dtype=torch.float64, generator=chance)
    seen = images[mine].clone().requires_grad_()
    norm = SharedBatchNorm(5).double()
    goal = torch.randn(8, 5, 4, 4, dtype=torch.float64, generator=chance)
    (norm(seen) * goal[mine]).sum().backward()
    some = [torch.full((2, 2), float(world().rank)), torch.ones(3)]
    world().add_up(some)
    return {
        "every": every.detach(), "own": own.grad, "seen": seen.grad, "mean": norm.running_mean,
        "variance": norm.running_var, "sums": some, "any": world().any(world().rank == 1),
        "none": world().any(False), "told": world().tell(lambda: {"rank": world().rank, "x": 0.1}),
    }  # fmt: skip


def test_what_ranks_exchange() -> None:
    """Against torch's own on one process; a rank without rows takes part."""
    found = by(3, exchanged)
    chance = torch.Generator().manual_seed(0)
    x = torch.randn(8, 3, dtype=torch.float64, generator=chance).requires_grad_()
    weights = torch.randn(3, 8, 3, dtype=torch.float64, generator=chance)
    (x.square() * weights).sum().backward()
    images = torch.randn(8, 5, 4, 4, dtype=torch.float64, generator=chance).requires_grad_()
    norm = nn.BatchNorm2d(5).double()
    (norm(images) * torch.randn(8, 5, 4, 4, dtype=torch.float64, generator=chance)).sum().backward()
    assert x.grad is not None and images.grad is not None
    for rank, got in enumerate(found):
        torch.testing.assert_close(got["every"], x.detach())
        torch.testing.assert_close(got["own"], x.grad[rows_of(rank)])
        torch.testing.assert_close(got["seen"], images.grad[rows_of(rank)])
        torch.testing.assert_close(got["mean"], norm.running_mean)
        torch.testing.assert_close(got["variance"], norm.running_var)
        assert got["sums"][0].tolist() == [[3, 3], [3, 3]] and got["sums"][1].tolist() == [3] * 3
        assert got["any"] is True and got["none"] is False
        assert got["told"] == {"rank": 0, "x": 0.1}


def test_one_process_exchanges_nothing() -> None:
    x, here = torch.ones(2, 3), World()
    assert here.gather(x, (2,)) is x and here.sum(x) is x
    assert here.tell(lambda: x) is x and here.any(True) and not here.any(False)
    y, *_ = batch_norm(torch.arange(6.0).view(3, 2), None, None, 0.0)
    assert y[:, 0].tolist() == pytest.approx([-(1.5**0.5), 0, 1.5**0.5])


def test_backbones_with_batchnorm_share_it_or_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastidmm import norms

    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    share_norms(model, 8, 8, 1)
    assert not isinstance(model[1], SharedBatchNorm)
    monkeypatch.setattr(norms, "world", lambda: World(0, 2))
    names = list(model.state_dict())
    share_norms(model, 8, 8, 1)
    assert isinstance(model[1], SharedBatchNorm) and list(model.state_dict()) == names
    with pytest.raises(UsageError, match="last batch has 1 images, too few"):
        share_norms(nn.Sequential(nn.BatchNorm2d(4)), 9, 8, 1)
    with pytest.raises(UsageError, match="SyncBatchNorm of this backbone cannot be shared"):
        share_norms(nn.Sequential(nn.SyncBatchNorm(4)), 8, 8, 1)


def short_of_memory(place: Path) -> tuple[list[float], int]:
    """The losses of two steps; the second rank's memory ends once, where others have gone on."""
    parts = parts_of("idmm", place)
    failed: list[Batch] = []
    forward = IDMM.forward

    def scarce(self: IDMM, batch: Batch) -> Any:
        if world().rank == 1 and batch.step == 1 and not failed:
            failed.append(batch)
            raise torch.OutOfMemoryError("on purpose")
        return forward(self, batch)

    IDMM.forward = scarce  # type: ignore[method-assign]
    try:
        return [float(step(parts, batch_of(parts, n)).loss) for n in (0, 1)], (
            parts.state.micro_batches
        )
    finally:
        IDMM.forward = forward  # type: ignore[method-assign]


def test_all_ranks_cut_the_batch_where_one_is_short_of_memory(tmp_path: Path) -> None:
    whole = parts_of("idmm", tmp_path)
    expected = [float(step(whole, batch_of(whole, n)).loss) for n in (0, 1)]
    for losses, pieces in by(2, partial(short_of_memory, tmp_path)):
        assert losses == pytest.approx(expected, rel=1e-6) and pieces == 2


def gone_back() -> tuple[int, list[float]]:
    """A run whose loss is not finite in two steps of the first attempt, on the last rank alone."""
    torch.set_num_threads(1)
    forward, last = IDMM.forward, world().rank == world().size - 1

    def failing(self: IDMM, batch: Batch) -> Loss:
        loss = forward(self, batch)
        fails = last and batch.step in (4, 5) and not self.backbone.counters.attempt  # type: ignore[union-attr]
        return replace(loss, total=loss.total * float("nan")) if fails else loss

    IDMM.forward = failing  # type: ignore[method-assign]
    try:
        stages.pretrain(recipe(loader="resident", device="cpu"), f"of-{world().size}")
    finally:
        IDMM.forward = forward  # type: ignore[method-assign]
    record = Record(Path(f"runs/of-{world().size}"))
    return record.state["attempt"], [line["loss"] for line in record.metrics()]


def test_all_go_back_where_one_has_losses_that_are_not_finite(toy: str) -> None:
    attempt, expected = gone_back()
    assert attempt == 1 and len(expected) == 21
    for again, losses in by(2, gone_back):
        assert again == 1 and losses == pytest.approx(expected, rel=1e-3)


def test_a_loss_that_is_not_finite_is_skipped_by_all(tmp_path: Path) -> None:
    def skipped() -> tuple[bool, bool]:
        parts = parts_of("supervised", tmp_path)
        before = torch.cat([p.detach().flatten() for p in parts.method.parameters()])
        batch = batch_of(parts, 0)
        if world().rank == 1:
            batch.groups[0].pixels[0, 0, 0, 0] = float("nan")
        found = stepping.step(parts, batch)
        after = torch.cat([p.detach().flatten() for p in parts.method.parameters()])
        return bool(found.skipped), torch.equal(before, after)

    assert by(2, skipped) == [(True, True)] * 2
