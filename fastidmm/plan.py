"""What chance decides in one step, as data: a pure function of (seed, attempt, step).

The algorithms are torchvision's (RandomResizedCrop, ColorJitter) and the IDMM paper's (RandAugment,
CutMix, Mixup); the numbers come from counters. One operation per tensor call, so that CPU and GPU
agree to the bit on every integer. Never compiled.
"""

import itertools
import math
from dataclasses import dataclass, replace
from functools import cache, lru_cache

import torch
from torch import Tensor

from fastidmm.batch import Interpolation, Mix, ViewGroup
from fastidmm.chance import (
    Counters,
    Use,
    below,
    beta_table,
    between,
    happens,
    look_up,
    permutation,
    philox,
    ratio_table,
)
from fastidmm.kernels.draws import draws
from fastidmm.randaugment import LEVELS, NONE, OPERATIONS

When = tuple[Tensor | int, Tensor | int, int]  # epoch, step, group
TRIES = 10
BLOCKS = 10  # of four words per crop: 5 for the tries, 5 for the rest


@dataclass(frozen=True, slots=True)
class Crops:
    """Where crops lie in their images: output pixel i covers origin + [i, i + 1) * scale."""

    rows: Tensor  # (C,) int64
    origin: Tensor  # (C, 2) float64: y, x in source pixels
    scale: Tensor  # (C, 2) float64: source pixels per output pixel
    window: Tensor  # (C, 4) int64: top, left, bottom, right of the source pixels that may be read
    size: int
    interpolation: Interpolation


@dataclass(frozen=True, slots=True)
class GroupPlan:
    """What chance decided for one group of views."""

    crops: Crops
    flip: Tensor  # (C,) bool, as are jitter, gray, blur, solarize
    jitter: Tensor
    order: Tensor  # (C, 4) int64: 0 brightness, 1 contrast, 2 saturation, 3 hue
    factors: Tensor  # (C, 4) float32, in that numbering
    gray: Tensor
    blur: Tensor
    sigma: Tensor  # (C,) float32
    solarize: Tensor
    operation: Tensor  # (C, n) int64: RandAugment's, as are level, negative (bool), spot (C, n, 2)
    level: Tensor
    negative: Tensor
    spot: Tensor
    mix: Mix
    partner: Tensor  # (C,) int64: the crop of this group that is pasted or blended in
    box: Tensor  # (C, 4) int64: top, left, bottom, right of the part that CutMix pastes
    weight: Tensor  # (C,) float32: share of the crop that stays its own
    place: Tensor  # (P,) int64: of the first P, those wanted, in the whole batch
    total: int  # crops of the group in the whole batch


@dataclass(frozen=True, slots=True)
class Plan:
    """One step: which rows, and how each group of their views is made."""

    rows: Tensor  # (B,) int64
    groups: tuple[GroupPlan, ...]
    step: Tensor | int
    epoch: int  # from 0, known to the host
    shares: tuple[int, ...]  # images of each rank: see `shares.py`


def num_steps(num_rows: int, batch_size: int) -> int:
    """Steps in an epoch; the last, shorter batch counts."""
    return math.ceil(num_rows / batch_size)


def epoch_order(
    num_rows: int, counters: Counters, epoch: Tensor | int, device: torch.device
) -> Tensor:
    """The order of the rows in one epoch: (N,) int64, not to be written to."""
    # A host sorts a million rows in over half a second: not in every step.
    order = _order if isinstance(epoch, Tensor) else _kept_order
    return order(num_rows, counters.key(Use.ORDER), epoch, device)


def _order(
    num_rows: int, key: tuple[int, int], epoch: Tensor | int, device: torch.device
) -> Tensor:
    return permutation(philox((epoch, torch.arange(num_rows, device=device), 0, 0), key))


_kept_order = lru_cache(maxsize=2)(_order)  # two: whoever draws ahead is in the next epoch first


