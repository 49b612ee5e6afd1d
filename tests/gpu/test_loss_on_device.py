"""The fused loss where it runs: bf16 products, aliased storage, graphs, more than 2**31 logits."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from loss_truth import Result, errors, result, truth, worst_row
from torch import Tensor

from fastidmm.kernels import instance_loss as public
from fastidmm.kernels import instance_loss_fused as fused
from fastidmm.kernels import instance_loss_logits as logits_path
from fastidmm.kernels import instance_loss_rows as row_kernels
from fastidmm.kernels import instance_loss_stream as stream

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
CASES = dict(public.cases())
SHAPES = [(64, 2040, 192), (96, 10_000, 384), (33, 20_001, 768), (17, 102, 192)]  # B, N, D


def loss(**case: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The public function's answer as a tuple."""
    total, stats = public.instance_loss(**case, return_stats=True)
    return total, stats.hits, stats.lse


def plain(**case: Any) -> tuple[Tensor, Tensor, Tensor]:
    """What a training step would do otherwise: a linear layer and cross-entropy to soft targets."""
    z, weight, bias = case["z"], case["weight"], case.get("bias")
    logits = torch.nn.functional.linear(z, weight, None if bias is None else bias.to(z.dtype))
    num, smoothing = weight.shape[0], case.get("smoothing", 0.1)
    target = torch.full(logits.shape, smoothing / num, device=z.device)
    lam = case["lam"][:, None] * (1 - smoothing)
    target.scatter_add_(1, case["rows"][:, None], lam)
    target.scatter_add_(1, case["partner"][:, None], 1 - smoothing - lam)
    losses = torch.nn.functional.cross_entropy(logits.float(), target, reduction="none")
    total = (losses * case["row_weight"]).sum()
    hits = logits.argmax(1) == case["rows"]
    return total, hits.detach(), logits.detach().float().logsumexp(1)


def made(shape: tuple[int, int, int], largest: float = 5.0) -> dict[str, Any]:
    """A batch of bf16 operands whose logits reach about `largest`."""
    batch, num, width = shape
    random = torch.Generator("cuda").manual_seed(0)
    z = torch.randn(batch, width, generator=random, device="cuda")
    weight = torch.randn(num, width, generator=random, device="cuda")
    scale = largest / float((z @ weight.T).abs().max())
    rows, partner = torch.randint(num, (2, batch), generator=random, device="cuda")
    return {
        "z": (z * scale).bfloat16(), "weight": weight.bfloat16(), "rows": rows, "partner": partner,
        "lam": torch.rand(batch, generator=random, device="cuda"),
        "bias": torch.randn(num, generator=random, device="cuda") * 0.1,
        "row_weight": torch.rand(batch, generator=random, device="cuda") / batch,
    }  # fmt: skip


@pytest.fixture
def without_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything path F can serve takes it."""
    monkeypatch.setattr(fused, "LOGITS_BYTES", 0)


def no_worse(found: Result, usual: Result, true: Result) -> None:
    """No part further from the truth than 1.5 times the plain version's."""
    ours, theirs = errors(found, true), errors(usual, true)
    assert ours.pop("hits") <= 1.5 * theirs.pop("hits") + 1
    assert {k: (v, theirs[k]) for k, v in ours.items() if not v <= 1.5 * theirs[k] + 2e-6} == {}


