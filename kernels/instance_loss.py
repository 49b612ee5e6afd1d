"""Label-smoothed instance discrimination: every image is its own class, crops may hold two.

With l = z W^T + b over N instances, kept share lam, smoothing e, own row i and partner j:

    loss = logsumexp(l) - lam (1 - e) l_i - (1 - lam)(1 - e) l_j - (e / N) sum_k l_k

Source: Cao, Yu, Wu, "Training Vision Transformers with Only 2040 Images", ECCV 2022; the smoothed
targets are torch's `cross_entropy(label_smoothing=e)`, mixed by lam.
"""

from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor


class Stats(NamedTuple):
    """What a forward pass knows besides the loss."""

    hits: Tensor  # (B,) bool: the own row has the largest logit
    lse: Tensor  # (B,) logsumexp of the logits


@overload
def instance_loss(
    z: Tensor,
    weight: Tensor,
    rows: Tensor,
    partner: Tensor | None = None,
    lam: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    smoothing: float = 0.1,
    row_weight: Tensor | None = None,
    return_stats: Literal[False] = False,
) -> Tensor: ...


@overload
def instance_loss(
    z: Tensor,
    weight: Tensor,
    rows: Tensor,
    partner: Tensor | None = None,
    lam: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    smoothing: float = 0.1,
    row_weight: Tensor | None = None,
    return_stats: Literal[True],
) -> tuple[Tensor, Stats]: ...


def instance_loss(
    z: Tensor,
    weight: Tensor,
    rows: Tensor,
    partner: Tensor | None = None,
    lam: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    smoothing: float = 0.1,
    row_weight: Tensor | None = None,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, Stats]:
    """The weighted sum of every crop's loss.

    z (B, D), weight (N, D), bias (N,): any float types; rows, partner (B,): integers in [0, N),
    partner `None` meaning none; lam, row_weight (B,): floats, `None` meaning 1 and 1/B. Computes
    in the widest type given, never below float32. With `return_stats`, also `Stats`.
    """
    loss, stats = reference(z, weight, rows, partner, lam, bias, smoothing, row_weight)
    return (loss, stats) if return_stats else loss


def reference(
    z: Tensor,
    weight: Tensor,
    rows: Tensor,
    partner: Tensor | None,
    lam: Tensor | None,
    bias: Tensor | None,
    smoothing: float,
    row_weight: Tensor | None,
) -> tuple[Tensor, Stats]:
    """The definition, on any device; autograd gives the gradients."""
    given = [t for t in (z, weight, bias, lam, row_weight) if t is not None]
    wide = torch.float32
    for tensor in given:
        wide = torch.promote_types(wide, tensor.dtype)
    with torch.autocast(z.device.type, enabled=False):
        logits = z.to(wide) @ weight.to(wide).T
        if bias is not None:
            logits = logits + bias.to(wide)
        lse = logits.logsumexp(dim=1)
        own = logits.gather(1, rows.long()[:, None])[:, 0]
        target = own
        if partner is not None and lam is not None:
            pasted = logits.gather(1, partner.long()[:, None])[:, 0]
            target = lam.to(wide) * own + (1 - lam.to(wide)) * pasted
        losses = lse - (1 - smoothing) * target - smoothing * logits.mean(dim=1)
        shares = 1 / rows.numel() if row_weight is None else row_weight.to(wide)
        stats = Stats(hits=logits.detach().argmax(dim=1) == rows, lse=lse.detach())
        return (losses * shares).sum(), stats
