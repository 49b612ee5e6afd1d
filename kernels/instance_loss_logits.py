"""Path M of the instance loss: logits in memory, their gradient written over them.

A product with fp32 logits, the row kernel, and two products in backward. Registered as
`fastidmm::instance_loss_logits`, so that torch.compile and graph capture see one node. Where the
logits would outgrow memory, `keep` is false and backward makes them again, some rows at a time.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastidmm.kernels.instance_loss_rows import launch_rows

# Logits of a part where they are made anew. Fewer rows would make the products slow.
PART_BYTES = 2 << 30
PART_ROWS = 256

TARGETS = "Tensor rows, Tensor? partner, Tensor? lam, Tensor? share, float smoothing"
FORWARD = (
    "(Tensor z, Tensor weight, Tensor? bias, Tensor left, Tensor right, "
    f"{TARGETS}, bool keep) -> (Tensor, Tensor, Tensor, Tensor)"
)
BACKWARD = (
    "(Tensor gradient, Tensor d_logits, Tensor left, Tensor right, Tensor? bias, "
    f"{TARGETS}, int num, bool for_z, bool for_weight, bool for_bias) -> (Tensor, Tensor, Tensor)"
)


def product(a: Tensor, b: Tensor) -> Tensor:
    """A matrix product in fp32, of bf16 factors where the device can."""
    if a.is_cuda and a.dtype == torch.bfloat16:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float())


def padded(bias: Tensor | None, pitch: int) -> Tensor | None:
    """The bias in fp32, as long as a row of logits."""
    return None if bias is None else pad(bias.float(), (0, pitch - bias.numel()))


def parts_of(left: Tensor, pitch: int) -> list[slice]:
    """Rows whose fp32 logits together take at most `PART_BYTES`, or 256 rows."""
    size = max(PART_ROWS, PART_BYTES // (4 * pitch))
    return [slice(start, start + size) for start in range(0, max(left.shape[0], 1), size)]


def share_of(share: Tensor | None, losses: Tensor) -> Tensor:
    """The sum; without weights the mean, of no rows NaN as torch's."""
    if share is None and losses.numel() == 0:
        return losses.new_full((), float("nan"))
    return losses.sum()


def joined(parts: list[Tensor]) -> Tensor:
    """The parts as one tensor; of one part, no copy."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def cut(tensor: Tensor | None, part: slice) -> Tensor | None:
    """A part of the rows of what may be None."""
    return None if tensor is None else tensor[part]


@torch.library.custom_op("fastidmm::instance_loss_logits", mutates_args=(), schema=FORWARD)
def forward(
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    left: Tensor,
    right: Tensor,
    rows: Tensor,
    partner: Tensor | None,
    lam: Tensor | None,
    share: Tensor | None,
    smoothing: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss (), hits (B,), lse (B,), and d-logits (B, pitch) where `keep`, else (0, pitch).

    z, weight, bias are what backward answers for. The product is of left (B, D), which is z, and
    right (pitch, D), which is weight with rows of zeros, both fp32 or both bf16; lam and share
    (B,) are fp32. Rows outside [0, N) make the loss NaN.
    """
    num, pitch, mean = weight.shape[0], right.shape[0], 1 / max(left.shape[0], 1)
    extra = padded(bias, pitch)
    found = []
    with torch.autocast(left.device.type, enabled=False):
        for part in [slice(None)] if keep else parts_of(left, pitch):
            logits = product(left[part], right.T)
            targets = (rows[part], cut(partner, part), cut(lam, part), cut(share, part))
            kind = left.dtype if keep else None
            found.append(launch_rows(logits, num, extra, *targets, smoothing, mean, kind))
    losses, hits, lse = (joined(list(t)) for t in list(zip(*found, strict=True))[:3])
    d_logits = found[0][3] if keep else left.new_empty(0, pitch)
    return share_of(share, losses), hits, lse, d_logits


