"""The Triton programs of `linear_dwconv_gelu`: maps gone through row by row, three rows at hand.

A program has every column of a map and a block of channels, and a thread two columns side by side:
four numbers of a row are loaded for those two, once for all three rows that need them, while the
row before is worked on. A program's maps follow one another, a row of zeros after each.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import triton
import triton.language as tl

from fastidmm.kernels.linear_program import gelu, gelu_gradient


@triton.jit
def _share(maps, height, width, hidden):
    """Where a program's rows begin, how many it has, and the steps to the next row and map."""
    pitch, programs = width * hidden, tl.num_programs(0)
    size = (height * pitch).to(tl.int64)
    rows = tl.cdiv(maps - tl.program_id(0), programs) * (height + 1)
    return tl.program_id(0) * size, rows, pitch, programs * size - height * pitch


@triton.jit
def _next(place, y, height, pitch, leap):
    """The row after y; that of zeros is at `height`."""
    last = y == height
    return place + tl.where(last, leap, pitch), tl.where(last, 0, y + 1)


@triton.jit
def _places(shift, width, hidden, channel, PAIRS: tl.constexpr):
    """Where a column of each pair is in a row, 0 or 1, or -1 or 2 beside them; if there is one."""
    column = tl.arange(0, PAIRS) * 2 + shift
    here = ((column >= 0) & (column < width))[:, None] & (channel < hidden)[None, :]
    return column[:, None] * hidden + channel[None, :], here


@triton.jit
def _load(ROW, there, shift, width, hidden, channel, PAIRS: tl.constexpr):
    """A column of each pair of a row: zero beyond its edges, and where it is not `there`."""
    place, here = _places(shift, width, hidden, channel, PAIRS)
    return tl.load(ROW + place, here & there, 0.0)


@triton.jit
def _two(ROW, there, width, hidden, channel, PAIRS: tl.constexpr):
    """Both columns of each pair."""
    first = _load(ROW, there, 0, width, hidden, channel, PAIRS)
    return first, _load(ROW, there, 1, width, hidden, channel, PAIRS)


@triton.jit
def _four(ROW, there, width, hidden, channel, PAIRS: tl.constexpr):
    """Both, between the columns beside them."""
    before = _load(ROW, there, -1, width, hidden, channel, PAIRS)
    first, second = _two(ROW, there, width, hidden, channel, PAIRS)
    return before, first, second, _load(ROW, there, 2, width, hidden, channel, PAIRS)


@triton.jit
def _store(ROW, first, second, width, hidden, channel, PAIRS: tl.constexpr):
    """Write both columns of each pair of a row."""
    kind = ROW.dtype.element_ty
    place, here = _places(0, width, hidden, channel, PAIRS)
    tl.store(ROW + place, first.to(kind), here)
    place, here = _places(1, width, hidden, channel, PAIRS)
    tl.store(ROW + place, second.to(kind), here)


@triton.jit
def _weights(W, channel, hidden):
    """A row of each channel's weights, three times (1, CHANNELS) fp32."""
    place, here = W + channel * 9, channel < hidden
    first = tl.load(place, here, 0.0).to(tl.float32)[None, :]
    second = tl.load(place + 1, here, 0.0).to(tl.float32)[None, :]
    return first, second, tl.load(place + 2, here, 0.0).to(tl.float32)[None, :]


