"""Layers whose biases' gradients a kernel makes in passing, on a GPU: torch's errors at most.

Sizes are a backbone's, with rows and columns that no program's share divides.
"""

from typing import Any

import pytest
import torch
from test_linear import FUSED, PLAIN, result, truth
from torch import Tensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def given(op: str, width: int, kind: torch.dtype = torch.float32) -> dict[str, Any]:
    """Of 37 crops, 50 tokens each."""
    random = torch.Generator().manual_seed(width)
    out = width * {"gelu": 4, "heads": 3}[op]
    found: dict[str, Any] = {
        "x": torch.randn(37, 50, width, generator=random).to(kind).cuda(),
        "weight": (torch.randn(out, width, generator=random) / width**0.5).cuda(),
        "bias": torch.randn(out, generator=random).cuda(),
    }
    return found if op == "gelu" else {**found, "heads": width // 16}


def compared(
    op: str, asked: dict[str, Any], found: dict[str, Tensor], plain: dict[str, Tensor]
) -> None:
    for key, value in truth(op, asked).items():
        assert found[key].dtype == plain[key].dtype, key
        worst = 1.5 * float((plain[key] - value).abs().max()) + 1e-6 * float(value.abs().max())
        assert float((found[key] - value).abs().max()) <= worst, key


@pytest.mark.parametrize("op", FUSED)
@pytest.mark.parametrize("width", [48, pytest.param(192, id="wide")])
def test_in_fp32_it_errs_as_little_as_torch(op: str, width: int) -> None:
    asked = given(op, width)
    compared(op, asked, result(FUSED[op], asked), result(PLAIN[op], asked))


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", FUSED)
@pytest.mark.parametrize(
    "width", [48, *(pytest.param(width, id=f"wide {width}") for width in (192, 384, 768))]
)
def test_under_autocast_it_errs_as_little_as_torch(op: str, width: int, kind: torch.dtype) -> None:
    asked = given(op, width, kind)
    with torch.autocast("cuda", kind):
        found, plain = result(FUSED[op], asked), result(PLAIN[op], asked)
    compared(op, asked, found, plain)


@pytest.mark.parametrize("op", FUSED)
def test_two_runs_are_equal_to_the_bit(op: str) -> None:
    asked = given(op, 48, torch.bfloat16)
    with torch.autocast("cuda", torch.bfloat16):
        once, again = result(FUSED[op], asked), result(FUSED[op], asked)
    assert all(torch.equal(once[key], again[key]) for key in once)
