"""NVIDIA apex's FusedAdam and FusedLAMB behind the step that torch's fused AdamW takes.

Both as apex has them for captured steps (FusedLAMB is its FusedMixedPrecisionLamb, whose rate and
step are tensors): rate, scale and the flag that skips a step are read on the device. They count
steps once a group, where torch's does so for each parameter.
"""

import importlib
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastidmm.errors import UsageError
from fastidmm.facts import apex_kind
from fastidmm.ranks import world

# The recipe's name, apex's class and what it is to be told besides.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "fused_adam": ("FusedAdam", {"capturable": True}),
    "fused_lamb": ("FusedMixedPrecisionLamb", {}),
}


def check(name: str, device: torch.device) -> None:
    """Refuse an optimizer of apex's where it cannot work."""
    if name not in KINDS:
        return
    if device.type != "cuda":
        raise UsageError(f"--optimizer {name} needs an NVIDIA GPU: use adamw on a CPU.")
    if name == "fused_lamb" and world().size > 1:
        raise UsageError(
            "--optimizer fused_lamb measures whole weights, and ranks may hold some by parts: use "
            "fused_adam or adamw with --gpus."
        )
    if apex_kind() != "cuda":
        raise UsageError(
            f"--optimizer {name} needs NVIDIA's apex with its CUDA extension, which `fastidmm "
            "doctor` tells how to install: or use adamw."
        )


def apex(
    name: str,
    groups: list[dict[str, Any]],
    device: torch.device,
    **options: Any,
) -> torch.optim.Optimizer:
    """One of apex's optimizers over these groups, told to skip as torch's is: by `found_inf`."""
    called, own = KINDS[name]
    kind = getattr(importlib.import_module("apex.optimizers"), called)
    optimizer: torch.optim.Optimizer = kind(groups, lr=0.0, **own, **options)
    told = _AsScaler(optimizer, device)
    for group in optimizer.param_groups:
        group["lr"] = torch.zeros((), device=device)
        # FusedAdam's would come into being in the first step.
        group["step"] = torch.zeros(1, dtype=torch.int32, device=device)
    # apex asks a GradScaler what torch's optimizers are told by attributes.
    optimizer.step = partial(optimizer.step, grad_scaler=told)  # type: ignore[assignment,method-assign]
    # FusedAdam's own takes no arguments.
    zero_grad = partial(torch.optim.Optimizer.zero_grad, optimizer)
    optimizer.zero_grad = zero_grad  # type: ignore[method-assign]
    return optimizer


def counters(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What apex's keep besides moments, by name, to be copied to; of torch's nothing."""
    groups = enumerate(optimizer.param_groups)
    steps = {f"group.{number}.step": group["step"] for number, group in groups if "step" in group}
    # FusedAdam counts a step in the next one, unless this flag was up.
    return steps | {"flag": optimizer._dummy_overflow_buf} if steps else {}  # type: ignore[attr-defined]


class _AsScaler:
    """What apex asks of torch's GradScaler."""

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        self.optimizer, self.one = optimizer, torch.ones((), device=device)

    def _check_inf_per_device(self, _: torch.optim.Optimizer) -> dict[torch.device, Tensor]:
        flag: Tensor = self.optimizer.found_inf  # type: ignore[attr-defined]
        return {flag.device: flag}

    def _get_scale_async(self) -> Tensor:
        scale: Tensor | None = self.optimizer.grad_scale  # type: ignore[attr-defined]
        return self.one if scale is None else scale
