"""The last layer of a residual branch, added to its tokens, and the sum normalised.

    total = x + scale * (branch weight^T + bias)        normed = LayerNorm(total)

Sum and norm are `add_norm`'s kernels. What is more: its way back leaves the gradient of the bias,
which is the sum of the branch's over all rows. Torch reads that once more, for each layer.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fastidmm.kernels import add_norm
from fastidmm.kernels.linear_gelu import fits


def linear_add_norm(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    *,
    scale: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """The sum and its norm, both (C, L, D), in the types that `add_norm` gives them.

    x (C, L, D), branch (C, L, H), weight (D, H), bias, norm_weight and norm_bias (D,) are of any
    float types, scale (C,) is fp32, or None for 1. On a GPU with Triton, unless something is
    float64, all but the product is one kernel each way.
    """
    by = fused if fits(x, branch, weight, bias, norm_weight, norm_bias) else reference
    return by(x, branch, weight, bias, norm_weight, norm_bias, scale=scale, eps=eps)


def reference(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    *,
    scale: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """The definition, on any device; autograd gives the gradients."""
    made = functional.linear(branch, weight, bias)
    return add_norm.reference(x, made, norm_weight, norm_bias, scale=scale, eps=eps)


def fused(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    *,
    scale: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """The same, all but the product by kernels."""
    made = functional.linear(branch, weight, bias.detach())
    return add_norm.fused(x, made, norm_weight, norm_bias, scale=scale, eps=eps, within=bias)


def cases() -> Iterator[tuple[str, dict[str, Any]]]:
    """Awkward inputs by name, as arguments of `linear_add_norm` in float32 on the CPU."""
    for c, l, h, d in ((1, 1, 1, 1), (3, 5, 7, 48), (2, 7, 130, 65), (5, 3, 16, 192)):  # noqa: E741
        random = torch.Generator().manual_seed(d)
        given = {
            "x": torch.randn(c, l, d, generator=random),
            "branch": torch.randn(c, l, h, generator=random),
            "weight": torch.randn(d, h, generator=random),
            "bias": torch.randn(d, generator=random),
            "norm_weight": torch.randn(d, generator=random),
            "norm_bias": torch.randn(d, generator=random),
        }
        scale = torch.rand(c, generator=random).mul(2) * (torch.arange(c) != 1)
        yield f"{c} x {l}, {h} to {d}", given
        yield f"scaled {c} x {l}, {h} to {d}", given | {"scale": scale}
