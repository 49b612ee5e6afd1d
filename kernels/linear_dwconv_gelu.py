"""A linear layer, a depthwise 3 x 3 convolution and GELU, as PVTv2's hidden layers have them.

    hidden = gelu(conv(x weight^T + bias) + conv_bias)

One by one, forward and backward, these are fourteen passes over the widest tensors of the model,
seven of them by cuDNN's depthwise kernels. Fused they are eight: what GELU is given is not kept but
made anew in the backward pass, which leaves both biases' gradients, the sums of what it writes.
Sums run in a fixed order, so the bits are always the same.
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

    from fastidmm.kernels import linear_dwconv_gelu_program as program
except ImportError:  # elsewhere than on Linux
    triton = None

PROGRAMS = 528  # four for each of an H200's multiprocessors: all of them run at once
ELEMENTS = 4  # channels for each thread: the weights' gradient has nine sums of each in registers

Size = Sequence[int]  # height and width


def linear_dwconv_gelu(
    x: Tensor, weight: Tensor, bias: Tensor, conv_weight: Tensor, conv_bias: Tensor, size: Size
) -> Tensor:
    """The hidden layer (C, L, H) of x (C, L, D).

    weight (H, D), conv_weight (H, 1, 3, 3), biases (H,); `size` is the map's, L tokens in all;
    zeros lie around it. In autocast's type under it. On a GPU with Triton, unless something is
    float64, all but the product is one kernel, and two back.
    """
    by = fused if fits(x, weight, bias, conv_weight, conv_bias) else reference
    return by(x, weight, bias, conv_weight, conv_bias, size)


def reference(
    x: Tensor, weight: Tensor, bias: Tensor, conv_weight: Tensor, conv_bias: Tensor, size: Size
) -> Tensor:
    """The definition, on any device; autograd gives the gradients."""
    maps = functional.linear(x, weight, bias).transpose(1, 2).unflatten(2, tuple(size))
    made = functional.conv2d(maps, conv_weight, conv_bias, padding=1, groups=len(conv_weight))
    return functional.gelu(made.flatten(2).transpose(1, 2))


def fused(
    x: Tensor, weight: Tensor, bias: Tensor, conv_weight: Tensor, conv_bias: Tensor, size: Size
) -> Tensor:
    """The same, all but the product by kernels, computed in fp32 whatever the types."""
    made = functional.linear(x, weight, bias.detach())
    hidden: Tensor = _Dwconv.apply(made, bias, conv_weight, conv_bias, size)  # type: ignore[no-untyped-call]
    return hidden


def shape_of(width: int) -> dict[str, int]:
    """How many pairs of columns and channels a program has of maps that wide, and its warps."""
    pairs = triton.next_power_of_2(triton.cdiv(width, 2))
    warps = 4 if pairs <= 32 else 8
    return {"PAIRS": pairs, "CHANNELS": 32 * ELEMENTS * warps // pairs, "num_warps": warps}


class _Dwconv(torch.autograd.Function):
    """The kernels, as autograd asks for them, of x (C, L, H) with the bias `within` it already."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, within: Tensor, weight: Tensor, bias: Tensor, size: Size
    ) -> Tensor:
        """What is kept for the backward pass is what it was given."""
        x, flat = x.contiguous(), weight.reshape(-1, 9)
        ctx.save_for_backward(x, flat, bias)
        ctx.sizes, ctx.shape, ctx.kind = (len(x), *size, x.shape[2]), weight.shape, within.dtype
        made = torch.empty_like(x)
        grid, options = shares_of(PROGRAMS, *ctx.sizes)
        with torch.cuda.device_of(x):
            program.conv_kernel[grid](x, flat, bias, None, made, None, *ctx.sizes, **options)
        return made

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> Any:
        """Gradients of x, the bias within, weight and bias."""
        x, weight, bias = ctx.saved_tensors
        sizes = ctx.sizes
        grid, options = shares_of(PROGRAMS, *sizes)
        # Three of these at once: they have more in registers.
        fewer, _ = shares_of(PROGRAMS * 3 // 4, *sizes)
        d_sum, d_x = torch.empty_like(x), torch.empty_like(x)
        d_bias = torch.empty(grid[0], x.shape[2], dtype=torch.float32, device=x.device)
        # Of each weight, and last of the bias within.
        d_weight = d_bias.new_empty(fewer[0], 10, x.shape[2])
        with torch.cuda.device_of(x):
            program.conv_kernel[grid](
                x, weight, bias, d_out.contiguous(), d_sum, d_bias, *sizes, **options
            )
            program.gradient_kernel[fewer](d_sum, x, weight, d_x, d_weight, *sizes, **options)
        *nine, d_within = d_weight.sum(0)
        d_weight = torch.stack(nine, dim=1).reshape(ctx.shape).to(weight.dtype)
        return d_x, d_within.to(ctx.kind), d_weight, d_bias.sum(0).to(bias.dtype), None


def shares_of(
    programs: int, maps: int, height: int, width: int, hidden: int
) -> tuple[tuple[int, int], dict[str, int]]:
    """How many of so many programs share maps and channels, and how each goes through them."""
    options = shape_of(width)
    blocks = triton.cdiv(hidden, options["CHANNELS"])
    return (max(1, min(maps, programs // blocks)), blocks), options


def cases() -> Iterator[tuple[str, dict[str, Any]]]:
    """Awkward inputs by name, as arguments of `linear_dwconv_gelu` in float32 on the CPU."""
    for maps, size, hidden in ((1, (1, 1), 1), (2, (3, 2), 5), (3, (7, 7), 40), (2, (2, 33), 17)):
        random = torch.Generator().manual_seed(hidden)
        given = {
            "x": torch.randn(maps, size[0] * size[1], 4, generator=random),
            "weight": torch.randn(hidden, 4, generator=random),
            "bias": torch.randn(hidden, generator=random),
            "conv_weight": torch.randn(hidden, 1, 3, 3, generator=random),
            "conv_bias": torch.randn(hidden, generator=random),
            "size": size,
        }
        yield f"{maps} of {size[0]} x {size[1]} x {hidden}", given
