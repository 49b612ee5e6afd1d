"""The three Triton programs of `views`; that file says what each is for."""

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
def _taps(place, origin, low, high, scale, CUBIC: tl.constexpr):
    """Centre, first and last source pixel of each output pixel, relative to the window."""
    support = 2.0 if CUBIC else 1.0
    stretch = tl.maximum(scale, 1.0)
    # In float64 until it is relative: exact enough for every image size.
    centre = origin - low.to(tl.float64) + (place.to(tl.float64) + 0.5) * scale
    first = tl.maximum(tl.floor(centre - support * stretch + 0.5), 0.0)
    extent = (high - low).to(tl.float64)
    last = tl.minimum(tl.floor(centre + support * stretch + 0.5), extent)
    return centre.to(tl.float32), first.to(tl.int32), last.to(tl.int32), stretch.to(tl.float32)


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
    top, left = tl.load(window + crop * 4), tl.load(window + crop * 4 + 1)
    bottom, right = tl.load(window + crop * 4 + 2), tl.load(window + crop * 4 + 3)
    y = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    x = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    cy, first_y, last_y, tall = _taps(
        tl.minimum(y, size - 1), tl.load(origin + crop * 2), top, bottom,
        tl.load(scale + crop * 2), CUBIC,
    )  # fmt: skip
    cx, first_x, last_x, wide = _taps(
        tl.minimum(x, size - 1), tl.load(origin + crop * 2 + 1), left, right,
        tl.load(scale + crop * 2 + 1), CUBIC,
    )  # fmt: skip
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
        sx = w + tl.arange(0, WIDE)
        place = tl.where(sx < end, (sx.to(tl.float32) + 0.5) * per_column, FAR)
        wx = _weight(place[None, :] - (cx * per_column)[:, None], CUBIC).to(tl.float16)
        wx = tl.trans(wx)
        red = tl.dot(_flat(down_r, share, ROWS, WIDE), wx, red)
        green = tl.dot(_flat(down_g, share, ROWS, WIDE), wx, green)
        blue = tl.dot(_flat(down_b, share, ROWS, WIDE), wx, blue)
        sum_x = tl.dot(tl.full((ROWS, WIDE), 1.0, tl.float16), wx, sum_x)
    factor = 1.0 / (255.0 * sum_x)
    at = ((crop * size + y)[:, None] * size + x[None, :]) * 3
    here = (y < size)[:, None] & (x < size)[None, :]
    kind = out.dtype.element_ty
    tl.store(out + at, _unit(red * factor).to(kind), here)
    tl.store(out + at + 1, _unit(green * factor).to(kind), here)
    tl.store(out + at + 2, _unit(blue * factor).to(kind), here)


@triton.jit
def _flat(x, share, ROWS: tl.constexpr, WIDE: tl.constexpr):
    """Parts side by side again, each row by its share."""
    return (tl.reshape(tl.permute(x, (1, 0, 2)), (ROWS, WIDE)) * share).to(tl.float16)


@triton.jit
def _unit(x):
    return tl.minimum(tl.maximum(x, 0.0), 1.0)


@triton.jit
def _luma(red, green, blue):
    return 0.299 * red + 0.587 * green + 0.114 * blue


@triton.jit
def _turn(x, sixths, value, chroma):
    """One channel of a colour of so many sixths of a turn, its own offset included."""
    k = sixths - 6.0 * tl.floor(sixths / 6.0)
    return value - chroma * _unit(tl.minimum(k, 4.0 - k))


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
                gray = _luma(red, green, blue)
                base = tl.where(now == 2, gray, tl.where(now == 1, mean, 0.0))
                red = _unit(base + (red - base) * factor)
                green = _unit(base + (green - base) * factor)
                blue = _unit(base + (blue - base) * factor)
    return red, green, blue


@triton.jit
def _read(
    resized, crop, y, x, jitter, order, factors, gray, mean, size,
    before_contrast: tl.constexpr,
):  # fmt: skip
    """Pixels of a crop, jittered and grayed as drawn."""
    at = ((crop * size + y) * size + x) * 3
    red = tl.load(resized + at).to(tl.float32)
    green = tl.load(resized + at + 1).to(tl.float32)
    blue = tl.load(resized + at + 2).to(tl.float32)
    if tl.load(jitter + crop):
        red, green, blue = _jitter(
            red, green, blue, order + crop * 4, factors + crop * 4, mean, before_contrast
        )
    shaded = False
    if not before_contrast:
        shaded = tl.load(gray + crop) != 0
    if shaded:
        shade = _luma(red, green, blue)
        red, green, blue = shade, shade, shade
    return red, green, blue


@triton.jit
def means(resized, mean, jitter, order, factors, size, BLOCK: tl.constexpr):
    """The gray that each crop's contrast turns about."""
    crop = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, size * size, BLOCK):
        place = start + tl.arange(0, BLOCK)
        last = tl.minimum(place, size * size - 1)
        red, green, blue = _read(
            resized, crop, last // size, last % size, jitter, order, factors, jitter, 0.0,
            size, True,
        )  # fmt: skip
        total += tl.where(place < size * size, _luma(red, green, blue), 0.0)
    tl.store(mean + crop, tl.sum(total, 0) / (size * size))


