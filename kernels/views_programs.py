"""The Triton programs of `views`; that file says what each is for."""

# mypy: allow-untyped-defs, allow-incomplete-defs
# mypy: disable-error-code="untyped-decorator"

import triton
import triton.language as tl

FAR = tl.constexpr(1e9)  # in widths of a kernel: no weight reaches there


@triton.jit
def _weight(distance, CUBIC: tl.constexpr):
    """Of a source pixel at a distance in widths of the kernel: a triangle, or Keys' cubic."""
    d = tl.abs(distance)
    if CUBIC:
        near = (1.5 * d - 2.5) * d * d + 1.0
        far = ((-0.5 * d + 2.5) * d - 4.0) * d + 2.0
        weight = tl.where(d < 1.0, near, tl.where(d < 2.0, far, 0.0))
    else:
        weight = tl.maximum(1.0 - d, 0.0)
    return weight


@triton.jit
def _taps(place, size, axis: tl.constexpr, window, origin, scale, CUBIC: tl.constexpr):
    """Where a crop begins; centre, first and last source pixel of outputs from there; stretch."""
    low, high = tl.load(window + axis), tl.load(window + 2 + axis)
    origin, scale = tl.load(origin + axis), tl.load(scale + axis)
    support = 2.0 if CUBIC else 1.0
    stretch = tl.maximum(scale, 1.0)
    # In float64 until it is relative: exact enough for every image size.
    place = tl.minimum(place, size - 1)
    centre = origin - low.to(tl.float64) + (place.to(tl.float64) + 0.5) * scale
    first = tl.maximum(tl.floor(centre - support * stretch + 0.5), 0.0).to(tl.int32)
    extent = (high - low).to(tl.float64)
    last = tl.minimum(tl.floor(centre + support * stretch + 0.5), extent).to(tl.int32)
    return low, centre.to(tl.float32), first, last, stretch.to(tl.float32)


@triton.jit
def _across(sx, end, centre, per_column, CUBIC: tl.constexpr):
    """How much source columns give to each output column: (sources, outputs), no sum's share."""
    place = tl.where(sx < end, (sx.to(tl.float32) + 0.5) * per_column, FAR)
    return tl.trans(_weight(place[None, :] - centre[:, None], CUBIC).to(tl.float16))


@triton.jit
def resize(
    pixels, offset, width, rows, window, origin, scale, out, size,
    CUBIC: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """A block of rows of one crop: down the source rows by sums, then across by products.

    Every byte is used by about two output rows, so the way down is what costs. A thread has
    PARTS pixels side by side by LANES there, which share their rows' weights and places.
    """
    WIDE: tl.constexpr = PARTS * LANES
    crop = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + crop)
    image, across = tl.load(offset + row), tl.load(width + row)
    y = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    x = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    window, origin, scale = window + crop * 4, origin + crop * 2, scale + crop * 2
    top, cy, first_y, last_y, tall = _taps(y, size, 0, window, origin, scale, CUBIC)
    left, cx, first_x, last_x, wide = _taps(x, size, 1, window, origin, scale, CUBIC)
    begin, end = tl.min(first_x, 0), tl.max(last_x, 0)
    per_row, per_column = 1.0 / tall, 1.0 / wide
    nearest = (first_y.to(tl.float32) + 0.5 - cy) * per_row
    many, taps = last_y - first_y, tl.max(last_y - first_y, 0)
    sum_y = tl.zeros((ROWS,), tl.float32)
    for t in range(taps):
        sum_y += tl.where(t < many, _weight(nearest + t * per_row, CUBIC), 0.0)
    share = (1.0 / sum_y)[:, None]
    # Bytes from the window's corner: 32 bits are enough, Pillow opens nothing as large.
    pitch = across * 3
    corner = pixels + image + (top * across + left) * 3
    first, final = (first_y * pitch)[None, :, None], ((last_y - 1) * pitch)[None, :, None]
    nearest, many = nearest[None, :, None], many[None, :, None]
    lanes = tl.arange(0, PARTS)[:, None, None] * LANES + tl.arange(0, LANES)[None, None, :]
    red = tl.zeros((ROWS, COLUMNS), tl.float32)
    green = tl.zeros((ROWS, COLUMNS), tl.float32)
    blue = tl.zeros((ROWS, COLUMNS), tl.float32)
    sum_x = tl.zeros((ROWS, COLUMNS), tl.float32)
    for w in range(begin, end, WIDE):
        down_r = tl.zeros((PARTS, ROWS, LANES), tl.float32)
        down_g = tl.zeros((PARTS, ROWS, LANES), tl.float32)
        down_b = tl.zeros((PARTS, ROWS, LANES), tl.float32)
        # What lies beyond is read at the last pixel, without weight: a mask would cost more.
        source = corner + tl.minimum(w + lanes, end - 1) * 3
        for t in range(taps):
            wy = tl.where(t < many, _weight(nearest + t * per_row, CUBIC), 0.0)
            at = source + tl.minimum(first + t * pitch, final).to(tl.uint32)
            down_r += wy * tl.load(at).to(tl.float32)
            down_g += wy * tl.load(at + 1).to(tl.float32)
            down_b += wy * tl.load(at + 2).to(tl.float32)
        wx = _across(w + tl.arange(0, WIDE), end, cx * per_column, per_column, CUBIC)
        red = tl.dot(_flat(down_r, share, ROWS, WIDE), wx, red)
        green = tl.dot(_flat(down_g, share, ROWS, WIDE), wx, green)
        blue = tl.dot(_flat(down_b, share, ROWS, WIDE), wx, blue)
        sum_x = tl.dot(tl.full((ROWS, WIDE), 1.0, tl.float16), wx, sum_x)
    factor = 1.0 / (255.0 * sum_x)
    here = (y < size)[:, None] & (x < size)[None, :]
    red, green, blue = unit(red * factor), unit(green * factor), unit(blue * factor)
    store_pixels(_of(out, crop, size), red, green, blue, _place(y, x, size), here)


