"""Dropout by one kernel, interpreted: the bits of its definition, forward and back."""

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from fastidmm.kernels import dropout as public
from fastidmm.kernels.dropout import cases, dropout, fused, reference

CASES = dict(cases())
interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="interprets kernels: tests/gpu runs them"
)


def result(work: Any, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """What comes out, and the gradient of its sum, weighted."""
    x = given["x"].detach().clone().requires_grad_()
    made = work(**given | {"x": x})
    wanted = torch.randn(x.shape, generator=torch.Generator().manual_seed(7))
    (made * wanted.to(x.device, x.dtype)).sum().backward()
    assert x.grad is not None
    return made.detach(), x.grad


def drawn(step: int, place: int, layer: int, quad: int, key: tuple[int, int]) -> list[int]:
    """Philox's four words in Python's own numbers."""
    c = [step % 2**32, place, layer, quad]
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [p1 >> 32 ^ c[1] ^ k0, p1 % 2**32, p0 >> 32 ^ c[3] ^ k1, p0 % 2**32]
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c


@pytest.mark.parametrize("name", CASES)
def test_words_of_a_crop_drop_its_numbers_in_order(name: str) -> None:
    given = CASES[name]
    x, p, key = given["x"], given["p"], given["key"]
    step, place, layer = given["counter"]
    made = dropout(**given)
    assert made.shape == x.shape and made.dtype == x.dtype
    for crop in range(len(x)):
        flat = x[crop].flatten()
        words = [
            word
            for quad in range(-(-len(flat) // 4))
            for word in drawn(int(step), int(place[crop]), layer, quad, key)
        ]
        kept = torch.tensor([word >= p * 2**32 for word in words])[: len(flat)]
        expected = torch.where(kept, flat / (1 - p), 0.0)
        torch.testing.assert_close(made[crop].flatten(), expected, rtol=2e-7, atol=0)


@interpreted
@pytest.mark.parametrize("kind", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_the_kernel_gives_the_bits_of_the_definition(
    name: str, kind: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(public, "QUADS", 8)  # several programs a crop
    given = CASES[name] | {"x": CASES[name]["x"].to(kind)}
    for ours, theirs in zip(result(fused, given), result(reference, given), strict=True):
        assert ours.dtype == kind and torch.equal(ours, theirs)


@interpreted
def test_numbers_that_do_not_lie_together_and_none() -> None:
    given = CASES["3 x 5 x 7"]
    turned = given["x"].transpose(1, 2).contiguous().transpose(1, 2)
    assert not turned.is_contiguous()
    assert torch.equal(fused(**given | {"x": turned}), reference(**given))
    step, place, layer = given["counter"]
    strided = torch.stack((place, place + 1), dim=1)[:, 0]
    asked = given | {"counter": (step, strided, layer)}
    assert torch.equal(fused(**asked), reference(**given))
    empty = given | {"x": given["x"][:0], "counter": (step, place[:0], layer)}
    assert fused(**empty).shape == reference(**empty).shape == (0, 5, 7)