@triton.jit
def _blurred(x, down, across):
    """A tile spread down and across by weights that need not sum to one."""
    total_y, total_x = tl.sum(down.to(tl.float32), 1), tl.sum(across.to(tl.float32), 0)
    rows = tl.dot(down, x.to(tl.float16)) / total_y[:, None]
    return tl.dot(rows.to(tl.float16), across) / total_x[None, :]


@triton.jit
def _bell(distance, sigma, RADIUS: tl.constexpr):
    """A Gaussian's weight at a distance in px, none beyond the radius."""
    d = distance.to(tl.float32) / sigma
    return tl.where(tl.abs(distance) <= RADIUS, tl.exp(-0.5 * d * d), 0.0).to(tl.float16)


@triton.jit
def _block_blurred(
    resized, crop, begin, begin_x, jitter, order, factors, gray, turned, sigma, size,
    RADIUS: tl.constexpr, ROWS: tl.constexpr, TALL: tl.constexpr, COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """A block of rows, blurred: from the rows and columns around it, the edge repeated."""
    tall, wide = tl.arange(0, TALL), tl.arange(0, WIDE)
    y = tl.minimum(tl.maximum(begin + tall - RADIUS, 0), size - 1)
    around = tl.minimum(tl.maximum(begin_x + wide - RADIUS, 0), size - 1)
    red, green, blue = _read(
        resized, crop, y[:, None], around[None, :], jitter, order, factors, gray, turned,
        size, False,
    )  # fmt: skip
    width = tl.load(sigma + crop)
    down = _bell(tall[None, :] - RADIUS - tl.arange(0, ROWS)[:, None], width, RADIUS)
    across = _bell(wide[:, None] - RADIUS - tl.arange(0, COLUMNS)[None, :], width, RADIUS)
    red, green = _blurred(red, down, across), _blurred(green, down, across)
    return red, green, _blurred(blue, down, across)


@triton.jit
def finish(
    resized, out, mean, jitter, order, factors, gray, blur, sigma, solarize, flip, box,
    goes_to, size, mean_r, mean_g, mean_b, std_r, std_g, std_b,
    RADIUS: tl.constexpr, ROWS: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr,
    COLUMNS: tl.constexpr, BLUR: tl.constexpr, CUTMIX: tl.constexpr,
):  # fmt: skip
    """A block of rows of one crop, from resized pixels to where the model reads them."""
    crop = tl.program_id(0).to(tl.int64)
    begin, begin_x = tl.program_id(1) * ROWS, tl.program_id(2) * COLUMNS
    y, x = begin + tl.arange(0, ROWS), begin_x + tl.arange(0, COLUMNS)
    last, turned = size - 1, tl.load(mean + crop)
    spread = False
    if BLUR:
        spread = tl.load(blur + crop) != 0
    if spread:
        red, green, blue = _block_blurred(
            resized, crop, begin, begin_x, jitter, order, factors, gray, turned, sigma, size,
            RADIUS, ROWS, TALL, COLUMNS, WIDE,
        )  # fmt: skip
    else:
        red, green, blue = _read(
            resized, crop, tl.minimum(y, last)[:, None], tl.minimum(x, last)[None, :], jitter,
            order, factors, gray, turned, size, False,
        )  # fmt: skip
    if tl.load(solarize + crop):
        red = tl.where(red >= 128 / 255, 1.0 - red, red)
        green = tl.where(green >= 128 / 255, 1.0 - green, green)
        blue = tl.where(blue >= 128 / 255, 1.0 - blue, blue)
    x = tl.where(tl.load(flip + crop) != 0, last - x, x)
    red, green, blue = (red - mean_r) / std_r, (green - mean_g) / std_g, (blue - mean_b) / std_b
    here = ((y < size)[:, None] & (x >= 0)[None, :]) & (x < size)[None, :]
    if CUTMIX:
        _put(out, red, green, blue, crop, y, x, size, here & ~_in_box(box, crop, y, x))
        there = tl.load(goes_to + crop)
        _put(out, red, green, blue, there, y, x, size, here & _in_box(box, there, y, x))
    else:
        _put(out, red, green, blue, crop, y, x, size, here)


@triton.jit
def _in_box(box, crop, y, x):
    """Which pixels of a crop its partner covers."""
    top, left = tl.load(box + crop * 4), tl.load(box + crop * 4 + 1)
    bottom, right = tl.load(box + crop * 4 + 2), tl.load(box + crop * 4 + 3)
    return ((y >= top) & (y < bottom))[:, None] & ((x >= left) & (x < right))[None, :]


@triton.jit
def _put(out, red, green, blue, crop, y, x, size, here):
    """Store pixels in a crop, channels last."""
    at = ((crop * size + y[:, None]) * size + x[None, :]) * 3
    kind = out.dtype.element_ty
    tl.store(out + at, red.to(kind), here)
    tl.store(out + at + 1, green.to(kind), here)
    tl.store(out + at + 2, blue.to(kind), here)
