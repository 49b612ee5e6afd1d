"""All views of a group on a CPU: a crop at a time, in memory that stays in the cache.

`fastidmm.augment.render` is the definition. What differs here:

    resize     torch's antialiased one of uint8, which is Pillow's: across, then down, each rounded
               to 8 bits. At most about 1/255, before contrast amplifies it.
    blur       each crop's taps end at four times its own sigma: beyond lies 6e-5 of a Gaussian
    solarize   the less of v and 255 - v: values between the levels 127 and 128 stay below 127.5

Brightness, contrast and normalise touch no pixel by themselves. Hue, saturation, gray and blur
commute with level = gain * value + lift; so these two numbers are carried along, values are clamped
where their levels are 0 and 255, and one multiply-add at the end writes what is kept.

A crop's bits depend on its own part of the plan alone, not on what is rendered beside it.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from fastidmm import augment
from fastidmm.batch import Mix, ViewGroup
from fastidmm.colour import LUMA
from fastidmm.plan import Crops, GroupPlan
from fastidmm.randaugment import FAMILIES, OPERATIONS
from fastidmm.store import Store

BLOCK = 16  # px that one small matrix product of a blur gives, at least
FAINTEST = 1e-9  # stands for a factor of 0, which would leave nothing to clamp by
MOST_PIXELS = 2**24  # of an image resized whole; what would be longer is left to the definition
CHANGES = {OPERATIONS.index(name): change for names, change in FAMILIES for name in names}


@contextmanager
def one_thread() -> Iterator[None]:
    """A crop is too little work to share: threads would mostly wait for one another, at full speed.

    The number is each thread's own, so that a step beside this one keeps its.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@one_thread()
def views(store: Store, plan: GroupPlan, group: ViewGroup, dtype: torch.dtype) -> Tensor:
    """Every crop of a group, finished and mixed: (C, 3, S, S) of `dtype`, channels last."""
    crops, sources = plan.crops, windows(store, plan.crops)
    side = (crops.size, crops.size)
    return _finished(lambda i: resized(sources[i], side, crops), plan, group, dtype)


@one_thread()
def finish(resized: Tensor, plan: GroupPlan, group: ViewGroup, dtype: torch.dtype) -> Tensor:
    """The same of crops that were resized elsewhere: (C, S, S, 3) uint8."""
    return _finished(lambda i: resized[i].permute(2, 0, 1), plan, group, dtype)


def _finished(
    levels_of: Callable[[int], Tensor], plan: GroupPlan, group: ViewGroup, dtype: torch.dtype
) -> Tensor:
    """All but the resize; `levels_of` a crop's number is (3, S, S) uint8."""
    crops, size = plan.crops, plan.crops.size
    kind = torch.float32 if plan.mix == "mixup" else dtype
    found = torch.empty(crops.rows.numel(), size, size, 3, dtype=kind)
    crop = Crop(size, group)
    names = ("flip", "jitter", "order", "factors", "gray", "blur", "sigma", "solarize")
    chances = list(zip(*(getattr(plan, name).tolist() for name in names), strict=True))
    # By image, whose pixels are then in the cache for all but its first crop.
    for i in crops.rows.argsort(stable=True).tolist():
        flip, jitter, order, factors, gray, blur, sigma, solarize = chances[i]
        levels = levels_of(i)
        # A flip commutes with all but RandAugment's moves, and is quickest on bytes.
        crop.load(levels.flip(-1) if flip and not group.randaugment else levels)
        if group.jitter and jitter:
            crop.jitter(order, factors)
        if group.gray and gray:
            crop.grayscale()
        if group.blur and blur:
            crop.blur(sigma)
        if group.solarize and solarize:
            crop.solarize()
        if group.randaugment:
            changed = randaugmented(crop.finished(), plan, i)
            crop.take(changed.flip(-1) if flip else changed)
        crop.write(found[i])
    return MIXES[plan.mix](found, plan).to(dtype).permute(0, 3, 1, 2)


@one_thread()
def plain_views(store: Store, crops: Crops, group: ViewGroup) -> Tensor:
    """Crops without chance, normalised, as evaluation sees them: (C, 3, S, S) float32."""
    size = crops.size
    found = torch.empty(crops.rows.numel(), size, size, 3)
    crop = Crop(size, group)
    low = crops.window[:, :2]
    # Of an image resized as a whole: its sides, and where the crop begins.
    sides = ((crops.window[:, 2:] - low) / crops.scale).round().long().tolist()
    corners = ((crops.origin - low) / crops.scale).round().long().tolist()
    for i, window in enumerate(windows(store, crops)):
        (high, wide), (top, left) = sides[i], corners[i]
        if high * wide > MOST_PIXELS:
            names = ("rows", "origin", "scale", "window")
            alone = replace(crops, **{name: getattr(crops, name)[i : i + 1] for name in names})
            found[i] = augment.render_plain(store, alone, group)[0].permute(1, 2, 0)
            continue
        whole = resized(window, (high, wide), crops)
        crop.load(whole[:, top : top + size, left : left + size])
        crop.write(found[i])
    return found.permute(0, 3, 1, 2)


