"""The Triton programs of `linear_gelu` and `linear_heads`: GELU, gradients, and biases' in passing.

A bias's gradient is the sum of its output's over all rows. Here that is summed by the program that
writes it, so that nobody reads it once more: each program takes every so many rows of a block of
columns, and leaves a share that is summed after, always in the same order.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import triton
import triton.language as tl


@triton.jit
def beyond(x):
    """The normal distribution's integral from |x| on, 4e-8 off at most: 2 to a polynomial."""
    far = tl.abs(x)
    power = -1.4118387525741127e-06 * far + 2.2825359337730333e-05
    power = power * far - 0.00011088776227552444
    power = power * far - 0.0003079072048421949
    power = power * far + 0.007268236018717289
    power = power * far - 0.05262155830860138
    power = power * far - 0.45917361974716187
    power = power * far - 1.1511082649230957
    return tl.exp2(power * far - 1)


@triton.jit
def gelu(x):
    """What is left of x where it is below zero, or its distance from what GELU makes of it."""
    return tl.maximum(x, 0) - tl.abs(x) * beyond(x)


@triton.jit
def gelu_gradient(x):
    """The normal distribution's integral up to x, and x times its density."""
    rest = beyond(x)
    density = tl.exp2(-0.7213475204444817 * x * x - 1.325748064736159)
    return tl.where(x > 0, 1 - rest, rest) + x * density


@triton.jit
def _places(first, num, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows from `first` on, this program's columns, and which of them there are."""
    row = first + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    return row[:, None], column[None, :], (row < num)[:, None] & (column < width)[None, :]


@triton.jit
def forward_kernel(X, OUT, num, BLOCK: tl.constexpr):
    """GELU of so many numbers."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + place, place < num, 0.0).to(tl.float32)
    tl.store(OUT + place, gelu(x).to(OUT.dtype.element_ty), place < num)


@triton.jit
def gelu_kernel(
    D_OUT, X, D_X,  # (num, width)
    D_BIAS,  # (programs, width) fp32: each program's share
    num, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The gradient of GELU: of x times the normal distribution's integral up to x."""
    shares = tl.zeros((ROWS, COLUMNS), tl.float32)
    step = tl.num_programs(0).to(tl.int64) * ROWS
    for first in range(tl.program_id(0).to(tl.int64) * ROWS, num, step):
        row, column, here = _places(first, num, width, ROWS, COLUMNS)
        place = row * width + column
        x = tl.load(X + place, here, 0.0).to(tl.float32)
        d_out = tl.load(D_OUT + place, here, 0.0).to(tl.float32)
        d_x = d_out * gelu_gradient(x)
        shares += d_x
        tl.store(D_X + place, d_x.to(D_X.dtype.element_ty), here)
    _leave(D_BIAS, tl.sum(shares, 0), 0, width, width, COLUMNS)


@triton.jit
def heads_kernel(
    D_Q, D_K, D_V,  # (num, width)
    D_X,  # (num, 3, width)
    D_BIAS,  # (programs, 3, width) fp32: each program's share
    num, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Gradients of queries, keys and values, row by row beside one another."""
    of_q = tl.zeros((ROWS, COLUMNS), tl.float32)
    of_k = tl.zeros((ROWS, COLUMNS), tl.float32)
    of_v = tl.zeros((ROWS, COLUMNS), tl.float32)
    step = tl.num_programs(0).to(tl.int64) * ROWS
    for first in range(tl.program_id(0).to(tl.int64) * ROWS, num, step):
        row, column, here = _places(first, num, width, ROWS, COLUMNS)
        place, to = row * width + column, row * (3 * width) + column
        q = tl.load(D_Q + place, here, 0.0)
        k = tl.load(D_K + place, here, 0.0)
        v = tl.load(D_V + place, here, 0.0)
        tl.store(D_X + to, q, here)
        tl.store(D_X + to + width, k, here)
        tl.store(D_X + to + 2 * width, v, here)
        of_q += q.to(tl.float32)
        of_k += k.to(tl.float32)
        of_v += v.to(tl.float32)
    _leave(D_BIAS, tl.sum(of_q, 0), 0, width, 3 * width, COLUMNS)
    _leave(D_BIAS, tl.sum(of_k, 0), width, width, 3 * width, COLUMNS)
    _leave(D_BIAS, tl.sum(of_v, 0), 2 * width, width, 3 * width, COLUMNS)


@triton.jit
def _leave(D_BIAS, share, first, width, pitch, COLUMNS: tl.constexpr):
    """A program's share of its columns, `first` columns into a row of `pitch`."""
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    place = tl.program_id(0).to(tl.int64) * pitch + first + column
    tl.store(D_BIAS + place, share, column < width)