def draw(
    sizes: tuple[Tensor, Tensor],
    groups: list[ViewGroup],
    counters: Counters,
    *,
    step: int,
    batch_size: int,
    cutmix_groups: int = 1,
    counter: Tensor | None = None,
) -> Plan:
    """Draw the plan of one step; `sizes` holds all heights and widths of the store, (N,) each.

    `counter`, () int64, holds the step where the sizes are. Numbers are drawn from it then, and the
    step given only says how many rows there are and how they mix: a capture may go on with others.
    """
    num = sizes[0].numel()
    epoch, place = divmod(step, num_steps(num, batch_size))
    first = place * batch_size
    if counter is None:
        when: tuple[Tensor | int, Tensor | int] = (epoch, step)
        rows = epoch_order(num, counters, epoch, sizes[0].device)[first : first + batch_size]
    else:
        when = (counter // num_steps(num, batch_size), counter)
        places = torch.arange(min(batch_size, num - first), device=counter.device)
        places = places + (counter % num_steps(num, batch_size)) * batch_size
        rows = epoch_order(num, counters, when[0], counter.device)[places]
    plans = []
    first_view = 0
    for index, group in enumerate(groups):
        views = torch.arange(first_view, first_view + group.count, device=rows.device)
        mix = mix_of(group, epoch)
        plans.append(
            _draw_group(group, mix, rows, views, sizes, counters, (*when, index), cutmix_groups)
        )
        first_view += group.count
    return Plan(rows, tuple(plans), when[1], epoch, (rows.numel(),))


def unmixed(
    sizes: tuple[Tensor, Tensor],
    group: ViewGroup,
    counters: Counters,
    rows: Tensor,
    *,
    view: int,
    epoch: int,
) -> GroupPlan:
    """A crop of each of these rows, by itself: what a group that mixes nothing makes of them."""
    views = torch.full((1,), view, device=rows.device)
    group = replace(group, count=1)
    return _draw_group(group, "none", rows, views, sizes, counters, (epoch, 0, 0), 1)


def _draw_group(
    group: ViewGroup,
    mix: Mix,
    rows: Tensor,
    views: Tensor,
    sizes: tuple[Tensor, Tensor],
    counters: Counters,
    when: When,
    cutmix_groups: int,
) -> GroupPlan:
    crop_rows, crop_views = rows.repeat(views.numel()), views.repeat_interleave(rows.numel())
    own = draws(group, crop_rows, crop_views, sizes, counters, when[0])
    origin, scale, window = (own.pop(name) for name in ("origin", "scale", "window"))
    crops = Crops(crop_rows, origin, scale, window, group.size, group.interpolation)
    partner, paste, weight = _draw_mix(group, mix, rows, counters, when, cutmix_groups)
    num = crop_rows.numel()
    place = torch.arange(num, device=rows.device)
    return GroupPlan(
        crops=crops, **own, mix=mix, partner=partner, box=paste, weight=weight, place=place,
        total=num,
    )  # fmt: skip


def own_draws(
    group: ViewGroup,
    rows: Tensor,
    views: Tensor,
    sizes: tuple[Tensor, Tensor],
    counters: Counters,
    epoch: Tensor | int,
) -> dict[str, Tensor]:
    """What chance decides of each crop by itself: the definition of `kernels.draws`."""
    blocks = torch.arange(BLOCKS, device=rows.device)
    counter = (epoch, rows[:, None], views[:, None], blocks)
    words = philox(counter, counters.key(Use.CROP)).flatten(1)  # (C, 4 * BLOCKS)
    high, wide = sizes[0][rows].long(), sizes[1][rows].long()
    box = resized_crop_box(words[:, :24], high, wide, group)
    crops = crops_of_boxes(rows, box, group.size, group.interpolation)
    operation, level, negative, spot = _draw_operations(group, rows, views, counters, epoch)
    ranges = (group.brightness, group.contrast, group.saturation, group.hue)
    factors = torch.stack([between(words[:, 26 + i], *r) for i, r in enumerate(ranges)], dim=1)
    return {
        "origin": crops.origin,
        "scale": crops.scale,
        "window": crops.window,
        "flip": happens(words[:, 22], group.flip),
        "jitter": happens(words[:, 23], group.jitter),
        "gray": happens(words[:, 25], group.gray),
        "blur": happens(words[:, 30], group.blur),
        "solarize": happens(words[:, 32], group.solarize),
        "order": _orders(rows.device)[below(words[:, 24], 24)],
        "factors": factors.float(),
        "sigma": between(words[:, 31], *group.sigma).float(),
        "operation": operation,
        "level": level,
        "negative": negative,
        "spot": spot,
    }


@cache
def _orders(device: torch.device) -> Tensor:
    """The 24 orders of the four colour operations: (24, 4) int64."""
    return torch.tensor(list(itertools.permutations(range(4))), device=device)


def _over(x: Tensor, divisor: float) -> Tensor:
    """x / divisor, rounded once: CUDA multiplies by the reciprocal of a host's number instead."""
    return x.double() / torch.full((), divisor, dtype=torch.float64, device=x.device)


def resized_crop_box(words: Tensor, high: Tensor, wide: Tensor, group: ViewGroup) -> Tensor:
    """RandomResizedCrop: ten tries, then the largest central crop within the ratio.

    words (C, 24), high and wide (C,) int64; returns (C, 4) int64: top, left, height, width.
    """
    tries = torch.arange(TRIES, device=words.device)
    area = (high * wide).double()[:, None] * between(words[:, 0 : 2 * TRIES : 2], *group.scale)
    ratio = look_up(ratio_table(*group.ratio, words.device), words[:, 1 : 2 * TRIES : 2])
    widths = torch.sqrt(area * ratio).round().long()
    heights = torch.sqrt(area / ratio).round().long()
    fits = (widths > 0) & (widths <= wide[:, None]) & (heights > 0) & (heights <= high[:, None])
    first = torch.where(fits, tries, TRIES).amin(dim=1)
    chosen = first.clamp(max=TRIES - 1)[:, None]
    spare_height, spare_width = _central_size(high, wide, group.ratio)
    found = first < TRIES
    height = torch.where(found, heights.gather(1, chosen)[:, 0], spare_height)
    width = torch.where(found, widths.gather(1, chosen)[:, 0], spare_width)
    top = torch.where(found, below(words[:, 20], high - height + 1), (high - height) // 2)
    left = torch.where(found, below(words[:, 21], wide - width + 1), (wide - width) // 2)
    return torch.stack((top, left, height, width), dim=1)


def _central_size(high: Tensor, wide: Tensor, ratio: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """The largest height and width whose ratio is allowed."""
    tall, flat = wide.double() / high < min(ratio), wide.double() / high > max(ratio)
    height = torch.where(tall, _over(wide, min(ratio)).round().long(), high)
    width = torch.where(flat, (high.double() * max(ratio)).round().long(), wide)
    return height, width


def crops_of_boxes(rows: Tensor, box: Tensor, size: int, interpolation: Interpolation) -> Crops:
    """Boxes cut out and resized to a square: nothing outside a box is read."""
    corner = box[:, :2]
    window = torch.cat((corner, corner + box[:, 2:]), dim=1)
    return Crops(rows, corner.double(), _over(box[:, 2:], size), window, size, interpolation)


def central_crops(rows: Tensor, high: Tensor, wide: Tensor, *, size: int, resize: int) -> Crops:
    """Evaluation: the shorter side to `resize`, then the central `size` square; no chance.

    As torchvision's Resize and CenterCrop, bicubic: the longer side is truncated to whole pixels.
    """
    short = torch.minimum(high, wide).long()
    full = torch.stack((high.long(), wide.long()), dim=1)
    resized = (resize * full) // short[:, None]
    scale = full.double() / resized
    corner = ((resized - size).double() / 2).round()
    window = torch.cat((torch.zeros_like(full), full), dim=1)
    return Crops(rows, corner * scale, scale, window, size, "bicubic")


def _draw_operations(
    group: ViewGroup, rows: Tensor, views: Tensor, counters: Counters, epoch: Tensor | int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """RandAugment's operations, levels, signs and spots, independent of one another."""
    num = group.randaugment
    if not num:
        none = torch.zeros(rows.numel(), 0, dtype=torch.int64, device=rows.device)
        return none, none, none.bool(), none[..., None].expand(-1, -1, 2)
    blocks = torch.arange(2 * num, device=rows.device)
    counter = (epoch, rows[:, None], views[:, None], blocks)
    words = philox(counter, counters.key(Use.OPERATION)).view(rows.numel(), num, 8)
    drawn = below(words[..., 0], len(OPERATIONS))
    operation = torch.where(happens(words[..., 1], 0.5), drawn, NONE)
    level = 1 + below(words[..., 2], LEVELS)
    return operation, level, happens(words[..., 3], 0.5), below(words[..., 4:6], group.size)


def mix_of(group: ViewGroup, epoch: int) -> Mix:
    """How crops of a group are mixed in an epoch, counted from 0."""
    if group.mix == "alternate":
        return "cutmix" if epoch % 2 else "mixup"
    return group.mix


def _draw_mix(
    group: ViewGroup,
    mix: Mix,
    rows: Tensor,
    counters: Counters,
    when: When,
    cutmix_groups: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Partners, pasted boxes and weights: (C,), (C, 4), (C,)."""
    num_crops, device = rows.numel() * group.count, rows.device
    place = torch.arange(num_crops, device=device)
    if mix == "none":
        nothing = torch.zeros(num_crops, 4, dtype=torch.int64, device=device)
        return place, nothing, torch.ones(num_crops, device=device)
    part = _parts(rows.numel(), cutmix_groups, device).repeat(group.count)
    partner = _partners(part, philox((*when, place), counters.key(Use.PARTNER)))
    parts = torch.arange(cutmix_groups, device=device)
    words = philox((*when, parts), counters.key(Use.MIX))
    if mix == "mixup":
        weight = folded(words, group).float()
        return partner, torch.zeros_like(words)[part], weight[part]
    box, weight = cutmix_box(words, group)
    return partner, box[part], weight[part]


def _parts(num_rows: int, num_parts: int, device: torch.device) -> Tensor:
    """Which part of the batch each of its rows belongs to, as tensor_split cuts: (B,) int64."""
    small, larger = divmod(num_rows, num_parts)
    place = torch.arange(num_rows, device=device)
    beyond = place - larger * (small + 1)
    return torch.where(beyond < 0, place // (small + 1), larger + beyond // max(small, 1))


def _partners(part: Tensor, words: Tensor) -> Tensor:
    """A permutation of the crops that keeps each within its part: (C,) int64."""
    shuffled = permutation(words)
    shuffled = shuffled[torch.argsort(part[shuffled], stable=True)]
    partner = torch.empty_like(shuffled)
    partner[torch.argsort(part, stable=True)] = shuffled
    return partner


def folded(words: Tensor, group: ViewGroup) -> Tensor:
    """Mixing weights from Beta(alpha, alpha), folded to at least 1/2: (P, 4) to (P,) float64."""
    drawn = look_up(beta_table(group.alpha, words.device), words[:, 0])
    return torch.maximum(drawn, 1 - drawn)


def cutmix_box(words: Tensor, group: ViewGroup) -> tuple[Tensor, Tensor]:
    """CutMix as IDMM draws it: weight folded to at least 1/2, box clipped, weight made exact.

    words (P, 4); returns boxes (P, 4) int64 and weights (P,) float32.
    """
    cut = torch.sqrt(1 - folded(words, group))
    half = (cut * group.size).floor().long() // 2
    centre = below(words[:, 1:3], group.size)
    low = (centre - half[:, None]).clamp(0, group.size)
    high = (centre + half[:, None]).clamp(0, group.size)
    area = (high - low).prod(dim=1)
    weight = 1 - _over(area, group.size**2)
    return torch.cat((low, high), dim=1), weight.float()
