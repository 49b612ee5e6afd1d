"""The instance loss on a GPU: how its inputs reach path M, with logits, or path F, without."""

import torch
from torch import Tensor

from fastidmm.kernels import instance_loss_logits as logits_path
from fastidmm.kernels import instance_loss_stream as stream_path
from fastidmm.kernels.instance_loss_rows import pitch_of

# fp32 logits a batch may have in memory: 6,144 crops of 174,000 instances, 1,536 of 699,000.
LOGITS_BYTES = 4 << 30


def type_of(z: Tensor, weight: Tensor) -> torch.dtype:
    """What the products take: bf16 under bf16 autocast or of bf16 inputs, else fp32.

    Never fp16: d-logits of 1 / (B N) lie below its range.
    """
    kind = torch.promote_types(z.dtype, weight.dtype)
    if torch.is_autocast_enabled(z.device.type):
        kind = torch.get_autocast_dtype(z.device.type)
    return kind if kind == torch.bfloat16 else torch.float32


def operand(weight: Tensor, kind: torch.dtype) -> Tensor:
    """The weight in `kind`, rows of zeros below it up to the pitch of the logits: (pitch, D)."""
    num, pitch = weight.shape[0], pitch_of(weight.shape[0])
    if num == pitch:
        return weight.to(kind).contiguous()
    found = weight.new_empty(pitch, weight.shape[1], dtype=kind)
    found[:num].copy_(weight)
    found[num:].zero_()
    return found


def fused(
    z: Tensor,
    weight: Tensor,
    rows: Tensor,
    partner: Tensor | None,
    lam: Tensor | None,
    bias: Tensor | None,
    smoothing: float,
    row_weight: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss (), hits (B,), lse (B,): `reference` in fp32, its products of `type_of`.

    Rows outside [0, N) make the loss NaN; nothing waits for the device.
    """
    kind = type_of(z, weight)
    if partner is None or lam is None:
        partner = lam = None
    targets = (
        rows.contiguous(),
        None if partner is None else partner.contiguous(),
        None if lam is None else lam.detach().float().contiguous(),
        None if row_weight is None else row_weight.detach().float().contiguous(),
    )
    left = z.detach().to(kind).contiguous()
    large = 4 * z.shape[0] * pitch_of(weight.shape[0]) > LOGITS_BYTES
    if large and kind == torch.bfloat16 and stream_path.tiles_of(z.device, z.shape[1]):
        right = weight.detach().to(kind).contiguous()
        loss, hits, lse, _ = stream_path.forward(
            z, weight, bias, left, right, *targets, float(smoothing)
        )
        return loss, hits, lse
    needed = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (z, weight, bias)
    )
    keep = needed and not large
    right = operand(weight.detach(), kind)
    loss, hits, lse, _ = logits_path.forward(
        z, weight, bias, left, right, *targets, float(smoothing), keep
    )
    return loss, hits, lse