@triton.jit
def _of(pixels, crop, size):
    """Where a crop begins; within it 32 bits are enough."""
    return pixels + crop * size * size * 3


@triton.jit
def _place(y, x, size):
    """Of pixels within a crop, channels last."""
    return ((y * size)[:, None] + x[None, :]) * 3


@triton.jit
def load_pixels(crop, at):
    """Three channels of pixels at places within a crop."""
    pixels = crop + at
    red, green, blue = tl.load(pixels), tl.load(pixels + 1), tl.load(pixels + 2)
    return red.to(tl.float32), green.to(tl.float32), blue.to(tl.float32)


@triton.jit
def store_pixels(crop, red, green, blue, at, here):
    """Store pixels at places within a crop."""
    pixels = crop + at
    kind = crop.dtype.element_ty
    tl.store(pixels, red.to(kind), here)
    tl.store(pixels + 1, green.to(kind), here)
    tl.store(pixels + 2, blue.to(kind), here)


@triton.jit
def _flat(x, share, ROWS: tl.constexpr, WIDE: tl.constexpr):
    """Parts side by side again, each row by its share."""
    return (tl.reshape(tl.permute(x, (1, 0, 2)), (ROWS, WIDE)) * share).to(tl.float16)


@triton.jit
def unit(x):
    """Clamped to [0, 1]."""
    return tl.minimum(tl.maximum(x, 0.0), 1.0)


@triton.jit
def luma(red, green, blue):
    """Brightness as the eye weighs it."""
    return 0.299 * red + 0.587 * green + 0.114 * blue


@triton.jit
def _turn(x, sixths, value, chroma):
    """One channel of a colour of so many sixths of a turn, its own offset included."""
    k = sixths - 6.0 * tl.floor(sixths / 6.0)
    return value - chroma * unit(tl.minimum(k, 4.0 - k))


@triton.jit
def _hue(red, green, blue, turns):
    """The colour circle turned, value and saturation kept."""
    value = tl.maximum(tl.maximum(red, green), blue)
    chroma = value - tl.minimum(tl.minimum(red, green), blue)
    safe = tl.where(chroma > 0.0, chroma, 1.0)
    sixths = tl.where(
        value == red,
        (green - blue) / safe,
        tl.where(value == green, 2.0 + (blue - red) / safe, 4.0 + (red - green) / safe),
    )
    sixths = sixths + 6.0 * turns
    return (
        _turn(red, sixths + 5.0, value, chroma),
        _turn(green, sixths + 3.0, value, chroma),
        _turn(blue, sixths + 1.0, value, chroma),
    )


