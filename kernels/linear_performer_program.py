"""The Triton programs of `linear_performer`: linear attention among a crop's tokens, and back.

Tokens are read in blocks, as the layer wrote them; features never leave the registers. What all of
a crop's tokens share is summed over spans, a program each, and the spans after, in a fixed order.
Products are of float32, each as three of TF32: they err some four times as much as float32's own,
a thousandth of what half precision does.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import triton
import triton.language as tl

EPS = tl.constexpr(1e-8)  # of a total


@triton.jit
def _times(a, b):
    """The product of two matrices in float32."""
    return tl.dot(a, b, input_precision="tf32x3")


@triton.jit
def _directions(W, M: tl.constexpr, D: tl.constexpr, FEATURES: tl.constexpr, WIDTH: tl.constexpr):
    """All of them, (FEATURES, WIDTH); those that there are not are 0."""
    m, d = tl.arange(0, FEATURES)[:, None], tl.arange(0, WIDTH)[None, :]
    return tl.load(W + m * D + d, (m < M) & (d < D), 0.0).to(tl.float32)


@triton.jit
def _features(x, w, here, M: tl.constexpr, FEATURES: tl.constexpr):
    """Features (BLOCK, FEATURES) of tokens (BLOCK, WIDTH): 0 of no token, and of no direction."""
    exponent = _times(x, tl.trans(w)) - tl.sum(x * x, 1)[:, None] * 0.5
    there = here[:, None] & (tl.arange(0, FEATURES) < M)[None, :]
    return tl.where(there, tl.exp(exponent) * (M**-0.5), 0.0)


@triton.jit
def _through(d_features, features, x, w):
    """The gradient of tokens from that of their features."""
    d_exponent = d_features * features
    return _times(d_exponent, w) - x * tl.sum(d_exponent, 1)[:, None]


@triton.jit
def _places(crop, token, tokens, PITCH: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr):
    """Where a crop's tokens lie in rows of PITCH, and which numbers there are."""
    d = tl.arange(0, WIDTH)
    place = (crop.to(tl.int64) * tokens + token)[:, None] * PITCH + d[None, :]
    return place, (token < tokens)[:, None] & (d < D)[None, :]


@triton.jit
def _shared(of, D: tl.constexpr, M: tl.constexpr, WIDTH: tl.constexpr, FEATURES: tl.constexpr):
    """Where what tokens share lies, (M, D) and (M,), and which numbers there are."""
    m, d = tl.arange(0, FEATURES), tl.arange(0, WIDTH)
    along = of.to(tl.int64) * M + m
    here = (m < M)[:, None] & (d < D)[None, :]
    return along[:, None] * D + d[None, :], here, along, m < M


