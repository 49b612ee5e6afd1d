"""Tokens-to-token vision transformers, registered into timm when this file is imported.

Source: Yuan et al., "Tokens-to-Token ViT", ICCV 2021; linear attention by random features is
`kernels/linear_performer.py`. Three soft splits make an image of S px into (S / 16)**2 tokens; the
feature is the class token after the last norm. Names of weights are those of the published models.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastidmm.backbones.build import Backbone
from fastidmm.backbones.of_timm import of_timm
from fastidmm.backbones.torchvision_ops import make_torchvision_importable
from fastidmm.kernels.add_norm import add_norm
from fastidmm.kernels.linear_gelu import linear_gelu
from fastidmm.kernels.linear_performer import linear_performer

WIDTH = 64  # of tokens until the last soft split
NUM_FEATURES = 32  # random ones, of an attention
DROPOUT = 0.1  # of a token block, whatever the rest has


def soft_split(maps: Tensor, size: int, stride: int, padding: int) -> Tensor:
    """Overlapping patches as tokens: (C, D, S, S) to (C, (S / stride)**2, D * size**2).

    As `functional.unfold` has them, whose CUDA form launches a kernel for every image.
    """
    maps = functional.pad(maps, [padding] * 4)
    patches = maps.unfold(2, size, stride).unfold(3, size, stride)  # (C, D, rows, columns, y, x)
    return patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)


def as_map(tokens: Tensor, side: int) -> Tensor:
    """Tokens of a square to maps: (C, side**2, D) to (C, D, side, side), channels last."""
    return tokens.transpose(1, 2).reshape(tokens.shape[0], -1, side, side)


class TokenBlock(nn.Module):
    """A transformer block on soft-split tokens: (C, L, width) to (C, L, 64)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.kqv = nn.Linear(width, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)
        self.dp = nn.Dropout(DROPOUT)
        self.norm2 = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH), nn.Dropout(DROPOUT)
        )
        directions = nn.init.orthogonal_(torch.empty(NUM_FEATURES, WIDTH))
        self.w = nn.Parameter(directions * NUM_FEATURES**0.5, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """The skip is the values': tokens come in wider than they leave."""
        one, two, kqv = self.norm1, self.norm2, self.kqv
        normed = add_norm(x, None, one.weight, one.bias, eps=one.eps)[1]
        v, found = linear_performer(normed, kqv.weight, kqv.bias, self.w)
        x, normed = add_norm(v, self.dp(self.proj(found)), two.weight, two.bias, eps=two.eps)
        first: Any = self.mlp[0]
        mixed: Tensor = self.mlp[2:](linear_gelu(normed, first.weight, first.bias))
        return x + mixed


class TokensToToken(nn.Module):
    """Images (C, 3, S, S) to tokens (C, (S / 16)**2, D)."""

    def __init__(self, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.attention1 = TokenBlock(in_chans * 7 * 7)
        self.attention2 = TokenBlock(WIDTH * 3 * 3)
        self.project = nn.Linear(WIDTH * 3 * 3, embed_dim)

    def forward(self, images: Tensor) -> Tensor:
        """The last split and its projection are a convolution: no patch is written out."""
        side = images.shape[-1] // 4
        maps = as_map(self.attention1(soft_split(images, 7, 4, 2)), side)
        maps = as_map(self.attention2(soft_split(maps, 3, 2, 1)), side // 2)
        weight = self.project.weight.unflatten(1, (WIDTH, 3, 3))
        maps = functional.conv2d(maps, weight, self.project.bias, stride=2, padding=1)
        return maps.flatten(2).transpose(1, 2)


def sinusoids(num: int, width: int) -> Tensor:
    """Positions 0 to num - 1, sines and cosines by turns: (1, num, width)."""
    rates = torch.pow(10000.0, -torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = torch.arange(num, dtype=torch.float64)[:, None] * rates
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1).float()[None]


class T2TViT(nn.Module):
    """Tokens to token, then a plain vision transformer; without a classifier for 0 classes."""

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        *,
        embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: int,
    ) -> None:
        from timm.models.vision_transformer import Block

        super().__init__()
        self.num_classes, self.num_features = num_classes, embed_dim
        self.global_pool, self.num_prefix_tokens = "token", 1  # as timm says that of its own
        self.tokens_to_token = TokensToToken(in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        side = img_size if isinstance(img_size, int) else img_size[0]  # timm's own is a pair
        # As timm's patches say it: positions are of one size.
        self.img_size, self.strict_img_size = (side, side), True
        positions = sinusoids((side // 16) ** 2 + 1, embed_dim)
        self.pos_embed = nn.Parameter(positions, requires_grad=False)
        self.blocks = nn.Sequential(
            *(
                Block(
                    embed_dim,
                    num_heads,
                    mlp_ratio,
                    drop_path=drop_path_rate * number / (depth - 1),
                    norm_layer=nn.LayerNorm,  # timm's own has another epsilon, 1e-6
                )
                for number in range(depth)
            )
        )
        self.norm = nn.LayerNorm(embed_dim)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward_features(self, images: Tensor) -> Tensor:
        """Tokens after the last norm, the class token first: (C, (S / 16)**2 + 1, D)."""
        tokens = self.tokens_to_token(images)
        tokens = torch.cat((self.cls_token.expand(tokens.shape[0], -1, -1), tokens), dim=1)
        normed: Tensor = self.norm(self.blocks(tokens + self.pos_embed))
        return normed

    def forward_head(self, tokens: Tensor, pre_logits: bool = False) -> Tensor:
        """The class token, and its scores unless told otherwise; transformers calls it by name."""
        scores: Tensor = tokens[:, 0] if pre_logits else self.head(tokens[:, 0])
        return scores

    def forward(self, images: Tensor) -> Tensor:
        """Features (C, D), or scores of the classes."""
        return self.forward_head(self.forward_features(images))


SHAPES = {
    "t2t_vit_7": {"embed_dim": 256, "depth": 7, "num_heads": 4, "mlp_ratio": 2},
    "t2t_vit_14": {"embed_dim": 384, "depth": 14, "num_heads": 6, "mlp_ratio": 3},
}
# timm asks for it, by this name: positions are of one resolution.
default_cfgs = {name: {"fixed_input_size": True, "classifier": "head"} for name in SHAPES}


def _register(name: str) -> None:
    """Tell timm of a model, so that `timm.create_model` knows it."""
    make_torchvision_importable()
    from timm.models import build_model_with_cfg, register_model

    def create(pretrained: bool = False, **settings: Any) -> nn.Module:
        model: nn.Module = build_model_with_cfg(T2TViT, name, pretrained, **SHAPES[name] | settings)
        return model

    create.__name__ = name
    register_model(create)


def _t2t(name: str, resolution: int, drop_path: float) -> nn.Module:
    return of_timm(name, drop_path_rate=drop_path, img_size=resolution)


for _name in SHAPES:
    _register(_name)
t2t_vit_7 = Backbone(partial(_t2t, "t2t_vit_7"), multiple_of=16, lr=1e-3, warmup_epochs=10)
t2t_vit_14 = Backbone(partial(_t2t, "t2t_vit_14"), multiple_of=16, lr=1e-3, warmup_epochs=10)
