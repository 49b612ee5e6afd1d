"""Path M's Triton kernels: from a row of logits to its loss and, in place, its d-logits.

With y = l - max l, s = sum exp y, C = smoothing / N, a = (1 - smoothing) lam and
c = (1 - smoothing)(1 - lam), row b of weight w gives

    loss = log s - a y_i - c y_j - C sum_k y_k          d-logit_k = w (exp y_k / s - C - hits)

in shifted logits, so that a large common offset costs no digits. Source of the mathematics:
Cao, Yu, Wu, ECCV 2022, with torch's label smoothing; softmax over blocks: Milakov and
Gimelshein, "Online normalizer calculation for softmax", 2018.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton
import triton.language as tl
from torch import Tensor

PAD = 64  # logits a row's length is rounded up to, so that loads of 16 bytes stay aligned
ONE_PASS = 16384  # logits a program keeps in registers; longer rows are read twice
LONG_BLOCK = 4096
# Stands for the maximum of nothing: finite, so that -inf less it is -inf, not NaN.
LOWEST = tl.constexpr(-1e30)


@triton.jit
def tl_targets(b, ROWS, PARTNER, LAM, SHARE, share, num):
    """Row b's own row and partner, -1 where there is none; shares lam and w; rows in range?"""
    row = tl.load(ROWS + b).to(tl.int64)
    inside = (row >= 0) & (row < num)
    other, lam = row * 0 - 1, 1.0
    if PARTNER is not None:
        other = tl.load(PARTNER + b).to(tl.int64)
        inside = inside & (other >= 0) & (other < num)
        lam = tl.load(LAM + b)
    w = share
    if SHARE is not None:
        w = tl.load(SHARE + b)
    # Narrowed after the check in 64 bits: 2**32 must not become row 0.
    row = tl.where(inside, row, -1).to(tl.int32)
    other = tl.where(inside, other, -1).to(tl.int32)
    return row, other, lam, w, inside


@triton.jit
def tl_loss(s, own, pasted, q, lam, smoothing, num):
    """The loss from shifted logits; what a share of zero multiplies may be infinite."""
    hard, soft = 1 - smoothing, smoothing / num
    target = tl.where(hard == 0, 0.0, hard * (lam * own + (1 - lam) * pasted))
    return tl.log(s) - target - tl.where(soft == 0, 0.0, soft * q)


@triton.jit
def tl_gradient(e, r, o, row, other, lam, w, smoothing, num):
    """w (P - T) of columns o, where e r = P."""
    hard = w * (1 - smoothing)
    g = w * (e * r) - w * (smoothing / num)
    g -= tl.where(o == row, hard * lam, 0.0)
    return g - tl.where(o == other, hard * (1 - lam), 0.0)


@triton.jit
def row_kernel(
    X,  # (B, pitch) fp32 logits without bias; their storage takes the d-logits
    G,  # the same storage in the type of the d-logits, rows g_pitch apart
    BIAS,  # (pitch,) fp32 or None
    ROWS, PARTNER, LAM, SHARE,  # (B,); all but ROWS may be None
    LOSS, LSE, HIT,  # (B,) fp32 weighted losses, fp32, uint8
    share, smoothing, num, pitch, g_pitch,
    BLOCK: tl.constexpr, WRITE: tl.constexpr,
):  # fmt: skip
    """One program, one row, read once: 0 < num <= pitch <= BLOCK."""
    b = tl.program_id(0).to(tl.int64)
    row, other, lam, w, valid = tl_targets(b, ROWS, PARTNER, LAM, SHARE, share, num)
    o = tl.arange(0, BLOCK)
    # Masked by the pitch, a multiple of 64: a mask by num would keep loads from being vectors.
    x = tl.load(X + b * pitch + o, mask=o < pitch, other=0.0)
    if BIAS is not None:
        x += tl.load(BIAS + o, mask=o < pitch, other=0.0)
    x = tl.where(o < num, x, float("-inf"))
    top = tl.maximum(tl.max(x, 0), LOWEST)
    y = x - top
    e = tl.exp(y)
    s = tl.sum(e, 0)
    s = tl.where(valid, s, float("nan"))
    own = tl.sum(tl.where(o == row, y, 0.0), 0)
    pasted = tl.sum(tl.where(o == other, y, 0.0), 0)
    q = tl.sum(tl.where(o < num, y, 0.0), 0)
    tl.store(LOSS + b, w * tl_loss(s, own, pasted, q, lam, smoothing, num))
    tl.store(LSE + b, top + tl.log(s))
    first = tl.min(tl.where(x == top, o, BLOCK), 0)
    tl.store(HIT + b, (first == row).to(tl.uint8))
    if WRITE:
        # Every store waits for s, which no warp knows before all have read their logits.
        g = tl_gradient(e, 1 / s, o, row, other, lam, w, smoothing, num)
        g = tl.where(o < num, g, 0.0)
        tl.store(G + b * g_pitch + o, g.to(G.dtype.element_ty), mask=o < pitch)


