"""The Triton program of `words`, and what others draw with.

Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011, as Triton has it.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# mypy: disable-error-code="untyped-decorator"

import triton
import triton.language as tl


@triton.jit
def as_word(bits):
    """32 bits, with or without a sign, as an int64 of 0 to 2**32 - 1."""
    return bits.to(tl.uint32, bitcast=True).to(tl.int64)


@triton.jit
def _part(given, place, here, IS_TENSOR: tl.constexpr):
    """One of a counter's four parts, for every counter."""
    part = tl.load(given + place, here, 0) if IS_TENSOR else place * 0 + given
    return part.to(tl.int32)


@triton.jit
def words(
    a, b, c, d, out, key: tl.int64, num,
    A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, D: tl.constexpr, COUNTERS: tl.constexpr,
):  # fmt: skip
    """Four words of each of a block of counters."""
    place = tl.program_id(0).to(tl.int64) * COUNTERS + tl.arange(0, COUNTERS)
    here = place < num
    e, f, g, h = tl.philox(
        key, _part(a, place, here, A), _part(b, place, here, B), _part(c, place, here, C),
        _part(d, place, here, D),
    )  # fmt: skip
    tl.store(out + place * 4, as_word(e), here)
    tl.store(out + place * 4 + 1, as_word(f), here)
    tl.store(out + place * 4 + 2, as_word(g), here)
    tl.store(out + place * 4 + 3, as_word(h), here)
