"""A branch added and normalised by one kernel, interpreted, against its definition in float64."""

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from fastidmm.kernels import add_norm as public
from fastidmm.kernels.add_norm import add_norm, cases, fused, reference

CASES = dict(cases())
interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="interprets kernels: tests/gpu runs them"
)
HALF = [torch.bfloat16, torch.float16]


def result(work: Any, given: dict[str, Any]) -> dict[str, Tensor]:
    """Sum, norm and gradients of a loss that asks for both, its weights of 8 bits."""
    leaves = {
        key: value.detach().clone().requires_grad_()
        for key, value in given.items()
        if key in ("x", "branch", "weight", "bias") and value is not None
    }
    total, normed = work(**given | leaves)
    wanted = torch.randn(2, *total.shape, generator=torch.Generator().manual_seed(7))
    one, other = wanted.to(total.device)
    loss = (total.double() * one.bfloat16()).sum() + (normed.double() * other.bfloat16()).sum()
    loss.backward()
    gradients = {f"d {key}": leaf.grad for key, leaf in leaves.items() if leaf.grad is not None}
    return {"total": total.detach(), "normed": normed.detach(), **gradients}


def truth(given: dict[str, Any]) -> dict[str, Tensor]:
    doubles = {k: v.double() if isinstance(v, Tensor) else v for k, v in given.items()}
    return result(reference, doubles)


def test_the_definition_is_a_sum_and_torchs_norm() -> None:
    given = CASES["scaled 3 x 5 x 48"]
    x, branch, scale = (given[key] for key in ("x", "branch", "scale"))
    total, normed = add_norm(**given)
    assert torch.equal(
        total, torch.stack([a + b * s for a, b, s in zip(x, branch, scale, strict=True)])
    )
    spread = (total - total.mean(2, keepdim=True)) / (
        total.var(2, correction=0, keepdim=True) + 1e-6
    ).sqrt()
    torch.testing.assert_close(normed, spread * given["weight"] + given["bias"])
    assert add_norm(x, None, given["weight"], given["bias"])[0] is x


@interpreted
@pytest.mark.parametrize("name", CASES)
def test_the_kernel_is_the_definition(name: str) -> None:
    given = CASES[name]
    found, expected = result(fused, given), truth(given)
    assert found.keys() == expected.keys()
    plain = result(reference, given)
    for key, value in expected.items():
        assert found[key].dtype == torch.float32 and found[key].shape == value.shape, key
        # Never more than half as much again as torch's own in fp32.
        worst = 1.5 * float((plain[key] - value).abs().max()) + 1e-6 * float(value.abs().max())
        assert float((found[key] - value).abs().max()) <= worst, key


@interpreted
@pytest.mark.parametrize("kind", HALF)
def test_under_autocast_the_norm_is_rounded_once(kind: torch.dtype) -> None:
    """The sum stays in fp32; gradients come in the types of what they belong to."""
    given = CASES["scaled 5 x 3 x 192"]
    given = given | {"branch": given["branch"].to(kind)}
    expected = truth(given)
    with torch.autocast("cpu", kind):
        found = result(fused, given)
    assert found["total"].dtype == found["d x"].dtype == torch.float32
    assert found["normed"].dtype == found["d branch"].dtype == kind
    step = torch.finfo(kind).eps
    for key, value in expected.items():
        share = step if found[key].dtype == kind else 2e-6
        worst = float(((found[key] - value).abs() / value.abs().clamp(min=1)).max())
        assert worst <= share * (1 if key != "d weight" else 20), (key, worst)


@interpreted
@pytest.mark.parametrize("num", [1, 33, 40])
def test_rows_that_many_programs_share(num: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes several; the last ones find fewer."""
    monkeypatch.setattr(public, "PROGRAMS", 3)
    monkeypatch.setattr(public, "ELEMENTS", 32)
    random = torch.Generator().manual_seed(num)
    x, branch = torch.randn(2, num, 3, 10, generator=random)
    weight, bias = torch.randn(2, 10, generator=random)
    given = {"x": x, "branch": branch, "weight": weight, "bias": bias}
    given["scale"] = torch.rand(num, generator=random)
    for key, value in truth(given).items():
        torch.testing.assert_close(result(fused, given)[key].double(), value, rtol=1e-4, atol=1e-5)


@interpreted
@pytest.mark.parametrize("used", ["total", "normed"])
def test_what_is_not_used_has_no_gradient(used: str) -> None:
    given = CASES["scaled 3 x 5 x 48"]
    found = []
    for work in (fused, reference):
        leaves = {k: given[k].clone().requires_grad_() for k in ("x", "branch")}
        total, normed = work(**given | leaves)
        (total if used == "total" else normed).square().sum().backward()
        found.append([leaf.grad for leaf in leaves.values()])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@interpreted
@pytest.mark.parametrize("asked", ["x", "branch", "weight"])
def test_what_is_not_asked_for_has_none(asked: str) -> None:
    """As of images, whose norm is the first thing that is made of them."""
    given = CASES["scaled 3 x 5 x 48"]
    found = []
    for work in (fused, reference):
        leaf = given[asked].clone().requires_grad_()
        total, normed = work(**given | {asked: leaf})
        (total.square().sum() + normed.pow(3).sum()).backward()
        found.append(leaf.grad)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@interpreted
def test_no_rows_and_rows_that_do_not_lie_together() -> None:
    given = CASES["scaled 3 x 5 x 48"]
    empty = {key: given[key][:0] for key in ("x", "branch", "scale")}
    found = result(fused, given | empty)
    assert found["total"].shape == found["d x"].shape == (0, 5, 48)
    assert not found["d weight"].any() and not found["d bias"].any()
    apart = {
        key: given[key].transpose(1, 2).contiguous().transpose(1, 2) for key in ("x", "branch")
    }
    for key, value in result(fused, given).items():
        torch.testing.assert_close(result(fused, given | apart)[key], value)
