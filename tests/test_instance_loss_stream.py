"""Path F, its kernels interpreted in fp32 (bf16 products come out wrong there), against float64."""

import os
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_truth import errors, result, truth
from torch import Tensor

from fastidmm.kernels import instance_loss_fused as fused
from fastidmm.kernels import instance_loss_logits as logits_path
from fastidmm.kernels import instance_loss_stream as stream
from fastidmm.kernels.instance_loss import cases

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="interprets kernels: tests/gpu runs them"
)
CASES = dict(cases())
LIMITS = {
    "loss": 2e-6, "lse": 1e-6, "hits": 0, "z": 2e-5, "weight": 5e-5, "bias": 5e-5, "worst row": 1e-3
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def small_blocks() -> Any:
    """Widths 16, 32 and 48 in chunks of 16; blocks of rows and classes that cut across inputs."""
    patch = pytest.MonkeyPatch()
    for width in (16, 32, 48):
        patch.setitem(stream.CHUNKS, width, 16)
    blocks = stream.Tiles(4, 32, 1, 1), stream.Tiles(4, 64, 1, 1)
    patch.setitem(stream.TILES, 0, dict.fromkeys((16, 32, 48), blocks))
    yield
    patch.undo()


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
    """The operator of path F with fp32 operands."""
    operands = z.detach().contiguous(), weight.detach().contiguous()
    made = stream.forward(
        z, weight, bias, *operands, rows, partner, lam, row_weight, float(smoothing)
    )
    return made[0], made[1], made[2]


def within(case: dict[str, Any], scale: float = 1.0) -> None:
    gaps = errors(result(loss, case, scale), truth(**case))
    assert {k: v for k, v in gaps.items() if not v <= LIMITS[k]} == {}


@pytest.mark.parametrize("name", [n for n in CASES if n.endswith("6 x 16 x 63")])
def test_cases(name: str) -> None:
    case = CASES[name]
    within(case | {"lam": case["lam"].contiguous()} if "lam" in case else case, scale=-3.0)


@st.composite
def drawn(draw: st.DrawFn) -> dict[str, Any]:
    """Any sizes, numbers of classes on both sides of a block, shares and weights."""
    batch = draw(st.sampled_from([1, 2, 3, 4, 5, 9]))
    width = draw(st.sampled_from([16, 32, 48]))
    num = draw(st.sampled_from([1, 2, 3, 31, 32, 33, 63, 64, 65, 97, 129]))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    # Of a single class all gradients are zero: what is left is the rounding of its logits.
    scale = draw(st.sampled_from([0.0, 0.1, 1.0, 30.0] if num > 1 else [0.0, 0.1, 1.0]))
    kind = draw(st.sampled_from([torch.int32, torch.int64]))
    rows, partner = torch.randint(num, (2, batch), generator=random).to(kind)
    case: dict[str, Any] = {
        "z": torch.randn(batch, width, generator=random) * scale,
        "weight": torch.randn(num, width, generator=random) / width**0.5,
        "rows": rows,
        "smoothing": draw(st.sampled_from([0.0, 1e-3, 0.1, 1.0])),
    }
    if draw(st.booleans()):
        case["bias"] = torch.randn(num, generator=random)
    if draw(st.booleans()):
        case["partner"] = rows if draw(st.booleans()) else partner
        case["lam"] = torch.rand(batch, generator=random)
    if draw(st.booleans()):
        case["row_weight"] = torch.randn(batch, generator=random)
    return case


@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(drawn())
def test_anything_drawn(case: dict[str, Any]) -> None:
    within(case)


@pytest.mark.parametrize("wrong", [-1, 63, 2**32, -(2**63)])
def test_a_row_out_of_range_makes_the_loss_nan(wrong: int) -> None:
    case = CASES["full 6 x 16 x 63"]
    for name in ("rows", "partner"):
        numbers = case[name].clone()
        numbers[3] = wrong
        found = result(loss, case | {name: numbers})
        assert found.loss.isnan() and found.weight.isnan().all()
        assert found.lse.isnan().tolist() == [b == 3 for b in range(6)]
        assert found.z.isnan().any(dim=1).tolist() == [b == 3 for b in range(6)]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the interpreter
def test_nan_and_infinite_biases() -> None:
    case = CASES["full 6 x 16 x 63"]
    z = case["z"].clone()
    z[2, 7] = float("nan")
    found = result(loss, case | {"z": z})
    assert found.loss.isnan() and found.weight.isnan().all()
    assert found.z.isnan().any(dim=1).tolist() == [b == 2 for b in range(6)]
    # The whole first block masked: without smoothing as if it were not there.
    plain = CASES["plain 6 x 16 x 63"]
    rows = plain["rows"].clamp(min=40)
    bias = torch.where(torch.arange(63) < 40, -torch.inf, 0.0)
    hard = plain | {"rows": rows, "smoothing": 0.0}
    true = truth(**(hard | {"weight": plain["weight"][40:], "rows": rows - 40}))
    found = result(loss, hard | {"bias": bias})
    torch.testing.assert_close(found.loss.double(), true.loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.weight[40:].double(), true.weight, rtol=1e-4, atol=1e-7)
    assert found.weight[:40].eq(0).all()
    assert loss(**(hard | {"bias": bias, "smoothing": 0.1}))[0] == torch.inf


def test_a_large_common_offset_costs_no_digits() -> None:
    steps = torch.arange(200) % 7 * 2.0
    case: dict[str, Any] = {
        "z": torch.zeros(3, 16), "weight": torch.randn(200, 16), "bias": steps + 2**24,
        "rows": torch.tensor([0, 6, 150]),
    }  # fmt: skip
    found = float(loss(**case)[0])
    assert found == pytest.approx(float(truth(**(case | {"bias": steps})).loss), rel=1e-5)


def test_equal_logits_are_a_hit_for_the_first() -> None:
    for num in (1, 33, 97):
        rows = torch.arange(4) % num
        lost = loss(torch.randn(4, 16), torch.zeros(num, 16), rows)
        assert lost[1].tolist() == [b % num == 0 for b in range(4)]


def test_a_batch_of_nothing() -> None:
    empty: dict[str, Any] = {
        "z": torch.zeros(0, 16),
        "weight": torch.randn(9, 16),
        "rows": torch.zeros(0).long(),
    }
    weighted = result(loss, empty | {"row_weight": torch.zeros(0), "bias": torch.zeros(9)})
    assert weighted.loss == 0 and weighted.weight.eq(0).all()
    assert weighted.bias is not None and weighted.bias.eq(0).all()
    assert loss(**empty)[0].isnan()


def test_splits_share_all_classes() -> None:
    for num in (1, 32, 33, 64, 200):
        left, right = torch.zeros(5, 16), torch.zeros(num, 16)
        splits, each = stream.splits_of(left, right, stream.Tiles(8, 32, 1, 1))
        assert each % 32 == 0 and (splits - 1) * each < num <= splits * each
        assert splits == (1 if num <= 32 else 2)


def test_opcheck() -> None:
    case = CASES["full 6 x 16 x 63"]
    z, weight, bias = (case[n].detach().requires_grad_() for n in ("z", "weight", "bias"))
    targets = (case["rows"], case["partner"], case["lam"], case["row_weight"])
    given = (z, weight, bias, z.detach(), weight.detach(), *targets, 0.1)
    torch.library.opcheck(stream.forward, given)
    lse = stream.forward(*given)[2].detach()
    operands = (lse, z.detach(), weight.detach(), bias.detach())
    torch.library.opcheck(stream.backward, (torch.ones(()), *operands, *targets, 0.1))


def test_large_bf16_logits_take_this_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """And only they: fp32, other widths and what fits have logits."""
    taken: list[str] = []
    answer = (torch.zeros(()),) * 4

    def path(name: str) -> Any:
        return lambda *_: (taken.append(name), answer)[1]  # type: ignore[func-returns-value]

    monkeypatch.setattr(stream, "forward", path("stream"))
    monkeypatch.setattr(logits_path, "forward", path("logits"))
    for kind, width, budget in (
        (torch.bfloat16, 32, 0), (torch.float32, 32, 0), (torch.bfloat16, 40, 0),
        (torch.bfloat16, 32, 4 * 3 * 64),
    ):  # fmt: skip
        monkeypatch.setattr(fused, "LOGITS_BYTES", budget)
        z, weight = torch.zeros(3, width, dtype=kind), torch.zeros(63, width, dtype=kind)
        fused.fused(z, weight, torch.arange(3), None, None, None, 0.1, None)
    assert taken == ["stream", "logits", "logits", "logits"]