@torch.library.custom_op(
    "fastidmm::instance_loss_logits_backward", mutates_args=(), schema=BACKWARD
)
def backward(
    gradient: Tensor,
    d_logits: Tensor,
    left: Tensor,
    right: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    partner: Tensor | None,
    lam: Tensor | None,
    share: Tensor | None,
    smoothing: float,
    num: int,
    for_z: bool,
    for_weight: bool,
    for_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of z (B, D), weight (N, D), bias (N,) in fp32, empty where not asked for."""
    batch, pitch = left.shape[0], right.shape[0]
    kept = d_logits.shape[0] == batch
    extra, mean = padded(bias, pitch), 1 / max(batch, 1)
    d_z, d_weight, d_bias = [], None, None
    with torch.autocast(left.device.type, enabled=False):
        for part in [slice(None)] if kept else parts_of(left, pitch):
            g, z = d_logits, left[part]
            if not kept:
                targets = (rows[part], cut(partner, part), cut(lam, part), cut(share, part))
                logits = product(z, right.T)
                g = launch_rows(logits, num, extra, *targets, smoothing, mean, left.dtype)[3]
            if for_z:
                d_z.append(product(g, right) * gradient)
            if for_weight:
                # The upstream gradient goes to the small factor: nothing as large as the
                # logits is read again, and what is saved stays as it is.
                found = product(g.T, (z * gradient).to(z.dtype))[:num]
                d_weight = found if d_weight is None else d_weight.add_(found)
            if for_bias:
                found = g.sum(0, dtype=torch.float32)[:num] * gradient
                d_bias = found if d_bias is None else d_bias.add_(found)
    # What is empty is so by itself: an operator's outputs may not be one tensor.
    return (
        joined(d_z) if for_z else gradient.new_empty(0),
        gradient.new_empty(0) if d_weight is None else d_weight,
        gradient.new_empty(0) if d_bias is None else d_bias,
    )


@forward.register_fake
def _(
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    left: Tensor,
    right: Tensor,
    rows: Tensor,
    partner: Tensor | None,
    lam: Tensor | None,
    share: Tensor | None,
    smoothing: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, pitch = left.shape[0], right.shape[0]
    lse = left.new_empty(batch, dtype=torch.float32)
    wide = 4 // left.element_size() * pitch  # a row's fp32 logits, counted in d-logits
    d_logits = left.new_empty_strided((batch if keep else 0, pitch), (wide if keep else pitch, 1))
    return lse.new_empty(()), lse.new_empty(batch, dtype=torch.bool), lse, d_logits


@backward.register_fake
def _(
    gradient: Tensor,
    d_logits: Tensor,
    left: Tensor,
    right: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    partner: Tensor | None,
    lam: Tensor | None,
    share: Tensor | None,
    smoothing: float,
    num: int,
    for_z: bool,
    for_weight: bool,
    for_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    def made(wanted: bool, *shape: int) -> Tensor:
        return left.new_empty(shape if wanted else (0,), dtype=torch.float32)

    width = left.shape[1]
    return (
        made(for_z, left.shape[0], width),
        made(for_weight, num, width),
        made(for_bias, num),
    )


def keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Saves the operands, the targets and the d-logits; nothing but the loss has a gradient."""
    z, weight, bias, left, right, rows, partner, lam, share, smoothing, _ = inputs
    _, hits, lse, d_logits = output
    ctx.save_for_backward(d_logits, left, right, bias, rows, partner, lam, share)
    ctx.mark_non_differentiable(hits, lse, d_logits)
    ctx.set_materialize_grads(False)
    ctx.smoothing, ctx.num = smoothing, weight.shape[0]
    ctx.kinds = z.dtype, weight.dtype, None if bias is None else bias.dtype


def differentiate(ctx: Any, gradient: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    """The gradients asked for, each in the type of what it belongs to."""
    wanted = ctx.needs_input_grad[:3]
    found = backward(gradient, *ctx.saved_tensors, ctx.smoothing, ctx.num, *wanted)
    answers = (
        t.to(kind) if wants else None
        for t, kind, wants in zip(found, ctx.kinds, wanted, strict=True)
    )
    return *answers, *[None] * 8


forward.register_autograd(differentiate, setup_context=keep_for_backward)
