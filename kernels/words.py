"""Philox's words for many counters in one launch.

`fastidmm.chance.rounds` is the definition: ten rounds, some two hundred small operations.
"""

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
    if triton is None or not any(isinstance(part, Tensor) and part.is_cuda for part in counter):
        return reference(counter, key)
    return fused(counter, key)


def reference(counter: tuple[Tensor | int, ...], key: tuple[int, int]) -> Tensor:
    """The definition, on any device."""
    from fastidmm.chance import rounds

    return rounds(counter, key)


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
