"""One photograph's views by Pillow and torchvision: 8 bits after every step, one core.

What the `torch` loader's workers do, and the truth that our own operations are tested against.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from fastidmm.backbones.torchvision_ops import make_torchvision_importable
from fastidmm.batch import Interpolation
from fastidmm.plan import GroupPlan
from fastidmm.randaugment import LEVELS, NONE, OPERATIONS

make_torchvision_importable()
from torchvision.transforms.v2 import functional as tv  # noqa: E402

Picture = Image.Image
Pixels = NDArray[np.uint8]

BICUBIC, NEAREST = Image.Resampling.BICUBIC, Image.Resampling.NEAREST
FILTERS: dict[Interpolation, Image.Resampling] = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": BICUBIC,
}
GRID = np.linspace(0, 1, LEVELS + 1)  # the published code's ten points, the first never drawn
GRAY, CUT_OUT = (128, 128, 128), (125, 122, 113)
# Brightness, contrast, saturation, hue, as a plan numbers them.
JITTER = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)


class Chances(NamedTuple):
    """What chance decided for one crop: a row of a GroupPlan as Python's own numbers."""

    window: tuple[int, int, int, int]  # top, left, bottom, right
    flip: bool
    jitter: bool
    order: list[int]
    factors: list[float]
    gray: bool
    blur: bool
    sigma: float
    solarize: bool
    operation: list[int]
    level: list[int]
    negative: list[bool]
    spot: list[tuple[int, int]]


def chances(plan: GroupPlan) -> list[Chances]:
    """Every crop's, in the plan's order; asking tensors crop by crop would take far longer."""
    columns = [getattr(plan, name).tolist() for name in Chances._fields[1:]]
    return [Chances(*row) for row in zip(plan.crops.window.tolist(), *columns, strict=True)]


def view(image: Picture, drawn: Chances, size: int, interpolation: Interpolation) -> Pixels:
    """One crop of an image, all but normalised and mixed: (S, S, 3)."""
    top, left, bottom, right = drawn.window
    x = image.crop((left, top, right, bottom)).resize((size, size), FILTERS[interpolation])
    if drawn.jitter:
        for which in drawn.order:
            x = JITTER[which](x, drawn.factors[which])
    if drawn.gray:
        x = tv.rgb_to_grayscale(x, num_output_channels=3)
    if drawn.blur:
        x = x.filter(ImageFilter.GaussianBlur(drawn.sigma))
    if drawn.solarize:
        x = tv.solarize(x, 128)
    turns = zip(drawn.operation, drawn.level, drawn.negative, drawn.spot, strict=True)
    for which, level, negative, spot in turns:
        if which != NONE:
            x = randaugmented(x, OPERATIONS[which], level, -1 if negative else 1, spot)
    return np.asarray(tv.horizontal_flip(x) if drawn.flip else x)


def randaugmented(
    image: Picture, name: str, level: int, sign: int, spot: tuple[int, int]
) -> Picture:
    """One operation of RandAugment at a level of 1 to 9, the cut-out around `spot` (y, x)."""
    part, side = GRID[level], image.size[0]
    shear, across = sign * 0.3 * part, sign * 150 / 331 * part * side
    factor = 1 + sign * 0.9 * part
    by_name: dict[str, Callable[[], Picture]] = {
        "invert": lambda: ImageOps.invert(image),
        "autocontrast": lambda: ImageOps.autocontrast(image),
        "equalize": lambda: ImageOps.equalize(image),
        "posterize": lambda: ImageOps.posterize(image, int(np.round(8 - 4 * part))),
        "solarize": lambda: ImageOps.solarize(image, 256 * (1 - part)),
        "brightness": lambda: ImageEnhance.Brightness(image).enhance(factor),
        "contrast": lambda: ImageEnhance.Contrast(image).enhance(factor),
        "color": lambda: ImageEnhance.Color(image).enhance(factor),
        "sharpness": lambda: ImageEnhance.Sharpness(image).enhance(factor),
        "shear_x": lambda: _moved(image, (1, shear, 0, 0, 1, 0), BICUBIC),
        "shear_y": lambda: _moved(image, (1, 0, 0, shear, 1, 0), BICUBIC),
        "translate_x": lambda: _moved(image, (1, 0, across, 0, 1, 0), NEAREST),
        "translate_y": lambda: _moved(image, (1, 0, 0, 0, 1, across), NEAREST),
        "rotate": lambda: image.rotate(30 * part, fillcolor=GRAY),
        "cutout": lambda: _with_square(image, spot, int(np.round(20 * part))),
    }
    return by_name[name]()


def _moved(image: Picture, matrix: tuple[float, ...], how: Image.Resampling) -> Picture:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, how, fillcolor=GRAY)


def _with_square(image: Picture, spot: tuple[int, int], side: int) -> Picture:
    pixels, half = np.array(image), side // 2
    y, x = spot
    pixels[max(0, y - half) : y + half, max(0, x - half) : x + half] = CUT_OUT
    return Image.fromarray(pixels)
