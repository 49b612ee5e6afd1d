"""Dropout that draws from counters: the same numbers are dropped wherever a step is made again.

Nothing is kept for the way back, where what was dropped is drawn anew. One operation at a time,
words and what is made of them are ten times as many bytes as the numbers themselves.
"""

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastidmm.chance import happens, limit, philox
from fastidmm.kernels.linear_gelu import fits
from fastidmm.kernels.words import signed

with suppress(ImportError):  # elsewhere than on Linux
    import triton

    from fastidmm.kernels import dropout_program as program

QUADS = 256  # of a program, four numbers each

Counter = tuple[Tensor | int, Tensor, int]


def dropout(x: Tensor, p: float, counter: Counter, key: tuple[int, int]) -> Tensor:
    """x (C, ...) with a share p of its numbers 0, the others divided by 1 - p; 0 < p < 1.

    `counter`: the step, each crop's place (C,) int64, and the layer's number. Numbers 4 i to
    4 i + 3 of a crop go by the words of (step, place, layer, i): dropped below p * 2**32. On a GPU
    with Triton, unless x is float64, it is one kernel.
    """
    return fused(x, p, counter, key) if fits(x) else reference(x, p, counter, key)


def reference(x: Tensor, p: float, counter: Counter, key: tuple[int, int]) -> Tensor:
    """The definition, on any device; autograd gives the gradient."""
    (step, place, layer), num = counter, x[0].numel() if len(x) else 0
    quads = torch.arange(-(-num // 4), device=x.device)
    drawn = philox((step, place[:, None], layer, quads), key).flatten(1)[:, :num]
    return x * ((~happens(drawn, p)).to(x.dtype) / (1 - p)).view_as(x)


def fused(x: Tensor, p: float, counter: Counter, key: tuple[int, int]) -> Tensor:
    """The same bits by one kernel, forward and back."""
    made: Tensor = _Dropout.apply(x, p, counter, key)  # type: ignore[no-untyped-call]
    return made


class _Dropout(torch.autograd.Function):
    """The kernel, for the numbers and then for their gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, counter: Counter, key: tuple[int, int]) -> Tensor:
        """No number is kept."""
        ctx.given = p, counter, key
        return dropped(x, p, counter, key)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, None, None, None]:
        """The same numbers of the gradient are dropped."""
        return dropped(d_out, *ctx.given), None, None, None


def dropped(x: Tensor, p: float, counter: Counter, key: tuple[int, int]) -> Tensor:
    """The kernel's launch."""
    (step, place, layer), x = counter, x.contiguous()
    made, num = torch.empty_like(x), x[0].numel() if len(x) else 0
    # As torch rounds it: to the type of x, before it is multiplied.
    factor = float(torch.ones((), dtype=x.dtype) / (1 - p))
    with torch.cuda.device_of(x):
        if num:
            program.dropout[(len(x), triton.cdiv(num, 4 * QUADS))](
                x, made, place.contiguous(), step if isinstance(step, Tensor) else signed(step, 32),
                layer, limit(p), signed(key[0] | key[1] << 32, 64), factor, num,
                COUNTED=isinstance(step, Tensor), QUADS=QUADS,
            )  # fmt: skip
    return made


def cases() -> Iterator[tuple[str, dict[str, Any]]]:
    """Awkward inputs by name, as arguments of `dropout` in float32 on the CPU."""
    far = torch.tensor([0, 7, 2**31, 2**32 - 1, 5])
    for size in ((1, 1), (5, 3), (3, 5, 7), (2, 11, 96)):
        x = torch.randn(*size, generator=torch.Generator().manual_seed(len(size)))
        place = far[: len(x)]
        given: dict[str, Any] = {"x": x, "p": 0.1, "key": (5, 260)}
        name = " x ".join(map(str, size))
        yield name, given | {"counter": (3, place, 2)}
        counter = torch.tensor(2**31 + 6), place, 9
        large = given | {"p": 0.75, "key": (2**32 - 3, 2**31 + 4), "counter": counter}
        yield f"{name}, large words", large
