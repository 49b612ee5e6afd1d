"""One training step: forward, loss, backward, update. Nothing in it waits for the device.

Each rank makes its share of the global batch; gradients are summed, so that all move alike.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastidmm.assemble import Parts
from fastidmm.batch import Batch, Loss
from fastidmm.optim import shared_gradients, update
from fastidmm.progress import say
from fastidmm.ranks import world


@dataclass(frozen=True, slots=True)
class Stepped:
    """What a step came to; tensors on the device."""

    loss: Tensor
    parts: dict[str, Tensor]  # of the loss, worth logging
    norm: Tensor  # of the gradients
    lr: Tensor
    skipped: Tensor  # since loss or gradients were not finite, whatever the precision
    num_images: int

    def numbers(self) -> dict[str, Tensor]:
        """What a metric line says of this step alone."""
        return {
            "loss": self.loss,
            **self.parts,
            "grad_norm": self.norm,
            "lr": self.lr,
        }


def step(parts: Parts, batch: Batch) -> Stepped:
    """Learn from a batch, which knows which step it is of."""
    return advance(parts, batch, together(parts, batch, backward(parts, batch)))


def backward(parts: Parts, batch: Batch) -> Loss:
    """Gradients of a rank's share of the batch, in as many passes as memory asks for."""
    parts.counters.step = batch.step
    # Ranks that exchange something within a pass cannot begin it again by themselves.
    bound = world().size > 1 and not parts.method.rows_independent
    most = sum(views.total for views in batch.groups)
    while True:
        losses, problem = [], None
        try:
            micros = [m for m in batch.micro(parts.state.micro_batches) if m.num_crops] or [batch]
            if len(micros) > 1 and parts.method.features_first:
                return _features_first(parts, batch, micros)
            for micro in micros:
                with _autocast(parts):
                    losses.append(parts.method(micro))
                _scaled(parts, losses[-1].total).backward()
        except torch.OutOfMemoryError as short:
            capturing = (
                parts.store.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
            )
            if bound or capturing:
                raise
            problem = short.with_traceback(None)  # whose frames would hold memory
        if bound or not world().any(problem is not None):
            return _sum(losses)
        parts.optimizer.zero_grad(set_to_none=True)
        losses.clear()
        released = parts.release()
        whole = not parts.method.can_be_cut()
        if not released and (whole or parts.state.micro_batches >= most):
            raise problem or torch.OutOfMemoryError("on another rank")
        torch.cuda.empty_cache()
        if released:
            continue
        parts.state.micro_batches *= 2
        say(f"memory is short: {parts.state.micro_batches} micro-batches from here on.")


def _features_first(parts: Parts, batch: Batch, micros: list[Batch]) -> Loss:
    """Gradients of a loss that needs all features at once: exact, for one more forward pass.

    Features are made without a graph, then the loss's gradient by them, then features again, whose
    graphs are small (Gao et al., "Scaling Deep Contrastive Learning Batch Size", 2021).
    """
    method = parts.method
    sizes = [[views.rows.numel() for views in micro.groups] for micro in micros]
    with torch.no_grad(), _autocast(parts):
        made = [method.features(m).split(of_m) for m, of_m in zip(micros, sizes, strict=True)]
    # The batch's order: all crops of a group, and then those of the next.
    features = torch.cat([part for group in zip(*made, strict=True) for part in group])
    features.requires_grad_()
    with _autocast(parts):
        loss = method.loss_of(features, batch)
    _scaled(parts, loss.total).backward()
    assert features.grad is not None, "a loss of the features has a gradient by them"
    shares = features.grad.split([num for group in zip(*sizes, strict=True) for num in group])
    for place, micro in enumerate(micros):
        with _autocast(parts):
            again = method.features(micro)
        again.backward(torch.cat(shares[place :: len(micros)]))
    return replace(loss, total=loss.total.detach())


def _autocast(parts: Parts) -> torch.autocast:
    return torch.autocast(
        parts.store.device.type, parts.dtype, enabled=parts.dtype != torch.float32
    )


def _scaled(parts: Parts, total: Tensor) -> Tensor:
    return total if parts.scaler is None else total * parts.scaler.scale


def advance(parts: Parts, batch: Batch, loss: Loss) -> Stepped:
    """Move the weights by their gradients, and then what follows them."""
    number = batch.step
    if not isinstance(number, Tensor):
        number = torch.full((), number, device=parts.store.device)
    for param in parts.method.frozen(batch.epoch):
        param.grad = None
    lr = parts.schedule(number)
    made = update(parts.optimizer, parts.method, loss.total, lr, number, parts.scaler)
    parts.method.after_step(loss.keep | loss.sums, number, made.skipped)
    return Stepped(loss.total, loss.parts, made.norm, lr, made.failed, batch.num_images)


def _sum(losses: list[Loss]) -> Loss:
    """The loss of a batch from its micro-batches' shares."""
    parts = {
        key: torch.stack([loss.parts[key] for loss in losses]).sum() for key in losses[0].parts
    }
    keep = {key: torch.cat([loss.keep[key] for loss in losses]) for key in losses[0].keep}
    sums = {key: torch.stack([loss.sums[key] for loss in losses]).sum(0) for key in losses[0].sums}
    total = torch.stack([loss.total.detach() for loss in losses]).sum()
    return Loss(total, parts, keep, sums)


def together(parts: Parts, batch: Batch, loss: Loss) -> Loss:
    """What all ranks made: gradients and losses summed, and the rows of every rank."""
    here = world()
    if here.size == 1:
        return loss
    numbers = torch.stack([loss.total.detach(), *loss.parts.values()])
    sums = {key: tensor.clone() for key, tensor in loss.sums.items()}
    here.add_up([*shared_gradients(parts.method), numbers, *sums.values()])
    total, *rest = numbers
    keep = {key: here.gather(tensor, batch.shares) for key, tensor in loss.keep.items()}
    return Loss(total, dict(zip(loss.parts, rest, strict=True)), keep, sums)
