"""NVIDIA apex's two optimizers in plain operations, with apex's arguments, state and order of work.

They exist for machines without CUDA: what fastidmm hands to apex and keeps of it is tested by them.
Written from the mathematics (Kingma and Ba, 2015; You et al., 2020) and apex's interface.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor


class _Apex(torch.optim.Optimizer):
    def __init__(self, params: Any, lr: float, betas: Any, eps: float, weight_decay: float) -> None:
        defaults = {"lr": torch.tensor(lr), "betas": betas, "eps": eps}
        super().__init__(params, defaults | {"weight_decay": weight_decay})
        self._dummy_overflow_buf = torch.zeros(1, dtype=torch.int32)

    def moved(self, p: Tensor, group: dict[str, Any], inverse: Tensor) -> Tensor:
        """Adam's step, with decoupled decay; moments stay where the flag is up."""
        state, (beta1, beta2) = self.state[p], group["betas"]
        if not state:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        assert p.grad is not None
        gradient, stays = p.grad * inverse, self._dummy_overflow_buf == 1
        for name, beta, value in (
            ("exp_avg", beta1, gradient), ("exp_avg_sq", beta2, gradient.square())
        ):  # fmt: skip
            moment = state[name]
            moment.copy_(torch.where(stays, moment, beta * moment + (1 - beta) * value))
        first = state["exp_avg"] / (1 - beta1 ** group["step"])
        second = state["exp_avg_sq"] / (1 - beta2 ** group["step"])
        moved: Tensor = first / (second.sqrt() + group["eps"]) + group["weight_decay"] * p
        return moved


class FusedAdam(_Apex):
    """apex.optimizers.FusedAdam, capturable."""

    def __init__(self, params: Any, *, capturable: bool, **options: Any) -> None:
        assert capturable
        super().__init__(params, **options)

    def zero_grad(self) -> None:  # type: ignore[override]
        """As apex's: without arguments."""
        raise AssertionError("apex's takes no set_to_none")

    @torch.no_grad()
    def step(self, closure: Any = None, grad_scaler: Any = None) -> None:  # type: ignore[override]
        """The flag counts from the step before: apex increments first."""
        for group in self.param_groups:
            device = group["params"][0].device
            group["step"] += (self._dummy_overflow_buf != 1).to(torch.int)
            self._dummy_overflow_buf.copy_(grad_scaler._check_inf_per_device(self)[device])
            inverse = grad_scaler._get_scale_async().double().reciprocal().float()
            for p in filter(lambda p: p.grad is not None, group["params"]):
                step = group["lr"] * self.moved(p, group, inverse)
                p.sub_(torch.where(self._dummy_overflow_buf == 1, 0.0, step))


class FusedMixedPrecisionLamb(_Apex):
    """apex.optimizers.FusedMixedPrecisionLamb, without weights of less precision."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **options)
        self.defaults["max_grad_norm"] = 1.0

    @torch.no_grad()
    def step(self, closure: Any = None, grad_scaler: Any = None) -> None:  # type: ignore[override]
        """Gradients clipped to a norm of one in all; each tensor's step as long as the tensor."""
        device = self.param_groups[0]["params"][0].device
        self._dummy_overflow_buf.copy_(grad_scaler._check_inf_per_device(self)[device])
        scale = grad_scaler._get_scale_async()
        with_gradient = [p for g in self.param_groups for p in g["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in with_gradient])
        inverse = scale.double().reciprocal().float() / (norm / scale).clamp(min=1)
        for group in self.param_groups:
            group["step"] += (self._dummy_overflow_buf != 1).to(torch.int)
            for p in filter(lambda p: p.grad is not None, group["params"]):
                step = self.moved(p, group, inverse)
                ratio = p.norm() / step.norm() if group["weight_decay"] else torch.ones(())
                ratio = torch.where(torch.isfinite(ratio) & (ratio > 0), ratio, 1)
                p.sub_(torch.where(self._dummy_overflow_buf == 1, 0.0, group["lr"] * ratio * step))


def modules() -> dict[str, ModuleType]:
    """What `import apex.optimizers` finds, for `sys.modules`."""
    apex, optimizers = ModuleType("apex"), ModuleType("apex.optimizers")
    optimizers.FusedAdam = FusedAdam  # type: ignore[attr-defined]
    optimizers.FusedMixedPrecisionLamb = FusedMixedPrecisionLamb  # type: ignore[attr-defined]
    apex.optimizers = optimizers  # type: ignore[attr-defined]
    return {"apex": apex, "apex.optimizers": optimizers}