@pytest.mark.parametrize("largest", [5.0, 20.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_path_m_is_no_worse_than_plain_bf16(shape: tuple[int, int, int], largest: float) -> None:
    case = made(shape, largest)
    no_worse(result(loss, case), result(plain, case), truth(**case))


@pytest.mark.usefixtures("without_logits")
@pytest.mark.parametrize("largest", [5.0, 20.0])
@pytest.mark.parametrize("width", sorted(stream.CHUNKS))
def test_path_f_is_no_worse_than_plain_bf16(width: int, largest: float) -> None:
    case = made((200, 5003, width), largest)
    if stream.tiles_of(case["z"].device, width) is None:
        pytest.skip("not served on this GPU")
    no_worse(result(loss, case), result(plain, case), truth(**case))


@pytest.fixture
def without_tensor_floats() -> Iterator[None]:
    """Products of fp32 in full; pytest's own patches cannot put this switch back."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.usefixtures("without_tensor_floats")
@pytest.mark.parametrize("name", CASES)
def test_fp32_without_tensor_floats(name: str) -> None:
    case: dict[str, Any] = {
        k: v.cuda() if isinstance(v, Tensor) else v for k, v in CASES[name].items()
    }
    gaps = errors(result(loss, case), truth(**case))
    limits = {"loss": 2e-6, "lse": 1e-6, "hits": 0, "worst row": 1e-3}
    assert {k: v for k, v in gaps.items() if not v <= limits.get(k, 2e-5)} == {}


def test_long_rows_alias_safely(monkeypatch: pytest.MonkeyPatch) -> None:
    """Written over in blocks by several warps: the same as a row held in registers, every time."""
    case = made((512, 10_000, 192))
    once = result(loss, case)
    monkeypatch.setattr(row_kernels, "ONE_PASS", 0)
    for block in (256, 4096):
        monkeypatch.setattr(row_kernels, "LONG_BLOCK", block)
        for _ in range(20):
            again = result(loss, case)
            assert float((again.z - once.z).norm() / once.z.norm()) < 1e-3
            assert worst_row(again.weight, once.weight.double()) < 1e-2


@pytest.mark.parametrize("largest", [5.0, 20.0, 30.0])
def test_d_logits_of_large_logits(largest: float) -> None:
    """At |logit| of 20 bf16 logits would be off by 1e-2; what is rounded is P - T alone."""
    case = made((64, 10_000, 384), largest)
    left, right = case["z"], fused.operand(case["weight"], torch.bfloat16)
    targets = (case["rows"], case["partner"], case["lam"], case["row_weight"])
    with torch.no_grad():
        given = (left, case["weight"], case["bias"], left, right, *targets, 0.1, True)
        found = logits_path.forward(*given)[3][:, :10_000].double()
    eye = torch.eye(64, device="cuda", dtype=torch.float64)
    logits = left.double() @ case["weight"].double().T + case["bias"].double()
    # With the unit matrix for z, the weight's gradient is the d-logits, transposed.
    logit_case = case | {"z": eye, "weight": logits.T, "bias": None}
    true = truth(**logit_case).weight.T
    assert float((found - true).norm() / true.norm()) <= 2e-3
    assert right.shape[0] > 10_000 or not found[:, 10_000:].any()


# With logits in memory, and without.
both_paths = pytest.mark.parametrize("budget", [fused.LOGITS_BYTES, 0], ids=["stored", "streamed"])


@both_paths
def test_two_runs_are_equal_to_the_bit(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "LOGITS_BYTES", budget)
    case = made((300, 20_001, 192))
    first, second = result(loss, case), result(loss, case)
    for one, other in zip(first, second, strict=True):
        assert one is not None and other is not None and one.equal(other)


@both_paths
def test_a_captured_graph_gives_what_eager_gives(
    budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Capture fails at the first wait for the host; a replay sees new inputs."""
    monkeypatch.setattr(fused, "LOGITS_BYTES", budget)
    still = {k: v.clone() for k, v in made((256, 2040, 192)).items()}
    leaves = [still[n].requires_grad_() for n in ("z", "weight", "bias")]

    def step() -> tuple[Tensor, ...]:
        total, hits, lse = loss(**still)
        return total.detach(), hits, lse, *torch.autograd.grad(total, leaves)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        still["z"].mul_(0.5)
        still["rows"].copy_(still["rows"].flip(0))
    graph.replay()
    torch.cuda.synchronize()
    replayed = [t.clone() for t in captured]
    for one, other in zip(replayed, step(), strict=True):
        assert one.equal(other)


def test_nothing_waits_for_the_host() -> None:
    case = made((256, 2040, 192))
    result(loss, case)
    try:
        torch.cuda.set_sync_debug_mode("error")
        result(loss, case)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_compiled_is_eager() -> None:
    case = made((256, 2040, 192))
    compiled = torch.compile(loss, fullgraph=True)
    for one, other in zip(result(compiled, case), result(loss, case), strict=True):
        assert one is not None and other is not None
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-5)


@both_paths
def test_opcheck(budget: int) -> None:
    case = made((32, 2040, 192))
    z, weight, bias = (case[n].requires_grad_() for n in ("z", "weight", "bias"))
    targets = (case["rows"], case["partner"], case["lam"], case["row_weight"])
    if budget:
        right = fused.operand(weight.detach(), torch.bfloat16)
        torch.library.opcheck(
            logits_path.forward, (z, weight, bias, z.detach(), right, *targets, 0.1, True)
        )
    else:
        operands = z.detach(), weight.detach()
        torch.library.opcheck(stream.forward, (z, weight, bias, *operands, *targets, 0.1))


@both_paths
def test_rows_out_of_range_make_the_loss_nan(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "LOGITS_BYTES", budget)
    case = made((64, 2040, 192))
    for wrong in (-1, 2040, 2047, 2**32, -(2**63)):
        for name in ("rows", "partner"):
            numbers = case[name].clone()
            numbers[5] = wrong
            assert loss(**(case | {name: numbers}))[0].isnan()
    torch.cuda.synchronize()


def test_more_than_2_to_the_31_logits() -> None:
    """The last rows lie beyond what 32 bits count; path M with d-logits, path F, parts agree."""
    batch, num, width = 17_000, 131_072, 192
    assert batch * num > 2**31
    if torch.cuda.mem_get_info()[0] < 30 << 30:
        pytest.skip("needs 30 GiB")
    case = made((batch, num, width)) | {"row_weight": None}
    few = slice(batch - 40, batch)
    small = {k: v[few] if k in ("z", "rows", "partner", "lam") else v for k, v in case.items()}
    true = truth(**small)
    found: list[Result] = []
    patch = pytest.MonkeyPatch()
    for budget, tiles in ((1 << 40, stream.TILES), (0, stream.TILES), (0, {})):
        patch.setattr(fused, "LOGITS_BYTES", budget)
        patch.setattr(stream, "TILES", tiles)
        found.append(result(loss, case))
    patch.undo()
    for one in found:
        torch.testing.assert_close(one.lse[few].double(), true.lse, rtol=1e-5, atol=1e-5)
        gap = (one.z[few].double() * batch / 40 - true.z).norm() / true.z.norm()
        assert float(gap) < 1e-2
        assert worst_row(one.weight, found[0].weight.double()) < 3e-2


@pytest.mark.parametrize(
    ("batch", "num", "width"),
    [(300, 8191, width) for width in sorted(stream.CHUNKS)] + [(1, 500, 192), (129, 2, 192)],
)
def test_path_f_is_path_m(
    batch: int, num: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = made((batch, num, width))
    if stream.tiles_of(case["z"].device, width) is None:
        pytest.skip("not served on this GPU")
    with_logits = result(loss, case)
    monkeypatch.setattr(fused, "LOGITS_BYTES", 0)
    without = result(loss, case)
    torch.testing.assert_close(without.loss, with_logits.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(without.lse, with_logits.lse, rtol=1e-5, atol=1e-5)
    assert without.hits.equal(with_logits.hits)
    assert float((without.z - with_logits.z).norm() / with_logits.z.norm()) < 6e-3
    assert worst_row(without.weight, with_logits.weight.double()) < 3e-2
    assert without.bias is not None and with_logits.bias is not None
    assert float((without.bias - with_logits.bias).norm() / with_logits.bias.norm()) < 4e-3


@pytest.mark.usefixtures("without_logits")
def test_path_f_needs_little_memory() -> None:
    """Beyond inputs, the bf16 weight and the gradients: under 256 MiB, as logits are 3.9 GiB."""
    batch, num, width = 1536, 640_000, 192
    if torch.cuda.mem_get_info()[0] < 16 << 30:
        pytest.skip("needs 16 GiB")
    case = made((8, 512, width)) | {"row_weight": None, "bias": None}
    case["z"] = torch.randn(batch, width, device="cuda").bfloat16().requires_grad_()
    case["weight"] = torch.randn(num, width, device="cuda").requires_grad_()
    case["rows"] = case["partner"] = torch.randint(num, (batch,), device="cuda")
    case["lam"] = torch.rand(batch, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.autocast("cuda", torch.bfloat16):
        total = loss(**case)[0]
    total.backward()
    owed = 2 * num * width + 4 * num * width + 2 * batch * width
    assert torch.cuda.max_memory_allocated() - before - owed < 256 << 20
