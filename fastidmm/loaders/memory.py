"""Memory for a store's pixels that a GPU reads: its own, or pinned memory of the host."""

from dataclasses import replace
from typing import Literal

import torch

from fastidmm.errors import DataError
from fastidmm.kernels.views import HAS_KERNELS
from fastidmm.machine import available_memory
from fastidmm.registry import LOADERS
from fastidmm.store import Store

Tier = Literal["auto", "device", "host"]

SHARE = 0.5  # of what is free now; the model, its activations and others need the rest


def tier_of(store: Store, device: torch.device) -> Tier | None:
    """The best memory that a store's pixels fit in; None where neither does."""
    num_bytes = store.num_bytes
    if device.type == "cpu":
        return "device"
    torch.cuda.empty_cache()  # what an earlier stage had and torch keeps would count as used
    if num_bytes <= SHARE * torch.cuda.mem_get_info(device)[0]:
        return "device"
    # Only the fused kernels read the host's memory, and torch pins a power of two of bytes.
    pinned = 1 << (num_bytes - 1).bit_length()
    return "host" if HAS_KERNELS and pinned <= SHARE * available_memory() else None


def place(store: Store, device: torch.device, tier: Tier = "auto") -> Store:
    """The store for use on `device`, its pixels in the memory asked for."""
    if device.type == "cpu":
        return store
    chosen = tier_of(store, device) if tier == "auto" else tier
    if chosen is None:
        others = " or ".join(name for name in LOADERS if name != "resident")
        raise DataError(
            f"{store.num_bytes / 1e9:.1f} GB of pixels fit neither half of the GPU's free "
            f"memory nor half of the host's: choose --loader {others}, or prepare with a "
            "smaller --max-side."
        )
    if store.row is not None:
        return _selected(store, device, chosen)
    if chosen == "device":
        return store.to(device)
    pinned = torch.empty(store.pixels.shape, dtype=torch.uint8, pin_memory=True)
    return replace(store.tables_to(device), pixels=pinned.copy_(store.pixels))


def _selected(store: Store, device: torch.device, tier: Tier) -> Store:
    """A selection, whose other images stay behind: its pixels take as many bytes as it counts.

    Image by image, so that the host never holds them twice.
    """
    sizes = store.height.long() * store.width * 3
    offset = sizes.cumsum(0) - sizes
    where = {"device": device} if tier == "device" else {"pin_memory": True}
    pixels = torch.empty(store.num_bytes, dtype=torch.uint8, **where)
    for row, start in enumerate(offset.tolist()):
        image = store.image(row).flatten()
        pixels[start : start + len(image)].copy_(image)
    return replace(replace(store, offset=offset).tables_to(device), pixels=pixels)


def within_reach(store: Store, device: torch.device) -> Store:
    """The store for looking at whole images on `device`: in its best memory, or else mapped."""
    chosen = tier_of(store, device)
    return place(store, device, chosen) if chosen else store.tables_to(device)