@triton.jit
def _jitter(red, green, blue, order, factors, mean, before_contrast: tl.constexpr):
    """The four operations of a crop in its order; or those that come before contrast."""
    going = True
    for turn in range(4):
        now = tl.load(order + turn)
        factor = tl.load(factors + now)
        if before_contrast:
            going = going and (now != 1)
        if going:
            if now == 3:
                red, green, blue = _hue(red, green, blue, factor)
            else:
                gray = luma(red, green, blue)
                base = tl.where(now == 2, gray, tl.where(now == 1, mean, 0.0))
                red = unit(base + (red - base) * factor)
                green = unit(base + (green - base) * factor)
                blue = unit(base + (blue - base) * factor)
    return red, green, blue


@triton.jit
def means(
    resized, part, jitter, order, factors, size, SPLITS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Sums of the gray that each jittered crop's contrast turns about, (crops, splits)."""
    crop, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if tl.load(jitter + crop):
        total = tl.zeros((BLOCK,), tl.float32)
        for start in range(split * BLOCK, size * size, SPLITS * BLOCK):
            place = start + tl.arange(0, BLOCK)
            last = tl.minimum(place, size * size - 1)
            red, green, blue = load_pixels(_of(resized, crop, size), last * 3)
            red, green, blue = _jitter(
                red, green, blue, order + crop * 4, factors + crop * 4, 0.0, True
            )
            total += tl.where(place < size * size, luma(red, green, blue), 0.0)
        tl.store(part + crop * SPLITS + split, tl.sum(total, 0))


@triton.jit
def tint(
    resized, part, jitter, order, factors, gray, size, SPLITS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """A block of one crop's pixels jittered and grayed as drawn, where they lie."""
    crop = tl.program_id(0).to(tl.int64)
    jittered, grayed = tl.load(jitter + crop) != 0, tl.load(gray + crop) != 0
    if jittered | grayed:
        place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        here = place < size * size
        at, pixels = tl.minimum(place, size * size - 1) * 3, _of(resized, crop, size)
        red, green, blue = load_pixels(pixels, at)
        if jittered:
            sums = tl.load(part + crop * SPLITS + tl.arange(0, SPLITS))
            mean = tl.sum(sums, 0) / (size * size)
            red, green, blue = _jitter(
                red, green, blue, order + crop * 4, factors + crop * 4, mean, False
            )
        if grayed:
            shade = luma(red, green, blue)
            red, green, blue = shade, shade, shade
        store_pixels(pixels, red, green, blue, at, here)


@triton.jit
def _bell(distance, sigma, RADIUS: tl.constexpr):
    """A Gaussian's weight at a distance in px, none beyond the radius."""
    d = distance.to(tl.float32) / sigma
    return tl.where(tl.abs(distance) <= RADIUS, tl.exp(-0.5 * d * d), 0.0).to(tl.float16)


@triton.jit
def _blurred(x, down, across, per_row, per_column):
    """A tile of one channel spread down and across by weights, and what their sums divide by."""
    rows = tl.dot(down, x.to(tl.float16)) * per_row
    return tl.dot(rows.to(tl.float16), across) * per_column


@triton.jit
def _mirrored(crop, y, x, flip, size):
    """Places of a crop's pixels, mirrored as drawn, the edge repeated beyond it."""
    last = size - 1
    y, x = tl.minimum(tl.maximum(y, 0), last), tl.minimum(tl.maximum(x, 0), last)
    return _place(y, tl.where(tl.load(flip + crop) != 0, last - x, x), size)


@triton.jit
def _solarized(x, solarize):
    return tl.where((x >= 128 / 255) & solarize, 1.0 - x, x)


@triton.jit
def finish(
    resized, out, blur, sigma, solarize, flip, partner, goes_to, box, weight, size,
    mean_r, mean_g, mean_b, per_r, per_g, per_b,
    RADIUS: tl.constexpr, ROWS: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr,
    COLUMNS: tl.constexpr, STRIP: tl.constexpr, BLUR: tl.constexpr, CUTMIX: tl.constexpr,
    MIXUP: tl.constexpr,
):  # fmt: skip
    """A strip of one crop, from tinted pixels to where the model reads them.

    A blur's weights across are made once a strip; Mixup does without blur.
    """
    crop = tl.program_id(0).to(tl.int64)
    first, begin_x = tl.program_id(1) * STRIP, tl.program_id(2) * COLUMNS
    end, x = tl.minimum(first + STRIP, size), begin_x + tl.arange(0, COLUMNS)
    pixels, told = _of(resized, crop, size), tl.load(solarize + crop) != 0
    places = (out, goes_to, box, crop, x, size)
    colours = (mean_r, mean_g, mean_b, per_r, per_g, per_b)
    spread = False
    if BLUR:
        spread = tl.load(blur + crop) != 0
    if spread:
        tall, wide = tl.arange(0, TALL) - RADIUS, tl.arange(0, WIDE) - RADIUS
        width = tl.load(sigma + crop)
        down = _bell(tall[None, :] - tl.arange(0, ROWS)[:, None], width, RADIUS)
        across = _bell(wide[:, None] - tl.arange(0, COLUMNS)[None, :], width, RADIUS)
        per_row = (1.0 / tl.sum(down.to(tl.float32), 1))[:, None]
        per_column = (1.0 / tl.sum(across.to(tl.float32), 0))[None, :]
        for begin in range(first, end, ROWS):
            at = pixels + _mirrored(crop, begin + tall, begin_x + wide, flip, size)
            red = _blurred(tl.load(at), down, across, per_row, per_column)
            green = _blurred(tl.load(at + 1), down, across, per_row, per_column)
            blue = _blurred(tl.load(at + 2), down, across, per_row, per_column)
            red, green = _solarized(red, told), _solarized(green, told)
            y = begin + tl.arange(0, ROWS)
            _put(red, green, _solarized(blue, told), y, places, colours, CUTMIX)
    else:
        for begin in range(first, end, ROWS):
            y = begin + tl.arange(0, ROWS)
            red, green, blue = load_pixels(pixels, _mirrored(crop, y, x, flip, size))
            red, green = _solarized(red, told), _solarized(green, told)
            blue = _solarized(blue, told)
            if MIXUP:
                other, own = tl.load(partner + crop), tl.load(weight + crop)
                there = tl.load(solarize + other) != 0
                at = _mirrored(other, y, x, flip, size)
                r, g, b = load_pixels(_of(resized, other, size), at)
                red = own * red + (1.0 - own) * _solarized(r, there)
                green = own * green + (1.0 - own) * _solarized(g, there)
                blue = own * blue + (1.0 - own) * _solarized(b, there)
            _put(red, green, blue, y, places, colours, CUTMIX)


@triton.jit
def _put(red, green, blue, y, places, colours, CUTMIX: tl.constexpr):
    """Normalise pixels, and store each where CutMix wants it: in this crop, another, or none."""
    out, goes_to, box, crop, x, size = places
    mean_r, mean_g, mean_b, per_r, per_g, per_b = colours
    red, green, blue = (red - mean_r) * per_r, (green - mean_g) * per_g, (blue - mean_b) * per_b
    here, at = (y < size)[:, None] & (x < size)[None, :], _place(y, x, size)
    if CUTMIX:
        there = tl.load(goes_to + crop)
        own = here & ~_in_box(box, crop, y, x)
        store_pixels(_of(out, crop, size), red, green, blue, at, own)
        pasted = here & _in_box(box, there, y, x)
        store_pixels(_of(out, there, size), red, green, blue, at, pasted)
    else:
        store_pixels(_of(out, crop, size), red, green, blue, at, here)


@triton.jit
def _in_box(box, crop, y, x):
    """Which pixels of a crop its partner covers."""
    top, left = tl.load(box + crop * 4), tl.load(box + crop * 4 + 1)
    bottom, right = tl.load(box + crop * 4 + 2), tl.load(box + crop * 4 + 3)
    return ((y >= top) & (y < bottom))[:, None] & ((x >= left) & (x < right))[None, :]
