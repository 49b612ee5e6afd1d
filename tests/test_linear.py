"""Layers whose biases' gradients a kernel makes in passing, interpreted, against float64."""

import os
from typing import Any

import pytest
import torch
from timm.models.pvt_v2 import MlpWithDepthwiseConv
from torch import Tensor
from torch.nn import functional

from fastidmm.backbones.blocks import fed_among_neighbours
from fastidmm.kernels import add_norm
from fastidmm.kernels import linear_add_norm as joined
from fastidmm.kernels import linear_dwconv_gelu as dwconv
from fastidmm.kernels import linear_gelu as gelu
from fastidmm.kernels import linear_heads as heads
from fastidmm.kernels import linear_performer as performer

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="interprets kernels: tests/gpu runs them"
)
MODULES: dict[str, Any] = {
    "gelu": gelu, "heads": heads, "joined": joined, "dwconv": dwconv, "performer": performer
}  # fmt: skip
CASES = {(op, name): given for op, module in MODULES.items() for name, given in module.cases()}
FUSED: dict[str, Any] = {op: module.fused for op, module in MODULES.items()}
PLAIN: dict[str, Any] = {op: module.reference for op, module in MODULES.items()}
HALF = [torch.bfloat16, torch.float16]


def result(work: Any, given: dict[str, Any]) -> dict[str, Tensor]:
    """What comes out, and the gradients of a loss that asks for all of it, weights of 8 bits."""
    leaves = {
        key: value.detach().clone().requires_grad_()
        for key, value in given.items()
        if isinstance(value, Tensor) and key not in ("scale", "directions")
    }
    made = work(**given | leaves)
    made = made if isinstance(made, tuple) else (made,)
    random = torch.Generator().manual_seed(7)
    loss = sum(
        (out.double() * torch.randn(out.shape, generator=random).bfloat16().to(out.device)).sum()
        for out in made
    )
    assert isinstance(loss, Tensor)
    loss.backward()
    gradients = {f"d {key}": leaf.grad for key, leaf in leaves.items() if leaf.grad is not None}
    return {f"out {place}": out.detach() for place, out in enumerate(made)} | gradients


def truth(op: str, given: dict[str, Any]) -> dict[str, Tensor]:
    doubles = {k: v.double() if isinstance(v, Tensor) else v for k, v in given.items()}
    return result(PLAIN[op], doubles)


def compared(
    op: str, given: dict[str, Any], found: dict[str, Tensor], plain: dict[str, Tensor]
) -> None:
    """It never errs more than half as much again as torch's own."""
    for key, value in truth(op, given).items():
        # Torch's norm is in fp32 until a product rounds it.
        other = plain[key].to(found[key].dtype) if (op, key) == ("joined", "out 1") else plain[key]
        assert found[key].dtype == other.dtype and found[key].shape == value.shape, key
        worst = 1.5 * float((other - value).abs().max()) + 1e-6 * float(value.abs().max())
        assert float((found[key] - value).abs().max()) <= worst, key


def test_the_definitions_are_torchs_layers() -> None:
    given = CASES["gelu", "2 x 9 x 2 of 16 to 130"]
    x, weight, bias = given.values()
    layers = torch.nn.Sequential(torch.nn.Linear(16, 130), torch.nn.GELU())
    layers.load_state_dict({"0.weight": weight, "0.bias": bias})
    assert torch.equal(gelu.linear_gelu(x, weight, bias), layers(x))
    given = CASES["heads", "2 x 7, 3 heads of 5"]
    for place, made in enumerate(heads.linear_heads(**given)):
        rows = slice(15 * place, 15 * place + 15)
        third = functional.linear(given["x"], given["weight"][rows], given["bias"][rows])
        for head in range(3):
            torch.testing.assert_close(made[:, head], third[..., 5 * head : 5 * head + 5])
    given = CASES["joined", "scaled 3 x 5, 7 to 48"]
    total, normed = joined.linear_add_norm(**given)
    branch = functional.linear(given["branch"], given["weight"], given["bias"])
    torch.testing.assert_close(total, given["x"] + given["scale"][:, None, None] * branch)
    norm = torch.nn.LayerNorm(48, eps=1e-6)
    norm.load_state_dict({"weight": given["norm_weight"], "bias": given["norm_bias"]})
    torch.testing.assert_close(normed, norm(total))


@pytest.mark.parametrize(("op", "name"), [k for k in CASES if "no bias" not in k[1]])
def test_the_kernel_is_the_definition(op: str, name: str) -> None:
    given = CASES[op, name]
    found, plain = result(FUSED[op], given), result(PLAIN[op], given)
    assert found.keys() == plain.keys() and {value.dtype for value in found.values()} == {
        torch.float32
    }
    compared(op, given, found, plain)