@triton.jit
def tl_block(X, BIAS, start, b, num, pitch, BLOCK: tl.constexpr):
    """Columns start to start + BLOCK of row b, their numbers; -inf beyond num."""
    o = start + tl.arange(0, BLOCK)
    x = tl.load(X + b * pitch + o, mask=o < pitch, other=0.0)
    if BIAS is not None:
        x += tl.load(BIAS + o, mask=o < pitch, other=0.0)
    return tl.where(o < num, x, float("-inf")), o


@triton.jit
def tl_one(X, BIAS, b, column, pitch):
    """One logit, 0 for column -1."""
    x = tl.load(X + b * pitch + column, mask=column >= 0, other=0.0)
    if BIAS is not None:
        x += tl.load(BIAS + column, mask=column >= 0, other=0.0)
    return x


@triton.jit
def long_row_kernel(
    X, G, BIAS, ROWS, PARTNER, LAM, SHARE, LOSS, LSE, HIT,
    share, smoothing, num, pitch, g_pitch,
    BLOCK: tl.constexpr, WRITE: tl.constexpr,
):  # fmt: skip
    """As `row_kernel`, for rows of any length: read twice, the second time from cache."""
    b = tl.program_id(0).to(tl.int64)
    row, other, lam, w, valid = tl_targets(b, ROWS, PARTNER, LAM, SHARE, share, num)
    own = tl_one(X, BIAS, b, row, pitch)
    pasted = tl_one(X, BIAS, b, other, pitch)
    top, first = tl.full((), LOWEST, tl.float32), tl.full((), -1, tl.int32)
    s, q, seen = top * 0, top * 0, top * 0
    for start in range(0, pitch, BLOCK):
        x, o = tl_block(X, BIAS, start, b, num, pitch, BLOCK)
        highest = tl.max(x, 0)
        first = tl.where(highest > top, tl.min(tl.where(x == highest, o, num), 0), first)
        new = tl.maximum(top, highest)
        y = x - new
        s = s * tl.exp(top - new) + tl.sum(tl.exp(y), 0)
        # What was summed relative to the old maximum is `seen` columns too high.
        q = q + seen * (top - new) + tl.sum(tl.where(o < num, y, 0.0), 0)
        seen += tl.minimum(num - start, BLOCK).to(tl.float32)
        top = new
    s = tl.where(valid, s, float("nan"))
    pasted = tl.where(other >= 0, pasted - top, 0.0)
    tl.store(LOSS + b, w * tl_loss(s, own - top, pasted, q, lam, smoothing, num))
    tl.store(LSE + b, top + tl.log(s))
    tl.store(HIT + b, (first == row).to(tl.uint8))
    if WRITE:
        for start in range(0, pitch, BLOCK):
            x, o = tl_block(X, BIAS, start, b, num, pitch, BLOCK)
            g = tl_gradient(tl.exp(x - top), 1 / s, o, row, other, lam, w, smoothing, num)
            # A narrower d-logit lies over another thread's logit of this block or one before.
            tl.debug_barrier()
            g = tl.where(o < num, g, 0.0)
            tl.store(G + b * g_pitch + o, g.to(G.dtype.element_ty), mask=o < pitch)


def pitch_of(num: int) -> int:
    """Logits from one row to the next: `num` rounded up to a multiple of 64."""
    return (num + PAD - 1) // PAD * PAD


def shape_of(pitch: int) -> tuple[bool, int, int]:
    """Whether a row is read once, the logits a block holds, and the warps that share it."""
    block = triton.next_power_of_2(pitch)
    if block > ONE_PASS:
        return False, LONG_BLOCK, 8
    return True, block, min(max(block // 256, 1), 16)


def launch_rows(
    logits: Tensor,
    num: int,
    bias: Tensor | None,
    rows: Tensor,
    partner: Tensor | None,
    lam: Tensor | None,
    share: Tensor | None,
    smoothing: float,
    mean: float,
    gradient: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weighted losses, hits, lse (B,) and d-logits (B, pitch) of `gradient`'s type.

    logits (B, pitch) fp32, contiguous, are overwritten by the d-logits, whose pad columns are
    zero; with `gradient` None they stay. bias (pitch,), lam and share (B,) are fp32; `mean` is
    every row's weight where `share` is None.
    """
    batch, pitch = logits.shape
    losses, lse = logits.new_empty(batch), logits.new_empty(batch)
    hits = torch.empty(batch, dtype=torch.uint8, device=logits.device)
    d_logits = logits if gradient is None else logits.view(gradient)
    once, block, warps = shape_of(pitch)
    if batch:
        kernel = row_kernel if once else long_row_kernel
        with torch.cuda.device_of(logits):
            kernel[(batch,)](
                logits, d_logits, bias, rows, partner, lam, share, losses, lse, hits,
                mean, smoothing, num, pitch, d_logits.shape[1],
                BLOCK=block, WRITE=gradient is not None, num_warps=warps, num_stages=1,
            )  # fmt: skip
    return losses, hits.view(torch.bool), lse, d_logits[:, :pitch]