@triton.jit
def _loaded(
    SUMS, TOTALS, of,
    D: tl.constexpr, M: tl.constexpr, WIDTH: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """What a crop's tokens share."""
    place, here, along, there = _shared(of, D, M, WIDTH, FEATURES)
    return tl.load(SUMS + place, here, 0.0), tl.load(TOTALS + along, there, 0.0)


@triton.jit
def _stored(
    SUMS, TOTALS, of, sums, totals,
    D: tl.constexpr, M: tl.constexpr, WIDTH: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """What a span's tokens share."""
    place, here, along, there = _shared(of, D, M, WIDTH, FEATURES)
    tl.store(SUMS + place, sums, here)
    tl.store(TOTALS + along, totals, there)


@triton.jit
def gather_kernel(
    KQV,  # (crops, tokens, 3, D)
    W,  # (M, D)
    SUMS, TOTALS,  # (crops, spans, M, D) and (crops, spans, M) fp32
    tokens, D: tl.constexpr, M: tl.constexpr, WIDTH: tl.constexpr, FEATURES: tl.constexpr,
    BLOCK: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """A span's sum of its keys' features times its values, and of the features."""
    crop, span = tl.program_id(0), tl.program_id(1)
    w = _directions(W, M, D, FEATURES, WIDTH)
    sums = tl.zeros((FEATURES, WIDTH), tl.float32)
    totals = tl.zeros((FEATURES,), tl.float32)
    for first in range(span * SPAN, tl.minimum(span * SPAN + SPAN, tokens), BLOCK):
        token = first + tl.arange(0, BLOCK)
        place, here = _places(crop, token, tokens, 3 * D, D, WIDTH)
        k = tl.load(KQV + place, here, 0.0).to(tl.float32)
        v = tl.load(KQV + place + 2 * D, here, 0.0).to(tl.float32)
        features = _features(k, w, token < tokens, M, FEATURES)
        sums += _times(tl.trans(features), v)
        totals += tl.sum(features, 0)
    of_span = crop * tl.num_programs(1) + span
    _stored(SUMS, TOTALS, of_span, sums, totals, D, M, WIDTH, FEATURES)


@triton.jit
def spread_kernel(
    KQV, W,  # as above
    SUMS, TOTALS,  # (crops, M, D) and (crops, M) fp32
    OUT,  # (crops, tokens, D)
    tokens, D: tl.constexpr, M: tl.constexpr, WIDTH: tl.constexpr, FEATURES: tl.constexpr,
    BLOCK: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """What a span's queries find: the mean of all values, by their features' products."""
    crop, span = tl.program_id(0), tl.program_id(1)
    w = _directions(W, M, D, FEATURES, WIDTH)
    sums, totals = _loaded(SUMS, TOTALS, crop, D, M, WIDTH, FEATURES)
    for first in range(span * SPAN, tl.minimum(span * SPAN + SPAN, tokens), BLOCK):
        token = first + tl.arange(0, BLOCK)
        place, here = _places(crop, token, tokens, 3 * D, D, WIDTH)
        q = tl.load(KQV + place + D, here, 0.0).to(tl.float32)
        features = _features(q, w, token < tokens, M, FEATURES)
        total = tl.sum(features * totals[None, :], 1) + EPS
        found = _times(features, sums) / total[:, None]
        to, here = _places(crop, token, tokens, D, D, WIDTH)
        tl.store(OUT + to, found.to(OUT.dtype.element_ty), here)


@triton.jit
def query_kernel(
    KQV, W, SUMS, TOTALS,  # as for `spread_kernel`
    D_OUT,  # (crops, tokens, D)
    D_KQV,  # (crops, tokens, 3, D), of which the queries' are written
    D_SUMS, D_TOTALS,  # (crops, spans, M, D) and (crops, spans, M) fp32
    SHARES,  # (crops, spans, 3, D) fp32, of which the queries' are written
    tokens, D: tl.constexpr, M: tl.constexpr, WIDTH: tl.constexpr, FEATURES: tl.constexpr,
    BLOCK: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """Gradients of a span's queries, and what they say of all keys and values."""
    crop, span = tl.program_id(0), tl.program_id(1)
    w = _directions(W, M, D, FEATURES, WIDTH)
    sums, totals = _loaded(SUMS, TOTALS, crop, D, M, WIDTH, FEATURES)
    d_sums = tl.zeros((FEATURES, WIDTH), tl.float32)
    d_totals = tl.zeros((FEATURES,), tl.float32)
    share = tl.zeros((WIDTH,), tl.float32)
    for first in range(span * SPAN, tl.minimum(span * SPAN + SPAN, tokens), BLOCK):
        token = first + tl.arange(0, BLOCK)
        beside, here = _places(crop, token, tokens, D, D, WIDTH)
        d_out = tl.load(D_OUT + beside, here, 0.0).to(tl.float32)
        place, here = _places(crop, token, tokens, 3 * D, D, WIDTH)
        q = tl.load(KQV + place + D, here, 0.0).to(tl.float32)
        features = _features(q, w, token < tokens, M, FEATURES)
        total = tl.sum(features * totals[None, :], 1) + EPS
        d_out /= total[:, None]
        d_features = _times(d_out, tl.trans(sums))
        # The product of gradient and output, over the total: what is found falls as that grows.
        d_total = -tl.sum(d_features * features, 1) / total
        d_sums += _times(tl.trans(features), d_out)
        d_totals += tl.sum(features * d_total[:, None], 0)
        d_q = _through(d_features + d_total[:, None] * totals[None, :], features, q, w)
        tl.store(D_KQV + place + D, d_q.to(D_KQV.dtype.element_ty), here)
        share += tl.sum(d_q, 0)
    of_span = crop * tl.num_programs(1) + span
    _stored(D_SUMS, D_TOTALS, of_span, d_sums, d_totals, D, M, WIDTH, FEATURES)
    _leave(SHARES, share, of_span, 1, D, WIDTH)


@triton.jit
def pair_kernel(
    KQV, W,  # as above
    D_SUMS, D_TOTALS,  # (crops, M, D) and (crops, M) fp32
    D_V,  # (crops, tokens, D): what else asked for the values, or None
    D_KQV, SHARES,  # as above, of which the keys' and the values' are written
    tokens, D: tl.constexpr, M: tl.constexpr, WIDTH: tl.constexpr, FEATURES: tl.constexpr,
    BLOCK: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """Gradients of a span's keys and values."""
    crop, span = tl.program_id(0), tl.program_id(1)
    w = _directions(W, M, D, FEATURES, WIDTH)
    d_sums, d_totals = _loaded(D_SUMS, D_TOTALS, crop, D, M, WIDTH, FEATURES)
    of_k = tl.zeros((WIDTH,), tl.float32)
    of_v = tl.zeros((WIDTH,), tl.float32)
    for first in range(span * SPAN, tl.minimum(span * SPAN + SPAN, tokens), BLOCK):
        token = first + tl.arange(0, BLOCK)
        place, here = _places(crop, token, tokens, 3 * D, D, WIDTH)
        k = tl.load(KQV + place, here, 0.0).to(tl.float32)
        v = tl.load(KQV + place + 2 * D, here, 0.0).to(tl.float32)
        features = _features(k, w, token < tokens, M, FEATURES)
        d_features = _times(v, tl.trans(d_sums)) + d_totals[None, :]
        d_k = _through(d_features, features, k, w)
        d_v = _times(features, d_sums)
        if D_V is not None:
            beside, here = _places(crop, token, tokens, D, D, WIDTH)
            d_v += tl.load(D_V + beside, here, 0.0).to(tl.float32)
        tl.store(D_KQV + place, d_k.to(D_KQV.dtype.element_ty), here)
        tl.store(D_KQV + place + 2 * D, d_v.to(D_KQV.dtype.element_ty), here)
        of_k += tl.sum(d_k, 0)
        of_v += tl.sum(d_v, 0)
    of_span = crop * tl.num_programs(1) + span
    _leave(SHARES, of_k, of_span, 0, D, WIDTH)
    _leave(SHARES, of_v, of_span, 2, D, WIDTH)


@triton.jit
def _leave(SHARES, share, of_span, third, D: tl.constexpr, WIDTH: tl.constexpr):
    """A span's share of a third of the bias's gradient."""
    d = tl.arange(0, WIDTH)
    tl.store(SHARES + (of_span.to(tl.int64) * 3 + third) * D + d, share, d < D)
