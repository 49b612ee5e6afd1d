"""One training step: forward, loss, backward, update. Nothing in it waits for the device."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastidmm.assemble import Parts
from fastidmm.batch import Batch, Loss
from fastidmm.optim import update
from fastidmm.progress import say


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
    return advance(parts, batch, backward(parts, batch))


def backward(parts: Parts, batch: Batch) -> Loss:
    """Gradients of the whole batch, in as many passes as memory asks for."""
    device = parts.store.device
    parts.counters.step = batch.step
    while True:
        losses = []
        try:
            for micro in batch.micro(parts.state.micro_batches):
                if not micro.num_crops:
                    continue
                with torch.autocast(device.type, parts.dtype, enabled=parts.dtype != torch.float32):
                    losses.append(parts.method(micro))
                total = losses[-1].total
                (total if parts.scaler is None else total * parts.scaler.scale).backward()
            return _sum(losses)
        except torch.OutOfMemoryError:
            if parts.store.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                raise
            parts.optimizer.zero_grad(set_to_none=True)
            if not parts.method.can_be_cut() or parts.state.micro_batches >= batch.num_crops:
                raise
        losses.clear()
        torch.cuda.empty_cache()
        parts.state.micro_batches *= 2
        say(f"memory is short: {parts.state.micro_batches} micro-batches from here on.")


def advance(parts: Parts, batch: Batch, loss: Loss) -> Stepped:
    """Move the weights by their gradients, and then what follows them."""
    number = batch.step
    if not isinstance(number, Tensor):
        number = torch.full((), number, device=parts.store.device)
    for param in parts.method.frozen(batch.epoch):
        param.grad = None
    lr = parts.schedule(number)
    made = update(parts.optimizer, parts.method, loss.total, lr, number, parts.scaler)
    parts.method.after_step(loss.keep, number, made.skipped)
    return Stepped(loss.total, loss.parts, made.norm, lr, made.failed, batch.num_images)


def _sum(losses: list[Loss]) -> Loss:
    """The loss of a batch from its micro-batches' shares."""
    parts = {
        key: torch.stack([loss.parts[key] for loss in losses]).sum() for key in losses[0].parts
    }
    keep = {key: torch.cat([loss.keep[key] for loss in losses]) for key in losses[0].keep}
    total = torch.stack([loss.total.detach() for loss in losses]).sum()
    return Loss(total, parts, keep)
