"""Attention as runs have it on a GPU, many queries or one: as near to float64 as plain products."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastidmm.machine import set_up

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def drawn(queries: int, keys: int, shift: float) -> list[Tensor]:
    """Queries, keys, values and the gradient, whose scores lie about `shift`.

    By queries far out: with keys as far, the rounding of a sum that is 0 would be all that the
    gradient of queries has there.
    """
    random = torch.Generator().manual_seed(keys)
    sizes = [queries, keys, keys, queries]
    q, k, v, g = (torch.randn(24, 3, size, 64, generator=random) for size in sizes)
    q[..., 0], k[..., 0] = 8 * shift, 1.0
    return [each.bfloat16().cuda() for each in (q, k, v, g)]


def result(given: list[Tensor]) -> list[Tensor]:
    """What comes out, and the gradients of queries, keys and values."""
    *operands, gradient = given
    leaves = [each.detach().requires_grad_() for each in operands]
    q, k, v = leaves
    found = functional.scaled_dot_product_attention(q, k, v)
    found.backward(gradient)
    return [found.detach(), *(each.grad for each in leaves if each.grad is not None)]


@pytest.mark.parametrize("shift", [0.0, -120.0])  # exp of the negative sum overflows in fp32
@pytest.mark.parametrize("keys", [50, 64, 128, 197])
@pytest.mark.parametrize("one", [True, False])
def test_it_errs_as_little_as_products(one: bool, keys: int, shift: float) -> None:
    set_up("cuda", exact=False)
    given = drawn(1 if one else keys, keys, shift)
    found = result(given)
    with sdpa_kernel(SDPBackend.MATH):
        plain, true = result(given), result([each.double() for each in given])
    for name, ours, theirs, value in zip("oqkv", found, plain, true, strict=True):
        worst = 1.5 * float((theirs - value).abs().max()) + 4e-3 * float(value.abs().max())
        assert float((ours - value).abs().max()) <= worst, name
