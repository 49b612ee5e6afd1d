"""Dropout by one kernel on a GPU: the bits of its definition there, and of the CPU's."""

from typing import Any

import pytest
import torch
from test_dropout import CASES, result
from torch import Tensor

from fastidmm.kernels.dropout import dropout, reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
KINDS = [torch.float32, torch.bfloat16, torch.float16]


def placed(given: dict[str, Any]) -> dict[str, Any]:
    """On the GPU, the step where it is a tensor, too."""
    counter = tuple(part.cuda() if isinstance(part, Tensor) else part for part in given["counter"])
    return given | {"x": given["x"].cuda(), "counter": counter}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
def test_the_kernel_gives_the_bits_of_the_definition(name: str, kind: torch.dtype) -> None:
    given = CASES[name] | {"x": CASES[name]["x"].to(kind)}
    ours, theirs = result(dropout, placed(given)), result(reference, placed(given))
    for found, there, here in zip(ours, theirs, result(reference, given), strict=True):
        assert found.dtype == kind and found.is_cuda
        assert torch.equal(found, there) and torch.equal(found.cpu(), here)


def test_a_crop_as_large_as_a_token_block_has() -> None:
    """784 tokens of 64: 49 programs a crop."""
    x = torch.randn(3, 784, 64, generator=torch.Generator().manual_seed(0)).bfloat16().cuda()
    given = {"x": x, "p": 0.1, "counter": (7, torch.tensor([4, 9, 2]).cuda(), 1), "key": (3, 4)}
    for ours, theirs in zip(result(dropout, given), result(reference, given), strict=True):
        assert torch.equal(ours, theirs)
