"""Path F's Triton kernels: the loss and its gradients without ever holding the logits.

The head is attention with the weight as keys and values: softmax(z W^T) W and the log-sum-exp
give both the loss and, with u = sum_k w_k, C = smoothing / N and the shares of the two targets,

    dz = w (softmax(z W^T) W - C u - a w_i - c w_j)

and a second pass, classes against all rows, gives dW. Widths are cut into chunks of a power of
two. Source of the scheme: Dao et al., "FlashAttention", 2022; no atomics, so equal to the bit.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# mypy: disable-error-code="assignment"
# ruff: noqa: RUF005  (Triton grows tuples by addition only)

import triton
import triton.language as tl

from fastidmm.kernels.instance_loss_rows import LOWEST, tl_loss, tl_targets

PARTIAL = tl.constexpr(5)  # numbers a row block leaves per row: maximum, sum, q, early, own


@triton.jit
def tl_tile(X, start, count, D: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr):
    """Rows start to start + ROWS of X (count, D) as a tuple of (ROWS, CHUNK); zeros beyond."""
    r = tl.arange(0, ROWS)
    place = X + tl.full((), D, tl.int64) * start
    place = place + r[:, None] * D + tl.arange(0, CHUNK)[None, :]
    found = ()
    for c in tl.static_range(D // CHUNK):
        x = tl.load(place + c * CHUNK, mask=(start + r < count)[:, None], other=0.0)
        found = found + (x,)
    return found


@triton.jit
def tl_product(a, b, NUM_CHUNKS: tl.constexpr):
    """a b^T of two tiles, in fp32."""
    x = tl.dot(a[0], tl.trans(b[0]), input_precision="ieee")
    for c in tl.static_range(1, NUM_CHUNKS):
        x = tl.dot(a[c], tl.trans(b[c]), x, input_precision="ieee")
    return x


@triton.jit
def forward_kernel(
    Z,  # (B, D)
    W,  # (N, D), of the same type
    BIAS,  # (N,) fp32 or None
    ROWS,  # (B,)
    OUT,  # (splits, B, D) fp32: sum_k exp(l_k - maximum) w_k
    PART,  # (splits, 5, B) fp32
    batch, num, per_split,
    D: tl.constexpr, CHUNK: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A block of rows against `per_split` classes, a multiple of BLOCK_N."""
    NUM_CHUNKS: tl.constexpr = D // CHUNK
    first, split = tl.program_id(0) * BLOCK_B, tl.program_id(1)
    b = first + tl.arange(0, BLOCK_B)
    row = tl.load(ROWS + b, mask=b < batch, other=-1).to(tl.int64)
    row = tl.where((row >= 0) & (row < num), row, -1).to(tl.int32)
    z = tl_tile(Z, first, batch, D, CHUNK, BLOCK_B)
    out = ()
    for _ in tl.static_range(NUM_CHUNKS):
        out = out + (tl.zeros((BLOCK_B, CHUNK), tl.float32),)
    top = tl.full((BLOCK_B,), LOWEST, tl.float32)
    early = top
    s, q, own = tl.zeros_like(top), tl.zeros_like(top), tl.zeros_like(top)
    begin = split * per_split
    for start in range(begin, tl.minimum(begin + per_split, num), BLOCK_N):
        o = start + tl.arange(0, BLOCK_N)
        w = tl_tile(W, start, num, D, CHUNK, BLOCK_N)
        x = tl_product(z, w, NUM_CHUNKS)
        if BIAS is not None:
            x += tl.load(BIAS + o, mask=o < num, other=0.0)[None, :]
        x = tl.where((o < num)[None, :], x, float("-inf"))
        early = tl.maximum(early, tl.max(tl.where(o[None, :] < row[:, None], x, LOWEST), 1))
        own += tl.sum(tl.where(o[None, :] == row[:, None], x, 0.0), 1)
        new = tl.maximum(top, tl.max(x, 1))
        y = x - new[:, None]
        e = tl.exp(y)
        shrink = tl.exp(top - new)
        s = s * shrink + tl.sum(e, 1)
        # What was summed relative to the old maximum is start - begin classes too high.
        q += (top - new) * (start - begin)
        q += tl.sum(tl.where((o < num)[None, :], y, 0.0), 1)
        top = new
        summed = ()
        for c in tl.static_range(NUM_CHUNKS):
            grown = out[c] * shrink[:, None]
            grown = tl.dot(e.to(W.dtype.element_ty), w[c], grown, input_precision="ieee")
            summed = summed + (grown,)
        out = summed
    inside = b < batch
    place = PART + split.to(tl.int64) * PARTIAL * batch + b
    tl.store(place, top, mask=inside)
    tl.store(place + batch, s, mask=inside)
    tl.store(place + 2 * batch, q, mask=inside)
    tl.store(place + 3 * batch, early, mask=inside)
    tl.store(place + 4 * batch, own, mask=inside)
    place = OUT + (split.to(tl.int64) * batch + b[:, None]) * D + tl.arange(0, CHUNK)[None, :]
    for c in tl.static_range(NUM_CHUNKS):
        tl.store(place + c * CHUNK, out[c], mask=inside[:, None])


@triton.jit
def tl_logit(Z, W, BIAS, b, k, d, D: tl.constexpr):
    """z_b . w_k + bias_k and w_k, both zero where k is -1."""
    z = tl.load(Z + b * D + d, mask=d < D, other=0.0).to(tl.float32)
    w = tl.load(W + k.to(tl.int64) * D + d, mask=(d < D) & (k >= 0), other=0.0).to(tl.float32)
    x = tl.sum(z * w, 0)
    if BIAS is not None:
        x += tl.load(BIAS + k, mask=k >= 0, other=0.0)
    return x, w


