"""The instance loss beside its peers: time, memory and gradient error of forward and backward.

    fastidmm bench loss [--json FILE]

All arms compute the same loss: two-hot targets of one kept share, smoothing over all N, the mean
over the crops, no bias (two peers have none), gradients for fp32 weights under bf16 autocast. They
take turns within every round, on a GPU with the L2 cache emptied before each. `floor` is the three
products alone: fp32 logits, bf16 d-logits, fp32 dW. A peer that is not installed or fails says so.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from fastidmm.bench.figures import Rows, measured, result
from fastidmm.capture import CudaGraph
from fastidmm.kernels.instance_loss import instance_loss
from fastidmm.machine import name_of

SHAPES = [(1536, 2040, 192), (6144, 10_000, 384), (1536, 1_281_167, 192)]  # B, N, D
SMALL = [(96, 500, 192), (64, 2040, 192)]  # where there is no GPU
KEPT, SMOOTHING = 0.7, 0.1
CHECKED = 64  # rows whose gradients are compared with float64


class Case(NamedTuple):
    """One batch: z and weight are the leaves."""

    z: Tensor
    weight: Tensor
    rows: Tensor
    partner: Tensor

    def part(self, num: int) -> "Case":
        """The first rows alone, with leaves of their own."""
        z, weight = self.z.detach()[:num], self.weight.detach()
        leaves = z.clone().requires_grad_(), weight.requires_grad_()
        return Case(*leaves, self.rows[:num], self.partner[:num])


Arm = Callable[[Case], Tensor]


def ours(case: Case) -> Tensor:
    """The public function."""
    lam = torch.full((), KEPT, device=case.z.device).expand(len(case.rows))
    return instance_loss(*case, lam, smoothing=SMOOTHING)


def soft_target(case: Case) -> Tensor:
    """Eager: a dense target matrix and torch's cross-entropy."""
    num = case.weight.shape[0]
    target = torch.full((len(case.rows), num), SMOOTHING / num, device=case.z.device)
    for rows, share in ((case.rows, KEPT), (case.partner, 1 - KEPT)):
        part = torch.full_like(rows, share * (1 - SMOOTHING), dtype=torch.float32)
        target.scatter_add_(1, rows[:, None], part[:, None])
    return cross_entropy(linear(case.z, case.weight).float(), target)


def smoothed_twice(case: Case) -> Tensor:
    """Eager: torch's smoothed cross-entropy to either target."""
    logits = linear(case.z, case.weight).float()
    own = cross_entropy(logits, case.rows, label_smoothing=SMOOTHING)
    pasted = cross_entropy(logits, case.partner, label_smoothing=SMOOTHING)
    return KEPT * own + (1 - KEPT) * pasted


def closed_form(case: Case) -> Tensor:
    """What one would write for torch.compile."""
    logits = linear(case.z, case.weight).float()
    own = logits.gather(1, case.rows[:, None])[:, 0]
    pasted = logits.gather(1, case.partner[:, None])[:, 0]
    hard = KEPT * own + (1 - KEPT) * pasted
    soft = logits.mean(dim=1)
    losses: Tensor = logits.logsumexp(dim=1) - (1 - SMOOTHING) * hard - SMOOTHING * soft
    return losses.mean()


def compiled_form() -> Arm:
    """For the shapes it meets, each by itself: what it compiled for others would be for any."""
    torch._dynamo.reset()
    return torch.compile(closed_form, dynamic=False)


