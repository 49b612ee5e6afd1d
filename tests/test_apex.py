"""apex's optimizers behind our step, by a stand-in: what they are handed, what is kept of them."""

import math
import sys
from pathlib import Path
from types import SimpleNamespace

import apex_stand_in
import pytest
import torch
from recorded import Recorded
from test_capture import STEPS, parts_of, plain_operations, plainly, same, told  # noqa: F401
from test_optim import Line, parameters
from torch import Tensor

from fastidmm import apex, checkpoint
from fastidmm.assemble import Parts
from fastidmm.capture import Captured
from fastidmm.errors import UsageError
from fastidmm.loaders.planned import Planned
from fastidmm.optim import OptimOptions, Scaler, optimizer_over, update
from fastidmm.step import step

OPTIONS = OptimOptions(lr=1.0, weight_decay=0.05, betas=(0.8, 0.95), eps=1e-6)
RATES = (0.0, 0.125, 0.25, 0.0625, 0.03125, 0.5)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module in apex_stand_in.modules().items():
        monkeypatch.setitem(sys.modules, name, module)


def trained(name: str, *, bad: int | None, scale: float = 0.0) -> Tensor:
    """Parameters after steps at every rate; one more, with a gradient that is not finite, amid."""
    method = Line(torch.float32)
    optimizer = optimizer_over(method, OPTIONS, CPU, name)
    scaler = Scaler(CPU) if scale else None
    for number, lr in enumerate(RATES):
        if scaler is not None:
            scaler.scale.fill_(scale)
        for value in [math.nan] * (number == bad) + [1.0]:
            loss = method.loss(number)
            (loss * value * (1.0 if scaler is None else scaler.scale)).backward()
            made = update(optimizer, method, loss, torch.tensor(lr), torch.tensor(number), scaler)
            assert bool(made.skipped) == math.isnan(value)
    return parameters(method)


def lamb(bound: float) -> Tensor:
    """You et al.'s algorithm 2 with Adam's corrections, gradients clipped in all, in float64."""
    method = Line(torch.float64)
    weights = list(method.parameters())
    first, second = ([torch.zeros_like(w) for w in weights] for _ in range(2))
    for number, lr in enumerate(RATES):
        gradients = torch.autograd.grad(method.loss(number), weights)
        norm = torch.sqrt(sum((g.square().sum() for g in gradients), torch.zeros(())))
        for w, g, m, v in zip(weights, gradients, first, second, strict=True):
            g = g / max(1.0, float(norm) / bound)
            m.mul_(0.8).add_(0.2 * g), v.mul_(0.95).add_(0.05 * g * g)
            r = m / (1 - 0.8 ** (number + 1)) / ((v / (1 - 0.95 ** (number + 1))).sqrt() + 1e-6)
            r = r + 0.05 * w.data
            w.data -= lr * w.data.norm() / r.norm() * r
    return parameters(method)


@pytest.mark.parametrize("bad", [None, 0, 3])
@pytest.mark.parametrize("scale", [0.0, 1024.0])
def test_fused_adam_is_adamw(bad: int | None, scale: float) -> None:
    found = trained("fused_adam", bad=bad, scale=scale)
    torch.testing.assert_close(found, trained("adamw", bad=None), rtol=0, atol=2e-6)


@pytest.mark.parametrize("bad", [None, 0, 3])
@pytest.mark.parametrize("scale", [0.0, 1024.0])
def test_fused_lamb_is_lamb(bad: int | None, scale: float) -> None:
    found = trained("fused_lamb", bad=bad, scale=scale)
    torch.testing.assert_close(found, lamb(1.0), rtol=0, atol=5e-6)
    assert not torch.allclose(found, trained("adamw", bad=None), atol=1e-3)


def made(parts: Parts, number: int, *, bad: bool = False) -> None:
    assert isinstance(parts.loader, Planned)
    batch = parts.loader.batch(number)
    if bad:
        batch.groups[0].pixels.fill_(math.nan)
    step(parts, batch)


@pytest.mark.parametrize("name", sorted(apex.KINDS))
@pytest.mark.parametrize("bad", [2, 3])
def test_a_checkpoint_holds_all_of_it(
    name: str, bad: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saved after four steps, one of them, at times the last, skipped: the same bits from there."""
    one, other = (parts_of("idmm", tmp_path / n, optimizer=name) for n in ("one", "other"))
    for number in range(4):
        made(one, number, bad=number == bad)
    kept = checkpoint.optimizer_tensors(one.optimizer, None)
    assert {"group.0.step", "flag"} < set(kept)
    other.method.load_state_dict(one.method.state_dict())
    checkpoint.load_optimizer(other.optimizer, None, {n: t.clone() for n, t in kept.items()})
    for parts in (one, other):
        for number in (4, 5):
            made(parts, number)
    assert same(one, other)
    assert int(one.optimizer.param_groups[0]["step"]) == int(
        other.optimizer.param_groups[0]["step"]
    )


@pytest.mark.parametrize("name", sorted(apex.KINDS))
def test_captured_steps_are_the_steps_themselves(name: str, tmp_path: Path) -> None:
    plain, caught = (parts_of("idmm", tmp_path / n, optimizer=name) for n in ("plain", "caught"))
    captured = Captured(caught, Recorded)
    found = [told(captured.step(number)) for number in range(STEPS)]
    assert found == plainly(plain) and captured.num_kinds
    assert same(caught, plain)


def test_where_it_cannot_work(monkeypatch: pytest.MonkeyPatch) -> None:
    apex.check("adamw", CPU)
    with pytest.raises(UsageError, match="fused_lamb needs an NVIDIA GPU: use adamw on a CPU"):
        apex.check("fused_lamb", CPU)
    gpu = torch.device("cuda")
    for kind in ("absent", "other", "python"):
        monkeypatch.setattr(apex, "apex_kind", lambda kind=kind: kind)
        with pytest.raises(UsageError, match="needs NVIDIA's apex with its CUDA extension"):
            apex.check("fused_adam", gpu)
    monkeypatch.setattr(apex, "apex_kind", lambda: "cuda")
    apex.check("fused_adam", gpu)
    apex.check("fused_lamb", gpu)
    monkeypatch.setattr(apex, "world", lambda: SimpleNamespace(size=2))
    apex.check("fused_adam", gpu)
    with pytest.raises(UsageError, match="use fused_adam or adamw with --gpus"):
        apex.check("fused_lamb", gpu)