@triton.jit
def combine_kernel(
    Z, W, BIAS, ROWS, PARTNER, LAM, SHARE, OUT, PART,  # as in forward_kernel and row_kernel
    SUM,  # (D,) fp32 sum of the rows of W
    LOSS, LSE, HIT, DZ,  # (B,) weighted losses, log-sum-exp, uint8; (B, D) fp32
    share, smoothing, batch, num, per_split, splits,
    D: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One program, one row: what the splits left becomes loss, hit and dz. WIDTH >= D."""
    b = tl.program_id(0).to(tl.int64)
    row, other, lam, w, valid = tl_targets(b, ROWS, PARTNER, LAM, SHARE, share, num)
    d = tl.arange(0, WIDTH)
    top, early = tl.full((), LOWEST, tl.float32), tl.full((), LOWEST, tl.float32)
    s, q, own = tl.zeros((), tl.float32), tl.zeros((), tl.float32), tl.zeros((), tl.float32)
    out = tl.zeros((WIDTH,), tl.float32)
    for k in range(0, splits):
        past = tl.full((), batch, tl.int64) * k  # rows of the splits before
        place = PART + past * PARTIAL + b
        highest = tl.load(place)
        early = tl.maximum(early, tl.load(place + 3 * batch))
        own += tl.load(place + 4 * batch)
        new = tl.maximum(top, highest)
        shrink, grow = tl.exp(top - new), tl.exp(highest - new)
        seen = tl.minimum(k * per_split, num)
        here = tl.minimum(seen + per_split, num) - seen
        q += (top - new) * seen
        q += tl.load(place + 2 * batch) + (highest - new) * here
        s = s * shrink + tl.load(place + batch) * grow
        o = tl.load(OUT + (past + b) * D + d, mask=d < D, other=0.0)
        out = out * shrink + o * grow
        top = new
    s = tl.where(valid, s, float("nan"))
    pasted, w_j = tl_logit(Z, W, BIAS, b, other, d, D)
    _, w_i = tl_logit(Z, W, BIAS, b, row, d, D)
    pasted = tl.where(other >= 0, pasted - top, 0.0)
    tl.store(LOSS + b, w * tl_loss(s, own - top, pasted, q, lam, smoothing, num))
    tl.store(LSE + b, top + tl.log(s))
    tl.store(HIT + b, ((own == top) & (own > early)).to(tl.uint8))
    u = tl.load(SUM + d, mask=d < D, other=0.0)
    hard = 1 - smoothing
    dz = out / s - (smoothing / num) * u - hard * lam * w_i - hard * (1 - lam) * w_j
    tl.store(DZ + b * D + d, w * dz, mask=d < D)


@triton.jit
def weight_kernel(
    Z, W, BIAS, ROWS, PARTNER, LAM, SHARE, LSE,
    GRADIENT,  # () fp32, of the loss
    DW, DBIAS,  # (N, D), (N,) fp32; DBIAS None where nobody asks
    share, smoothing, batch, num,
    D: tl.constexpr, CHUNK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """A block of classes against all rows, whose log-sum-exp is known."""
    NUM_CHUNKS: tl.constexpr = D // CHUNK
    first = tl.program_id(0) * BLOCK_N
    k = first + tl.arange(0, BLOCK_N)
    w = tl_tile(W, first, num, D, CHUNK, BLOCK_N)
    if BIAS is not None:
        bias = tl.load(BIAS + k, mask=k < num, other=0.0)
    gradient = tl.load(GRADIENT)
    dw = ()
    for _ in tl.static_range(NUM_CHUNKS):
        dw = dw + (tl.zeros((BLOCK_N, CHUNK), tl.float32),)
    d_bias = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, batch, BLOCK_B):
        o = start + tl.arange(0, BLOCK_B)
        b = tl.minimum(o, batch - 1)  # rows beyond are taken out below
        row, other, lam, share_b, _valid = tl_targets(b, ROWS, PARTNER, LAM, SHARE, share, num)
        z = tl_tile(Z, start, batch, D, CHUNK, BLOCK_B)
        x = tl_product(w, z, NUM_CHUNKS)
        if BIAS is not None:
            x += bias[:, None]
        g = tl.exp(x - tl.load(LSE + b)[None, :]) - smoothing / num
        hard = 1 - smoothing
        g -= tl.where(k[:, None] == row[None, :], hard * lam, 0.0)
        g -= tl.where(k[:, None] == other[None, :], hard * (1 - lam), 0.0)
        g = tl.where((o < batch)[None, :], g * (share_b * gradient), 0.0)
        d_bias += tl.sum(g, 1)
        summed = ()
        for c in tl.static_range(NUM_CHUNKS):
            summed = summed + (
                tl.dot(g.to(Z.dtype.element_ty), z[c], dw[c], input_precision="ieee"),
            )
        dw = summed
    place = DW + first.to(tl.int64) * D + tl.arange(0, BLOCK_N)[:, None] * D
    place += tl.arange(0, CHUNK)[None, :]
    for c in tl.static_range(NUM_CHUNKS):
        tl.store(place + c * CHUNK, dw[c], mask=(k < num)[:, None])
    if DBIAS is not None:
        tl.store(DBIAS + k, d_bias, mask=k < num)
