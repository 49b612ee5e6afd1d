"""Sums and norms of tokens by one kernel on a GPU: as near to float64 as torch's own, and exact."""

from typing import Any

import pytest
import torch
from test_add_norm import CASES, result, truth
from torch import Tensor

from fastidmm.kernels.add_norm import add_norm, reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
WIDTHS = [128, 192, 384, 768]


def placed(given: dict[str, Any]) -> dict[str, Any]:
    return {k: v.cuda() if isinstance(v, Tensor) else v for k, v in given.items()}


def tokens(width: int, kind: torch.dtype) -> dict[str, Any]:
    """Of 37 crops, 50 each, a tenth of the branches dropped."""
    random = torch.Generator().manual_seed(width)
    x, branch = torch.randn(2, 37, 50, width, generator=random)
    weight, bias = torch.randn(2, width, generator=random)
    scale = (torch.rand(37, generator=random) > 0.1).float() / 0.9
    return {"x": x, "branch": branch.to(kind), "weight": weight, "bias": bias, "scale": scale}


@pytest.mark.parametrize("name", CASES)
def test_in_fp32_it_errs_as_little_as_torch(name: str) -> None:
    given = placed(CASES[name])
    found, plain, expected = result(add_norm, given), result(reference, given), truth(given)
    for key, value in expected.items():
        worst = 1.5 * float((plain[key] - value).abs().max()) + 1e-6 * float(value.abs().max())
        assert float((found[key] - value).abs().max()) <= worst, key


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", WIDTHS)
def test_under_autocast_it_errs_as_little_as_torch(width: int, kind: torch.dtype) -> None:
    given = placed(tokens(width, kind))
    expected = truth(given)
    with torch.autocast("cuda", kind):
        found, plain = result(add_norm, given), result(reference, given)
    assert found["normed"].dtype == found["d branch"].dtype == kind
    for key, value in expected.items():
        # Torch's norm is in fp32 until a product rounds it.
        other = plain[key].to(found[key].dtype)
        worst = 1.5 * float((other - value).abs().max()) + 1e-6 * float(value.abs().max())
        assert float((found[key] - value).abs().max()) <= worst, key


def test_two_runs_are_equal_to_the_bit() -> None:
    given = placed(tokens(192, torch.bfloat16))
    with torch.autocast("cuda", torch.bfloat16):
        once, again = result(add_norm, given), result(add_norm, given)
    assert all(torch.equal(once[key], again[key]) for key in once)
