"""Schedules against the recipe's figures, updates against plain AdamW in float64."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastidmm.batch import Method
from fastidmm.optim import OptimOptions, Scaler, lr_schedule, optimizer_over, update

STEPS = 8  # an epoch


def curve(schedule: str, epochs: int, warmup: float, peak: float = 1.0) -> Tensor:
    """The rate at every step, and at the end: (epochs * STEPS + 1,)."""
    options = OptimOptions.model_validate(
        {"lr": peak, "warmup_epochs": warmup, "schedule": schedule}
    )
    return lr_schedule(options, epochs=epochs, steps_per_epoch=STEPS)(
        torch.arange(epochs * STEPS + 1)
    )


@pytest.mark.parametrize(("epochs", "warmup"), [(800, 2), (800, 10), (100, 10), (3, 0.75), (5, 0)])
def test_cosine_after_a_linear_rise(epochs: int, warmup: float) -> None:
    t = np.arange(epochs * STEPS + 1) / STEPS
    falling = 0.5 * (1 + np.cos(np.pi * (t - warmup) / (epochs - warmup)))
    expected = 5e-4 * np.where(t < warmup, t / (warmup or 1), falling)
    found = curve("cosine", epochs, warmup, 5e-4)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-10)
    assert found.dtype == torch.float32
    assert found[0] == (0 if warmup else torch.tensor(5e-4))
    assert float(found[round(warmup * STEPS)]) == pytest.approx(5e-4, rel=1e-6)
    assert float(found[-1]) == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize(
    ("epochs", "warmup", "deviation"),
    [(800, 2, 0.27), (800, 10, 1.4), (200, 2, 1.1), (200, 10, 5.6), (100, 2, 2.2), (100, 10, 11.9)],
)
def test_the_published_slip_deviates_as_measured(
    epochs: int, warmup: int, deviation: float
) -> None:
    apart = (curve("cosine", epochs, warmup) - curve("idmm_legacy", epochs, warmup)).abs()
    digit = 0.05 if deviation > 1 else 0.005  # as it was rounded
    assert 100 * float(apart.max()) == pytest.approx(deviation, abs=digit)


def test_the_published_slip_by_its_own_formula() -> None:
    t = np.arange(100 * STEPS + 1) / STEPS
    published = np.where(t < 10, t / 10, 0.5 * (1 + np.cos((np.pi * t - 10) / (100 - 10))))
    found = curve("idmm_legacy", 100, 10)
    np.testing.assert_allclose(found.numpy(), published, rtol=1e-5, atol=1e-6)
    assert float(found[10 * STEPS]) == pytest.approx(0.98591, abs=1e-5)
    assert float(found[-2]) == pytest.approx(0.0136, abs=1e-4)  # the last step of the run
    assert 10 + float(found[10 * STEPS :].argmin()) / STEPS == pytest.approx(93, abs=0.5)
    assert float(curve("idmm_legacy", 800, 2)[2 * STEPS]) == pytest.approx(0.99999, abs=1e-5)


# --- update -------------------------------------------------------------------------------------


class Line(Method):
    """One linear layer under a smooth loss."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(nn.Identity())
        self.layer = nn.Linear(5, 3, dtype=dtype)
        for number, p in enumerate(self.parameters()):
            values = torch.linspace(-1, 1, p.numel(), dtype=torch.float64) + 0.1 * number
            p.data = values.view_as(p).to(dtype)

    def loss(self, step: int) -> Tensor:
        weight = self.layer.weight
        x = torch.linspace(-1, 2, 20, dtype=torch.float64).view(4, 5).to(weight.dtype) * (step + 1)
        loss: Tensor = (self.layer(x).tanh() - 0.3).square().mean()
        return loss


def parameters(method: Method) -> Tensor:
    return torch.cat([p.detach().double().flatten() for p in method.parameters()])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_updates_are_adamws(dtype: torch.dtype, tolerance: float) -> None:
    """With a rate that changes every step, starting from 0 as the schedules do."""
    options = OptimOptions(lr=1.0, weight_decay=0.05, betas=(0.8, 0.95), eps=1e-6)
    ours, truth = Line(dtype), Line(torch.float64)
    optimizer = optimizer_over(ours, options, torch.device("cpu"))
    plain = torch.optim.AdamW(
        truth.parameters(), betas=(0.8, 0.95), eps=1e-6, weight_decay=0.05, foreach=False
    )
    start = parameters(truth)
    for step, lr in enumerate((0.0, 0.125, 0.25, 0.0625, 0.03125)):
        loss = ours.loss(step)
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in ours.parameters() if p.grad is not None])
        norm, skipped, _ = update(optimizer, ours, loss, torch.tensor(lr), torch.tensor(step))
        assert float(norm) == pytest.approx(float(gradient.norm()), rel=1e-5) and not skipped
        assert all(p.grad is None for p in ours.parameters())
        plain.param_groups[0]["lr"] = lr
        plain.zero_grad()
        truth.loss(step).backward()
        plain.step()
        torch.testing.assert_close(parameters(ours), parameters(truth), rtol=0, atol=tolerance)
        assert step > 0 or torch.equal(parameters(truth), start)
    assert float((parameters(ours) - start).abs().min()) > 0.001


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("first", [0, 2])
def test_what_is_not_finite_is_skipped(where: str, value: float, first: int) -> None:
    """Parameters, moments and the count of steps stay as they were, and training goes on."""
    methods = Line(torch.float32), Line(torch.float32)
    optimizers = [optimizer_over(m, OptimOptions(lr=1.0), torch.device("cpu")) for m in methods]
    lr = torch.tensor(0.1)
    for step in range(4):
        for method, optimizer in zip(methods, optimizers, strict=True):
            if step == first and method is methods[0]:  # only this one meets the bad step
                loss = method.loss(9)
                loss.backward()
                bad = loss if where == "loss" else method.layer.weight.grad
                assert bad is not None
                bad.data.view(-1)[-1] = value
                before = parameters(method)
                _, skipped, _ = update(optimizer, method, loss, lr, torch.tensor(step))
                assert bool(skipped) and torch.equal(parameters(method), before)
            loss = method.loss(step)
            loss.backward()
            update(optimizer, method, loss, lr, torch.tensor(step))
    assert torch.equal(parameters(methods[0]), parameters(methods[1]))
    states = [optimizer.state_dict()["state"] for optimizer in optimizers]
    for number, state in states[1].items():
        for key, expected in state.items():
            assert torch.equal(states[0][number][key], expected), key
        assert float(state["step"]) == 4


