"""The Triton programs of `add_norm`: rows of tokens in, sums and norms out, and back.

A program holds whole rows in registers, so each number is read once and written once. Source of the
backward pass: Ba, Kiros, Hinton, "Layer Normalization", 2016.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import triton
import triton.language as tl


@triton.jit
def _places(first, num, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """Rows from `first` on, where their numbers lie, and which there are."""
    row = first + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    here = (row < num)[:, None] & (column < D)[None, :]
    return row, row[:, None] * D + column[None, :], here


@triton.jit
def _crop(row, tokens):
    """Whose tokens the rows are: in 32 bits, since a GPU has no division of 64."""
    return row.to(tl.int32) // tokens


@triton.jit
def forward_kernel(
    X, BRANCH,  # (num, D); BRANCH may be None, and then TOTAL is not written
    SCALE,  # (num / tokens,) fp32 or None
    WEIGHT, BIAS,  # (D,)
    TOTAL, NORMED,  # (num, D)
    MEAN, RSTD,  # (num,) fp32
    eps, num, tokens, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program, ROWS rows: their sums, and those normalised."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    row, place, here = _places(first, num, D, WIDTH, ROWS)
    column = tl.arange(0, WIDTH)
    x = tl.load(X + place, here, 0.0).to(tl.float32)
    if BRANCH is not None:
        y = tl.load(BRANCH + place, here, 0.0).to(tl.float32)
        if SCALE is not None:
            y *= tl.load(SCALE + _crop(row, tokens), row < num, 0.0)[:, None]
        total = (x + y).to(TOTAL.dtype.element_ty)
        tl.store(TOTAL + place, total, here)
        x = total.to(tl.float32)
    mean = tl.sum(x, 1) / D
    centred = tl.where(here, x - mean[:, None], 0.0)
    rstd = 1 / tl.sqrt_rn(tl.sum(centred * centred, 1) / D + eps)
    weight = tl.load(WEIGHT + column, column < D, 0.0).to(tl.float32)
    bias = tl.load(BIAS + column, column < D, 0.0).to(tl.float32)
    normed = centred * rstd[:, None] * weight[None, :] + bias[None, :]
    tl.store(NORMED + place, normed.to(NORMED.dtype.element_ty), here)
    tl.store(MEAN + row, mean, row < num)
    tl.store(RSTD + row, rstd, row < num)


@triton.jit
def backward_kernel(
    D_TOTAL,  # (num, D) or None
    D_NORMED, TOTAL,  # (num, D)
    SCALE, WEIGHT, MEAN, RSTD,  # as above
    D_X, D_BRANCH,  # (num, D); each may be None
    SHARES,  # (2 or 3, programs, D) fp32: each program's of weight, bias, and the branch's bias
    num, tokens, WITHIN: tl.constexpr,
    D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Every so many rows by one program, which sums what they say of weight and biases."""
    column = tl.arange(0, WIDTH)
    weight = tl.load(WEIGHT + column, column < D, 0.0).to(tl.float32)
    d_weight = tl.zeros((ROWS, WIDTH), tl.float32)
    d_bias = tl.zeros((ROWS, WIDTH), tl.float32)
    d_within = tl.zeros((ROWS, WIDTH), tl.float32)
    step = tl.num_programs(0).to(tl.int64) * ROWS
    for first in range(tl.program_id(0).to(tl.int64) * ROWS, num, step):
        row, place, here = _places(first, num, D, WIDTH, ROWS)
        mean = tl.load(MEAN + row, row < num, 0.0)
        rstd = tl.load(RSTD + row, row < num, 0.0)
        x = tl.load(TOTAL + place, here, 0.0).to(tl.float32)
        x = tl.where(here, (x - mean[:, None]) * rstd[:, None], 0.0)
        g = tl.load(D_NORMED + place, here, 0.0).to(tl.float32)
        d_weight += g * x
        d_bias += g
        g *= weight[None, :]
        along, across = tl.sum(g, 1) / D, tl.sum(g * x, 1) / D
        d_x = rstd[:, None] * (g - along[:, None] - x * across[:, None])
        if D_TOTAL is not None:
            d_x += tl.load(D_TOTAL + place, here, 0.0).to(tl.float32)
        if D_X is not None:
            tl.store(D_X + place, d_x.to(D_X.dtype.element_ty), here)
        if D_BRANCH is not None:
            if SCALE is not None:
                d_x *= tl.load(SCALE + _crop(row, tokens), row < num, 0.0)[:, None]
            tl.store(D_BRANCH + place, d_x.to(D_BRANCH.dtype.element_ty), here)
        if WITHIN:
            d_within += d_x
    share = SHARES + tl.program_id(0).to(tl.int64) * D + column
    apart = tl.num_programs(0).to(tl.int64) * D
    tl.store(share, tl.sum(d_weight, 0), column < D)
    tl.store(share + apart, tl.sum(d_bias, 0), column < D)
    if WITHIN:
        tl.store(share + 2 * apart, tl.sum(d_within, 0), column < D)
