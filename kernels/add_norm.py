"""A residual branch added to its tokens, and the sum normalised: what joins a transformer's layers.

    total = x + scale * branch        normed = LayerNorm(total)

One by one these are four passes over the tokens, drop-path's product, the sum, the norm in fp32 and
its rounding to half precision, and six back. Fused, each number is read and written once.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

try:
    import triton

    from fastidmm.kernels import add_norm_program as program
except ImportError:  # elsewhere than on Linux
    triton = None

ELEMENTS = 1024  # that a program holds at a time
PROGRAMS = 528  # of a backward pass: four for each of an H200's multiprocessors
WARPS = 4


def add_norm(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    *,
    scale: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """The sum and its norm, both (C, L, D).

    x and branch (C, L, D) and weight and bias (D,) are of any float types, scale (C,) is fp32;
    `None` means no branch, and 1. The sum has the wider of both types. On a GPU with Triton, unless
    something is float64, it is one kernel, whose norm has autocast's type, or the sum's without.
    """
    given = [t for t in (x, branch, weight, bias) if t is not None]
    wide = any(tensor.dtype == torch.float64 for tensor in given)
    if triton is None or not x.is_cuda or wide or torch.compiler.is_compiling():
        return reference(x, branch, weight, bias, scale=scale, eps=eps)
    return fused(x, branch, weight, bias, scale=scale, eps=eps)


def reference(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    *,
    scale: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """The definition, on any device; autograd gives the gradients."""
    if branch is not None:
        x = x + (branch if scale is None else branch * scale[:, None, None])
    return x, functional.layer_norm(x, weight.shape, weight, bias, eps)


def fused(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    *,
    scale: Tensor | None = None,
    eps: float = 1e-6,
    within: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same by one kernel, computed in fp32 whatever the types.

    A bias (D,) that is `within` the branch already has its gradient from here.
    """
    kind = x.dtype if branch is None else torch.promote_types(x.dtype, branch.dtype)
    device = x.device.type
    to = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else kind
    made = _AddNorm.apply(x, branch, weight, bias, scale, eps, within, kind, to)  # type: ignore[no-untyped-call]
    return x if branch is None else made[0], made[1]


def shape_of(width: int) -> dict[str, int]:
    """How a row of that width lies in a program, and how many do."""
    padded = triton.next_power_of_2(width)
    return {"D": width, "WIDTH": padded, "ROWS": max(1, ELEMENTS // padded)}


class _AddNorm(torch.autograd.Function):
    """Both kernels, as autograd asks for them; the sum is empty where there is no branch."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        branch: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        scale: Tensor | None,
        eps: float,
        within: Tensor | None,
        kind: torch.dtype,
        to: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        """Every row's sum and norm; kept for backward: the sum, and of each row two numbers."""
        x = x.contiguous()
        branch = None if branch is None else branch.contiguous()
        total = x.new_empty(0) if branch is None else torch.empty_like(x, dtype=kind)
        normed = torch.empty_like(x, dtype=to)
        num, width = x.numel() // x.shape[-1], x.shape[-1]
        mean, rstd = torch.empty(2, num, dtype=torch.float32, device=x.device)
        shape = shape_of(width)
        with torch.cuda.device_of(x):
            if num:
                program.forward_kernel[(triton.cdiv(num, shape["ROWS"]),)](
                    x, branch, scale, weight, bias, total, normed, mean, rstd, eps, num,
                    x.shape[1], **shape, num_warps=WARPS,
                )  # fmt: skip
        ctx.save_for_backward(x if branch is None else total, scale, weight, mean, rstd)
        ctx.set_materialize_grads(False)
        ctx.kinds = [None if each is None else each.dtype for each in (x, branch, bias, within)]
        if branch is None:
            ctx.mark_non_differentiable(total)
        return total, normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total: Tensor | None, d_normed: Tensor | None) -> Any:
        """Gradients of x, branch, weight, bias, and the bias within."""
        total, scale, weight, mean, rstd = ctx.saved_tensors
        x_kind, branch_kind, bias_kind, within_kind = ctx.kinds
        if d_normed is None:
            d_normed = torch.zeros_like(total)
        d_total = None if d_total is None else d_total.contiguous()
        # Nobody asks for the gradient of images.
        d_x = torch.empty_like(total, dtype=x_kind) if ctx.needs_input_grad[0] else None
        d_branch = None if branch_kind is None else torch.empty_like(total, dtype=branch_kind)
        num, width, shape = mean.numel(), total.shape[-1], shape_of(total.shape[-1])
        programs = max(1, min(PROGRAMS, triton.cdiv(num, shape["ROWS"])))
        sums = 2 if within_kind is None else 3
        shares = torch.empty(sums, programs, width, dtype=torch.float32, device=total.device)
        with torch.cuda.device_of(total):
            program.backward_kernel[(programs,)](
                d_total, d_normed.contiguous(), total, scale, weight, mean, rstd, d_x, d_branch,
                shares, num, total.shape[1], WITHIN=sums == 3, **shape, num_warps=WARPS,
            )  # fmt: skip
        d_weight, d_bias, *rest = shares.sum(1)
        d_within = rest[0].to(within_kind) if rest else None
        d_weight, d_bias = d_weight.to(weight.dtype), d_bias.to(bias_kind)
        return d_x, d_branch, d_weight, d_bias, None, None, d_within, None, None


def cases() -> Iterator[tuple[str, dict[str, Any]]]:
    """Awkward inputs by name, as arguments of `add_norm` in float32 on the CPU."""
    for c, l, d in ((1, 1, 1), (3, 5, 48), (2, 7, 65), (5, 3, 192), (1, 2, 2050)):  # noqa: E741
        random = torch.Generator().manual_seed(c + 100 * d)
        x, branch = torch.randn(2, c, l, d, generator=random)
        weight, bias = torch.randn(2, d, generator=random)
        plain: dict[str, Any] = {"x": x, "branch": branch, "weight": weight, "bias": bias}
        scale = torch.rand(c, generator=random).mul(2) * (torch.arange(c) != 1)
        named = {
            "plain": plain,
            "scaled": plain | {"scale": scale},
            "no branch": plain | {"branch": None},
            "far from zero": plain | {"x": x + 100, "scale": scale},
            "hardly any spread": plain | {"x": x * 1e-4, "branch": branch * 1e-4, "eps": 1e-5},
        }
        yield from ((f"{name} {c} x {l} x {d}", given) for name, given in named.items())