def windows(store: Store, crops: Crops) -> list[Tensor]:
    """What each crop may read, where it lies in the store: (1, 3, h, w) uint8, channels last."""
    base = store.pixels.storage_offset()
    starts, widths = store.offset[crops.rows].tolist(), store.width[crops.rows].tolist()
    found = []
    for start, wide, window in zip(starts, widths, crops.window.tolist(), strict=True):
        top, left, bottom, right = window
        high, across = bottom - top, right - left
        strides = (3 * wide * high, 1, 3 * wide, 3)
        place = base + start + 3 * (top * wide + left)
        found.append(store.pixels.as_strided((1, 3, high, across), strides, place))
    return found


def resized(window: Tensor, size: tuple[int, int], crops: Crops) -> Tensor:
    """A window at another size, antialiased: (3, *size) uint8, in any layout."""
    return interpolate(window, size, mode=crops.interpolation, antialias=True)[0]


def randaugmented(x: Tensor, plan: GroupPlan, i: int) -> Tensor:
    """RandAugment's operations of crop i, each by its family alone: (1, 3, S, S) in [0, 1]."""
    drawn = (plan.operation, plan.level, plan.negative, plan.spot)
    for turn, operation in enumerate(plan.operation[i].tolist()):
        if operation in CHANGES:
            x = CHANGES[operation](x, *(each[i : i + 1, turn] for each in drawn))
    return x


class Crop:
    """The crop being made: `planes` (1 or 3, S, S) float32, and what they stand for.

    Levels, in 0 to 255, are gain * planes + lift. One plane stands for three equal ones, once a
    crop is gray. One object serves all crops of a group, so that they share its memory.
    """

    def __init__(self, size: int, group: ViewGroup) -> None:
        self.mean, self.std = group.mean, group.std
        self.bytes = torch.empty(3, size, size, dtype=torch.uint8)
        self.values = torch.empty(3, size, size)
        self.spare = torch.empty(6, size, size)  # hue's; gray lies in the last, `write` in three
        self.pixels = self.spare[:3].view(size, size, 3)
        self.luma = torch.tensor([LUMA])
        self.gray = self.spare[5:]
        self.bias = torch.empty(3).unbind()
        self.away = torch.empty(3, 1, 1)
        # Views made once: each costs as much as it takes to add two planes.
        self.channels, self.spares = self.values.unbind(), self.spare.unbind()
        self.columns, self.aways = self.pixels.unbind(-1), self.away.unbind()
        self.pairs = self.bytes[:2], self.bytes[1:]

    def load(self, levels: Tensor) -> None:
        """Begin with a resized crop: (3, S, S) uint8, in any layout."""
        # The bytes by themselves first: to reorder and convert in one takes half as long again.
        self.bytes.copy_(levels)
        if torch.equal(*self.pairs):
            self.planes = self.values[:1].copy_(self.bytes[:1])
        else:
            self.planes = self.values.copy_(self.bytes)
        self.gain, self.lift = 1.0, 0.0

    def take(self, x: Tensor) -> None:
        """Go on with a crop that was finished: (1, 3, S, S) in [0, 1]."""
        self.planes, self.gain, self.lift = x[0], 255.0, 0.0

    def finished(self) -> Tensor:
        """The crop as the definition has it: (1, 3, S, S) in [0, 1]."""
        x = self.planes * (self.gain / 255) + self.lift / 255
        return x.expand(3, -1, -1).contiguous()[None]

    def write(self, into: Tensor) -> None:
        """Normalise into (S, S, 3) of any type."""
        direct = into.dtype == torch.float32
        for channel, column in enumerate(into.unbind(-1) if direct else self.columns):
            std = self.std[channel]
            bias = self.bias[channel].fill_((self.lift / 255 - self.mean[channel]) / std)
            plane = self.planes[channel % len(self.planes)]
            torch.add(bias, plane, alpha=self.gain / (255 * std), out=column)
        if not direct:
            into.copy_(self.pixels)

    def jitter(self, order: list[int], factors: list[float]) -> None:
        """Brightness, contrast, saturation and hue in the crop's own order."""
        changes = (self.brightness, self.contrast, self.saturation, self.hue)
        for turn in order:
            if turn < 2 or len(self.planes) == 3:  # a gray crop has no colour to change
                changes[turn](factors[turn])

    def brightness(self, factor: float) -> None:
        """Away from black."""
        self._scale(factor, 0.0)

    def contrast(self, factor: float) -> None:
        """Away from the mean gray."""
        weights = LUMA if len(self.planes) == 3 else (1.0,)
        sums = self.planes.flatten(1).sum(1).tolist()
        total = sum(weight * one for weight, one in zip(weights, sums, strict=True))
        self._scale(factor, self.gain * total / self.planes[0].numel() + self.lift)

    def _scale(self, factor: float, base: float) -> None:
        amount = max(factor, FAINTEST)
        self.gain *= amount
        self.lift = base + (self.lift - base) * amount
        self._clamp(factor)

    def _clamp(self, factor: float) -> None:
        """After a step away from a base by `factor`: below 1, no level can have left its range."""
        if factor > 1:
            self.planes.clamp_(-self.lift / self.gain, (255 - self.lift) / self.gain)

    def saturation(self, factor: float) -> None:
        """Away from each pixel's own gray."""
        self.planes.lerp_(self._gray(), 1 - factor)
        self._clamp(factor)

    def _gray(self) -> Tensor:
        """Luma: (1, S, S)."""
        torch.mm(self.luma, self.values.flatten(1), out=self.gray.flatten(1))
        return self.gray

    def hue(self, turns: float) -> None:
        """Turn the colour circle, the brightest and the darkest channel's values kept.

        A pixel d sixths of the circle away from a channel's own hue has that channel at chroma *
        clamp(2 - d, 0, 1) above the darkest. From red's, d = (chroma - red + green + blue -
        darkest) / chroma on either side, so that no case needs a choice; nor is anything divided,
        since every term below is in units of chroma.
        """
        red, green, blue = self.channels
        high, low, chroma, base, apart, side = self.spares
        torch.amax(self.values, 0, out=high)
        torch.amin(self.values, 0, out=low)
        torch.sub(high, low, out=chroma)
        torch.sub(low, chroma, out=base)
        torch.add(green, blue, out=apart).sub_(red).sub_(base)
        torch.copysign(apart, torch.sub(green, blue, out=side), out=apart)
        for own, away in zip((0, 2, 4), self.aways, strict=True):
            away.fill_(math.remainder(6 * turns - own, 6))
        x = torch.addcmul(apart, chroma, self.away, out=self.values)
        # In -6 to 6, on a circle of 6: the distance from 0 is 3 - ||x| - 3|.
        x.abs_().sub_(chroma, alpha=3).abs_().add_(base).clamp_(low, high)

    def grayscale(self) -> None:
        """Luma, in one plane."""
        if len(self.planes) == 3:
            self.planes = self._gray()

    def solarize(self) -> None:
        """Invert what is at least half bright."""
        inverted = self.planes.neg().add_((255 - 2 * self.lift) / self.gain)
        self.planes = torch.minimum(self.planes, inverted)

    def blur(self, sigma: float) -> None:
        """A Gaussian of `sigma` px, edges extended."""
        self.planes = blurred(self.planes, sigma)


