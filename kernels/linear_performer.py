"""Keys, queries and values of tokens by one product, and linear attention among them.

    k, q, v = x weight^T + bias        f(t) = exp(w t - |t|^2 / 2) / sqrt(M)
    found = f(q) (f(k)^T v) / (f(q) f(k)^T 1)

Choromanski et al., "Rethinking Attention with Performers", ICLR 2021: products of features stand
for exp(k . q), and no token meets another. One by one these are some forty passes over the tokens
in float32, and twice as many back. Fused, what the layer made is read once and what is found is
written, in the type that the layer has; and back it is read once more.
"""

import math
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from fastidmm.kernels.linear_gelu import fits

with suppress(ImportError):  # elsewhere than on Linux
    import triton

    from fastidmm.kernels import linear_performer_program as program

BLOCK = 32  # tokens that a program holds at a time: of more, the way back spills
SPAN = 1024  # tokens of a program that sums them
NEAR = 256  # tokens of one that sums nothing
# Fetched one block ahead, as Triton would by itself, two more would not fit an A10's memory.
OPTIONS = {"num_warps": 4, "num_stages": 1}


def linear_performer(
    x: Tensor, weight: Tensor, bias: Tensor, directions: Tensor
) -> tuple[Tensor, Tensor]:
    """Values and what the queries find among them, both (C, L, D), in autocast's type under it.

    x (C, L, D'), weight (3 D, D') and bias (3 D,) are of any float types; directions (M, D) have
    no gradient. On a GPU with Triton and in half precision attention is two kernels, and its way
    back with the bias's gradient two; wider types are multiplied in full, by torch.
    """
    device = x.device.type
    kind = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    if kind.itemsize == 2 and fits(x, weight, bias, directions):
        return fused(x, weight, bias, directions)
    return reference(x, weight, bias, directions)


def reference(x: Tensor, weight: Tensor, bias: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    """The definition, on any device; autograd gives the gradients."""
    k, q, v = functional.linear(x, weight, bias).chunk(3, dim=-1)
    return v, performer(q, k, v, directions)


def performer(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
    """Attention whose cost is linear in the tokens: (C, L, D) each, with M directions w (M, D).

    In float32 whatever autocast says: exponents reach |w|**2 / 2 = 16, beyond half precision, and
    bfloat16 would round them by up to 6 %.
    """
    kind = v.dtype
    with torch.autocast(q.device.type, enabled=False):
        if kind != torch.float64:
            q, k, v, w = q.float(), k.float(), v.float(), w.float()
        q, k = random_features(q, w), random_features(k, w)
        total = q @ k.sum(dim=1).unsqueeze(-1)
        return (q @ (k.transpose(1, 2) @ v) / (total + 1e-8)).to(kind)


def random_features(x: Tensor, w: Tensor) -> Tensor:
    """Features (C, L, M) whose products stand for exp(x . y): exp(w . x - |x|**2 / 2) / sqrt(M)."""
    return torch.exp(x @ w.T - x.square().sum(dim=-1, keepdim=True) / 2) / math.sqrt(len(w))


def fused(x: Tensor, weight: Tensor, bias: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    """The same, all but the first product by kernels, computed in fp32 whatever the types."""
    made = functional.linear(x, weight, bias.detach())
    v, found = _Performer.apply(made, bias, directions)  # type: ignore[no-untyped-call]
    return v, found


class _Performer(torch.autograd.Function):
    """Values and attention of keys, queries and values x (C, L, 3 D), whose bias is (3 D,)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        """Kept for backward: x, and of each crop the sums that its tokens share."""
        x, directions = x.contiguous(), directions.contiguous()
        (crops, tokens, _), (num, width) = x.shape, directions.shape
        shape = shape_of(width, num) | OPTIONS
        sums, totals = shared(x, directions, spans := triton.cdiv(tokens, SPAN))
        found = x.new_empty(crops, tokens, width)
        with torch.cuda.device_of(x):
            if found.numel():
                program.gather_kernel[(crops, spans)](
                    x, directions, sums, totals, tokens, **shape, SPAN=SPAN
                )
                sums, totals = sums.sum(1), totals.sum(1)
                program.spread_kernel[(crops, triton.cdiv(tokens, NEAR))](
                    x, directions, sums, totals, found, tokens, **shape, SPAN=NEAR
                )
        ctx.save_for_backward(x, directions, sums, totals)
        ctx.set_materialize_grads(False)
        ctx.kind = bias.dtype
        return x[..., 2 * width :], found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_v: Tensor | None, d_found: Tensor | None) -> Any:
        """Of x and of the bias."""
        x, directions, sums, totals = ctx.saved_tensors
        (crops, tokens, _), (num, width) = x.shape, directions.shape
        shape = shape_of(width, num) | OPTIONS
        d_sums, d_totals = shared(x, directions, spans := triton.cdiv(tokens, SPAN))
        d_x = torch.empty_like(x)
        shares = d_sums.new_zeros(crops * spans, 3 * width)
        if d_found is None:
            d_found = x.new_zeros(crops, tokens, width)
        d_v = None if d_v is None else d_v.contiguous()
        with torch.cuda.device_of(x):
            if d_x.numel():
                program.query_kernel[(crops, spans)](
                    x, directions, sums, totals, d_found.contiguous(), d_x, d_sums, d_totals,
                    shares, tokens, **shape, SPAN=SPAN,
                )  # fmt: skip
                program.pair_kernel[(crops, spans)](
                    x, directions, d_sums.sum(1), d_totals.sum(1), d_v, d_x, shares, tokens,
                    **shape, SPAN=SPAN,
                )  # fmt: skip
        return d_x, shares.sum(0).to(ctx.kind), None


def shape_of(width: int, num: int) -> dict[str, int]:
    """How tokens of that width, and so many features, lie in a program; products begin at 16."""
    padded, features = (max(16, triton.next_power_of_2(each)) for each in (width, num))
    return {"D": width, "M": num, "WIDTH": padded, "FEATURES": features, "BLOCK": BLOCK}


def shared(x: Tensor, directions: Tensor, spans: int) -> tuple[Tensor, Tensor]:
    """Room for what a crop's tokens share, span by span: (C, spans, M, D) and (C, spans, M)."""
    sums = x.new_empty(len(x), spans, *directions.shape, dtype=torch.float32)
    return sums, sums.new_empty(sums.shape[:3])


def cases() -> Iterator[tuple[str, dict[str, Any]]]:
    """Awkward inputs by name, as arguments of `linear_performer` in float32 on the CPU."""
    sizes = ((1, 1, 1, 1), (3, 7, 5, 3), (2, 65, 20, 17), (2, 130, 64, 32))
    for c, l, d, m in sizes:  # noqa: E741
        random = torch.Generator().manual_seed(d)
        given: dict[str, Any] = {
            "x": torch.randn(c, l, 4, generator=random),
            "weight": torch.randn(3 * d, 4, generator=random) / d**0.5,
            "bias": torch.randn(3 * d, generator=random) / d**0.5,
            "directions": torch.randn(m, d, generator=random),
        }
        yield f"{c} x {l}, {d} wide, {m} features", given
        far = {"weight": 2 * given["weight"], "directions": 2 * given["directions"]}
        yield f"{c} x {l}, {d} wide, {m} features far apart", given | far
