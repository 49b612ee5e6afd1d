"""Pyramid vision transformers v2, by way of timm: any resolution, no position embedding.

Source: Wang et al., "PVT v2: Improved Baselines with Pyramid Vision Transformer", CVM 2022. The
feature is the mean over the last stage's tokens. At the paper's 112 px the stages are 28, 14, 7 and
4 tokens a side.
"""

from functools import partial

from torch import nn

from fastidmm.backbones.build import Backbone
from fastidmm.backbones.of_timm import of_timm


def _pvt(name: str, resolution: int, drop_path: float) -> nn.Module:
    return of_timm(name, drop_path_rate=drop_path)


def _backbone(name: str) -> Backbone:
    build = partial(_pvt, name)
    return Backbone(build, multiple_of=1, smallest=32, lr=1e-3, warmup_epochs=10, weights=name)


pvtv2_b0, pvtv2_b3 = _backbone("pvt_v2_b0"), _backbone("pvt_v2_b3")
