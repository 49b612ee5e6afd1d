"""Any other model of timm, as `timm:NAME`."""

from functools import partial
from typing import Any

from torch import nn

from fastidmm.backbones.build import Backbone
from fastidmm.backbones.of_timm import of_timm
from fastidmm.backbones.torchvision_ops import make_torchvision_importable
from fastidmm.errors import UsageError, did_you_mean


def any_timm(name: str) -> Backbone:
    """A backbone made of timm's model of that name."""
    make_torchvision_importable()
    import timm

    known = timm.list_models()
    if name not in known:
        near = [n for n in known if n.split("_")[0] == name.split("_")[0]] or known[:20]
        raise UsageError(f"timm has no model {name!r}: {did_you_mean(name, near)}")
    return Backbone(partial(_build, name), multiple_of=1, weights=name)


def _build(name: str, resolution: int, drop_path: float) -> nn.Module:
    wanted: dict[str, Any] = {"img_size": resolution, "drop_path_rate": drop_path}
    # Not every model takes both; which ones do is written nowhere but in their signatures.
    for keys in (("img_size", "drop_path_rate"), ("drop_path_rate",), ("img_size",), ()):
        try:
            return of_timm(name, **{key: wanted[key] for key in keys})
        except TypeError:
            continue
    raise UsageError(f"timm's {name} cannot be built without a head.")
