"""Blocks of vision transformers, timm's in all but the way they are gone through.

Where a branch joins the tokens, sum and norm are one operation (`kernels/add_norm.py`). Where a
model gives nothing but its class token, its last block makes nothing else: queries, projection and
hidden layer of the other tokens are read by nobody. Biases have their gradients from who writes
those of their layer (`kernels/linear_gelu.py`, `linear_heads.py`, `linear_add_norm.py`), and a
pyramid's hidden layers are convolved by a kernel (`kernels/linear_dwconv_gelu.py`).
"""

# ruff: noqa: E402

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn import functional

from fastidmm.backbones.drop import Dropout, DropPath
from fastidmm.backbones.torchvision_ops import make_torchvision_importable
from fastidmm.kernels.add_norm import add_norm
from fastidmm.kernels.linear_add_norm import linear_add_norm
from fastidmm.kernels.linear_dwconv_gelu import linear_dwconv_gelu
from fastidmm.kernels.linear_gelu import linear_gelu
from fastidmm.kernels.linear_heads import linear_heads

make_torchvision_importable()
from timm.layers import Mlp
from timm.models import pvt_v2
from timm.models import vision_transformer as vit


class Branch(NamedTuple):
    """What a branch says of the tokens: x (C, L, H), or what its last layer makes of it."""

    x: Tensor
    layer: nn.Linear | None = None

    def whole(self) -> Tensor:
        """With the last layer (C, L, D)."""
        return self.x if self.layer is None else self.layer(self.x)


class LightBlocks(nn.Sequential):
    """Blocks in a row: tokens (C, L, D) to (C, L, D), or (C, 1, D) where one is wanted `alone`."""

    alone = False

    def forward(self, x: Tensor) -> Tensor:
        """What timm's blocks make of the tokens, one after the other."""

        def attention(block: Any, normed: Tensor, *, alone: bool) -> Branch:
            mixed = attended(block.attn, normed, alone=alone)
            return last(mixed, block.attn.proj, block.attn.proj_drop, block.ls1)

        def hidden(block: Any, normed: Tensor) -> Branch:
            mlp = block.mlp
            if not _by_gelu(mlp):
                return Branch(block.ls2(mlp(normed)))
            made = linear_gelu(normed, mlp.fc1.weight, mlp.fc1.bias)
            return last(mlp.norm(mlp.drop1(made)), mlp.fc2, mlp.drop2, block.ls2)

        return through(self, x, attention, hidden, alone=self.alone)


class LightStage(pvt_v2.PyramidVisionTransformerStage):  # type: ignore[misc]
    """A stage of a pyramid vision transformer: maps to maps of fewer tokens."""

    def forward(self, x: Tensor) -> Tensor:
        """As timm's: (C, D, S, S), in the first stage (C, S, S, D), to (C, D, S, S)."""
        if self.downsample is not None:
            x = self.downsample(x)
        size = x.shape[1:3]

        def attention(block: Any, normed: Tensor, *, alone: bool) -> Branch:
            return Branch(block.attn(normed, size))

        def hidden(block: Any, normed: Tensor) -> Branch:
            return fed_among_neighbours(block.mlp, normed, size)

        tokens = self.norm(through(self.blocks, x.flatten(1, 2), attention, hidden))
        maps: Tensor = tokens.unflatten(1, size).permute(0, 3, 1, 2).contiguous()
        return maps


def through(
    blocks: Iterable[Any],
    x: Tensor,
    attention: Callable[..., Branch],
    hidden: Callable[[Any, Tensor], Branch],
    *,
    alone: bool = False,
) -> Tensor:
    """Tokens (C, L, D) through blocks: (C, L, D), or (C, 1, D) for the first `alone`.

    `attention` and `hidden` are a block's two branches, given normalised tokens.
    """
    blocks = list(blocks)
    x, normed = _joined(x, None, blocks[0].norm1)
    for block, following in zip(blocks, [*blocks[1:], None], strict=True):
        narrow = alone and following is None
        mixed = attention(block, normed, alone=narrow)
        x, normed = _joined(x[:, :1] if narrow else x, mixed, block.norm2, block.drop_path1)
        mixed = hidden(block, normed)
        if following is None:
            break
        x, normed = _joined(x, mixed, following.norm1, block.drop_path2)
    passed: Tensor = x + block.drop_path2(mixed.whole())
    return passed


def _joined(
    x: Tensor, branch: Branch | None, norm: nn.LayerNorm, path: nn.Module | None = None
) -> tuple[Tensor, Tensor]:
    """Tokens with what a branch adds to them, and those normalised."""
    scale = path.of(x) if isinstance(path, DropPath) else None
    given, layer = (None, None) if branch is None else branch
    if given is None or layer is None:
        return add_norm(x, given, norm.weight, norm.bias, scale=scale, eps=norm.eps)
    of_layer = layer.weight, layer.bias
    return linear_add_norm(x, given, *of_layer, norm.weight, norm.bias, scale=scale, eps=norm.eps)


