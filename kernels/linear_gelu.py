"""A linear layer and GELU, as a transformer's hidden layer has them.

    hidden = gelu(x weight^T + bias)

GELU is a kernel's: torch's has 65 instructions a number, by whose count an H200 waits for them and
not for its memory. It differs by rounding, and makes NaN of infinity. So is the way back, with the
bias's gradient, the sum of GELU's over all rows: torch writes that and reads it once more.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

try:
    import triton

    from fastidmm.kernels import linear_program as program
except ImportError:  # elsewhere than on Linux
    triton = None

ELEMENTS = 1024  # that a program holds of each tensor at a time
PROGRAMS = 1056  # eight for each of an H200's multiprocessors: all of them run at once
WARPS = 4


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The hidden layer: x (..., D), weight (H, D), bias (H,) to (..., H), of any float types.

    In autocast's type under it. On a GPU with Triton, unless something is float64, GELU is one
    kernel, and its gradient and the bias's another.
    """
    return fused(x, weight, bias) if fits(x, weight, bias) else reference(x, weight, bias)


def fits(*given: Tensor) -> bool:
    """Whether these tensors are for a kernel here."""
    wide = any(tensor.dtype == torch.float64 for tensor in given)
    on_gpu = triton is not None and given[0].is_cuda
    return on_gpu and not wide and not torch.compiler.is_compiling()


def reference(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The definition, on any device; autograd gives the gradients."""
    return functional.gelu(functional.linear(x, weight, bias))


def fused(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The same, all but the product by kernels."""
    made: Tensor = _Gelu.apply(functional.linear(x, weight, bias.detach()), bias)  # type: ignore[no-untyped-call]
    return made


def shares_of(num: int, width: int) -> tuple[tuple[int, int], dict[str, int]]:
    """How many programs share so many rows and columns, and what each holds of them at a time."""
    columns = 128 if width % 128 == 0 else 64
    rows, blocks = max(1, ELEMENTS // columns), triton.cdiv(width, columns)
    programs = max(1, min(PROGRAMS // blocks, triton.cdiv(num, rows)))
    return (programs, blocks), {"ROWS": rows, "COLUMNS": columns}


class _Gelu(torch.autograd.Function):
    """GELU of x (..., H), and the gradient of the bias (H,) that is in it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor) -> Tensor:
        """In fewer instructions than torch, whose count alone takes longer than the memory."""
        x = x.contiguous()
        ctx.save_for_backward(x)
        ctx.kind = bias.dtype
        made, num = torch.empty_like(x), x.numel()
        with torch.cuda.device_of(x):
            if num:
                program.forward_kernel[(triton.cdiv(num, ELEMENTS),)](
                    x, made, num, BLOCK=ELEMENTS, num_warps=WARPS
                )
        return made

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor]:
        """Of x and of the bias."""
        (x,) = ctx.saved_tensors
        width = x.shape[-1]
        d_x = torch.empty_like(x)
        grid, shape = shares_of(num := x.numel() // width, width)
        shares = torch.empty(grid[0], width, dtype=torch.float32, device=x.device)
        with torch.cuda.device_of(x):
            program.gelu_kernel[grid](
                d_out.contiguous(), x, d_x, shares, num, width, **shape, num_warps=WARPS
            )
        return d_x, shares.sum(0).to(ctx.kind)


def cases() -> Iterator[tuple[str, dict[str, Any]]]:
    """Awkward inputs by name, as arguments of `linear_gelu` in float32 on the CPU."""
    for size, width, hidden in (
        ((1,), 1, 1),
        ((3, 5), 7, 20),
        ((2, 9, 2), 16, 130),
        ((33,), 4, 64),
    ):
        random = torch.Generator().manual_seed(hidden)
        x = torch.randn(*size, width, generator=random)
        weight = torch.randn(hidden, width, generator=random)
        bias = torch.randn(hidden, generator=random)
        name = f"{' x '.join(map(str, size))} of {width} to {hidden}"
        yield name, {"x": x, "weight": weight, "bias": bias}
        yield f"far out, {name}", {"x": 30 * x, "weight": weight, "bias": bias}
