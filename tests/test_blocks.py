"""A vision transformer's blocks, gone through lightly, against timm's own way, in float64."""

import copy
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fastidmm.backbones.blocks import LightBlocks, LightStage, lighten
from fastidmm.backbones.build import backbone
from fastidmm.backbones.drop import PathWords, draw_from_counters
from fastidmm.chance import Counters

TINY = "deit_tiny_patch16_224"
SMALL = {"img_size": 48, "depth": 3, "num_classes": 0, "drop_path_rate": 0.4}
# What timm can be asked for, and whether the last block may be the class token's alone.
MADE: dict[str, tuple[str, dict[str, Any], bool]] = {
    "deit": (TINY, {}, True),
    "one block": (TINY, {"depth": 1}, True),
    "no bias": (TINY, {"qkv_bias": False}, True),
    "layer scale, dropout": (TINY, {"init_values": 0.3, "proj_drop_rate": 0.3}, True),
    "t2t": ("t2t_vit_7", {}, True),
    "mean of tokens": (TINY, {"global_pool": "avg"}, False),
    "registers": ("vit_small_patch14_reg4_dinov2", {"img_size": 42}, False),
    "pooled by attention": ("vit_base_patch16_siglip_224", {"embed_dim": 96}, False),
    "two class tokens": ("deit_tiny_distilled_patch16_224", {}, False),
}  # fmt: skip


def made(name: str, shape: dict[str, Any]) -> tuple[nn.Module, PathWords]:
    """A model in training, in float64, its weights far from what they begin with."""
    torch.manual_seed(0)
    words = PathWords(Counters(3, step=5, place=torch.tensor([4, 0, 9, 2])))
    given = {key: value for key, value in (SMALL | shape).items() if value is not None}
    backbone("t2t_vit_7")  # timm knows it from here on
    model = draw_from_counters(timm.create_model(name, **given), words).train().double()
    for param in model.parameters():
        param.data.add_(torch.randn_like(param), alpha=0.1)
    return model, words


def passed(model: nn.Module, words: PathWords, side: int) -> list[Tensor]:
    """Features, and every weight's gradient."""
    images = torch.randn(4, 3, side, side, dtype=torch.float64, generator=torch.manual_seed(1))
    words.draw()
    features = model(images)
    features.mul(torch.linspace(-1, 1, features.numel()).view_as(features)).sum().backward()
    return [features, *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("kind", MADE)
def test_features_and_gradients_are_timms(kind: str) -> None:
    name, shape, alone = MADE[kind]
    model, words = made(name, shape)
    light: Any = lighten(copy.deepcopy(model))
    assert type(light.blocks) is LightBlocks and light.blocks.alone == alone
    assert light.state_dict().keys() == model.state_dict().keys()
    side = shape.get("img_size", 48)
    expected = passed(model, words, side)
    words.paths = [m for m in light.modules() if type(m).__name__ == "DropPath"]
    found = passed(light, words, side)
    assert len(found) == len(expected) > 10
    for ours, timms in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, timms, rtol=1e-9, atol=1e-12)


def test_a_pyramids_maps_and_gradients_are_timms() -> None:
    shape = {"img_size": None, "depth": None, "depths": (2, 1, 1, 2)}
    model, words = made("pvt_v2_b0", shape)
    light: Any = lighten(copy.deepcopy(model))
    assert all(type(stage) is LightStage for stage in light.stages)
    expected = passed(model, words, 64)
    words.paths = [m for m in light.modules() if type(m).__name__ == "DropPath"]
    assert len(words.paths) == 10  # the first block drops nothing
    for ours, timms in zip(passed(light, words, 64), expected, strict=True):
        torch.testing.assert_close(ours, timms, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("vit_tiny_patch16_224", {"qk_norm": True}),
        ("beit_base_patch16_224", {}),
        ("cait_xxs24_224", {}),
    ],
)
def test_other_blocks_stay_as_they_are(name: str, shape: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0, **shape)
    kinds = [type(m) for m in model.modules()]
    assert [type(m) for m in lighten(model).modules()] == kinds and not {
        LightBlocks,
        LightStage,
    } & set(kinds)


@pytest.mark.parametrize(
    ("name", "tokens", "share"), [("deit_tiny", 50, 0.067), ("vit_micro", 197, 0.211)]
)
def test_the_last_block_saves_what_nobody_reads(name: str, tokens: int, share: float) -> None:
    """Of all but the class token: queries, projection, hidden layer, scores and their mix."""
    flop = []
    for change in (lambda model: model, lighten):
        model: Any = change(backbone(name).build(112, 0.0).eval())
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
            model(torch.zeros(1, 3, 112, 112))
        flop.append(counter.get_total_flops())
    width = model.num_features
    assert flop[0] - flop[1] == 2 * (tokens - 1) * (10 * width**2 + 2 * tokens * width)
    assert 1 - flop[1] / flop[0] == pytest.approx(share, abs=0.0005)
