"""A step by itself: a batch's gradient however it is cut, its chance, its types, what follows."""

import warnings
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from toy_runs import recipe

from fastidmm.assemble import Parts, assemble, training_rows
from fastidmm.backbones.build import Encoder
from fastidmm.batch import Batch, Loss
from fastidmm.errors import UsageError
from fastidmm.folders import free_folder
from fastidmm.machine import set_up
from fastidmm.methods.idmm import IDMM
from fastidmm.record import Record
from fastidmm.step import backward, step


def parts_of(**changes: Any) -> Parts:
    """A run of 20 images in batches of 8, about to make its first step."""
    asked = recipe(loader="resident", **changes)
    folder = free_folder(Path("runs/run"))
    return assemble(Record.create(folder, asked, training_rows(asked)))


def batch_of(parts: Parts, number: int) -> Batch:
    with closing(parts.loader.batches(number)) as batches:
        return next(batches)


def gradients(parts: Parts) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in parts.method.parameters() if p.grad is not None])


def whole_gradients(parts: Parts, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of a batch in one pass and its gradients, by torch alone."""
    parts.counters.step = batch.step
    loss = parts.method(batch).total
    found = torch.autograd.grad(loss, list(parts.method.parameters()))
    return loss.detach(), torch.cat([each.flatten() for each in found])


@pytest.mark.parametrize("pieces", [2, 5])
@pytest.mark.parametrize("short", [0, 1, 2])
def test_gradients_are_the_batchs_however_often_memory_runs_out(
    toy: str, pieces: int, short: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each time in the second piece, when the first has left its gradients."""
    parts = parts_of(micro_batches=pieces)
    batch = batch_of(parts, 1)
    loss, expected = whole_gradients(parts, batch)
    forward, sizes, left = IDMM.forward, [], short

    def scarce(self: IDMM, given: Batch) -> Loss:
        nonlocal left
        sizes.append(given.num_crops)
        if left and len(sizes) == 2:
            sizes.clear()
            left -= 1
            raise torch.OutOfMemoryError("on purpose")
        return forward(self, given)

    monkeypatch.setattr(IDMM, "forward", scarce)
    found = backward(parts, batch)
    assert len(sizes) == parts.state.micro_batches == pieces * 2**short
    assert sum(sizes) == batch.num_crops == 48
    torch.testing.assert_close(found.total, loss)
    assert float((gradients(parts) - expected).norm() / expected.norm()) < 1e-5


def test_every_step_draws_by_its_own_number(toy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parts, told = parts_of(), []
    forward = Encoder.forward

    def watched(self: Encoder, images: torch.Tensor) -> torch.Tensor:
        told.append(self.counters.step)
        return forward(self, images)

    monkeypatch.setattr(Encoder, "forward", watched)
    for number in (0, 1, 5):
        step(parts, batch_of(parts, number))
    assert told == [0, 1, 5]


@pytest.mark.parametrize("pieces", [1, 3])
def test_what_follows_a_step_sees_the_whole_batch_and_moved_weights(
    toy: str, pieces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = parts_of(micro_batches=pieces)
    forward, seen = IDMM.forward, []

    def keeping(self: IDMM, batch: Batch) -> Loss:
        return replace(forward(self, batch), keep={"rows": batch.groups[0].rows})

    def after(self: IDMM, keep: dict[str, Tensor], number: Tensor, skipped: Tensor) -> None:
        told = int(number), bool(skipped)
        seen.append((keep["rows"].tolist(), told, self.head.weight.detach().clone()))

    monkeypatch.setattr(IDMM, "forward", keeping)
    monkeypatch.setattr(IDMM, "after_step", after)
    before, batch = parts.method.get_parameter("head.weight").detach().clone(), batch_of(parts, 2)
    step(parts, batch)
    ((rows, told, weight),) = seen
    assert rows == batch.groups[0].rows.tolist() and told == (2, False)
    assert not torch.equal(weight, before)


@pytest.mark.parametrize(("precision", "kind"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_layers_compute_in_the_precision_asked_for(
    toy: str, precision: str, kind: torch.dtype
) -> None:
    """Weights, gradients and the loss stay in float32."""
    parts, kinds = parts_of(precision=precision, device="cpu"), []
    for layer in parts.method.modules():
        if isinstance(layer, torch.nn.Linear) and layer is not parts.method.head:
            layer.register_forward_hook(lambda *given: kinds.append(given[2].dtype))
    loss = backward(parts, batch_of(parts, 0))
    assert kinds and set(kinds) == {kind}
    assert loss.total.dtype == gradients(parts).dtype == torch.float32


def test_what_is_frozen_stays(toy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In its epoch: neither gradient nor decay moves it, and all else learns."""
    parts = parts_of()
    head = parts.method.get_parameter("head.weight")
    monkeypatch.setattr(type(parts.method), "frozen", lambda self, epoch: [] if epoch else [head])
    found = []
    for number in (1, 3):  # of the first and the second epoch, of three steps each
        weights = list(parts.method.parameters())
        before = [p.detach().clone() for p in weights]
        step(parts, batch_of(parts, number))
        moved = [not torch.equal(a, b) for a, b in zip(before, weights, strict=True)]
        found.append((moved.pop(-2), all(moved)))
    assert found == [(False, True), (True, True)]


def test_a_compiled_backbone_trains_alike_and_is_scored_plainly(
    toy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a compiler that leaves operations as they are: one graph a shape, the same bits."""
    graphs = []

    def compiler(graph: torch.fx.GraphModule, given: list[Tensor]) -> Any:
        graphs.append(given)
        return graph.forward

    real = torch.compile
    plain = parts_of()
    expected = [step(plain, batch_of(plain, number)) for number in range(6)]
    monkeypatch.setattr(
        torch, "compile", lambda f, **o: real(f, backend=compiler, fullgraph=True, **o)
    )
    fast = parts_of(compile=True)
    assert fast.method.state_dict().keys() == plain.method.state_dict().keys()
    for number, made in enumerate(expected):
        ours = step(fast, batch_of(fast, number)).numbers()
        assert all(torch.equal(ours[name], value) for name, value in made.numbers().items()), number
    assert len(graphs) == 2  # of 8 and of 4 images
    fast.method.backbone.eval()(torch.zeros(5, 3, 16, 16))
    assert len(graphs) == 2


def test_compiling_recommends_no_tf32(toy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch would where a product is of float32, on Ampere and later."""
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)
    parts_of(compile=True)
    warnings.warn("TensorFloat32 tensor cores for float32 [...] not enabled.", stacklevel=1)


def test_compiling_and_exactness_exclude_each_other(toy: str) -> None:
    with pytest.raises(UsageError, match="leave one of them out"):
        parts_of(compile=True, exact=True)
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("exact", [False, True])
def test_float32_is_float32(exact: bool) -> None:
    """No product of it in TF32, which keeps 10 bits: not with fp32, nor beside bf16."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    set_up("cpu", exact=exact)
    assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32
    torch.use_deterministic_algorithms(False)


def test_attention_is_not_cudnns() -> None:
    """Whose gradients by one query have been NaN: see `machine.set_up`."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    set_up("cpu", exact=False)
    assert not torch.backends.cuda.cudnn_sdp_enabled()
