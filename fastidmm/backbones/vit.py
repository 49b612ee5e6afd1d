"""Plain vision transformers: DeiT's two sizes and a micro one, by way of timm.

Source: Touvron et al., "Training data-efficient image transformers", ICML 2021. The feature is the
class token after the last norm.
"""

from functools import partial

from torch import nn

from fastidmm.backbones.build import Backbone
from fastidmm.backbones.of_timm import of_timm


def _vit(name: str, resolution: int, drop_path: float, **shape: int) -> nn.Module:
    model = of_timm(name, drop_path_rate=drop_path, img_size=resolution, **shape)
    # timm draws it with a deviation of 1e-6; DeiT's own code, and the paper's, with 0.02.
    nn.init.trunc_normal_(model.cls_token, std=0.02)  # type: ignore[arg-type]
    return model


TINY, BASE = "deit_tiny_patch16_224", "deit_base_patch16_224"
deit_tiny = Backbone(partial(_vit, TINY), multiple_of=16, weights=TINY)
deit_base = Backbone(partial(_vit, BASE), multiple_of=16, weights=BASE)
# For tests and the demo: 0.8 million parameters, and tokens enough at 32 to 64 px.
vit_micro = Backbone(
    partial(_vit, TINY, patch_size=8, embed_dim=128, depth=4, num_heads=4),
    multiple_of=8,
)
