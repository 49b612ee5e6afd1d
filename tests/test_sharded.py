"""The head dealt out by rows: its loss, its gradients, its checkpoints, wherever rows end up."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from ranked import by
from test_ranks import NUM, batch_of, in_float64, parts_of
from torch import Tensor, nn

from fastidmm import checkpoint, sharded
from fastidmm.kernels.instance_loss import reference
from fastidmm.ranks import World, world
from fastidmm.sharded import cut, sharded_loss, worth_it
from fastidmm.step import step
from fastidmm.train import take_up

# Crops, width, rows, smoothing, and how many crops each of one, two or four ranks has.
CASES: dict[str, tuple[int, int, int, float]] = {
    "uneven": (7, 5, 11, 0.1),
    "hard": (7, 5, 6, 0.0),
    "fewer rows than ranks": (7, 4, 3, 0.1),
    "all targets on one rank": (6, 4, 9, 0.1),
    "all smooth": (5, 3, 2, 1.0),
    "wide logits": (6, 8, 10, 0.1),
    "ImageNet": (6, 4, 1_281_167, 0.1),
}
Given = tuple[Tensor, nn.Linear, tuple[Tensor, ...]]


def given(name: str) -> Given:
    """Features, a head, and rows, partners, kept shares and weights of crops, in float64."""
    num, width, rows, _ = CASES[name]
    chance = torch.Generator().manual_seed(num + rows)
    z = torch.randn(num, width, dtype=torch.float64, generator=chance)
    head = nn.Linear(width, rows).double()
    with torch.no_grad():
        for tensor in head.parameters():
            tensor.copy_(torch.randn(tensor.shape, dtype=torch.float64, generator=chance))
    if name == "wide logits":
        z *= 300
    drawn = torch.randint(rows, (2, num), generator=chance)
    if name == "all targets on one rank":
        drawn[:] = rows - 1
    shares = torch.rand(2, num, dtype=torch.float64, generator=chance)
    return z, head, (*drawn, *shares)


def crops_of(num: int, ranks: int) -> list[int]:
    """A rank may have none."""
    return {1: [num], 2: [num - 2, 2], 4: [num - 3, 0, 2, 1]}[ranks]


def rows_made() -> dict[str, tuple[Tensor, ...]]:
    """Of every case what one rank finds."""
    found: dict[str, tuple[Tensor, ...]] = {}
    for name, (num, _, _, smoothing) in CASES.items():
        z, head, drawn = given(name)
        crops, shards = crops_of(num, world().size), cut(head)
        own = slice(*world().own(crops))
        mine = z[own].clone().requires_grad_()
        loss, hits = sharded_loss(
            mine, head, *(each[own] for each in drawn),
            smoothing=smoothing, shards=shards, crops=crops,
        )  # fmt: skip
        (3 * loss).backward()
        assert mine.grad is not None and head.weight.grad is not None and head.bias.grad is not None
        found[name] = loss.detach()[None], hits, mine.grad, head.weight.grad, head.bias.grad
    return found


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_loss_of_a_head_in_parts_is_that_of_the_whole(ranks: int) -> None:
    """To 1e-12 in float64, with all gradients; hits are the same."""
    made = by(ranks, rows_made)
    for name, (*_, smoothing) in CASES.items():
        z, head, (rows, partner, lam, weight) = given(name)
        z.requires_grad_()
        loss, stats = reference(z, head.weight, rows, partner, lam, head.bias, smoothing, weight)
        (3 * loss).backward()
        expected = (z.grad, head.weight.grad, head.bias.grad)
        losses, hits, *gradients = (
            torch.cat(parts) for parts in zip(*(m[name] for m in made), strict=True)
        )
        assert float(losses.sum()) == pytest.approx(float(loss.detach()), rel=1e-12, abs=1e-12), (
            name
        )
        assert torch.equal(hits, stats.hits), name
        for ours, theirs in zip(gradients, expected, strict=True):
            assert theirs is not None
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_a_head_is_cut_where_its_rows_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not worth_it(10**6, 100)
    monkeypatch.setattr(sharded, "world", lambda: World(0, 2))
    assert worth_it(401, 100) and not worth_it(400, 100)


def trained(place: Path, steps: int, start: Path | None = None) -> tuple[list[float], Any, Any]:
    """Steps of a run with its head dealt out: losses, what a checkpoint would hold, a gradient."""
    torch.set_num_threads(1)
    parts = parts_of("idmm", place, head="sharded")
    rows = parts.method.get_parameter("head.weight").shape[0]
    _, gradient = in_float64(parts)
    if start is not None:
        take_up(parts, *checkpoint.load(start, checkpoint.MODEL, checkpoint.OPTIMIZER))
    made = [step(parts, batch_of(parts, parts.state.step + n)) for n in range(steps)]
    numbers = [float(number) for each in made for number in (each.loss, each.norm)]
    tables = checkpoint.tables(parts.method, parts.optimizer, None)
    assert parts.method.get_parameter("head.weight").shape[0] == rows
    return numbers, tables, (rows, gradient)


def test_runs_go_on_wherever_rows_are(tmp_path: Path) -> None:
    """By four ranks, of which checkpoints know nothing; then by two; then by one."""
    for name in ("alone", "four", "two", "one"):
        (tmp_path / name).mkdir()
    numbers, tables, (_, gradient) = trained(tmp_path / "alone", 4)
    four = by(4, partial(trained, tmp_path / "four", 2))
    assert [rows for *_, (rows, _) in four] == [3, 3, 3, 2]
    width = tables[checkpoint.MODEL]["head.weight"].shape[1]
    body = len(gradient) - NUM * (width + 1)
    heads = [g[body:].split([n * width, n]) for *_, (n, g) in four]
    dealt = torch.cat([part for which in zip(*heads, strict=True) for part in which])
    assert (dealt - gradient[body:]).norm() < 1e-11 * gradient.norm()
    for file, table in four[0][1].items():
        shapes = {name: tensor.shape for name, tensor in tables[file].items()}
        assert {name: tensor.shape for name, tensor in table.items()} == shapes
    for ours, _, (_, own) in four:
        assert (own[:body] - gradient[:body]).norm() < 1e-11 * gradient.norm()
        assert ours == pytest.approx(numbers[:4], rel=1e-6)
    state = {"step": 2, "attempt": 0, "micro_batches": 1}
    kept = checkpoint.save(tmp_path / "kept", 2, four[0][1], state)
    two = by(2, partial(trained, tmp_path / "two", 2, kept))
    assert [ours for ours, *_ in two] == [pytest.approx(numbers[4:], rel=1e-5)] * 2
    for name, tensor in tables[checkpoint.MODEL].items():
        torch.testing.assert_close(two[0][1][checkpoint.MODEL][name], tensor, rtol=0, atol=1e-4)
    ours, _, _ = trained(tmp_path / "one", 2, kept)
    assert ours == pytest.approx(numbers[4:], rel=1e-5)
