"""RandAugment as the paper's fine-tuning has it: fifteen operations, drawn with a level each.

The list, the levels 1 to 9 and the fills are those of the published code, which took them from UDA.
Operations come in families that each work on a whole batch of crops: tables of 256 levels, blends,
shears, nearest-pixel moves, and the cut-out square. Crops are (C, 3, S, S) float32 in [0, 1].

Source: Cubuk et al., "RandAugment", 2020; Xie et al., "Unsupervised Data Augmentation", 2020.
"""

import math
from functools import cache

import torch
from torch import Tensor

from fastidmm import colour

OPERATIONS = (
    "invert", "cutout", "sharpness", "autocontrast", "posterize", "shear_x", "translate_x",
    "translate_y", "shear_y", "rotate", "equalize", "contrast", "color", "solarize", "brightness",
)  # fmt: skip
NONE = len(OPERATIONS)  # stands for an operation that was drawn and, by chance, left out
LEVELS = 9

FILL = 128 / 255  # where a moved picture leaves nothing
CUTOUT_FILL = (125 / 255, 122 / 255, 113 / 255)
FIXED = 16  # bits after the point of a source coordinate, as Pillow's nearest-pixel moves have


def randaugment(
    x: Tensor, operation: Tensor, level: Tensor, negative: Tensor, spot: Tensor
) -> Tensor:
    """Apply the operations drawn for each crop, one after the other.

    operation (C, n) int64 in [0, 15], 15 meaning none; level (C, n) int64 in [1, 9]; negative
    (C, n) bool: the sign of signed operations; spot (C, n, 2) int64: centre of the cut-out square.
    """
    for turn in range(operation.shape[1]):
        now = operation[:, turn]
        for members, change in FAMILIES:
            concerned = torch.stack([now == OPERATIONS.index(name) for name in members]).any(0)
            drawn = (now, level[:, turn], negative[:, turn], spot[:, turn])
            x = colour.where(concerned, x, change, *drawn)
    return x


def _is(operation: Tensor, name: str, dims: int) -> Tensor:
    """Which crops have that operation, shaped to meet a tensor of so many dimensions."""
    return (operation == OPERATIONS.index(name)).view(-1, *[1] * (dims - 1))


# --- tables of 256 levels -----------------------------------------------------------------------


def by_table(x: Tensor, operation: Tensor, level: Tensor, *_: Tensor) -> Tensor:
    """Invert, posterize, solarize, autocontrast and equalize: exact for pictures of 8 bits.

    These are defined on 256 levels, so values are rounded to them here, and here only.
    """
    levels = (x * 255).round().long().flatten(2)
    before = torch.arange(256, device=x.device)
    kept = before & ~((1 << (8 - _grid(level, POSTERIZE_BITS))) - 1)[:, None]
    bright = before >= _grid(level, SOLARIZE_FROM)[:, None]
    table = torch.where(_is(operation, "posterize", 2), kept, 255 - before)
    table = torch.where(_is(operation, "solarize", 2) & ~bright, before, table)
    table = table[:, None].expand(-1, 3, -1)
    table = torch.where(_is(operation, "autocontrast", 3), _stretched(levels), table)
    table = torch.where(_is(operation, "equalize", 3), _equalized(levels), table)
    return (table.gather(2, levels).float() / 255).view_as(x)


def _stretched(levels: Tensor) -> Tensor:
    """Each channel's darkest level to 0 and its brightest to 255: (C, 3, 256)."""
    low, high = levels.amin(dim=2, keepdim=True), levels.amax(dim=2, keepdim=True)
    before = torch.arange(256, device=levels.device)
    # In Pillow's order, in float64, so that cutting the fraction off gives the same level.
    scale = torch.full((), 255.0, dtype=torch.float64, device=levels.device) / (high - low).clamp(1)
    found = (before * scale + -low * scale).long().clamp(0, 255)
    return torch.where(high > low, found, before)


