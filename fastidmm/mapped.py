"""Parts of several files as one tensor: mapped side by side in memory, nothing read or copied."""

import ctypes
import json
import mmap
import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

PAGE = mmap.ALLOCATIONGRANULARITY
MAP_FIXED = 0x10  # Python does not name it; Linux and macOS agree on it
FAILED = ctypes.c_void_p(-1).value


class Part(NamedTuple):
    """Some bytes of a file."""

    path: Path
    start: int
    num_bytes: int


def tensor_in(path: Path, name: str) -> Part:
    """Where the bytes of a tensor lie in a safetensors file."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        first, last = json.loads(file.read(length))[name]["data_offsets"]
    return Part(path, 8 + length + first, last - first)


def side_by_side(parts: Sequence[Part]) -> tuple[Tensor, list[int]]:
    """One uint8 tensor over all parts, not to be written to, and where in it each begins.

    Parts begin at multiples of three, so that pixels can be counted across them; zeros and other
    bytes of the files lie in between.
    """
    libc = _libc()
    bases, starts, total = [], [], 0
    for part in parts:
        lead = part.start % PAGE
        while (total + lead) % 3:
            total += PAGE
        bases.append(total)
        starts.append(total + lead)
        total += -(-(lead + part.num_bytes) // PAGE) * PAGE
    whole = _checked(libc, None, total, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    span = (ctypes.c_ubyte * total).from_address(whole)
    weakref.finalize(span, libc.munmap, whole, total)  # the tensor holds on to the span
    for part, base, start in zip(parts, bases, starts, strict=True):
        file = os.open(part.path, os.O_RDONLY)
        try:
            lead = start - base
            how = mmap.MAP_PRIVATE | MAP_FIXED
            size = lead + part.num_bytes
            _checked(libc, whole + base, size, how, file, part.start - lead)
        finally:
            os.close(file)
    return torch.frombuffer(span, dtype=torch.uint8), starts


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [
        *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int),
        ctypes.c_int64,
    ]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return libc


def _checked(
    libc: ctypes.CDLL, address: int | None, size: int, how: int, file: int, start: int
) -> int:
    """The address that `size` bytes are mapped to, to be read only."""
    found = libc.mmap(address, size, mmap.PROT_READ, how, file, start)
    if found == FAILED:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return int(found)
