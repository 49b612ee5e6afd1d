"""timm's blocks of a plain vision transformer: the same result from less work.

Where a model gives nothing but its class token, its last block makes nothing else: queries,
projection and hidden layer of the other tokens are read by nobody. And the gradients of queries,
keys and values are put together in the order that their product has them in, so that no copy is
needed.
"""

# ruff: noqa: E402

from torch import Tensor, nn
from torch.nn import functional

from fastidmm.backbones.torchvision_ops import make_torchvision_importable

make_torchvision_importable()
from timm.models.vision_transformer import Attention, Block


class LightBlock(Block):  # type: ignore[misc]
    """timm's block with its weights and their names; of the last one, the class token alone."""

    alone = False

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (C, L, D) to (C, L, D), or to (C, 1, D) where the class token is `alone`."""
        mixed = self.drop_path1(self.ls1(self._attended(self.norm1(x))))
        x = (x[:, :1] if self.alone else x) + mixed
        passed: Tensor = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return passed

    def _attended(self, x: Tensor) -> Tensor:
        attn = self.attn
        shape = (attn.num_heads, attn.head_dim)
        if self.alone:
            weight, bias = attn.qkv.weight, attn.qkv.bias
            sizes = [len(weight) // 3, len(weight) // 3 * 2]
            first, others = weight.split(sizes)
            biases = (None, None) if bias is None else bias.split(sizes)
            q = functional.linear(x[:, :1], first, biases[0]).unflatten(2, shape)
            k, v = functional.linear(x, others, biases[1]).unflatten(2, (2, *shape)).unbind(2)
        else:
            q, k, v = attn.qkv(x).unflatten(2, (3, *shape)).unbind(2)
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))  # (C, heads, L, D / heads)
        mixed = functional.scaled_dot_product_attention(q, k, v)
        projected: Tensor = attn.proj_drop(attn.proj(mixed.transpose(1, 2).flatten(2)))
        return projected


def lighten(model: nn.Module) -> nn.Module:
    """Let a plain vision transformer's blocks be light ones; any other model stays as it is."""
    blocks = getattr(model, "blocks", None)
    if isinstance(blocks, nn.Sequential) and all(map(_plain, blocks)):
        for block in blocks:
            block.__class__ = LightBlock
        blocks[-1].alone = _gives_class_token_alone(model)  # type: ignore[assignment]
    return model


def _plain(block: nn.Module) -> bool:
    """Whether nothing is in a block but what is above."""
    if type(block) is not Block or type(block.attn) is not Attention:
        return False
    named = (getattr(block.attn, name, None) for name in ("gate", "norm", "q_norm", "k_norm"))
    return all(each is None or type(each) is nn.Identity for each in named)


def _gives_class_token_alone(model: nn.Module) -> bool:
    pooled = getattr(model, "global_pool", ""), getattr(model, "attn_pool", None)
    return pooled == ("token", None) and getattr(model, "num_prefix_tokens", 0) == 1
