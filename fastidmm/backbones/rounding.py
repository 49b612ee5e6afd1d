"""A model's weights rounded to autocast's type, all of them at once.

Autocast rounds each weight where a product asks for it, and widens each gradient by itself: some
two hundred launches a step of a GPU, and a thousand of PVTv2-B3, each for a few kilobytes. At
once they are two. The same numbers are rounded in the same way, so the bits are the same.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

# Whose weights go into nothing but products that autocast would round them for. No subclass: what
# it does with a weight before is its own.
PRODUCTS = (nn.Linear, nn.Conv2d)


def called(model: nn.Module, images: Tensor) -> Any:
    """What `model(images)` gives, under autocast or without."""
    device = images.device.type
    if not torch.is_autocast_enabled(device) or torch.compiler.is_compiling():
        return model(images)
    names = [
        f"{path}.{name}".lstrip(".")
        for path, module in model.named_modules()
        if type(module) in PRODUCTS
        for name, weight in module.named_parameters(recurse=False)
        if weight.dtype == torch.float32
    ]
    if not names:
        return model(images)
    weights = [model.get_parameter(name) for name in names]
    rounded = _Rounded.apply(torch.get_autocast_dtype(device), *weights)  # type: ignore[no-untyped-call]
    return functional_call(model, dict(zip(names, rounded, strict=True)), (images,))


class _Rounded(torch.autograd.Function):
    """Tensors in another type, and their gradients in fp32."""

    @staticmethod
    def forward(ctx: Any, kind: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        """Each as large and as it lies."""
        ctx.set_materialize_grads(False)
        made = [torch.empty_like(weight, dtype=kind) for weight in weights]
        torch._foreach_copy_(made, weights)
        return tuple(made)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """None for what was not used."""
        there = [gradient for gradient in gradients if gradient is not None]
        wide = [torch.empty_like(gradient, dtype=torch.float32) for gradient in there]
        torch._foreach_copy_(wide, there)
        coming = iter(wide)
        return None, *(None if gradient is None else next(coming) for gradient in gradients)
