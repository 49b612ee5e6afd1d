"""Colour operations on batches of crops: values in [0, 1], clamped, never rounded to 8 bits.

Plain PyTorch on any device. On a GPU every crop is worked on and the result chosen by mask, so that
nothing waits for a size; on a CPU only the crops that an operation concerns.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from fastidmm.batch import ViewGroup

LUMA = (0.299, 0.587, 0.114)  # ITU-R 601-2, as Pillow's mode L
SOLARIZE_FROM = 128 / 255


def on_gpu(x: Tensor) -> bool:
    """Whether to take the GPU's way, which never asks for a size or a mask."""
    return x.is_cuda


def where(mask: Tensor, x: Tensor, change: Callable[..., Tensor], *params: Tensor) -> Tensor:
    """Change the crops that `mask` names; `params` have one entry per crop."""
    if on_gpu(x):
        return torch.where(mask[:, None, None, None], change(x, *params), x)
    index = mask.nonzero()[:, 0]
    if index.numel():
        x[index] = change(x[index], *(param[index] for param in params))
    return x


@contextmanager
def exact_products() -> Iterator[None]:
    """Products of pixels in full float32, whatever is allowed elsewhere."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


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
        x = where(now < 3, x, blend, now, factor)
        x = where(now == 3, x, shift_hue, factor)
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
    with exact_products():
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
