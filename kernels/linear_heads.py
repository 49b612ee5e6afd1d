"""Queries, keys and values of tokens by one product, for each head of attention.

    q, k, v = x weight^T + bias

What is fused is the way back: their gradients put beside one another, as the product has them, and
the bias's, which is their sum over all rows, by one kernel. Torch writes the first and reads them
once more for the second.
"""

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from fastidmm.kernels.linear_gelu import WARPS, fits, shares_of

with suppress(ImportError):  # elsewhere than on Linux
    from fastidmm.kernels import linear_program as program


def linear_heads(
    x: Tensor, weight: Tensor, bias: Tensor | None, heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Each (C, heads, L, D / heads): x (C, L, D'), weight (3 D, D'), bias (3 D,) or none.

    In autocast's type under it. On a GPU with Triton, unless something is float64 or there is no
    bias, gradients are put together by the kernel.
    """
    if bias is not None and fits(x, weight, bias):
        return fused(x, weight, bias, heads)
    return reference(x, weight, bias, heads)


def reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition, on any device; autograd gives the gradients."""
    return apart(functional.linear(x, weight, bias), heads)


def apart(made: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """The product's three thirds (C, L, 3 D) by heads, without a copy."""
    q, k, v = made.unflatten(2, (3, heads, -1)).unbind(2)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def fused(x: Tensor, weight: Tensor, bias: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same, the gradients put together by the kernel."""
    made = functional.linear(x, weight, bias.detach())
    q, k, v = _Heads.apply(made, bias, heads)  # type: ignore[no-untyped-call]
    return q, k, v


class _Heads(torch.autograd.Function):
    """Three views of x (C, L, 3 D), and the gradient of the bias (3 D,) that is in it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
        """Nothing is moved."""
        ctx.kind = bias.dtype
        return apart(x, heads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        """Of x and of the bias."""
        # (C, L, heads, D / heads) each: as flash attention lays them out.
        q, k, v = (each.transpose(1, 2).contiguous() for each in gradients)
        num, width = q.shape[0] * q.shape[1], q.shape[2] * q.shape[3]
        d_x = q.new_empty(*q.shape[:2], 3 * width)
        grid, shape = shares_of(num, width)
        shares = torch.empty(grid[0], 3 * width, dtype=torch.float32, device=q.device)
        with torch.cuda.device_of(q):
            program.heads_kernel[grid](q, k, v, d_x, shares, num, width, **shape, num_warps=WARPS)
        return d_x, shares.sum(0).to(ctx.kind), None


def cases() -> Iterator[tuple[str, dict[str, Any]]]:
    """Awkward inputs by name, as arguments of `linear_heads` in float32 on the CPU."""
    for c, l, heads, d in ((1, 1, 1, 1), (2, 7, 3, 5), (3, 11, 2, 66)):  # noqa: E741
        random = torch.Generator().manual_seed(d)
        given = {
            "x": torch.randn(c, l, 4, generator=random),
            "weight": torch.randn(3 * heads * d, 4, generator=random),
            "heads": heads,
        }
        bias = torch.randn(3 * heads * d, generator=random)
        yield f"{c} x {l}, {heads} heads of {d}", given | {"bias": bias}
        yield f"{c} x {l}, {heads} heads of {d}, no bias", given | {"bias": None}