# The interpreter cuts a result off where it is stored as bf16, and does not round it.
@pytest.mark.parametrize(
    ("op", "name", "kind"),
    [
        *(("gelu", "2 x 9 x 2 of 16 to 130", kind) for kind in HALF),
        *(("heads", "3 x 11, 2 heads of 66", kind) for kind in HALF),
        ("joined", "scaled 5 x 3, 16 to 192", torch.float16),
        ("dwconv", "3 of 7 x 7 x 40", torch.float16),
    ],
)
def test_under_autocast_it_errs_as_little_as_torch(op: str, name: str, kind: torch.dtype) -> None:
    given = CASES[op, name]
    with torch.autocast("cpu", kind):
        found, plain = result(FUSED[op], given), result(PLAIN[op], given)
    compared(op, given, found, plain)


@pytest.mark.parametrize("num", [1, 33, 40])
def test_rows_that_many_programs_share(num: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes several; the last ones find fewer."""
    monkeypatch.setattr(gelu, "PROGRAMS", 6)
    monkeypatch.setattr(gelu, "ELEMENTS", 128)
    random = torch.Generator().manual_seed(num)
    x, weight = torch.randn(num, 3, 4, generator=random), torch.randn(210, 4, generator=random)
    given = {"x": x, "weight": weight, "bias": torch.randn(210, generator=random)}
    maps = given | {"x": torch.randn(num, 6, 4, generator=random), "size": (3, 2)}
    maps["conv_weight"] = torch.randn(210, 1, 3, 3, generator=random)
    maps["conv_bias"] = given["bias"] / 2
    tokens = {"x": torch.randn(num, 3, 210, generator=random), "branch": given["x"]}
    tokens |= {"norm_weight": given["bias"] + 1, "norm_bias": given["bias"]}
    asked: dict[str, dict[str, Any]] = {
        "gelu": given, "heads": {**given, "heads": 2}, "joined": given | tokens, "dwconv": maps
    }  # fmt: skip
    monkeypatch.setattr(dwconv, "PROGRAMS", 6)
    monkeypatch.setattr(add_norm, "PROGRAMS", 6)
    for op, arguments in asked.items():
        compared(op, arguments, result(FUSED[op], arguments), result(PLAIN[op], arguments))


@pytest.mark.parametrize("name", [name for op, name in CASES if op == "performer"])
def test_tokens_of_a_crop_that_many_programs_share(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two blocks each, the last ones fewer."""
    monkeypatch.setattr(performer, "SPAN", 64)
    monkeypatch.setattr(performer, "NEAR", 64)
    given = CASES["performer", name]
    found, plain = result(performer.fused, given), result(performer.reference, given)
    compared("performer", given, found, plain)


def test_what_does_not_lie_together_or_is_not_asked_for() -> None:
    """Gradients in another order, as attention may give them; and of one of three."""
    given = CASES["heads", "2 x 7, 3 heads of 5"]
    found = []
    for work in (heads.fused, heads.reference):
        leaves = {k: given[k].clone().requires_grad_() for k in ("x", "weight", "bias")}
        q, k, v = work(**given | leaves)
        (q.mT.contiguous().mT.square() + (k * 2).transpose(0, 2).sum() * 1e-3).sum().backward()
        assert v.requires_grad
        found.append([leaf.grad for leaf in leaves.values()])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("asked", [0, 1])
def test_values_or_what_queries_find_alone(asked: int) -> None:
    """The other one's gradient is none; a token block asks for both."""
    given = CASES["performer", "2 x 65, 20 wide, 17 features"]

    def alone(work: Any) -> Any:
        return lambda **arguments: work(**arguments)[asked]

    found, plain = (result(alone(work), given) for work in (performer.fused, performer.reference))
    doubles = {key: value.double() for key, value in given.items()}
    for key, value in result(alone(performer.reference), doubles).items():
        worst = 1.5 * float((plain[key] - value).abs().max()) + 1e-6 * float(value.abs().max())
        assert float((found[key] - value).abs().max()) <= worst, key


def test_convolutions_are_timms() -> None:
    """A whole hidden layer of PVTv2, by its own module."""
    mlp: Any = MlpWithDepthwiseConv(6, 40)
    x, size = torch.randn(2, 35, 6), (5, 7)
    of_layer, conv = (mlp.fc1.weight, mlp.fc1.bias), mlp.dwconv
    made = dwconv.fused(x, *of_layer, conv.weight, conv.bias, size)
    torch.testing.assert_close(mlp.fc2(made), mlp(x, size))
    said = fed_among_neighbours(mlp, x, size).whole()
    torch.testing.assert_close(said, mlp(x, size), rtol=0, atol=0)


@pytest.mark.parametrize("op", MODULES)
def test_no_rows(op: str) -> None:
    name = next(name for kind, name in CASES if kind == op)
    given = CASES[op, name]
    none = {key: given[key][:0] for key in ("x", "branch") if key in given}
    found = result(FUSED[op], given | none)
    assert not found["d bias"].any() and not found["d weight"].any()
    assert found["d x"].shape == given["x"][:0].shape
