"""The definition of the instance loss against torch's own smoothed cross-entropy in float64."""

import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fastidmm.kernels.instance_loss import instance_loss

SHAPES = [(1, 1, 1), (5, 4, 1), (6, 8, 2), (7, 13, 37), (33, 16, 129)]  # B, D, N


class Case(NamedTuple):
    z: Tensor
    weight: Tensor
    bias: Tensor
    rows: Tensor
    partner: Tensor
    lam: Tensor


def case(shape: tuple[int, int, int], dtype: torch.dtype = torch.float64) -> Case:
    """Random numbers; the first crop's partner is itself."""
    b, d, n = shape
    random = torch.Generator().manual_seed(b + 100 * n)
    floats = [torch.randn(s, generator=random, dtype=torch.float64) for s in ((b, d), (n, d), (n,))]
    rows, partner = torch.randint(n, (2, b), generator=random)
    partner[0] = rows[0]
    lam = torch.rand(b, generator=random, dtype=torch.float64)
    z, weight, bias = (t.to(dtype) for t in floats)
    return Case(z, weight, bias, rows, partner, lam.to(dtype))


def truth(c: Case, smoothing: float, *, mixed: bool = True, bias: bool = True) -> Tensor:
    """Each crop's loss: lam CE(a) + (1 - lam) CE(b), by torch in float64: (B,)."""
    logits = c.z.double() @ c.weight.double().T
    logits = logits + c.bias.double() if bias else logits
    own = cross_entropy(logits, c.rows.long(), label_smoothing=smoothing, reduction="none")
    if not mixed:
        return own
    other = cross_entropy(logits, c.partner.long(), label_smoothing=smoothing, reduction="none")
    lam = c.lam.double()
    return lam * own + (1 - lam) * other


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_loss_and_gradients_are_torchs(shape: tuple[int, int, int], smoothing: float) -> None:
    c = case(shape)
    leaves = [t.requires_grad_() for t in (c.z, c.weight, c.bias)]
    ours = instance_loss(c.z, c.weight, c.rows, c.partner, c.lam, bias=c.bias, smoothing=smoothing)
    theirs = truth(c, smoothing).mean()
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    for one, other in zip(
        torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_gradient_of_the_logits_is_softmax_minus_target() -> None:
    """With unit weight vectors z is the logits: (P - T) / B, the additive form of the paper."""
    b, n, smoothing = 6, 9, 0.1
    c = case((b, n, n))
    z = c.z.requires_grad_()
    loss = instance_loss(
        z, torch.eye(n, dtype=torch.float64), c.rows, c.partner, c.lam, smoothing=smoothing
    )
    (gradient,) = torch.autograd.grad(loss, z)
    target = torch.full((b, n), smoothing / n, dtype=torch.float64)
    for i in range(b):
        target[i, c.rows[i]] += c.lam[i] * (1 - smoothing)
        target[i, c.partner[i]] += (1 - c.lam[i]) * (1 - smoothing)
    torch.testing.assert_close(target.sum(dim=1), torch.ones(b, dtype=torch.float64))
    torch.testing.assert_close(gradient, (z.softmax(dim=1) - target) / b, rtol=1e-10, atol=1e-14)


def test_gradcheck() -> None:
    c = case((4, 3, 5))
    weights = torch.tensor([0.3, 0.0, 2.0, 1.0], dtype=torch.float64)

    def loss(z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return instance_loss(
            z, weight, c.rows, c.partner, c.lam, bias=bias, smoothing=0.1, row_weight=weights
        )

    assert torch.autograd.gradcheck(loss, [t.requires_grad_() for t in (c.z, c.weight, c.bias)])


def test_without_partner_or_share_it_is_plain_cross_entropy() -> None:
    c = case((7, 13, 37))
    expected = truth(c, 0.1, mixed=False, bias=False).mean()
    for partner, lam in ((None, None), (None, c.lam), (c.partner, None)):
        loss = instance_loss(c.z, c.weight, c.rows, partner, lam)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    kept = instance_loss(c.z, c.weight, c.rows, c.partner, torch.ones_like(c.lam))
    torch.testing.assert_close(kept, expected, rtol=1e-12, atol=0)


def test_row_weights_weigh_every_crop() -> None:
    c = case((7, 13, 37))
    weights = torch.tensor([0, 1, 2, 0.5, 0.25, 3, 1], dtype=torch.float64)
    loss = instance_loss(c.z, c.weight, c.rows, c.partner, c.lam, bias=c.bias, row_weight=weights)
    torch.testing.assert_close(loss, (truth(c, 0.1) * weights).sum(), rtol=1e-12, atol=0)


def test_an_own_partner_counts_once() -> None:
    c = case((7, 13, 37))
    mixed = instance_loss(c.z, c.weight, c.rows, c.rows, c.lam)
    torch.testing.assert_close(mixed, instance_loss(c.z, c.weight, c.rows), rtol=1e-12, atol=0)


@pytest.mark.parametrize("num", [1, 2, 2040])
def test_equal_logits_give_ln_n(num: int) -> None:
    weight, rows = torch.zeros(num, 4), torch.tensor([0, num - 1])
    for smoothing in (0.0, 0.1, 1.0):
        loss = instance_loss(torch.randn(2, 4), weight, rows, smoothing=smoothing)
        assert loss.item() == pytest.approx(math.log(num), abs=1e-5)


@pytest.mark.parametrize(
    ("z", "head", "computed", "tolerance"),
    [
        (torch.bfloat16, torch.bfloat16, torch.float32, 1e-5),
        (torch.bfloat16, torch.float32, torch.float32, 1e-5),
        (torch.float16, torch.float16, torch.float32, 1e-5),
        (torch.float32, torch.float32, torch.float32, 1e-5),
        (torch.float32, torch.float64, torch.float64, 1e-12),
    ],
)
def test_narrow_types_are_computed_in_float32(
    z: torch.dtype, head: torch.dtype, computed: torch.dtype, tolerance: float
) -> None:
    c = case((33, 16, 129))
    c = c._replace(z=c.z.to(z), weight=c.weight.to(head), bias=c.bias.to(head), lam=c.lam.to(head))
    leaf = c.z.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):  # as in a training step; it must not reach inside
        loss = instance_loss(leaf, c.weight, c.rows, c.partner, c.lam, bias=c.bias)
    assert loss.dtype == computed
    torch.testing.assert_close(loss.double(), truth(c, 0.1).mean(), rtol=tolerance, atol=tolerance)
    (gradient,) = torch.autograd.grad(loss, leaf)
    assert gradient.dtype == z


def test_large_logits_do_not_overflow() -> None:
    c = case((7, 13, 37), torch.float32)
    for offset in (3e4, -3e4):
        shifted = c._replace(bias=c.bias + offset)
        loss = instance_loss(c.z, c.weight, c.rows, c.partner, c.lam, bias=shifted.bias)
        # Adding one number to all logits changes nothing but their last digits.
        assert loss.item() == pytest.approx(float(truth(c, 0.1).mean()), abs=0.02)


@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_stats_and_small_integers(kind: torch.dtype) -> None:
    c = case((33, 16, 129))
    logits = c.z @ c.weight.T + c.bias
    best = logits.detach().numpy().argmax(axis=1)
    rows = c.rows.clone()
    rows[::2] = torch.from_numpy(best)[::2]
    c = c._replace(rows=rows.to(kind), partner=c.partner.to(kind))
    arguments: dict[str, Any] = {"bias": c.bias, "smoothing": 0.1}
    loss, stats = instance_loss(
        c.z.requires_grad_(), c.weight, c.rows, c.partner, c.lam, return_stats=True, **arguments
    )
    torch.testing.assert_close(loss, truth(c, 0.1).mean(), rtol=1e-12, atol=0)
    assert loss.requires_grad and not stats.lse.requires_grad
    assert stats.hits.tolist() == (best == rows.numpy()).tolist()
    assert 17 <= int(stats.hits.sum()) < 33
    torch.testing.assert_close(
        stats.lse, logits.detach().exp().sum(dim=1).log(), rtol=1e-12, atol=0
    )