class Careful(Line):
    """Clips each tensor; the weights' decay grows with the step, the bias has none."""

    clip = 0.01

    def param_groups(self) -> list[dict[str, Any]]:
        return [
            {"params": [self.layer.weight], "decay": lambda step: 0.1 + 0.2 * step},
            {"params": [self.layer.bias], "weight_decay": 0.0},
        ]


def test_tensors_are_clipped_and_decay_follows_its_schedule() -> None:
    """Against torch's own functions; a skipped step decays nothing, a frozen tensor not at all."""
    ours, truth = Careful(torch.float64), Careful(torch.float64)
    optimizer = optimizer_over(ours, OptimOptions(lr=1.0, weight_decay=9.0), torch.device("cpu"))
    groups = [{"params": [p], "weight_decay": 0.0} for p in (truth.layer.weight, truth.layer.bias)]
    plain = torch.optim.AdamW(groups, foreach=False)
    for step, lr in enumerate((0.25, 0.125, 0.0625)):
        for method in (ours, truth):
            method.zero_grad()
            method.loss(step).backward()
        before = parameters(ours)
        for param in truth.parameters():
            torch.nn.utils.clip_grad_norm_(param, 0.01)
        for group, decay in zip(plain.param_groups, (0.1 + 0.2 * step, 0.0), strict=True):
            group |= {"lr": lr, "weight_decay": decay}
        if step == 1:
            truth.layer.weight.grad = ours.layer.weight.grad = None  # as a frozen one's is
        plain.step()
        loss = ours.loss(step)
        update(optimizer, ours, loss, torch.tensor(lr), torch.tensor(step))
        torch.testing.assert_close(parameters(ours), parameters(truth), rtol=0, atol=1e-7)
        assert (parameters(ours) != before).sum() == (3 if step == 1 else 18)
    before = parameters(ours)
    loss = ours.loss(0) * math.nan
    loss.backward()
    update(optimizer, ours, loss, torch.tensor(0.5), torch.tensor(3))
    assert torch.equal(parameters(ours), before)


@pytest.mark.parametrize("clipping", [False, True])
def test_scaled_gradients_are_divided_again(clipping: bool) -> None:
    """A loss 2**16 times too large moves weights as the loss itself does; an overflow halves it."""
    kind = Careful if clipping else Line
    ours, plain = kind(torch.float32), kind(torch.float32)
    cpu = torch.device("cpu")
    optimizers = [optimizer_over(m, OptimOptions(lr=1.0), cpu) for m in (ours, plain)]
    scaler = Scaler(cpu)
    for step in range(3):
        at, lr = torch.tensor(step), torch.tensor(0.1)
        loss = ours.loss(step)
        (loss * scaler.scale).backward()
        scaled = update(optimizers[0], ours, loss, lr, at, scaler)
        loss = plain.loss(step)
        loss.backward()
        norm, _, _ = update(optimizers[1], plain, loss, lr, at)
        assert float(scaled.norm) == pytest.approx(float(norm), rel=1e-5)
        assert not scaled.skipped
        torch.testing.assert_close(parameters(ours), parameters(plain), rtol=0, atol=1e-6)
    scaler.good.fill_(1999)
    for overflow, scale in ((False, 2.0**17), (True, 2.0**16), (False, 2.0**16)):
        before, loss = parameters(ours), ours.loss(0)
        (loss * scaler.scale * (math.inf if overflow else 1)).backward()
        made = update(optimizers[0], ours, loss, torch.tensor(0.1), torch.tensor(0), scaler)
        assert bool(made.skipped) == overflow and not made.failed
        assert torch.equal(parameters(ours), before) == overflow
        assert (float(scaler.scale), int(scaler.good)) == (scale, not (overflow or scale > 2**16))
    scaler.scale.fill_(1.0)
    for bad in ("gradient", "loss"):
        loss = ours.loss(0) * (math.nan if bad == "loss" else 1)
        (loss * math.inf).backward()
        assert update(optimizers[0], ours, loss, torch.tensor(0.1), torch.tensor(0), scaler).failed
