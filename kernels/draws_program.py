"""The Triton program of `draws`; `fastidmm.plan.own_draws` says what each word is for."""

# mypy: allow-untyped-defs, allow-incomplete-defs
# mypy: disable-error-code="untyped-decorator"

import triton
import triton.language as tl

from fastidmm.kernels.words_program import as_word


@triton.jit
def _words(key, epoch, row, view, block):
    """Four words of a counter; `row` and `view` as int32 bits."""
    counter = row * 0
    a, b, c, d = tl.philox(key, counter + epoch, row, view, counter + block)
    return as_word(a), as_word(b), as_word(c), as_word(d)


@triton.jit
def _below(word, limit):
    return (word * limit) >> 32


@triton.jit
def _between(word, ranges, which):
    """A word in a range given by its low end and its span, in float64."""
    unit = word.to(tl.float64) * 2.3283064365386963e-10  # 2**-32, exactly
    return unit * tl.load(ranges + 2 * which + 1) + tl.load(ranges + 2 * which)


@triton.jit
def _rounded(x):
    """Half to even, below 2**51: what is added leaves no bits for a fraction."""
    return ((x + 4503599627370496.0) - 4503599627370496.0).to(tl.int64)


@triton.jit
def _try(area_word, ratio_word, high, wide, ratio_table, ranges):
    """Height and width of a try, and whether they fit."""
    area = (high * wide).to(tl.float64) * _between(area_word, ranges, 0)
    ratio = tl.load(ratio_table + (ratio_word >> 16))
    width = _rounded(tl.sqrt(area * ratio))
    height = _rounded(tl.sqrt(area / ratio))
    fits = (width > 0) & (width <= wide) & (height > 0) & (height <= high)
    return height, width, fits


@triton.jit
def _central(high, wide, ranges):
    """The largest height and width whose ratio is allowed."""
    least, most = tl.load(ranges + 12), tl.load(ranges + 13)
    ratio = wide.to(tl.float64) / high.to(tl.float64)
    height = tl.where(ratio < least, _rounded(wide.to(tl.float64) / least), high)
    width = tl.where(ratio > most, _rounded(high.to(tl.float64) * most), wide)
    return height, width


@triton.jit
def _size(key, epoch, row, view, high, wide, ratio_table, ranges):
    """Height and width of the first try that fits, and whether one does."""
    height, width = _central(high, wide, ranges)
    found = high < 0
    for block in tl.static_range(5):
        a, b, c, d = _words(key, epoch, row, view, block)
        tall, broad, fits = _try(a, b, high, wide, ratio_table, ranges)
        height = tl.where(fits & ~found, tall, height)
        width = tl.where(fits & ~found, broad, width)
        found = found | fits
        tall, broad, fits = _try(c, d, high, wide, ratio_table, ranges)
        height = tl.where(fits & ~found, tall, height)
        width = tl.where(fits & ~found, broad, width)
        found = found | fits
    return height, width, found


@triton.jit
def _keep_crop(origin, scale, window, crop, here, top, left, height, width, size):
    """A box as the renderer takes it."""
    tl.store(origin + crop * 2, top.to(tl.float64), here)
    tl.store(origin + crop * 2 + 1, left.to(tl.float64), here)
    side = (size + 0 * height).to(tl.float64)
    tl.store(scale + crop * 2, height.to(tl.float64) / side, here)
    tl.store(scale + crop * 2 + 1, width.to(tl.float64) / side, here)
    tl.store(window + crop * 4, top, here)
    tl.store(window + crop * 4 + 1, left, here)
    tl.store(window + crop * 4 + 2, top + height, here)
    tl.store(window + crop * 4 + 3, left + width, here)


@triton.jit
def draws(
    rows, views, heights, widths, ratio_table, orders, chances, ranges,
    origin, scale, window, flip, jitter, gray, blur, solarize, order, factors, sigma,
    operation, level, negative, spot,
    key: tl.int64, operation_key: tl.int64, epochs, num, size,
    TURNS: tl.constexpr, CROPS: tl.constexpr,
):  # fmt: skip
    """All that chance decides of a block of crops, one by one."""
    crop = tl.program_id(0) * CROPS + tl.arange(0, CROPS)
    here = crop < num
    epoch = tl.load(epochs).to(tl.int32)
    place = tl.load(rows + crop, here, 0)
    row, view = place.to(tl.int32), tl.load(views + crop, here, 0).to(tl.int32)
    high = tl.load(heights + place).to(tl.int64)
    wide = tl.load(widths + place).to(tl.int64)
    height, width, found = _size(key, epoch, row, view, high, wide, ratio_table, ranges)
    a, b, c, d = _words(key, epoch, row, view, 5)
    top = tl.where(found, _below(a, high - height + 1), (high - height) // 2)
    left = tl.where(found, _below(b, wide - width + 1), (wide - width) // 2)
    _keep_crop(origin, scale, window, crop, here, top, left, height, width, size)
    tl.store(flip + crop, c < tl.load(chances), here)
    tl.store(jitter + crop, d < tl.load(chances + 1), here)
    a, b, c, d = _words(key, epoch, row, view, 6)
    for turn in tl.static_range(4):
        tl.store(order + crop * 4 + turn, tl.load(orders + _below(a, 24) * 4 + turn), here)
    tl.store(gray + crop, b < tl.load(chances + 2), here)
    tl.store(factors + crop * 4, _between(c, ranges, 1).to(tl.float32), here)
    tl.store(factors + crop * 4 + 1, _between(d, ranges, 2).to(tl.float32), here)
    a, b, c, d = _words(key, epoch, row, view, 7)
    tl.store(factors + crop * 4 + 2, _between(a, ranges, 3).to(tl.float32), here)
    tl.store(factors + crop * 4 + 3, _between(b, ranges, 4).to(tl.float32), here)
    tl.store(blur + crop, c < tl.load(chances + 3), here)
    tl.store(sigma + crop, _between(d, ranges, 5).to(tl.float32), here)
    a, b, c, d = _words(key, epoch, row, view, 8)
    tl.store(solarize + crop, a < tl.load(chances + 4), here)
    for turn in tl.static_range(TURNS):
        at = crop * TURNS + turn
        a, b, c, d = _words(operation_key, epoch, row, view, 2 * turn)
        applied = b < tl.load(chances + 5)
        tl.store(operation + at, tl.where(applied, _below(a, 15), 15), here)
        tl.store(level + at, 1 + _below(c, 9), here)
        tl.store(negative + at, d < tl.load(chances + 5), here)
        a, b, c, d = _words(operation_key, epoch, row, view, 2 * turn + 1)
        tl.store(spot + at * 2, _below(a, size), here)
        tl.store(spot + at * 2 + 1, _below(b, size), here)
