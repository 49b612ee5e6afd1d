"""The Triton program of `dropout`: four numbers for each of Philox's counters."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import triton
import triton.language as tl

from fastidmm.kernels.words_program import as_word


@triton.jit
def dropout(
    X, OUT,  # (crops, num)
    PLACE,  # (crops,) int64
    STEP,  # (1,) int64, or a number
    layer, limit: tl.int64, key: tl.int64, factor, num,
    COUNTED: tl.constexpr, QUADS: tl.constexpr,
):  # fmt: skip
    """A block of a crop: what words below the limit belong to is 0, the rest times the factor."""
    crop = tl.program_id(0)
    quad = tl.program_id(1) * QUADS + tl.arange(0, QUADS)
    none = quad * 0
    step = none + (tl.load(STEP).to(tl.int32) if COUNTED else STEP)
    place = none + tl.load(PLACE + crop).to(tl.int32)
    a, b, c, d = tl.philox(key, step, place, none + layer, quad)
    # Joined by turns, they lie as they are numbered: a, b, c, d of each counter.
    word = as_word(tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (QUADS, 4)))
    at = quad[:, None] * 4 + tl.arange(0, 4)[None, :]
    start = crop.to(tl.int64) * num
    x = tl.load(X + start + at, at < num, 0.0).to(tl.float32)
    kept = x * tl.where(word < limit, 0.0, factor)
    tl.store(OUT + start + at, kept.to(OUT.dtype.element_ty), at < num)