def last(x: Tensor, layer: nn.Module, *after: nn.Module) -> Branch:
    """A branch's last layer, left to who adds it to the tokens where nothing comes after."""
    idle = all(
        type(each) is nn.Identity or (type(each) is Dropout and each.p == 0) for each in after
    )
    if idle and type(layer) is nn.Linear and layer.bias is not None:
        return Branch(x, layer)
    for each in (layer, *after):
        x = each(x)
    return Branch(x)


def attended(attn: vit.Attention, x: Tensor, *, alone: bool = False) -> Tensor:
    """What the heads make of normalised tokens (C, L, D), for all or the first `alone`: (C, L, D).

    The projection is yet to come.
    """
    weight, bias = attn.qkv.weight, attn.qkv.bias
    if alone:
        shape, sizes = (attn.num_heads, attn.head_dim), [len(weight) // 3, len(weight) // 3 * 2]
        first, others = weight.split(sizes)
        biases = (None, None) if bias is None else bias.split(sizes)
        q = functional.linear(x[:, :1], first, biases[0]).unflatten(2, shape)
        k, v = functional.linear(x, others, biases[1]).unflatten(2, (2, *shape)).unbind(2)
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))  # (C, heads, L, D / heads)
    else:
        q, k, v = linear_heads(x, weight, bias, attn.num_heads)
    mixed = functional.scaled_dot_product_attention(q, k, v)
    return mixed.transpose(1, 2).flatten(2)


def fed_among_neighbours(mlp: Any, x: Tensor, size: Sequence[int]) -> Branch:
    """What a pyramid's hidden layer, which sees the tokens around on a map, says of (C, L, D)."""
    if not _by_dwconv(mlp):
        return Branch(mlp(x, size))
    of_layer, conv = (mlp.fc1.weight, mlp.fc1.bias), mlp.dwconv
    made = linear_dwconv_gelu(x, *of_layer, conv.weight, conv.bias, size)
    return last(mlp.drop(made), mlp.fc2, mlp.drop)


def lighten(model: nn.Module) -> nn.Module:
    """Let a model's blocks be gone through so, where they are of these kinds."""
    blocks = getattr(model, "blocks", None)
    if type(blocks) is nn.Sequential and all(map(_plain, blocks)):
        blocks.__class__ = LightBlocks
        pooled = getattr(model, "global_pool", ""), getattr(model, "attn_pool", None)
        only_token = getattr(model, "num_prefix_tokens", 0) == 1
        blocks.alone = pooled == ("token", None) and only_token  # type: ignore[assignment]
    stages: list[Any] = list(model.modules())
    for stage in stages:
        if type(stage) is pvt_v2.PyramidVisionTransformerStage and all(map(_joins, stage.blocks)):
            stage.__class__ = LightStage
    return model


def _by_gelu(mlp: Any) -> bool:
    """Whether its hidden layer is what `linear_gelu` does."""
    if type(mlp) is not Mlp or type(mlp.fc1) is not nn.Linear or mlp.fc1.bias is None:
        return False
    return _is_gelu(mlp.act)


def _by_dwconv(mlp: Any) -> bool:
    """Whether its hidden layer is what `linear_dwconv_gelu` does."""
    if type(mlp) is not pvt_v2.MlpWithDepthwiseConv or type(mlp.relu) is not nn.Identity:
        return False
    if type(mlp.fc1) is not nn.Linear or mlp.fc1.bias is None:
        return False
    # timm makes no other convolution there.
    return type(mlp.dwconv) is nn.Conv2d and mlp.dwconv.bias is not None and _is_gelu(mlp.act)


def _is_gelu(act: nn.Module) -> bool:
    return type(act) is nn.GELU and act.approximate == "none"


def _plain(block: nn.Module) -> bool:
    """Whether nothing is in a plain vision transformer's block but what is above."""
    if type(block) is not vit.Block or type(block.attn) is not vit.Attention:
        return False
    idle = [getattr(block.attn, name, None) for name in ("gate", "norm", "q_norm", "k_norm")]
    return all(each is None or type(each) is nn.Identity for each in idle) and _joins(block)


def _joins(block: Any) -> bool:
    """Whether its branches are joined by what `add_norm` does."""
    norms, paths = (block.norm1, block.norm2), (block.drop_path1, block.drop_path2)
    return all(isinstance(n, nn.LayerNorm) and n.bias is not None for n in norms) and all(
        isinstance(path, DropPath | nn.Identity) for path in paths
    )
