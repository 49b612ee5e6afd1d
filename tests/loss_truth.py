"""The instance loss spelt out in float64, and how far a result is from it."""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Result(NamedTuple):
    """What a loss function gives for one batch."""

    loss: Tensor  # ()
    hits: Tensor  # (B,)
    lse: Tensor  # (B,)
    z: Tensor  # gradient (B, D)
    weight: Tensor  # gradient (N, D)
    bias: Tensor | None  # gradient (N,)


def truth(
    z: Tensor,
    weight: Tensor,
    rows: Tensor,
    partner: Tensor | None = None,
    lam: Tensor | None = None,
    bias: Tensor | None = None,
    smoothing: float = 0.1,
    row_weight: Tensor | None = None,
) -> Result:
    """Cross-entropy to explicit targets, its gradients by (P - T), all in float64."""
    batch, num = z.shape[0], weight.shape[0]
    z, weight = z.double(), weight.double()
    w = torch.ones(batch).double() / batch if row_weight is None else row_weight
    share = torch.ones(batch) if partner is None or lam is None else lam
    target = torch.full((batch, num), smoothing / num, dtype=torch.float64, device=z.device)
    for b in range(batch):
        target[b, rows[b]] += (1 - smoothing) * share[b].double()
        if partner is not None:
            target[b, partner[b]] += (1 - smoothing) * (1 - share[b].double())
    logits = z @ weight.T + (0 if bias is None else bias.double())
    log_p = logits - logits.amax(1, keepdim=True)
    log_p = log_p - log_p.exp().sum(1, keepdim=True).log()
    w = w.double().to(z.device)
    d_logits = w[:, None] * (log_p.exp() - target)
    return Result(
        loss=-(w * (target * log_p).sum(1)).sum(),
        hits=logits.argmax(1) == rows,
        lse=(logits - log_p).mean(1),
        z=d_logits @ weight,
        weight=d_logits.T @ z,
        bias=None if bias is None else d_logits.sum(0),
    )


def result(function: Any, given: dict[str, Any], scale: float = 1.0) -> Result:
    """The function's answer and its gradients of `scale` times the loss, over `scale`."""
    names = [n for n in ("z", "weight", "bias") if given.get(n) is not None]
    leaves = {n: given[n].detach().requires_grad_() for n in names}
    loss, hits, lse = function(**(given | leaves))
    assert loss.shape == () and not lse.requires_grad and not hits.requires_grad
    found = torch.autograd.grad(scale * loss, list(leaves.values()))
    for one, leaf in zip(found, leaves.values(), strict=True):
        assert one.shape == leaf.shape and one.dtype == leaf.dtype
    gradients = {n: g / scale for n, g in zip(names, found, strict=True)}
    return Result(
        loss.detach(), hits, lse, gradients["z"], gradients["weight"], gradients.get("bias")
    )


def distance(one: Tensor, other: Tensor) -> float:
    """The norm of the difference over that of `other`, which for N = 1 is nothing."""
    return float((one.double() - other).norm() / other.norm().clamp(min=0.01))


def worst_row(one: Tensor, other: Tensor) -> float:
    """The largest relative error of a row, rows a millionth of the largest aside.

    What a norm over all rows hides: gradients of instances without a picture in the batch.
    """
    size = other.norm(dim=1)
    counted = size > 1e-6 * size.max()
    gap = (one.double() - other).norm(dim=1)
    return float((gap[counted] / size[counted]).max()) if counted.any() else 0.0


def errors(found: Result, true: Result) -> dict[str, float]:
    """How far every part of a result is from the truth."""
    per_row = {
        # Logits of fp32 cancel in it: where they are huge, so is what rounding leaves.
        "loss": float((found.loss.double() - true.loss).abs())
        / float(1 + true.loss.abs() + 0.1 * true.lse.abs().max()),
        "lse": float(((found.lse.double() - true.lse).abs() / (1 + true.lse.abs())).max()),
        "hits": float((found.hits != true.hits).sum()),
        "z": distance(found.z, true.z),
        "weight": distance(found.weight, true.weight),
        "worst row": worst_row(found.weight, true.weight),
    }
    if true.bias is not None and found.bias is not None:
        per_row["bias"] = distance(found.bias, true.bias)
    return per_row
