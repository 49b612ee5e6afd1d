"""Carry out a plan: uint8 pixels of a store in, finished views out.

Plain PyTorch on any device, and the definition that faster renderers must meet. Order: resized
crop, flip, colour jitter, gray, blur, solarize, normalise, CutMix. Values are in [0, 1], clamped
after each colour operation and never rounded to 8 bits.

A GPU is never asked for a size: windows are padded to the store's largest image there. On a CPU
sizes are known, so crops are cut one by one, and only the crops that an operation concerns are
touched. Both give the same numbers.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from fastidmm.batch import ViewGroup
from fastidmm.plan import Crops, GroupPlan
from fastidmm.store import Store

LUMA = (0.299, 0.587, 0.114)  # ITU-R 601-2, as Pillow's mode L
SOLARIZE_FROM = 128 / 255
CPU_CHUNK = 32  # crops; keeps a chunk's intermediates in the cache
GPU_CHUNK_BYTES = 2**30


def render(store: Store, plan: GroupPlan, group: ViewGroup) -> Tensor:
    """Every crop of a group, finished, normalised and mixed: (C, 3, S, S) float32."""
    crops = plan.crops
    pixels = torch.empty(
        (crops.rows.numel(), 3, crops.size, crops.size), device=store.pixels.device
    )
    for part in _chunks(store, crops):
        pixels[part] = _colour(_resized(store, crops, part), plan, part, group)
    return pixels if group.mix == "none" else cutmix(pixels, plan)


def render_plain(store: Store, crops: Crops, group: ViewGroup) -> Tensor:
    """Crops without chance, normalised, as evaluation sees them: (C, 3, S, S) float32."""
    parts = [_resized(store, crops, part) for part in _chunks(store, crops)]
    return normalise(torch.cat(parts), group)


def on_gpu(x: Tensor) -> bool:
    """Whether to take the GPU's way, which never asks for a size or a mask."""
    return x.is_cuda


