"""Layers whose biases' gradients a kernel makes in passing, on a GPU: torch's errors at most.

Sizes are a backbone's, with rows and columns that no program's share divides.
"""

from typing import Any

import pytest
import torch
from test_linear import FUSED, PLAIN, compared, result

from fastidmm.kernels import add_norm, linear_dwconv_gelu, linear_gelu

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def maps(num: int, size: tuple[int, int], width: int, kind: torch.dtype) -> dict[str, Any]:
    """Of 16 channels, and the hidden layer of them."""
    random = torch.Generator().manual_seed(width + size[0])
    return {
        "x": torch.randn(num, size[0] * size[1], 16, generator=random).to(kind).cuda(),
        "weight": (torch.randn(width, 16, generator=random) / 4).cuda(),
        "bias": torch.randn(width, generator=random).cuda(),
        "conv_weight": (torch.randn(width, 1, 3, 3, generator=random) / 3).cuda(),
        "conv_bias": torch.randn(width, generator=random).cuda(),
        "size": size,
    }


def given(op: str, width: int, kind: torch.dtype = torch.float32) -> dict[str, Any]:
    """Of 37 crops, 50 tokens each, or maps of 70."""
    random = torch.Generator().manual_seed(width)
    if op == "dwconv":
        return maps(37, (10, 7), width, kind)
    if op == "performer":  # 1,100 tokens of 64: two programs sum them
        return {
            "x": torch.randn(2, 1100, width, generator=random).to(kind).cuda(),
            "weight": (torch.randn(192, width, generator=random) / 8 / width**0.5).cuda(),
            "bias": (torch.randn(192, generator=random) / 8).cuda(),
            "directions": torch.randn(32, 64, generator=random).cuda(),
        }
    out = width * {"gelu": 4, "heads": 3, "joined": 1}[op]
    found: dict[str, Any] = {
        "x": torch.randn(37, 50, width, generator=random).to(kind).cuda(),
        "weight": (torch.randn(out, width, generator=random) / width**0.5).cuda(),
        "bias": torch.randn(out, generator=random).cuda(),
    }
    if op == "heads":
        found["heads"] = width // 16
    if op == "joined":
        found["branch"] = found["x"]
        found["x"] = torch.randn(37, 50, width, generator=random).cuda()
        found["norm_weight"], found["norm_bias"] = torch.randn(2, width, generator=random).cuda()
        found["scale"] = ((torch.rand(37, generator=random) > 0.1).float() / 0.9).cuda()
    return found


# Linear attention has no kernel for what it multiplies in full.
@pytest.mark.parametrize("op", [op for op in FUSED if op != "performer"])
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


@pytest.mark.parametrize(
    "side", [4, 14, pytest.param(56, id="wide 56"), pytest.param(112, id="wide 112")]
)
def test_maps_of_every_stage(side: int) -> None:
    """As wide as PVTv2 has them from 112 to 448 px."""
    asked = maps(2, (side, side), 48, torch.bfloat16)
    with torch.autocast("cuda", torch.bfloat16):
        found, plain = result(FUSED["dwconv"], asked), result(PLAIN["dwconv"], asked)
    compared("dwconv", asked, found, plain)


@pytest.mark.parametrize("op", FUSED)
def test_programs_that_take_several_turns(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (linear_gelu, linear_dwconv_gelu, add_norm):
        monkeypatch.setattr(module, "PROGRAMS", 6)
    kind = torch.bfloat16 if op == "performer" else torch.float32
    asked = given(op, 48, kind)
    with torch.autocast("cuda", kind, enabled=kind != torch.float32):
        compared(op, asked, result(FUSED[op], asked), result(PLAIN[op], asked))


@pytest.mark.parametrize("op", FUSED)
def test_two_runs_are_equal_to_the_bit(op: str) -> None:
    asked = given(op, 48, torch.bfloat16)
    with torch.autocast("cuda", torch.bfloat16):
        once, again = result(FUSED[op], asked), result(FUSED[op], asked)
    assert all(torch.equal(once[key], again[key]) for key in once)
