"""Philox's words for many counters: on a GPU in one launch, on a CPU in 64-bit products.

`fastidmm.chance.rounds` is the definition: ten rounds, some three hundred small operations on
int64, which holds no product of two words.
"""

import numpy as np
import torch
from torch import Tensor

try:
    import triton

    from fastidmm.kernels import words_program as program
except ImportError:  # elsewhere than on Linux
    triton = None

COUNTERS = 256  # of a program


def words(counter: tuple[Tensor | int, ...], key: tuple[int, int]) -> Tensor:
    """Four words for each counter: parts that broadcast to (...), one a tensor, give (..., 4)."""
    if torch.compiler.is_compiling():
        return reference(counter, key)  # a compiler joins these operations with what they are for
    devices = {part.device.type for part in counter if isinstance(part, Tensor)}
    if devices == {"cpu"}:
        return on_cpu(counter, key)
    if triton is None or devices != {"cuda"}:
        return reference(counter, key)
    return fused(counter, key)


def reference(counter: tuple[Tensor | int, ...], key: tuple[int, int]) -> Tensor:
    """The definition, on any device."""
    from fastidmm.chance import rounds

    return rounds(counter, key)


def on_cpu(counter: tuple[Tensor | int, ...], key: tuple[int, int]) -> Tensor:
    """The same words by NumPy, whose uint64 holds a product, and whose calls cost a tenth."""
    half, word = np.uint64(32), np.uint64(0xFFFFFFFF)
    c0, c1, c2, c3 = (np.asarray(part).astype(np.uint64) & word for part in counter)
    k0, k1 = key
    with np.errstate(over="ignore"):  # of single numbers, which NumPy remarks on
        for _ in range(10):
            p0, p1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
            c0, c1 = (p1 >> half) ^ (c1 ^ np.uint64(k0)), p1 & word
            c2, c3 = (p0 >> half) ^ (c3 ^ np.uint64(k1)), p0 & word
            k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    found = np.empty((*np.broadcast(c0, c1, c2, c3).shape, 4), dtype=np.int64)
    for place, part in enumerate((c0, c1, c2, c3)):
        found[..., place] = part
    return torch.from_numpy(found)


def fused(counter: tuple[Tensor | int, ...], key: tuple[int, int]) -> Tensor:
    """The same words by one kernel."""
    tensors = [part for part in counter if isinstance(part, Tensor)]
    shape = torch.broadcast_shapes(*(part.shape for part in tensors))
    parts = [
        part.long().expand(shape).contiguous() if isinstance(part, Tensor) else signed(part, 32)
        for part in counter
    ]
    found = torch.empty(*shape, 4, dtype=torch.int64, device=tensors[0].device)
    num = found.numel() // 4
    if num:
        program.words[(triton.cdiv(num, COUNTERS),)](
            *parts, found, signed(key[0] | key[1] << 32, 64), num,
            *(isinstance(part, Tensor) for part in counter), COUNTERS=COUNTERS,
        )  # fmt: skip
    return found


def signed(value: int, bits: int) -> int:
    """The number of so many bits as one with a sign, which is how Triton takes it."""
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value