def liger() -> Arm:
    """liger-kernel's fused linear cross-entropy to either target, the batch as one chunk.

    Its default chunks are a few rows where N is much larger than D.
    """
    module = import_module("liger_kernel.ops.fused_linear_cross_entropy")
    function = module.LigerFusedLinearCrossEntropyFunction.apply
    defaults = signature(module.LigerFusedLinearCrossEntropyFunction.forward).parameters
    optional = list(defaults)[4:]  # after the context, the input, the weight and the target
    given = {"label_smoothing": SMOOTHING, "accum_dtype": torch.float32}

    def arm(case: Case) -> Tensor:
        z, weight = (t.to(operand(case)) for t in case[:2])
        chosen = given | {"chunk_mem_const": -(-len(weight) // z.shape[1])}

        def loss(rows: Tensor) -> Any:
            rest = [chosen.get(n, defaults[n].default) for n in optional]
            answer = function(z, weight, rows, *rest)
            return answer[0] if isinstance(answer, tuple) else answer

        found: Tensor = KEPT * loss(case.rows) + (1 - KEPT) * loss(case.partner)
        return found

    return arm


def cut() -> Arm:
    """cut-cross-entropy without its gradient filter, which would drop the smoothed targets.

    Its answer gives the log-sum-exp, and that the loss.
    """
    function = import_module("cut_cross_entropy").linear_cross_entropy

    def arm(case: Case) -> Tensor:
        z, weight = (t.to(operand(case)) for t in case[:2])
        nll = function(z, weight, case.rows, reduction="none", filter_eps=None)
        own = (z * weight[case.rows]).sum(dim=1, dtype=torch.float32)
        pasted = (z * weight[case.partner]).sum(dim=1, dtype=torch.float32)
        soft = (z.float() @ weight.sum(dim=0, dtype=torch.float32)) / weight.shape[0]
        hard = KEPT * own + (1 - KEPT) * pasted
        found: Tensor = (nll + own - (1 - SMOOTHING) * hard - SMOOTHING * soft).mean()
        return found

    return arm


def arms(device: torch.device) -> Iterator[tuple[str, Callable[[], Arm]]]:
    """Names, and what makes each arm: it may fail."""
    yield "fastidmm", lambda: ours
    yield "eager, soft target", lambda: soft_target
    yield "eager, smoothed twice", lambda: smoothed_twice
    if device.type == "cuda":
        yield "torch.compile, closed form", compiled_form
        yield "liger-kernel", liger
        yield "cut-cross-entropy", cut


def operand(case: Case) -> torch.dtype:
    """What the products take: bf16 on a GPU."""
    return torch.bfloat16 if case.z.is_cuda else torch.float32


def autocast(case: Case) -> AbstractContextManager[Any]:
    """As in a training step."""
    return torch.autocast("cuda", torch.bfloat16) if case.z.is_cuda else nullcontext()


def once(arm: Arm, case: Case) -> None:
    """Forward and backward from no gradients."""
    case.z.grad = case.weight.grad = None
    with autocast(case):
        loss = arm(case)
    loss.backward()


def floor(case: Case) -> Callable[[], None]:
    """The three products without anything else, operands given."""
    z, weight = (t.detach().to(operand(case)) for t in case[:2])
    wide: dict[str, Any] = {"out_dtype": torch.float32} if case.z.is_cuda else {}
    d_logits = torch.zeros(len(z), len(weight), dtype=z.dtype, device=z.device)

    def work() -> None:
        torch.mm(z, weight.T, **wide)
        torch.mm(d_logits, weight)
        torch.mm(d_logits.T, z, **wide)

    return work


def made(shape: tuple[int, int, int], device: torch.device) -> Case:
    """A batch whose logits spread by about 4."""
    batch, num, width = shape
    random = torch.Generator(device).manual_seed(0)
    z = torch.randn(batch, width, generator=random, device=device)
    weight = torch.randn(num, width, generator=random, device=device).mul_(4 / width**0.5)
    rows, partner = torch.randint(num, (2, batch), generator=random, device=device)
    return Case(z.requires_grad_(), weight.requires_grad_(), rows, partner)


def gradient_error(arm: Arm, case: Case) -> dict[str, float]:
    """Relative error of dz and dW on the first rows, against float64."""
    part = case.part(CHECKED)
    once(arm, part)
    z, weight = part.z.detach().double(), part.weight.detach()
    d_logits = torch.cat([z @ w.double().T for w in weight.split(1 << 16)], dim=1).softmax(dim=1)
    d_logits -= SMOOTHING / len(weight)
    at = torch.arange(len(z), device=z.device)
    for rows, share in ((part.rows, KEPT), (part.partner, 1 - KEPT)):
        d_logits[at, rows] -= share * (1 - SMOOTHING)
    d_logits /= len(z)
    true_z, gap, size = torch.zeros_like(z), z.new_zeros(()), z.new_zeros(())
    assert part.z.grad is not None and part.weight.grad is not None
    pieces = (t.split(1 << 16) for t in (d_logits.T, weight, part.weight.grad))
    for g, w, found in zip(*pieces, strict=True):
        true = g @ z
        true_z += g.T @ w.double()
        gap, size = gap + (found - true).square().sum(), size + true.square().sum()
    error = (part.z.grad - true_z).norm() / true_z.norm()
    return {"error_z": error.item(), "error_weight": (gap / size).sqrt().item()}


def graphed(work: Callable[[], None]) -> Callable[[], None] | None:
    """The work as one CUDA graph, as training runs it; `None` where it cannot be captured."""
    graph = CudaGraph(torch.cuda.graph_pool_handle())
    try:
        graph.record(work)
    except Exception:  # a wait for the host, or no memory for the graph's own pool
        torch.cuda.synchronize()
        return None
    return graph.replay


def milliseconds(work: Callable[[], None], cache: Tensor | None) -> float:
    """One call: between events on a GPU, its L2 emptied; on the clock otherwise."""
    if cache is None:
        began = time.perf_counter()
        work()
        return (time.perf_counter() - began) * 1e3
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    cache.zero_()
    start.record()
    work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def rows_at(shape: tuple[int, int, int], device: torch.device, rounds: int) -> Rows:
    """Every arm at one shape."""
    case = made(shape, device)
    cache = torch.empty(256 << 20, dtype=torch.uint8, device=device) if case.z.is_cuda else None
    # Every graph keeps its own memory; where the work takes milliseconds it would gain nothing.
    small = shape[0] * shape[1] < 1 << 28
    rows: Rows = {}
    calls: dict[str, dict[str, Callable[[], None]]] = {}
    for name, make in arms(device):
        try:
            arm = make()
            errors = gradient_error(arm, case)
            calls[name] = {"eager": lambda arm=arm: once(arm, case)}  # type: ignore[misc]
            rows[name] = errors | prepared(calls[name], small)
        except Exception as problem:  # not installed, no memory: the others are worth having
            rows[name] = {"status": status(problem)}
            calls.pop(name, None)
    calls["floor"] = {"eager": floor(case)}
    rows["floor"] = prepared(calls["floor"], small)
    times: dict[tuple[str, str], list[float]] = {}
    for _ in range(rounds):
        for name, ways in calls.items():
            for way, work in ways.items():
                times.setdefault((name, way), []).append(milliseconds(work, cache))
    for name in calls:
        eager = measured(times[name, "eager"])
        # Training replays graphs.
        best = measured(times[name, "graph"]) if (name, "graph") in times else eager
        spent = {"milliseconds": best, "eager_milliseconds": eager}
        rows[name] = {"status": "ok", **spent, **rows[name]}
    return rows


def status(problem: Exception) -> str:
    """Why an arm has no figures."""
    if isinstance(problem, ImportError):
        return f"missing: {problem}: pip install 'fastidmm[bench]'"
    return f"failed: {type(problem).__name__}: {problem}".splitlines()[0][:200]


def prepared(ways: dict[str, Callable[[], None]], small: bool) -> dict[str, float]:
    """Warms the work up, notes its peak memory beyond what was there, adds a small one's graph."""
    work = ways["eager"]
    for _ in range(3):
        work()
    if not torch.cuda.is_available():
        return {}
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    peak = torch.cuda.max_memory_allocated() - before
    captured = graphed(work) if small else None
    if captured is not None:
        ways["graph"] = captured
    return {"gpu_mb": peak / 1e6}


def measure(
    device: torch.device,
    *,
    quick: bool = False,
    rounds: int | None = None,
    shapes: list[tuple[int, int, int]] | None = None,
) -> dict[str, Any]:
    """Every arm at every shape; on a CPU small ones."""
    rounds = rounds or (10 if quick else 50)
    chosen = shapes or (SHAPES if device.type == "cuda" else SMALL)
    tables = {
        f"B = {b}, N = {n}, D = {d}": rows_at((b, n, d), device, rounds) for b, n, d in chosen
    }
    about = f"forward and backward on {name_of(device)}, bf16 autocast on a GPU"
    return result("loss", about, tables, settings={"rounds": rounds, "shapes": chosen})