def _chunks(store: Store, crops: Crops) -> Iterator[slice]:
    num, size = crops.rows.numel(), CPU_CHUNK
    if on_gpu(store.pixels):
        # Of each source pixel: an index of 8 bytes, 3 values as bytes and as float32.
        size = max(1, GPU_CHUNK_BYTES // (23 * store.max_height * store.max_width))
    yield from (slice(i, min(i + size, num)) for i in range(0, num, size))


def _colour(x: Tensor, plan: GroupPlan, part: slice, group: ViewGroup) -> Tensor:
    """Flip, jitter, gray, blur, solarize and normalise one chunk of crops."""
    x = _where(plan.flip[part], x, flip)
    if group.jitter:
        x = _where(plan.jitter[part], x, jitter, plan.order[part], plan.factors[part])
    if group.gray:
        x = _where(plan.gray[part], x, grayscale)
    if group.blur:
        # One radius for all, four times the largest sigma: sigma itself is known to the GPU only.
        radius = math.ceil(4 * group.sigma[1])
        x = _where(plan.blur[part], x, lambda y, s: blur(y, s, radius), plan.sigma[part])
    if group.solarize:
        x = _where(plan.solarize[part], x, solarize)
    return normalise(x, group)


def _where(mask: Tensor, x: Tensor, change: Callable[..., Tensor], *params: Tensor) -> Tensor:
    """Change the crops that `mask` names; `params` have one entry per crop."""
    if on_gpu(x):
        return torch.where(mask[:, None, None, None], change(x, *params), x)
    index = mask.nonzero()[:, 0]
    if index.numel():
        x[index] = change(x[index], *(param[index] for param in params))
    return x


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
    if on_gpu(store.pixels):
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
    with _exact_products():
        planes = windows.permute(0, 3, 1, 2).float()
        # Across first and clamped in between, as Pillow: bicubic overshoots at hard edges.
        rows = (planes @ across[:, None].transpose(2, 3)).clamp_(0, 255)
        return (down[:, None] @ rows).mul_(1 / 255).clamp_(0, 1)


@contextmanager
def _exact_products() -> Iterator[None]:
    """Products of pixels in full float32, whatever the training step allows itself."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


# --- colour -------------------------------------------------------------------------------------


def flip(x: Tensor) -> Tensor:
    """Mirror left and right."""
    return x.flip(-1)


def luma(x: Tensor) -> Tensor:
    """Brightness as the eye weighs it: (C, 3, S, S) -> (C, 1, S, S)."""
    red, green, blue = x.unbind(dim=1)
    return (LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue)[:, None]


def grayscale(x: Tensor) -> Tensor:
    """Luma in all three channels."""
    return luma(x).expand_as(x)


def jitter(x: Tensor, order: Tensor, factors: Tensor) -> Tensor:
    """Brightness, contrast, saturation and hue in each crop's own order: (C, 4) each."""
    for turn in range(4):
        now = order[:, turn]
        factor = factors.gather(1, now[:, None])[:, 0]
        x = _where(now < 3, x, blend, now, factor)
        x = _where(now == 3, x, shift_hue, factor)
    return x


def blend(x: Tensor, operation: Tensor, factor: Tensor) -> Tensor:
    """Brightness (0), contrast (1) or saturation (2): away from black, mean gray or own gray."""
    gray = luma(x)
    mean = gray.mean(dim=(2, 3), keepdim=True)
    which, amount = operation[:, None, None, None], factor[:, None, None, None]
    base = torch.where(which == 2, gray, torch.where(which == 1, mean, 0.0))
    return (base + (x - base) * amount).clamp_(0, 1)


def shift_hue(x: Tensor, turns: Tensor) -> Tensor:
    """Turn the colour circle, value and saturation kept: by HSV in float."""
    red, green, blue = x.unbind(dim=1)
    value, low = x.amax(dim=1), x.amin(dim=1)
    chroma = value - low
    safe = torch.where(chroma > 0, chroma, 1.0)
    sixths = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    sixths = sixths + 6 * turns[:, None, None]
    channels = []
    for start in (5, 3, 1):  # red, green, blue: value - chroma * max(0, min(k, 4 - k, 1))
        k = (sixths + start) % 6
        channels.append(value - chroma * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.stack(channels, dim=1)


def blur(x: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """A Gaussian of each crop's sigma (px), edges extended, taps out to `radius` px."""
    taps = torch.arange(-radius, radius + 1, device=x.device)
    weights = torch.exp(-0.5 * (taps / sigma[:, None]) ** 2)
    weights = weights / weights.sum(dim=1, keepdim=True)
    size = x.shape[-1]
    with _exact_products():
        spread = (weights @ _edge_steps(size, radius, x.device)).view(-1, 1, size, size)
        return spread @ x @ spread.transpose(2, 3)


@cache
def _edge_steps(size: int, radius: int, device: torch.device) -> Tensor:
    """1 where pixel j is what tap d of pixel i reads, the edge repeated: (taps, S * S) float32."""
    place = torch.arange(size, device=device)
    reads = (place + torch.arange(-radius, radius + 1, device=device)[:, None]).clamp(0, size - 1)
    return (reads[..., None] == place).float().flatten(1)


def solarize(x: Tensor) -> Tensor:
    """Invert what is at least half bright."""
    return torch.where(x >= SOLARIZE_FROM, 1 - x, x)


def normalise(x: Tensor, group: ViewGroup) -> Tensor:
    """Subtract the mean and divide by the deviation, per channel."""
    channels = [
        (channel - mean) / std
        for channel, mean, std in zip(x.unbind(dim=1), group.mean, group.std, strict=True)
    ]
    return torch.stack(channels, dim=1)


# --- mixing -------------------------------------------------------------------------------------


def cutmix(x: Tensor, plan: GroupPlan) -> Tensor:
    """Paste each crop's box from its partner, both finished: (C, 3, S, S)."""
    place = torch.arange(x.shape[-1], device=x.device)
    top, left, bottom, right = (side[:, None] for side in plan.box.unbind(dim=1))
    down = (place >= top) & (place < bottom)
    across = (place >= left) & (place < right)
    inside = down[:, None, :, None] & across[:, None, None, :]
    return torch.where(inside, x[plan.partner], x)