@triton.jit
def conv_kernel(
    X,  # (maps, height, width, hidden)
    W, BIAS,  # (hidden, 9), (hidden,)
    D_OUT,  # as X, or None
    OUT,  # as X
    D_BIAS,  # (programs, hidden) fp32, each program's share; None without D_OUT
    maps, height, width, hidden, PAIRS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """GELU of every so many maps' convolutions; with D_OUT, the gradient of what GELU is given."""
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    w0, w1, w2 = _weights(W, channel, hidden)
    w3, w4, w5 = _weights(W + 3, channel, hidden)
    w6, w7, w8 = _weights(W + 6, channel, hidden)
    bias = tl.load(BIAS + channel, channel < hidden, 0.0).to(tl.float32)[None, :]
    shares = tl.zeros((PAIRS, CHANNELS), tl.float32)
    # Sums of the rows above and at y, for both columns, to which row y is yet to add.
    above0 = tl.zeros((PAIRS, CHANNELS), tl.float32) + bias
    above1, at0, at1 = above0, above0, above0
    place, rows, pitch, leap = _share(maps, height, width, hidden)
    y = 0
    ahead0, ahead1, ahead2, ahead3 = _four(X + place, rows > 0, width, hidden, channel, PAIRS)
    d0, d1 = tl.zeros_like(ahead0), tl.zeros_like(ahead0)
    for row in range(rows):
        x0, x1 = ahead0.to(tl.float32), ahead1.to(tl.float32)
        x2, x3 = ahead2.to(tl.float32), ahead3.to(tl.float32)
        following, below = _next(place, y, height, pitch, leap)
        there = (below < height) & (row + 1 < rows)
        ahead0, ahead1, ahead2, ahead3 = _four(X + following, there, width, hidden, channel, PAIRS)
        if y > 0:
            made0 = above0 + x0 * w6 + x1 * w7 + x2 * w8
            made1 = above1 + x1 * w6 + x2 * w7 + x3 * w8
            if D_OUT is None:
                made0, made1 = gelu(made0), gelu(made1)
            else:
                made0 = d0.to(tl.float32) * gelu_gradient(made0)
                made1 = d1.to(tl.float32) * gelu_gradient(made1)
                shares += made0 + made1
            _store(OUT + (place - pitch), made0, made1, width, hidden, channel, PAIRS)
        if D_OUT is not None:
            d0, d1 = _two(D_OUT + place, y < height, width, hidden, channel, PAIRS)
        above0 = at0 + x0 * w3 + x1 * w4 + x2 * w5
        above1 = at1 + x1 * w3 + x2 * w4 + x3 * w5
        at0 = bias + x0 * w0 + x1 * w1 + x2 * w2
        at1 = bias + x1 * w0 + x2 * w1 + x3 * w2
        place, y = following, below
    if D_OUT is not None:
        share = tl.program_id(0).to(tl.int64) * hidden + channel
        tl.store(D_BIAS + share, tl.sum(shares, 0), channel < hidden)


@triton.jit
def gradient_kernel(
    D_SUM, X, W,  # as above, D_SUM of what GELU is given
    D_X,  # as X
    D_W,  # (programs, 10, hidden) fp32: each program's share, the last of D_X's own sum
    maps, height, width, hidden, PAIRS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Gradients of every so many maps and of the weights, from those of the convolutions' sums."""
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    w0, w1, w2 = _weights(W, channel, hidden)
    w3, w4, w5 = _weights(W + 3, channel, hidden)
    w6, w7, w8 = _weights(W + 6, channel, hidden)
    none = tl.zeros((PAIRS, CHANNELS), tl.float32)
    d0, d1, d2 = none, none, none
    d3, d4, d5 = none, none, none
    d6, d7, d8 = none, none, none
    total = none
    # A pair may lie beside the map, where its gradients are none: 0 for it, and 1.
    inside0, inside1 = _inside(0, width, PAIRS), _inside(1, width, PAIRS)
    # Gradients of the rows above and at y, for both columns, to which row y is yet to add.
    above0, above1, at0, at1 = none, none, none, none
    place, rows, pitch, leap = _share(maps, height, width, hidden)
    y = 0
    following, below = _next(place, y, height, pitch, leap)
    ahead0, ahead1, ahead2, ahead3 = _four(D_SUM + place, rows > 0, width, hidden, channel, PAIRS)
    # Rows of X above y, at y and below it.
    u0, u1 = none, none
    v0, v1 = _two(X + place, rows > 0, width, hidden, channel, PAIRS)
    x0, x1 = _two(X + following, (rows > 0) & (below < height), width, hidden, channel, PAIRS)
    v0, v1 = v0.to(tl.float32), v1.to(tl.float32)
    for row in range(rows):
        g0, g1 = ahead0.to(tl.float32), ahead1.to(tl.float32)
        g2, g3 = ahead2.to(tl.float32), ahead3.to(tl.float32)
        z0, z1 = x0.to(tl.float32), x1.to(tl.float32)
        there = (below < height) & (row + 1 < rows)
        ahead0, ahead1, ahead2, ahead3 = _four(
            D_SUM + following, there, width, hidden, channel, PAIRS
        )
        after, then = _next(following, below, height, pitch, leap)
        there = (then < height) & (row + 2 < rows)
        x0, x1 = _two(X + after, there, width, hidden, channel, PAIRS)
        # A sum's left neighbour in X has the sum on its right.
        if y > 0:
            made0 = above0 + g2 * w0 + g1 * w1 + g0 * w2
            made1 = above1 + g3 * w0 + g2 * w1 + g1 * w2
            _store(D_X + (place - pitch), made0, made1, width, hidden, channel, PAIRS)
            total = total + made0 * inside0 + made1 * inside1
        above0 = at0 + g2 * w3 + g1 * w4 + g0 * w5
        above1 = at1 + g3 * w3 + g2 * w4 + g1 * w5
        at0 = g2 * w6 + g1 * w7 + g0 * w8
        at1 = g3 * w6 + g2 * w7 + g1 * w8
        d0, d1, d2 = _more(d0, d1, d2, u0, u1, g0, g1, g2, g3)
        d3, d4, d5 = _more(d3, d4, d5, v0, v1, g0, g1, g2, g3)
        d6, d7, d8 = _more(d6, d7, d8, z0, z1, g0, g1, g2, g3)
        u0, u1, v0, v1 = v0, v1, z0, z1
        place, y, following, below = following, below, after, then
    share = D_W + tl.program_id(0).to(tl.int64) * 10 * hidden + channel
    _leave(share, d0, d1, d2, hidden, channel)
    _leave(share + 3 * hidden, d3, d4, d5, hidden, channel)
    _leave(share + 6 * hidden, d6, d7, d8, hidden, channel)
    tl.store(share + 9 * hidden, tl.sum(total, 0), channel < hidden)


@triton.jit
def _inside(shift, width, PAIRS: tl.constexpr):
    """1 for pairs whose column 0 or 1 is one of the map's, and 0 (PAIRS, 1)."""
    return (tl.arange(0, PAIRS) * 2 + shift < width).to(tl.float32)[:, None]


@triton.jit
def _more(d0, d1, d2, x0, x1, g0, g1, g2, g3):
    """Gradients of a row of weights, with what a row of X adds; each product fused with its sum."""
    d0 = d0 + x0 * g2 + x1 * g3
    d1 = d1 + x0 * g1 + x1 * g2
    d2 = d2 + x0 * g0 + x1 * g1
    return d0, d1, d2


@triton.jit
def _leave(SHARE, first, second, third, hidden, channel):
    """A program's share of the gradients of a row of weights."""
    tl.store(SHARE, tl.sum(first, 0), channel < hidden)
    tl.store(SHARE + hidden, tl.sum(second, 0), channel < hidden)
    tl.store(SHARE + 2 * hidden, tl.sum(third, 0), channel < hidden)
