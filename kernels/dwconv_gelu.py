"""A depthwise 3 x 3 convolution of tokens and GELU, as PVTv2's hidden layers have them.

    hidden = gelu(conv(x) + bias)

One by one, forward and backward, these are thirteen passes over the widest tensors of the model,
seven of them by cuDNN's depthwise kernels. Fused they are eight: what GELU is given is not kept but
made anew in the backward pass. Sums run in a fixed order, so the bits are always the same.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from fastidmm.kernels.linear_gelu import fits

try:
    import triton

    from fastidmm.kernels import dwconv_gelu_program as program
except ImportError:  # elsewhere than on Linux
    triton = None

PROGRAMS = 528  # four for each of an H200's multiprocessors: all of them run at once
ELEMENTS = 4  # channels for each thread: the weights' gradient has nine sums of each in registers

Size = Sequence[int]  # height and width


def dwconv_gelu(x: Tensor, weight: Tensor, bias: Tensor, size: Size) -> Tensor:
    """The hidden layer: x (C, L, H), weight (H, 1, 3, 3), bias (H,) to (C, L, H).

    `size` is the map's, L tokens in all; zeros lie around it. In autocast's type under
    it. On a GPU with Triton, unless something is float64, it is one kernel, and two back.
    """
    if fits(x, weight, bias):
        return fused(x, weight, bias, size)
    return reference(x, weight, bias, size)


def reference(x: Tensor, weight: Tensor, bias: Tensor, size: Size) -> Tensor:
    """The definition, on any device; autograd gives the gradients."""
    maps = x.transpose(1, 2).unflatten(2, tuple(size))
    made = functional.conv2d(maps, weight, bias, padding=1, groups=len(weight))
    return functional.gelu(made.flatten(2).transpose(1, 2))


def fused(x: Tensor, weight: Tensor, bias: Tensor, size: Size) -> Tensor:
    """The same by kernels, computed in fp32 whatever the types."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    made: Tensor = _Dwconv.apply(x, weight, bias, size)  # type: ignore[no-untyped-call]
    return made


def shape_of(width: int) -> dict[str, int]:
    """How many pairs of columns and channels a program has of maps that wide, and its warps."""
    pairs = triton.next_power_of_2(triton.cdiv(width, 2))
    warps = 4 if pairs <= 32 else 8
    return {"PAIRS": pairs, "CHANNELS": 32 * ELEMENTS * warps // pairs, "num_warps": warps}


class _Dwconv(torch.autograd.Function):
    """The kernels, as autograd asks for them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, size: Size) -> Tensor:
        """What is kept for the backward pass is what it was given."""
        x, flat = x.contiguous(), weight.reshape(-1, 9)
        ctx.save_for_backward(x, flat, bias)
        ctx.sizes, ctx.shape = (len(x), *size, x.shape[2]), weight.shape
        made = torch.empty_like(x)
        grid, options = shares_of(PROGRAMS, *ctx.sizes)
        with torch.cuda.device_of(x):
            program.conv_kernel[grid](x, flat, bias, None, made, None, *ctx.sizes, **options)
        return made

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> Any:
        """Gradients of x, weight and bias."""
        x, weight, bias = ctx.saved_tensors
        sizes = ctx.sizes
        grid, options = shares_of(PROGRAMS, *sizes)
        # Three of these at once: they have more in registers.
        fewer, _ = shares_of(PROGRAMS * 3 // 4, *sizes)
        d_sum, d_x = torch.empty_like(x), torch.empty_like(x)
        d_bias = torch.empty(grid[0], x.shape[2], dtype=torch.float32, device=x.device)
        d_weight = d_bias.new_empty(fewer[0], 9, x.shape[2])
        with torch.cuda.device_of(x):
            program.conv_kernel[grid](
                x, weight, bias, d_out.contiguous(), d_sum, d_bias, *sizes, **options
            )
            program.gradient_kernel[fewer](d_sum, x, weight, d_x, d_weight, *sizes, **options)
        d_weight = d_weight.sum(0).t().reshape(ctx.shape)
        return d_x, d_weight.to(weight.dtype), d_bias.sum(0).to(bias.dtype), None


def shares_of(
    programs: int, maps: int, height: int, width: int, hidden: int
) -> tuple[tuple[int, int], dict[str, int]]:
    """How many of so many programs share maps and channels, and how each goes through them."""
    options = shape_of(width)
    blocks = triton.cdiv(hidden, options["CHANNELS"])
    return (max(1, min(maps, programs // blocks)), blocks), options


def cases() -> Iterator[tuple[str, dict[str, Any]]]:
    """Awkward inputs by name, as arguments of `dwconv_gelu` in float32 on the CPU."""
    for maps, size, hidden in ((1, (1, 1), 1), (2, (3, 2), 5), (3, (7, 7), 40), (2, (2, 33), 17)):
        random = torch.Generator().manual_seed(hidden)
        given = {
            "x": torch.randn(maps, size[0] * size[1], hidden, generator=random),
            "weight": torch.randn(hidden, 1, 3, 3, generator=random),
            "bias": torch.randn(hidden, generator=random),
            "size": size,
        }
        yield f"{maps} of {size[0]} x {size[1]} x {hidden}", given
