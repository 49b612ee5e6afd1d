"""The optimizer, its schedule as a function of the step, and the fused update."""

import math
from collections.abc import Callable
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from fastidmm.apex import apex
from fastidmm.batch import Method, Options
from fastidmm.ranks import world

Schedule = Callable[[Tensor], Tensor]
Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimOptions(Options):
    """The table `[optim]` of a recipe; what is unset comes from the backbone."""

    lr: Annotated[float, Field(gt=0)] | None = None
    weight_decay: Annotated[float, Field(ge=0)] = 1e-3
    warmup_epochs: Annotated[float, Field(ge=0)] | None = None
    schedule: Literal["cosine", "idmm_legacy"] = "cosine"
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0)] = 1e-8


def lr_schedule(options: OptimOptions, *, epochs: int, steps_per_epoch: int) -> Schedule:
    """Linear warm-up from 0, then half a cosine down to 0, step by step.

    `idmm_legacy` is the published code's slip: its cosine runs over (pi t - w) / (T - w).
    """
    assert options.lr is not None and options.warmup_epochs is not None, "resolve the recipe first"
    peak, warmup = options.lr, options.warmup_epochs
    slope = 1 if options.schedule == "cosine" else 1 / math.pi
    rest = max(epochs - warmup, 1e-9)

    def lr(step: Tensor) -> Tensor:
        epoch = step.double() / steps_per_epoch
        falling = 0.5 * (1 + torch.cos(math.pi * (epoch - slope * warmup) / rest))
        rising = epoch / max(warmup, 1e-9)
        return (peak * torch.where(epoch < warmup, rising, falling)).float()

    return lr


def optimizer_over(
    method: Method, options: OptimOptions, device: torch.device, name: str = "adamw"
) -> torch.optim.Optimizer:
    """An optimizer over the method's parameter groups, the rate a tensor on the device.

    torch's fused AdamW, or one of apex's by the recipe's name of it.
    """
    groups = method.param_groups()
    for group in groups:
        if "decay" in group:
            group["weight_decay"] = 0.0  # a number for torch, which a capture would keep
    if name != "adamw":
        own = {"betas": options.betas, "eps": options.eps, "weight_decay": options.weight_decay}
        return apex(name, groups, device, **own)
    optimizer = torch.optim.AdamW(
        groups,
        lr=torch.zeros((), device=device),
        betas=options.betas,
        eps=options.eps,
        weight_decay=options.weight_decay,
        fused=True,
        capturable=device.type == "cuda",
    )
    # Steps before a capture are meant to be made without one, and torch would remark on them.
    optimizer._warned_capturable_if_run_uncaptured = True
    return optimizer


class Scaler:
    """What a loss in fp16 is multiplied by, so that gradients neither vanish nor overflow.

    It halves when they overflow, which skips the step, and doubles after 2,000 steps without; as
    torch's GradScaler, but for the device alone.
    """

    def __init__(self, device: torch.device) -> None:
        self.scale = torch.full((), 2.0**16, device=device)
        self.good = torch.zeros((), dtype=torch.int32, device=device)  # steps since it changed

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps, by name; theirs to be copied to."""
        return {"scaler.scale": self.scale, "scaler.good": self.good}

    def follow(self, skipped: Tensor) -> None:
        """Learn whether the step just made was skipped."""
        torch._amp_update_scale_(self.scale, self.good, skipped.float(), 2.0, 0.5, 2000)


def shared_gradients(method: Method) -> list[Tensor]:
    """Gradients of what every rank has."""
    named = method.named_parameters()
    return [p.grad for name, p in named if p.grad is not None and name not in method.shards]


def gradient_norm(method: Method, grads: list[Tensor]) -> Tensor:
    """Of all gradients there are: ()."""
    if not method.shards:
        return torch.nn.utils.get_total_norm(grads)
    shared = shared_gradients(method)
    own = [
        p.grad
        for name, p in method.named_parameters()
        if name in method.shards and p.grad is not None
    ]
    elsewhere = world().sum(torch.nn.utils.get_total_norm(own).square())
    return (torch.nn.utils.get_total_norm(shared).square() + elsewhere).sqrt()


class Updated(NamedTuple):
    """What an update came to, as tensors."""

    norm: Tensor  # of the gradients
    skipped: Tensor  # whether nothing moved
    failed: Tensor  # whether that was no matter of fp16's range


@torch.no_grad()
def update(
    optimizer: torch.optim.Optimizer,
    method: Method,
    loss: Tensor,
    lr: Tensor,
    step: Tensor,
    scaler: Scaler | None = None,
) -> Updated:
    """One step of the optimizer, skipped on the device when loss or gradients are not finite.

    Gradients are the scaler's times too large, where there is one. Nothing waits.
    """
    grads = [p.grad for p in method.parameters() if p.grad is not None]
    norm = gradient_norm(method, grads)
    skipped = ~(torch.isfinite(norm) & torch.isfinite(loss))
    failed, scale = skipped, None
    if scaler is not None:
        scale = scaler.scale.clone()  # gradients are divided by this step's
        failed = skipped & (~torch.isfinite(loss) | (scale <= 1))
        norm = norm / scale
        scaler.follow(skipped)
    if method.clip is not None:
        most = method.clip if scale is None else method.clip * scale
        norms = torch._foreach_norm(grads)
        torch._foreach_mul_(grads, [(most / (n + 1e-6)).clamp(max=1) for n in norms])
    for group in optimizer.param_groups:
        group["lr"].copy_(lr)
        if "decay" in group:
            moving = [p for p in group["params"] if p.grad is not None]
            shrunk = torch.where(skipped, 1.0, 1 - lr * group["decay"](step)).float()
            if moving:
                torch._foreach_mul_(moving, shrunk)
    # The fused optimizer's own way of skipping, made for gradient scalers.
    optimizer.grad_scale, optimizer.found_inf = scale, skipped.float()  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return Updated(norm, skipped, failed)