def blurred(x: Tensor, sigma: float) -> Tensor:
    """A Gaussian of `sigma` px, edges extended, taps out to 4 sigma: (P, S, S) float32.

    A block of B output rows (or columns) is the product of B x (B + 2 radius) taps with what it
    reads: a third of the work of S x S matrices at 112 px.
    """
    num_planes, size = x.shape[0], x.shape[-1]
    radius = math.ceil(4 * sigma)
    block = max(BLOCK, 2 * radius)
    taps = (_squares(block, radius) * (-0.5 / sigma**2)).exp_()
    taps /= taps[0].sum()
    reach = taps.shape[1]
    # One block more than the output has, so that each of its own reads within its plane.
    num = -(-size // block) + 1
    side = num * block
    after = side - size - radius
    padded = pad(x, (radius, after, radius, after), mode="replicate")
    rows = padded.as_strided((num_planes * num - 1, reach, side), (block * side, side, 1))
    down = torch.empty(num_planes * num, block, side)
    torch.bmm(taps.expand(len(rows), -1, -1), rows, out=down[:-1])
    # Neighbours read some columns both, which one matrix cannot say: every other block, then the
    # rest, into the memory that is read no more.
    flat, pairs = down.view(-1), padded.view(-1, 2 * block)
    torch.mm(flat.view(-1, 2 * block)[:, :reach], taps.T, out=pairs[:, :block])
    odd = flat[block:-block].view(-1, 2 * block)
    torch.mm(odd[:, :reach], taps.T, out=pairs[:-1, block:])
    return padded[:, :size, :size]


@cache
def _squares(block: int, radius: int) -> Tensor:
    """Squared distance from output i of a block to what it reads: (B, B + 2 radius) float32.

    Infinite beyond the radius.
    """
    apart = torch.arange(block + 2 * radius) - torch.arange(block)[:, None] - radius
    return torch.where(apart.abs() > radius, torch.inf, apart.float() ** 2)


def cutmix(x: Tensor, plan: GroupPlan) -> Tensor:
    """Paste each crop's box from its partner, in place: (C, S, S, 3)."""
    pastes = []
    for i, (there, box) in enumerate(zip(plan.partner.tolist(), plan.box.tolist(), strict=True)):
        top, left, bottom, right = box
        if top < bottom and left < right:
            pastes.append((x[i, top:bottom, left:right], x[there, top:bottom, left:right].clone()))
    for into, pixels in pastes:
        into.copy_(pixels)
    return x


def mixup(x: Tensor, plan: GroupPlan) -> Tensor:
    """Blend each crop with its partner: (C, S, S, 3)."""
    return torch.lerp(x[plan.partner], x, plan.weight[:, None, None, None])


MIXES: dict[Mix, Callable[[Tensor, GroupPlan], Tensor]] = {
    "none": lambda x, plan: x,
    "cutmix": cutmix,
    "mixup": mixup,
}