def _equalized(levels: Tensor) -> Tensor:
    """Each channel's levels made equally frequent: (C, 3, 256)."""
    num, pixels = levels.shape[0] * 3, levels.shape[2]
    place = torch.arange(num, device=levels.device).view(-1, 3, 1) * 256 + levels
    counts = torch.zeros(num * 256, dtype=torch.int64, device=levels.device)
    counts.scatter_add_(0, place.flatten(), torch.ones_like(place).flatten())
    counts = counts.view(-1, 3, 256)
    brightest = counts.gather(2, levels.amax(dim=2, keepdim=True))
    step = (pixels - brightest) // 255
    below = counts.cumsum(dim=2) - counts
    found = ((step // 2 + below) // step.clamp(min=1)).clamp(max=255)
    return torch.where(step > 0, found, torch.arange(256, device=levels.device))


# --- blends -------------------------------------------------------------------------------------


def enhance(x: Tensor, operation: Tensor, level: Tensor, negative: Tensor, *_: Tensor) -> Tensor:
    """Brightness, contrast, colour and sharpness by 1 ± level / 10."""
    factor = 1 + torch.where(negative, -0.1, 0.1) * level
    # Colour's numbering, where 0 is brightness.
    kind = (operation == OPERATIONS.index("contrast")) + 2 * (
        operation == OPERATIONS.index("color")
    )
    soft = smooth(x)
    sharp = (soft + (x - soft) * factor[:, None, None, None]).clamp(0, 1)
    return torch.where(_is(operation, "sharpness", 4), sharp, colour.blend(x, kind, factor))


def smooth(x: Tensor) -> Tensor:
    """Pillow's filter SMOOTH: 3 x 3, the middle weighing 5 of 13; the outermost pixels stay."""
    size = x.shape[-1]
    if size < 3:
        return x
    # By shifted sums: a convolution might be computed in TF32.
    total = 4 * x[:, :, 1:-1, 1:-1]
    for down in range(3):
        for across in range(3):
            total = total + x[:, :, down : down + size - 2, across : across + size - 2]
    smoothed = x.clone()
    smoothed[:, :, 1:-1, 1:-1] = total / 13
    return smoothed


# --- moves --------------------------------------------------------------------------------------


def shear(x: Tensor, operation: Tensor, level: Tensor, negative: Tensor, *_: Tensor) -> Tensor:
    """Shift each row (or column) in proportion to its place, up to 0.3 px per px; bicubic.

    Along the other axis a shear falls on whole pixels, so four taps are all of the cubic, whose
    free parameter is -1 in Pillow's transforms, unlike in its resizes.
    """
    upright = _is(operation, "shear_y", 4)
    x = torch.where(upright, x.mT, x)
    size = x.shape[-1]
    place = torch.arange(size, device=x.device) + 0.5
    # In float64 all the way: a pixel on the very edge must fall on Pillow's side of it.
    slope = torch.where(negative, -level, level).double() * (0.3 / LEVELS)
    shift = slope[:, None] * place  # (C, S), of each row
    whole = shift.floor()
    d = (shift - whole).float()[:, None, :, None]
    taps = (
        ((2 - d) * d - 1) * d, ((d - 2) * d) * d + 1, ((1 - d) * d + 1) * d, (d - 1) * d * d,
    )  # fmt: skip
    reads = (place - 0.5).long() + whole.long()[:, :, None]  # (C, S, S)
    found = torch.zeros_like(x)
    for number, weight in enumerate(taps):
        near = (reads + number - 1).clamp(0, size - 1)[:, None].expand_as(x)
        found += weight * x.gather(3, near)
    centre = place + shift[:, :, None]
    inside = ((centre >= 0) & (centre < size))[:, None]
    found = torch.where(inside, found.clamp(0, 1), FILL)
    return torch.where(upright, found.mT, found)


def move(x: Tensor, operation: Tensor, level: Tensor, negative: Tensor, *_: Tensor) -> Tensor:
    """Translate by up to 150/331 of the side, or rotate by up to 30 degrees; nearest pixels."""
    size = x.shape[-1]
    steps = _steps(size, x.device)[operation, level, negative.long()]  # (C, 2, 3)
    place = torch.arange(size, device=x.device)
    across, down, start = (part[:, :, None, None] for part in steps.unbind(dim=2))
    source = (start + across * place + down * place[:, None]) >> FIXED  # (C, 2, S, S): x, y
    inside = ((source >= 0) & (source < size)).all(dim=1, keepdim=True)
    source = source.clamp(0, size - 1)
    flat = (source[:, 1] * size + source[:, 0]).flatten(1)[:, None].expand(-1, 3, -1)
    return torch.where(inside, x.flatten(2).gather(2, flat).view_as(x), FILL)


@cache
def _steps(size: int, device: torch.device) -> Tensor:
    """How source coordinates of a move run: (15, 10, 2, 2, 3) int64, in 2**-16 px.

    By operation, level and sign: of x and of y the step per output column, per output row, and the
    value at the first pixel. Made on the host in float64, so that every device reads the same.
    """
    table = torch.zeros(len(OPERATIONS) + 1, LEVELS + 1, 2, 2, 3, dtype=torch.int64)
    for level in range(LEVELS + 1):
        for sign in range(2):
            by = (1 - 2 * sign) * level / LEVELS * (150 / 331) * size
            # The published code draws no sign for rotations: they all turn one way.
            angle = -math.radians(level / LEVELS * 30)
            cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
            middle = size / 2
            matrices = {
                "translate_x": ((1, 0, by), (0, 1, 0)),
                "translate_y": ((1, 0, 0), (0, 1, by)),
                "rotate": (
                    (cos, sin, middle - cos * middle - sin * middle),
                    (-sin, cos, middle + sin * middle - cos * middle),
                ),
            }
            for name, rows in matrices.items():
                table[OPERATIONS.index(name), level, sign] = torch.tensor(
                    [[_fixed(a), _fixed(b), _fixed(c + a / 2 + b / 2)] for a, b, c in rows]
                )
    return table.to(device)


def _fixed(value: float) -> int:
    return math.floor(value * (1 << FIXED) + 0.5)


# --- the cut-out square -------------------------------------------------------------------------


def cutout(x: Tensor, operation: Tensor, level: Tensor, negative: Tensor, spot: Tensor) -> Tensor:
    """Fill a square of up to 20 px, whatever the crop's size, with the mean colour."""
    half = _grid(level, CUTOUT_SIDE)[:, None] // 2
    place = torch.arange(x.shape[-1], device=x.device)
    low, high = spot - half, spot + half
    inside = (place >= low[..., None]) & (place < high[..., None])  # (C, 2, S): y, x
    square = inside[:, 0, None, :, None] & inside[:, 1, None, None, :]
    return torch.where(square, _on(CUTOUT_FILL, x.device)[:, None, None], x)


# What levels 0 to 9 mean, for the operations that are no simple multiple of them.
POSTERIZE_BITS = (8, 8, 7, 7, 6, 6, 5, 5, 4, 4)
CUTOUT_SIDE = (0, 2, 4, 7, 9, 11, 13, 16, 18, 20)
SOLARIZE_FROM = tuple(-(-256 * (LEVELS - level) // LEVELS) for level in range(LEVELS + 1))


def meanings(size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For a kernel: what levels mean to posterize, solarize and cutout (10,), and to moves."""
    posterize, solarize = _on(POSTERIZE_BITS, device), _on(SOLARIZE_FROM, device)
    return posterize, solarize, _on(CUTOUT_SIDE, device), _steps(size, device)


def _grid(level: Tensor, values: tuple[int, ...]) -> Tensor:
    """What each level means: (C,) int64."""
    return _on(values, level.device)[level]


@cache
def _on(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device)


FAMILIES = (
    (("invert", "posterize", "solarize", "autocontrast", "equalize"), by_table),
    (("brightness", "contrast", "color", "sharpness"), enhance),
    (("shear_x", "shear_y"), shear),
    (("translate_x", "translate_y", "rotate"), move),
    (("cutout",), cutout),
)
