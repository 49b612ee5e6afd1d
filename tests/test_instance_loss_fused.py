"""The fused instance loss, its kernels interpreted, against explicit targets in float64."""

import importlib
import math
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_truth import Result, errors, result, truth
from torch import Tensor

from fastidmm.kernels import instance_loss as public
from fastidmm.kernels import instance_loss_fused as fused
from fastidmm.kernels import instance_loss_logits as logits_path
from fastidmm.kernels import instance_loss_rows as row_kernels

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="interprets kernels: tests/gpu runs them"
)
CASES = dict(public.cases())
EXACT = {
    "loss": 2e-6, "lse": 1e-6, "hits": 0, "z": 2e-5, "weight": 2e-5, "bias": 2e-5, "worst row": 1e-3
}  # fmt: skip
# d-logits of 8 bits, which the interpreter cuts off where a GPU rounds; the rest is fp32.
NARROW = EXACT | {"z": 8e-3, "weight": 8e-3, "bias": 8e-3, "worst row": 1e-2}


def loss(
    z: Tensor,
    weight: Tensor,
    rows: Tensor,
    partner: Tensor | None = None,
    lam: Tensor | None = None,
    bias: Tensor | None = None,
    smoothing: float = 0.1,
    row_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`fused` with the public function's defaults."""
    return fused.fused(z, weight, rows, partner, lam, bias, smoothing, row_weight)


def reference(**case: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The CPU path's answer in the same form."""
    total, stats = public.instance_loss(**case, return_stats=True)
    return total, stats.hits, stats.lse


def within(found: Result, true: Result, limits: dict[str, float] = EXACT) -> None:
    """Every part of the result is as near to the truth as `limits` says."""
    gaps = errors(found, true)
    assert {k: v for k, v in gaps.items() if not v <= limits[k]} == {}


def narrow(case: dict[str, Any]) -> dict[str, Any]:
    """The case with z and weight in bf16."""
    return case | {n: case[n].bfloat16() for n in ("z", "weight")}


@pytest.fixture
def long_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row of over 64 logits is read twice, in blocks of 64."""
    monkeypatch.setattr(row_kernels, "ONE_PASS", 64)
    monkeypatch.setattr(row_kernels, "LONG_BLOCK", 64)


@pytest.mark.parametrize("name", CASES)
def test_fp32(name: str) -> None:
    within(result(loss, CASES[name]), truth(**CASES[name]))


@pytest.mark.parametrize("name", [n for n in CASES if n.split()[0] in ("full", "plain", "wide")])
def test_bf16(name: str) -> None:
    case = narrow(CASES[name])
    within(result(loss, case), truth(**case), NARROW)


@pytest.mark.usefixtures("long_rows")
@pytest.mark.parametrize("name", [n for n in CASES if n.endswith("257")])
def test_long_rows(name: str) -> None:
    within(result(loss, CASES[name]), truth(**CASES[name]))
    within(result(loss, narrow(CASES[name])), truth(**narrow(CASES[name])), NARROW)


@pytest.mark.parametrize("scale", [1.0, -3.0])
def test_parts_give_what_the_whole_gives(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["full 6 x 16 x 63"]
    monkeypatch.setattr(fused, "LOGITS_BYTES", 0)
    monkeypatch.setattr(logits_path, "PART_ROWS", 5)
    monkeypatch.setattr(logits_path, "PART_BYTES", 0)
    assert len(logits_path.parts_of(case["z"], 64)) == 2
    within(result(loss, case, scale), truth(**case))


sizes = st.tuples(
    st.sampled_from([1, 2, 3, 5, 9]),
    st.sampled_from([1, 7, 16, 48, 65]),
    st.sampled_from([1, 2, 3, 15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 256, 257]),
)


@st.composite
def drawn(draw: st.DrawFn) -> dict[str, Any]:
    """Any sizes, strides, integers, shares and weights."""
    batch, width, num = draw(sizes)
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from([0.0, 0.1, 1.0, 30.0]))
    wide = torch.randn(batch, 2 * width, generator=random) * scale
    weight = torch.randn(width, num, generator=random) / width**0.5
    kind = draw(st.sampled_from([torch.int32, torch.int64]))
    # From the second number on: not aligned to 16 bytes.
    rows = torch.randint(num, (batch + 1,), generator=random).to(kind)[1:]
    case: dict[str, Any] = {
        "z": wide[:, ::2] if draw(st.booleans()) else wide[:, width:],
        "weight": weight.T if draw(st.booleans()) else weight.T.contiguous(),
        "rows": rows,
        "smoothing": draw(st.sampled_from([0.0, 1e-3, 0.1, 1.0])),
    }
    if draw(st.booleans()):
        case["bias"] = torch.randn(num, generator=random)
    if draw(st.booleans()):
        partner = torch.randint(num, (batch,), generator=random).to(kind)
        case["partner"] = rows if draw(st.booleans()) else partner
        lam = draw(st.sampled_from([0.0, 0.5, 1.0, None]))
        some = torch.rand(batch, generator=random)
        case["lam"] = some if lam is None else torch.tensor([lam]).expand(batch)
    if draw(st.booleans()):
        case["row_weight"] = torch.randn(batch, generator=random).double()
    return case


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(drawn())
def test_anything_drawn(case: dict[str, Any]) -> None:
    within(result(loss, case), truth(**case))


def test_autocast_multiplies_in_bf16_and_keeps_types() -> None:
    """fp32 z and weight are rounded to bf16 for the products, and only there."""
    case = CASES["full 6 x 16 x 63"]
    rounded = case | {n: case[n].bfloat16().float() for n in ("z", "weight")}
    with torch.autocast("cpu", torch.bfloat16):
        found = result(loss, case)
    within(found, truth(**rounded), NARROW)
    assert errors(found, truth(**case))["lse"] > 1e-5  # it did round
    with torch.autocast("cpu", torch.float16):
        assert fused.type_of(case["z"], case["weight"]) == torch.float32
    mixed = case | {"weight": case["weight"].bfloat16()}
    within(result(loss, mixed), truth(**mixed), EXACT | {"weight": 4e-3, "worst row": 1e-2})


@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize("wrong", [-1, 63, 68, 2**32, -(2**63)])
def test_a_row_out_of_range_makes_the_loss_nan(
    wrong: int, long: bool, request: pytest.FixtureRequest
) -> None:
    if long:
        request.getfixturevalue("long_rows")
    case = CASES["full 6 x 16 x 63"]
    for name in ("rows", "partner"):
        numbers = case[name].clone()
        numbers[3] = wrong
        found = result(loss, case | {name: numbers})
        assert found.loss.isnan() and found.weight.isnan().all()
        assert found.lse.isnan().tolist() == [b == 3 for b in range(6)]
        assert found.z.isnan().any(dim=1).tolist() == [b == 3 for b in range(6)]


def test_debug_says_which_row_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["mixed 6 x 16 x 63"]
    monkeypatch.setattr(public, "DEBUG", True)
    assert public.instance_loss(**case).isfinite()
    for name, wrong, said in (
        ("rows", 63, r"rows from \d+ to 63"),
        ("partner", -1, "partner from -1"),
    ):
        numbers = case[name].clone()
        numbers[5] = wrong
        with pytest.raises(IndexError, match=said + ".*only 0 to 62 exist"):
            public.instance_loss(**(case | {name: numbers}))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the interpreter
@pytest.mark.parametrize("long", [False, True])
def test_nan_and_infinity_travel(long: bool, request: pytest.FixtureRequest) -> None:
    if long:
        request.getfixturevalue("long_rows")
    case = CASES["full 4 x 48 x 257"]
    for bad in (math.nan, math.inf):
        z = case["z"].clone()
        z[2, 7] = bad
        found = result(loss, case | {"z": z})
        assert not found.loss.isfinite() and found.lse[2].isnan()
        assert found.z.isfinite().all(dim=1).tolist() == [b != 2 for b in range(4)]
        assert not found.weight.isfinite().any()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("long", [False, True])
def test_classes_masked_by_an_infinite_bias(long: bool, request: pytest.FixtureRequest) -> None:
    """Without smoothing they leave the loss as if they were not there; with it, it is infinite."""
    if long:
        request.getfixturevalue("long_rows")
    case = CASES["plain 4 x 48 x 257"] | {"bias": torch.zeros(257), "smoothing": 0.0}
    case["rows"] = case["rows"].clamp(min=130)
    masked = case | {"bias": torch.where(torch.arange(257) < 130, -math.inf, 0.0)}
    fewer = case | {"weight": case["weight"][130:], "rows": case["rows"] - 130, "bias": None}
    found, true = result(loss, masked), truth(**fewer)
    torch.testing.assert_close(found.loss.double(), true.loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.weight[130:].double(), true.weight, rtol=1e-4, atol=1e-7)
    assert found.weight[:130].eq(0).all()
    for function in (loss, reference):
        assert function(**(masked | {"smoothing": 0.1}))[0] == math.inf
        all_soft = masked | {"rows": case["rows"] * 0, "smoothing": 0.0}
        assert function(**all_soft)[0] == math.inf


@pytest.mark.parametrize("long", [False, True])
def test_a_large_common_offset_costs_no_digits(long: bool, request: pytest.FixtureRequest) -> None:
    """Even numbers near 2**24 are exact in fp32, and so must be their differences."""
    if long:
        request.getfixturevalue("long_rows")
    steps = torch.arange(200) % 7 * 2.0
    case: dict[str, Any] = {
        "z": torch.zeros(3, 2), "weight": torch.randn(200, 2), "rows": torch.tensor([0, 6, 150]),
        "bias": steps + 2**24,
    }  # fmt: skip
    found = float(loss(**case)[0])
    assert found == pytest.approx(float(truth(**case).loss), rel=1e-5)
    assert found == pytest.approx(float(truth(**(case | {"bias": steps})).loss), rel=1e-5)


def test_one_class_and_equal_logits() -> None:
    for num in (1, 5, 63):
        case = {
            "z": torch.randn(3, 4),
            "weight": torch.zeros(num, 4),
            "rows": torch.arange(3) % num,
        }
        found = result(loss, case)
        assert found.loss.item() == pytest.approx(math.log(num), abs=1e-6)
        # Of equal logits the first is the largest, as argmax has it.
        assert found.hits.tolist() == [b % num == 0 for b in range(3)]
    assert result(loss, CASES["full 1 x 1 x 1"]).weight.abs().max() <= 1e-7


def test_a_batch_of_nothing() -> None:
    case: dict[str, Any] = {
        "z": torch.zeros(0, 4),
        "weight": torch.randn(9, 4),
        "rows": torch.zeros(0, dtype=torch.long),
    }
    for function in (loss, reference):
        weighted = result(function, case | {"row_weight": torch.zeros(0)})
        assert weighted.loss == 0 and weighted.weight.eq(0).all() and weighted.lse.shape == (0,)
        assert function(**case)[0].isnan()  # the mean of nothing, as torch's


def test_pad_columns_are_zero_and_rows_start_at_the_pitch() -> None:
    case = CASES["full 6 x 16 x 63"]
    for kind in (torch.float32, torch.bfloat16):
        left, right = case["z"].to(kind), fused.operand(case["weight"], kind)
        assert right.shape == (64, 16) and right[63].eq(0).all()
        made = logits_path.forward(
            case["z"], case["weight"], None, left, right, case["rows"], None, None, None, 0.1, True
        )
        d_logits = made[3]
        assert d_logits.shape == (6, 64) and d_logits.dtype == kind
        assert d_logits.stride() == (64 * 4 // left.element_size(), 1)
        assert d_logits[:, 63].eq(0).all() and d_logits[:, :63].ne(0).all()
        # The gradient of logits sums to nothing.
        assert d_logits.float().sum(1).abs().max() < (1e-6 if kind == torch.float32 else 1e-3)


def test_offsets_have_64_bits(tmp_path: Path) -> None:
    """Rows 2**29 logits apart in a sparse file, the pointer in its middle.

    Row 4 begins at 2**31; counted in 32 bits it would begin before the pointer, among zeros.
    """
    apart, batch = 2**29, 6
    store = np.memmap(tmp_path / "logits", np.float32, "w+", shape=(10 * apart + 64,))
    logits = torch.from_numpy(store)[4 * apart :].as_strided((batch, 64), (apart, 1))
    values = torch.randn(batch, 64)
    logits.copy_(values)
    losses, lse = torch.empty(2, batch)
    hits = torch.empty(batch, dtype=torch.uint8)
    rows = torch.arange(batch)
    row_kernels.row_kernel[(batch,)](
        logits, logits, None, rows, None, None, None, losses, lse, hits, 1.0, 0.1, 40, apart, apart,
        BLOCK=64, WRITE=True,
    )  # fmt: skip
    torch.testing.assert_close(lse, values[:, :40].logsumexp(1))
    expected = values[:, :40].softmax(1) - 0.1 / 40
    expected[rows, rows] -= 0.9
    torch.testing.assert_close(logits[:, :40], expected)


def test_only_what_is_asked_for_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["full 6 x 16 x 63"]
    true = truth(**case)
    with torch.no_grad():
        without = loss(**case)
    assert without[0].item() == pytest.approx(float(true.loss), rel=1e-5)
    assert without[1].tolist() == true.hits.tolist()
    asked: list[tuple[int, ...]] = []
    real = logits_path.product

    def product(a: Tensor, b: Tensor) -> Tensor:
        asked.append((a.shape[0], b.shape[1]))
        return real(a, b)

    monkeypatch.setattr(logits_path, "product", product)
    for name, backward in (("z", [(6, 16)]), ("weight", [(64, 16)]), ("bias", [])):
        asked.clear()
        leaf = case[name].detach().requires_grad_()
        total = loss(**(case | {name: leaf}))[0]
        first = torch.autograd.grad(total, leaf, retain_graph=True)[0]
        second = torch.autograd.grad(3 * total, leaf)[0]  # the d-logits are as they were
        torch.testing.assert_close(3 * first, second)
        torch.testing.assert_close(first.double(), getattr(true, name), rtol=1e-4, atol=1e-6)
        assert asked == [(6, 64), *backward, *backward]


def test_the_public_function_takes_the_cpu_path_here(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["plain 3 x 7 x 2"]
    expected = truth(**case).loss.float()
    for there in (None, lambda *a: pytest.fail("fused on a CPU")):
        monkeypatch.setattr(public, "fused", there)
        torch.testing.assert_close(public.instance_loss(**case), expected)


def test_it_imports_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n.startswith("fastidmm.kernels.instance_loss")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)
    alone = importlib.import_module("fastidmm.kernels.instance_loss")
    assert alone.fused is None and alone is not public
    assert alone.instance_loss(**CASES["plain 3 x 7 x 2"]).isfinite()
