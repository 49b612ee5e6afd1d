"""The Triton programs of `dwconv_gelu`: maps gone through row by row, three rows at hand.

A program has every column of a map and a block of channels, so each number is loaded once for each
of three columns beside one another, and for all three rows that need it.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import triton
import triton.language as tl


@triton.jit
def _load(MAP, y, shift, height, width, hidden, channel, COLUMNS: tl.constexpr):
    """Row y of a map (height, width, hidden), `shift` columns on: fp32, zero beyond its edge."""
    column = tl.arange(0, COLUMNS) + shift
    inside = (column >= 0) & (column < width) & (y >= 0) & (y < height)
    here = inside[:, None] & (channel < hidden)[None, :]
    place = (y * width + column)[:, None] * hidden + channel[None, :]
    return tl.load(MAP + place, here, 0.0).to(tl.float32)


@triton.jit
def _store(MAP, y, value, width, hidden, channel, COLUMNS: tl.constexpr):
    """Write row y of a map."""
    column = tl.arange(0, COLUMNS)
    here = (column < width)[:, None] & (channel < hidden)[None, :]
    place = (y * width + column)[:, None] * hidden + channel[None, :]
    tl.store(MAP + place, value.to(MAP.dtype.element_ty), here)


@triton.jit
def _weight(W, place: tl.constexpr, channel, hidden):
    """One of nine weights of each channel, (1, CHANNELS) fp32."""
    return tl.load(W + channel * 9 + place, channel < hidden, 0.0).to(tl.float32)[None, :]


@triton.jit
def conv_kernel(
    X,  # (maps, height, width, hidden)
    W, BIAS,  # (hidden, 9), (hidden,)
    D_OUT,  # as X, or None
    OUT,  # as X
    D_BIAS,  # (programs, hidden) fp32, each program's share; None without D_OUT
    maps, height, width, hidden, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """GELU of every so many maps' convolutions; with D_OUT, the gradient of what GELU is given."""
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    w0 = _weight(W, 0, channel, hidden)
    w1 = _weight(W, 1, channel, hidden)
    w2 = _weight(W, 2, channel, hidden)
    w3 = _weight(W, 3, channel, hidden)
    w4 = _weight(W, 4, channel, hidden)
    w5 = _weight(W, 5, channel, hidden)
    w6 = _weight(W, 6, channel, hidden)
    w7 = _weight(W, 7, channel, hidden)
    w8 = _weight(W, 8, channel, hidden)
    bias = tl.load(BIAS + channel, channel < hidden, 0.0).to(tl.float32)[None, :]
    shares = tl.zeros((COLUMNS, CHANNELS), tl.float32)
    size = height * width * hidden
    step = tl.num_programs(0).to(tl.int64) * size
    for first in range(tl.program_id(0).to(tl.int64) * size, size.to(tl.int64) * maps, step):
        # Sums of the rows above and at y, to which row y is yet to add.
        above = tl.zeros((COLUMNS, CHANNELS), tl.float32) + bias
        at = above
        for y in range(height + 1):
            left = _load(X + first, y, -1, height, width, hidden, channel, COLUMNS)
            middle = _load(X + first, y, 0, height, width, hidden, channel, COLUMNS)
            right = _load(X + first, y, 1, height, width, hidden, channel, COLUMNS)
            if y > 0:
                made = above + left * w6 + middle * w7 + right * w8
                integral = 0.5 + 0.5 * tl.erf(made * 0.7071067811865476)
                if D_OUT is None:
                    made *= integral
                else:
                    integral += made * tl.exp(-0.5 * made * made) * 0.3989422804014327
                    row = _load(D_OUT + first, y - 1, 0, height, width, hidden, channel, COLUMNS)
                    made = row * integral
                    shares += made
                _store(OUT + first, y - 1, made, width, hidden, channel, COLUMNS)
            above = at + left * w3 + middle * w4 + right * w5
            at = bias + left * w0 + middle * w1 + right * w2
    if D_OUT is not None:
        share = tl.program_id(0).to(tl.int64) * hidden + channel
        tl.store(D_BIAS + share, tl.sum(shares, 0), channel < hidden)


@triton.jit
def gradient_kernel(
    D_SUM, X, W,  # as above, D_SUM of what GELU is given
    D_X,  # as X
    D_W,  # (programs, 9, hidden) fp32: each program's share
    maps, height, width, hidden, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Gradients of every so many maps and of the weights, from those of the convolutions' sums."""
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    w0 = _weight(W, 0, channel, hidden)
    w1 = _weight(W, 1, channel, hidden)
    w2 = _weight(W, 2, channel, hidden)
    w3 = _weight(W, 3, channel, hidden)
    w4 = _weight(W, 4, channel, hidden)
    w5 = _weight(W, 5, channel, hidden)
    w6 = _weight(W, 6, channel, hidden)
    w7 = _weight(W, 7, channel, hidden)
    w8 = _weight(W, 8, channel, hidden)
    none = tl.zeros((COLUMNS, CHANNELS), tl.float32)
    d0, d1, d2 = none, none, none
    d3, d4, d5 = none, none, none
    d6, d7, d8 = none, none, none
    size = height * width * hidden
    step = tl.num_programs(0).to(tl.int64) * size
    for first in range(tl.program_id(0).to(tl.int64) * size, size.to(tl.int64) * maps, step):
        # Gradients of the rows above and at y, to which row y is yet to add; rows of X around y.
        above, at, x_above = none, none, none
        x_at = _load(X + first, 0, 0, height, width, hidden, channel, COLUMNS)
        for y in range(height):
            x_below = _load(X + first, y + 1, 0, height, width, hidden, channel, COLUMNS)
            # A sum's left neighbour in X has the sum on its right.
            right = _load(D_SUM + first, y, 1, height, width, hidden, channel, COLUMNS)
            middle = _load(D_SUM + first, y, 0, height, width, hidden, channel, COLUMNS)
            left = _load(D_SUM + first, y, -1, height, width, hidden, channel, COLUMNS)
            if y > 0:
                made = above + right * w0 + middle * w1 + left * w2
                _store(D_X + first, y - 1, made, width, hidden, channel, COLUMNS)
            above = at + right * w3 + middle * w4 + left * w5
            at = right * w6 + middle * w7 + left * w8
            d0 += x_above * right
            d1 += x_above * middle
            d2 += x_above * left
            d3 += x_at * right
            d4 += x_at * middle
            d5 += x_at * left
            d6 += x_below * right
            d7 += x_below * middle
            d8 += x_below * left
            x_above, x_at = x_at, x_below
        _store(D_X + first, height - 1, above, width, hidden, channel, COLUMNS)
    share = D_W + tl.program_id(0).to(tl.int64) * 9 * hidden + channel
    tl.store(share, tl.sum(d0, 0), channel < hidden)
    tl.store(share + hidden, tl.sum(d1, 0), channel < hidden)
    tl.store(share + 2 * hidden, tl.sum(d2, 0), channel < hidden)
    tl.store(share + 3 * hidden, tl.sum(d3, 0), channel < hidden)
    tl.store(share + 4 * hidden, tl.sum(d4, 0), channel < hidden)
    tl.store(share + 5 * hidden, tl.sum(d5, 0), channel < hidden)
    tl.store(share + 6 * hidden, tl.sum(d6, 0), channel < hidden)
    tl.store(share + 7 * hidden, tl.sum(d7, 0), channel < hidden)
    tl.store(share + 8 * hidden, tl.sum(d8, 0), channel < hidden)
