"""Weights rounded all at once against autocast's own way: to the bit, in two operations."""

from collections import Counter
from typing import Any

import pytest
import torch
from test_backbones import VIT, build
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastidmm.backbones.build import Encoder
from fastidmm.backbones.rounding import called


def passed(encoder: Encoder, how: Any, kind: torch.dtype) -> list[Tensor]:
    """Features and every gradient of a pass in training."""
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    encoder.train().zero_grad()
    encoder.set_place(torch.arange(4))
    with torch.autocast("cpu", kind):
        features = how(encoder.model, images)
    features.float().square()[:, ::3].sum().backward()
    gradients = [p.grad for p in encoder.parameters() if p.grad is not None]
    return [features, *(g.clone() for g in gradients)]


def plainly(model: nn.Module, images: Tensor) -> Any:
    return model(images)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "name",
    [
        "vit_micro",
        "t2t_vit_7",
        "pvtv2_b0",
        VIT,
        "timm:vit_tiny_r_s16_p8_224",
        "timm:beit_base_patch16_224",
    ],
)
def test_bits_are_autocasts(name: str, kind: torch.dtype) -> None:
    """Also where a model does something to its weights first, or has none of the kinds."""
    encoder = build(name)
    ours, expected = (passed(encoder, how, kind) for how in (called, plainly))
    assert len(ours) == len(expected) > 10
    assert all(
        torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(ours, expected, strict=True)
    )
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in encoder.parameters())


class Calls(TorchDispatchMode):
    """How often each operation is called."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num = Counter[str]()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.num[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def test_two_operations_stand_for_two_hundred() -> None:
    encoder = build("deit_tiny")
    num = []
    for how in (called, plainly):
        with Calls() as calls:
            passed(encoder, how, torch.bfloat16)
        num.append(calls.num)
    weights = sum(p.ndim > 1 or n.endswith("bias") for n, p in encoder.model.named_parameters())
    assert num[0]["_foreach_copy_"] == 2 and num[1]["_foreach_copy_"] == 0
    # Two for each weight or bias of a product; biases of norms, class token and positions stay.
    assert num[1]["_to_copy"] - num[0]["_to_copy"] >= 2 * (weights - 25 - 2)


def test_without_autocast_nothing_is_rounded() -> None:
    encoder = build("vit_micro").eval()
    with Calls() as calls:
        encoder(torch.zeros(1, 3, 32, 32))
    assert calls.num["_foreach_copy_"] == 0


def test_a_model_of_norms_alone_is_called_as_it_is() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert called(nn.Sequential(nn.LayerNorm(4)), torch.ones(2, 4)).abs().max() < 1e-2
