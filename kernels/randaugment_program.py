"""The two Triton programs of `randaugment`; that file says what each is for.

Operations bear the definition's numbers. Pixels are float32 in [0, 1] while they are worked on.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# mypy: disable-error-code="untyped-decorator"

import triton
import triton.language as tl

from fastidmm import randaugment as definition
from fastidmm.kernels.views_programs import load_pixels, luma, store_pixels, unit

INVERT = tl.constexpr(definition.OPERATIONS.index("invert"))
CUTOUT = tl.constexpr(definition.OPERATIONS.index("cutout"))
SHARPNESS = tl.constexpr(definition.OPERATIONS.index("sharpness"))
AUTOCONTRAST = tl.constexpr(definition.OPERATIONS.index("autocontrast"))
POSTERIZE = tl.constexpr(definition.OPERATIONS.index("posterize"))
SHEAR_X = tl.constexpr(definition.OPERATIONS.index("shear_x"))
TRANSLATE_X = tl.constexpr(definition.OPERATIONS.index("translate_x"))
TRANSLATE_Y = tl.constexpr(definition.OPERATIONS.index("translate_y"))
SHEAR_Y = tl.constexpr(definition.OPERATIONS.index("shear_y"))
ROTATE = tl.constexpr(definition.OPERATIONS.index("rotate"))
EQUALIZE = tl.constexpr(definition.OPERATIONS.index("equalize"))
CONTRAST = tl.constexpr(definition.OPERATIONS.index("contrast"))
COLOR = tl.constexpr(definition.OPERATIONS.index("color"))
SOLARIZE = tl.constexpr(definition.OPERATIONS.index("solarize"))
BRIGHTNESS = tl.constexpr(definition.OPERATIONS.index("brightness"))
FIXED = tl.constexpr(definition.FIXED)
FILL = tl.constexpr(definition.FILL)
CUTOUT_RED = tl.constexpr(definition.CUTOUT_FILL[0])
CUTOUT_GREEN = tl.constexpr(definition.CUTOUT_FILL[1])
CUTOUT_BLUE = tl.constexpr(definition.CUTOUT_FILL[2])


@triton.jit
def _level(x):
    """The nearest of 256 levels."""
    return tl.floor(x * 255.0 + 0.5).to(tl.int32)


# Else a program would be compiled for the first turn and another for the second.
@triton.jit(do_not_specialize=["turn"])
def measure(x, table, gray, operation, turn, turns, size, BLOCK: tl.constexpr):
    """What an operation must know of a whole crop: a channel's new levels, or its mean gray."""
    crop, channel = tl.program_id(0).to(tl.int64), tl.program_id(1)
    now = tl.load(operation + crop * turns + turn)
    pixels, last = x + crop * size * size * 3, size * size - 1
    if (now == AUTOCONTRAST) | (now == EQUALIZE):
        bins = tl.arange(0, 256)
        counts = tl.zeros((256,), tl.int32)
        low, high = tl.full((), 255, tl.int32), tl.full((), 0, tl.int32)
        for start in range(0, size * size, BLOCK):
            place = tl.minimum(start + tl.arange(0, BLOCK), last)
            levels = _level(tl.load(pixels + place * 3 + channel).to(tl.float32))
            low, high = tl.minimum(low, tl.min(levels, 0)), tl.maximum(high, tl.max(levels, 0))
            counts += tl.histogram(levels, 256)
        # The last pixel has filled the last block.
        final = _level(tl.load(pixels + last * 3 + channel).to(tl.float32))
        counts -= tl.where(bins == final, tl.cdiv(size * size, BLOCK) * BLOCK - size * size, 0)
        if now == EQUALIZE:
            step = (size * size - tl.sum(tl.where(bins == high, counts, 0), 0)) // 255
            below = tl.cumsum(counts, 0) - counts
            found = tl.minimum((step // 2 + below) // tl.maximum(step, 1), 255)
            told = step > 0
        else:
            scale = tl.full((), 255, tl.float64) / tl.maximum(high - low, 1).to(tl.float64)
            stretched = bins.to(tl.float64) * scale + (-low).to(tl.float64) * scale
            found = tl.minimum(tl.maximum(stretched.to(tl.int32), 0), 255)
            told = high > low
        tl.store(table + (crop * 3 + channel) * 256 + bins, tl.where(told, found, bins))
    if (now == CONTRAST) & (channel == 0):
        total = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, size * size, BLOCK):
            place = start + tl.arange(0, BLOCK)
            red, green, blue = load_pixels(pixels, tl.minimum(place, last) * 3)
            total += tl.where(place <= last, luma(red, green, blue), 0.0)
        tl.store(gray + crop, tl.sum(total, 0) / (size * size))


@triton.jit(do_not_specialize=["turn"])
def operate(
    x, out, table, gray, operation, level, negative, spot, posterize, solarize, cutout, steps,
    turn, turns, size, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of one crop by the operation that was drawn for it."""
    crop = tl.program_id(0).to(tl.int64)
    drawn = crop * turns + turn
    now, amount = tl.load(operation + drawn), tl.load(level + drawn)
    minus = tl.load(negative + drawn) != 0
    pixels, place = x + crop * size * size * 3, tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here, place = place < size * size, tl.minimum(place, size * size - 1)
    down, across = place // size, place % size
    red, green, blue = load_pixels(pixels, place * 3)
    if now == INVERT:
        red, green, blue = _inverted(red, 0), _inverted(green, 0), _inverted(blue, 0)
    elif now == POSTERIZE:
        lost = (8 - tl.load(posterize + amount)).to(tl.int32)
        red, green = _posterized(red, lost), _posterized(green, lost)
        blue = _posterized(blue, lost)
    elif now == SOLARIZE:
        bright = tl.load(solarize + amount).to(tl.int32)
        red, green = _inverted(red, bright), _inverted(green, bright)
        blue = _inverted(blue, bright)
    elif (now == AUTOCONTRAST) | (now == EQUALIZE):
        levels = table + crop * 768
        red = tl.load(levels + _level(red)) / 255.0
        green = tl.load(levels + 256 + _level(green)) / 255.0
        blue = tl.load(levels + 512 + _level(blue)) / 255.0
    elif (now == BRIGHTNESS) | (now == CONTRAST) | (now == COLOR):
        factor = _factor(amount, minus)
        base = tl.where(now == COLOR, luma(red, green, blue), 0.0)
        if now == CONTRAST:
            base += tl.load(gray + crop)
        red = unit(base + (red - base) * factor)
        green = unit(base + (green - base) * factor)
        blue = unit(base + (blue - base) * factor)
    elif now == SHARPNESS:
        factor = _factor(amount, minus)
        red = _sharpened(red, pixels, down, across, factor, size)
        green = _sharpened(green, pixels + 1, down, across, factor, size)
        blue = _sharpened(blue, pixels + 2, down, across, factor, size)
    elif (now == SHEAR_X) | (now == SHEAR_Y):
        red, green, blue = _sheared(pixels, down, across, now == SHEAR_Y, amount, minus, size)
    elif (now == TRANSLATE_X) | (now == TRANSLATE_Y) | (now == ROTATE):
        own = steps + ((now * 10 + amount) * 2 + minus.to(tl.int64)) * 6
        red, green, blue = _moved(pixels, down, across, own, size)
    elif now == CUTOUT:
        half = tl.load(cutout + amount) // 2
        middle, centre = tl.load(spot + drawn * 2), tl.load(spot + drawn * 2 + 1)
        square = (down >= middle - half) & (down < middle + half)
        square = square & (across >= centre - half) & (across < centre + half)
        red, green = tl.where(square, CUTOUT_RED, red), tl.where(square, CUTOUT_GREEN, green)
        blue = tl.where(square, CUTOUT_BLUE, blue)
    store_pixels(out + crop * size * size * 3, red, green, blue, place * 3, here)


@triton.jit
def _posterized(x, lost):
    """Without its lowest bits."""
    return ((_level(x) >> lost) << lost) / 255.0


@triton.jit
def _inverted(x, bright):
    """Levels inverted from one on."""
    found = _level(x)
    return tl.where(found >= bright, 255 - found, found) / 255.0


@triton.jit
def _factor(amount, minus):
    """Of a blend: 1 ± level / 10."""
    return 1.0 + tl.where(minus, -0.1, 0.1) * amount.to(tl.float32)


@triton.jit
def _sharpened(x, pixels, down, across, factor, size):
    """One channel blended with what Pillow's SMOOTH makes of it; the outermost pixels stay."""
    inside = (down > 0) & (down < size - 1) & (across > 0) & (across < size - 1)
    total = 4.0 * x
    for dy in tl.static_range(-1, 2):
        for dx in tl.static_range(-1, 2):
            y = tl.minimum(tl.maximum(down + dy, 0), size - 1)
            near = tl.minimum(tl.maximum(across + dx, 0), size - 1)
            total += tl.load(pixels + (y * size + near) * 3).to(tl.float32)
    soft = tl.where(inside, total / 13.0, x)
    return unit(soft + (x - soft) * factor)


@triton.jit
def _sheared(pixels, down, across, upright, amount, minus, size):
    """Each line shifted in proportion to its place: four taps of a cubic along it."""
    line, along = tl.where(upright, across, down), tl.where(upright, down, across)
    steep = tl.where(minus, -amount, amount).to(tl.float64) * (tl.full((), 0.3, tl.float64) / 9)
    half = tl.full((), 0.5, tl.float64)
    shift = steep * (line.to(tl.float64) + half)
    whole = tl.floor(shift)
    d = (shift - whole).to(tl.float32)
    reads = along + whole.to(tl.int32) - 1
    red, green, blue = d * 0.0, d * 0.0, d * 0.0
    for tap in tl.static_range(4):
        if tap == 0:
            weight = ((2.0 - d) * d - 1.0) * d
        elif tap == 1:
            weight = ((d - 2.0) * d) * d + 1.0
        elif tap == 2:
            weight = ((1.0 - d) * d + 1.0) * d
        else:
            weight = (d - 1.0) * d * d
        near = tl.minimum(tl.maximum(reads + tap, 0), size - 1)
        place = tl.where(upright, near * size + line, line * size + near)
        r, g, b = load_pixels(pixels, place * 3)
        red, green, blue = red + weight * r, green + weight * g, blue + weight * b
    centre = along.to(tl.float64) + half + shift
    inside = (centre >= 0) & (centre < size)
    red, green = tl.where(inside, unit(red), FILL), tl.where(inside, unit(green), FILL)
    return red, green, tl.where(inside, unit(blue), FILL)


@triton.jit
def _moved(pixels, down, across, own, size):
    """Nearest pixels, by the steps that a move's source coordinates take."""
    x = (tl.load(own + 2) + tl.load(own) * across + tl.load(own + 1) * down) >> FIXED
    y = (tl.load(own + 5) + tl.load(own + 3) * across + tl.load(own + 4) * down) >> FIXED
    inside = (x >= 0) & (x < size) & (y >= 0) & (y < size)
    x, y = tl.minimum(tl.maximum(x, 0), size - 1), tl.minimum(tl.maximum(y, 0), size - 1)
    red, green, blue = load_pixels(pixels, (y * size + x) * 3)
    red, green = tl.where(inside, red, FILL), tl.where(inside, green, FILL)
    return red, green, tl.where(inside, blue, FILL)
