"""The fused loss is an operator torch knows: one node when compiled, checked by `opcheck`."""

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from fastidmm.kernels import instance_loss as public
from fastidmm.kernels import instance_loss_fused as fused
from fastidmm.kernels import instance_loss_logits as logits_path

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="interprets kernels: tests/gpu runs them"
)
CASES = dict(public.cases())


def arguments(name: str, kind: torch.dtype, keep: bool) -> tuple[Any, ...]:
    """What the forward operator of path M takes."""
    case = CASES[name]
    z, weight, bias = (case[n].detach().requires_grad_() for n in ("z", "weight", "bias"))
    left, right = z.detach().to(kind), fused.operand(weight.detach(), kind)
    targets = (case["rows"], case["partner"], case["lam"], case["row_weight"])
    return z, weight, bias, left, right, *targets, 0.1, keep


@pytest.mark.parametrize(("kind", "keep"), [(torch.bfloat16, True), (torch.float32, False)])
def test_opcheck_of_path_m(kind: torch.dtype, keep: bool) -> None:
    given = arguments("full 3 x 7 x 2", kind, keep)
    torch.library.opcheck(logits_path.forward, given)
    d_logits = logits_path.forward(*given)[3].detach()
    _, _, bias, left, right, *targets, _ = (
        t.detach() if isinstance(t, Tensor) else t for t in given
    )
    wanted = (True, True, True) if keep else (False, True, False)
    torch.library.opcheck(
        logits_path.backward,
        (torch.ones(()), d_logits, left, right, bias, *targets, 2, *wanted),
    )


def test_compiled_it_is_one_node_and_gives_the_same() -> None:
    case = CASES["full 3 x 7 x 2"]
    given = case | {"smoothing": 0.1}
    names: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        names.extend(str(n.target) for n in graph.graph.nodes if n.op == "call_function")
        return graph

    def loss(z: Tensor, weight: Tensor) -> Tensor:
        return fused.fused(**(given | {"z": z, "weight": weight}))[0]

    leaves = [case[n].detach().requires_grad_() for n in ("z", "weight")]
    plain = loss(*leaves)
    made = torch.compile(loss, backend=backend, fullgraph=True)(*leaves)
    assert made == plain
    for one, other in zip(*(torch.autograd.grad(t, leaves) for t in (made, plain)), strict=True):
        assert one.equal(other)
    assert [n for n in names if "instance_loss" in n] == ["fastidmm.instance_loss_logits.default"]
