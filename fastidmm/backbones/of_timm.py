"""timm's models without a head, each knowing how timm would make it again."""

from typing import Any

from torch import nn


def of_timm(name: str, *, drop_path_rate: float | None = None, **shape: Any) -> nn.Module:
    """timm's model of that name; `made_of` is what to ask timm for, to have its weights loaded."""
    import timm

    chance = {} if drop_path_rate is None else {"drop_path_rate": drop_path_rate}
    model = timm.create_model(name, pretrained=False, num_classes=0, **shape, **chance)
    model.made_of = (name, shape)  # not the chance of training, which nothing keeps to
    made: nn.Module = model
    return made
