"""Label-smoothed instance discrimination: every image is its own class, crops may hold two.

With l = z W^T + b over N instances, kept share lam, smoothing e, own row i and partner j:

    loss = logsumexp(l) - lam (1 - e) l_i - (1 - lam)(1 - e) l_j - (e / N) sum_k l_k

Source: Cao, Yu, Wu, "Training Vision Transformers with Only 2040 Images", ECCV 2022; the smoothed
targets are torch's `cross_entropy(label_smoothing=e)`, mixed by lam.

Here: the public function, which alone chooses, the reference and the cases. Beside it, `_fused`
brings the arguments to a path: `_logits` over `_rows` is path M, `_stream` over `_tiles` path F.
"""

import os
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

try:
    from fastidmm.kernels.instance_loss_fused import fused
except ImportError:  # no Triton: macOS, Windows
    fused = None  # type: ignore[assignment]

# Look at every row before it is used, and say which is wrong; the device is waited for.
DEBUG = os.environ.get("FASTIDMM_DEBUG") == "1"


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

    On a GPU with Triton, unless something is float64, it is one fused operator: logits in fp32 of
    bf16 factors under bf16 autocast (or of bf16 inputs), gradients for z, weight, bias. There a
    row outside [0, N) makes the loss NaN; with FASTIDMM_DEBUG=1 it is an IndexError everywhere.
    """
    if DEBUG:
        check_rows(weight.shape[0], rows=rows, partner=partner)
    arguments = (z, weight, rows, partner, lam, bias, smoothing, row_weight)
    wide = any(isinstance(t, Tensor) and t.dtype == torch.float64 for t in arguments)
    if fused is not None and z.is_cuda and not wide:
        loss, *stats = fused(*arguments)
        found = loss, Stats(*stats)
    else:
        found = reference(*arguments)
    return found if return_stats else found[0]


def check_rows(num: int, **given: Tensor | None) -> None:
    """IndexError unless all integers lie in [0, num). Waits for the device."""
    for name, rows in given.items():
        if rows is not None and rows.numel():
            low, high = int(rows.min()), int(rows.max())
            if low < 0 or high >= num:
                raise IndexError(f"{name} from {low} to {high}, but only 0 to {num - 1} exist")


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
        losses = lse
        # A share of zero does not count even where a logit is infinite, as torch has it.
        if smoothing < 1:
            losses = losses - (1 - smoothing) * target
        if smoothing > 0:
            losses = losses - smoothing * logits.mean(dim=1)
        stats = Stats(hits=logits.detach().argmax(dim=1) == rows, lse=lse.detach())
        if row_weight is None:
            return losses.mean(), stats
        return (losses * row_weight.to(wide)).sum(), stats


def cases() -> Iterator[tuple[str, dict[str, Any]]]:
    """Awkward inputs by name, as arguments of `instance_loss` in float32 on the CPU."""
    for b, d, n in ((1, 1, 1), (3, 7, 2), (6, 16, 63), (4, 48, 257), (2, 65, 2040)):
        random = torch.Generator().manual_seed(b + 100 * n)
        rows, partner = torch.randint(n, (2, b), generator=random)
        partner[0] = rows[0]
        plain: dict[str, Any] = {
            "z": torch.randn(b, d, generator=random),
            "weight": torch.randn(n, d, generator=random) / d**0.5,
            "rows": rows,
        }
        mixed = plain | {"partner": partner, "lam": torch.rand(b, generator=random)}
        full = mixed | {
            "bias": torch.randn(n, generator=random),
            "row_weight": torch.randn(b, generator=random) * (torch.arange(b) != 1),
        }
        named = {
            "plain": plain,
            "mixed": mixed,
            "full": full,
            "int32": full | {"rows": rows.int(), "partner": partner.int()},
            "one weight for all": full | {"lam": torch.tensor([0.25]).expand(b)},
            "hard": full | {"smoothing": 0.0},
            "all smooth": full | {"smoothing": 1.0},
            "wide logits": full | {"z": plain["z"] * 30},
        }
        yield from ((f"{name} {b} x {d} x {n}", given) for name, given in named.items())
