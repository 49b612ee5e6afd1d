"""Carry out a plan: uint8 pixels of a store in, finished views out.

Plain PyTorch on any device, and the definition that faster renderers must meet. Order: resized
crop, colour jitter, gray, blur, solarize, RandAugment, flip, normalise, mixing. Values are in
[0, 1], clamped after each colour operation and never rounded to 8 bits, but by those operations of
RandAugment that are tables of 256 levels.

A GPU is never asked for a size: windows are padded to the store's largest image there. On a CPU
sizes are known, so crops are cut one by one, and only the crops that an operation concerns are
touched. Both give the same numbers.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fastidmm import colour
from fastidmm.batch import Mix, ViewGroup
from fastidmm.plan import Crops, GroupPlan
from fastidmm.randaugment import randaugment
from fastidmm.store import Store

CPU_CHUNK = 32  # crops; keeps a chunk's intermediates in the cache
GPU_CHUNK_BYTES = 2**30


def render(store: Store, plan: GroupPlan, group: ViewGroup) -> Tensor:
    """Every crop of a group, finished, normalised and mixed: (C, 3, S, S) float32."""
    crops = plan.crops
    pixels = torch.empty((crops.rows.numel(), 3, crops.size, crops.size), device=store.device)
    for part in _chunks(store, crops):
        pixels[part] = finished(_resized(store, crops, part), plan, group, part)
    return MIXES[plan.mix](pixels, plan)


def render_plain(store: Store, crops: Crops, group: ViewGroup) -> Tensor:
    """Crops without chance, normalised, as evaluation sees them: (C, 3, S, S) float32."""
    parts = [_resized(store, crops, part) for part in _chunks(store, crops)]
    return colour.normalise(torch.cat(parts), group)


def _chunks(store: Store, crops: Crops) -> Iterator[slice]:
    num, size = crops.rows.numel(), CPU_CHUNK
    if colour.on_gpu(store.pixels):
        # Of each source pixel: an index of 8 bytes, 3 values as bytes and as float32.
        size = max(1, GPU_CHUNK_BYTES // (23 * store.max_height * store.max_width))
    yield from (slice(i, min(i + size, num)) for i in range(0, num, size))


def finished(x: Tensor, plan: GroupPlan, group: ViewGroup, part: slice = slice(None)) -> Tensor:
    """Jitter, gray, blur, solarize, RandAugment, flip and normalise resized crops, or a part."""
    if group.jitter:
        x = colour.where(plan.jitter[part], x, colour.jitter, plan.order[part], plan.factors[part])
    if group.gray:
        x = colour.where(plan.gray[part], x, colour.grayscale)
    if group.blur:
        # One radius for all, four times the largest sigma: sigma itself is known to the GPU only.
        radius = math.ceil(4 * group.sigma[1])
        x = colour.where(
            plan.blur[part], x, lambda y, s: colour.blur(y, s, radius), plan.sigma[part]
        )
    if group.solarize:
        x = colour.where(plan.solarize[part], x, colour.solarize)
    if group.randaugment:
        drawn = (plan.operation, plan.level, plan.negative, plan.spot)
        x = randaugment(x, *(each[part] for each in drawn))
    x = colour.where(plan.flip[part], x, colour.flip)
    return colour.normalise(x, group)


# --- resized crop -------------------------------------------------------------------------------


def _triangle(distance: Tensor) -> Tensor:
    return (1 - distance.abs()).clamp_(min=0)


def _cubic(distance: Tensor) -> Tensor:
    """Keys' cubic with a = -1/2, as Pillow and torch's antialiased resize have it."""
    d = distance.abs()
    near = (1.5 * d - 2.5) * d * d + 1
    far = ((-0.5 * d + 2.5) * d - 4) * d + 2
    return torch.where(d < 1, near, torch.where(d < 2, far, 0.0))


KERNELS = {"bilinear": (_triangle, 1.0), "bicubic": (_cubic, 2.0)}


def tap_matrix(crops: Crops, axis: int, extent: int) -> Tensor:
    """How much each source pixel gives to each output pixel along an axis: (C, S, extent) float32.

    Column k stands for source pixel `window start + k`. Antialiased as Pillow does: the kernel is
    widened by the scale where it shrinks, cut at the window, and made to sum to one.
    """
    kernel, support = KERNELS[crops.interpolation]
    low, high = crops.window[:, axis, None], crops.window[:, 2 + axis, None]
    place = torch.arange(crops.size, device=low.device) + 0.5
    # Relative to the window, so that float32 is exact enough for every image size.
    centre = crops.origin[:, axis, None] - low + place * crops.scale[:, axis, None]
    stretch = crops.scale[:, axis, None].clamp(min=1)
    first = (centre - support * stretch + 0.5).floor().clamp(min=0)
    last = torch.minimum((centre + support * stretch + 0.5).floor(), (high - low).double())
    taps = torch.arange(extent, device=low.device, dtype=torch.float32)
    distance = (taps + 0.5 - centre.float()[..., None]) / stretch.float()[..., None]
    inside = (taps >= first.float()[..., None]) & (taps < last.float()[..., None])
    weights = kernel(distance) * inside
    return weights / weights.sum(dim=-1, keepdim=True)


def _resized(store: Store, crops: Crops, part: slice) -> Tensor:
    """Cut and resize some crops: (c, 3, S, S) float32 in [0, 1]."""
    chosen = _take(crops, part)
    if colour.on_gpu(store.pixels):
        high, wide = store.max_height, store.max_width
        return _apply_taps(_padded_windows(store, chosen, high, wide), *_taps(chosen, high, wide))
    sides = chosen.window[:, 2:] - chosen.window[:, :2]
    down, across = _taps(chosen, *sides.amax(dim=0).tolist())
    singles = []
    for place, (row, (top, left, bottom, right)) in enumerate(
        zip(chosen.rows.tolist(), chosen.window.tolist(), strict=True)
    ):
        window = store.image(row)[None, top:bottom, left:right]
        taps = down[place, None, :, : bottom - top], across[place, None, :, : right - left]
        singles.append(_apply_taps(window, *taps))
    return torch.cat(singles)


def _taps(crops: Crops, high: int, wide: int) -> tuple[Tensor, Tensor]:
    """The tap matrices of both axes, for windows padded to (high, wide)."""
    return tap_matrix(crops, 0, high), tap_matrix(crops, 1, wide)


def _take(crops: Crops, part: slice) -> Crops:
    tensors = (crops.rows, crops.origin, crops.scale, crops.window)
    rows, origin, scale, window = (tensor[part] for tensor in tensors)
    return Crops(rows, origin, scale, window, crops.size, crops.interpolation)


def _padded_windows(store: Store, crops: Crops, high: int, wide: int) -> Tensor:
    """Windows of several crops, padded with any pixels to one size: (c, high, wide, 3) uint8."""
    triples = store.pixels[: store.pixels.numel() // 3 * 3].view(-1, 3)
    device = triples.device
    top, left, bottom, right = (side[:, None] for side in crops.window.unbind(dim=1))
    y = torch.minimum(top + torch.arange(high, device=device), bottom - 1)
    x = torch.minimum(left + torch.arange(wide, device=device), right - 1)
    start = (store.offset[crops.rows] // 3)[:, None]
    across = store.width[crops.rows].long()[:, None]
    return triples[(start + y * across)[:, :, None] + x[:, None, :]]


def _apply_taps(windows: Tensor, down: Tensor, across: Tensor) -> Tensor:
    """Both passes of a separable resize: (c, h, w, 3) uint8 to (c, 3, S, S) in [0, 1].

    down (c, S, h) and across (c, S, w) float32.
    """
    with colour.exact_products():
        planes = windows.permute(0, 3, 1, 2).float()
        # Across first and clamped in between, as Pillow: bicubic overshoots at hard edges.
        rows = (planes @ across[:, None].transpose(2, 3)).clamp_(0, 255)
        return (down[:, None] @ rows).mul_(1 / 255).clamp_(0, 1)


# --- mixing -------------------------------------------------------------------------------------


def cutmix(x: Tensor, plan: GroupPlan) -> Tensor:
    """Paste each crop's box from its partner, both finished: (C, 3, S, S)."""
    place = torch.arange(x.shape[-1], device=x.device)
    top, left, bottom, right = (side[:, None] for side in plan.box.unbind(dim=1))
    down = (place >= top) & (place < bottom)
    across = (place >= left) & (place < right)
    inside = down[:, None, :, None] & across[:, None, None, :]
    return torch.where(inside, x[plan.partner], x)


def mixup(x: Tensor, plan: GroupPlan) -> Tensor:
    """Blend each crop with its partner, both finished: (C, 3, S, S)."""
    weight = plan.weight[:, None, None, None]
    return weight * x + (1 - weight) * x[plan.partner]


MIXES: dict[Mix, Callable[[Tensor, GroupPlan], Tensor]] = {
    "none": lambda x, plan: x,
    "cutmix": cutmix,
    "mixup": mixup,
}
