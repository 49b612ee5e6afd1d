"""Any other model of timm, as `timm:NAME`."""

from difflib import get_close_matches
from functools import partial
from typing import Any

from torch import nn

from fastidmm.backbones.build import Backbone
from fastidmm.backbones.of_timm import of_timm
from fastidmm.backbones.torchvision_ops import make_torchvision_importable
from fastidmm.errors import UsageError


def any_timm(name: str) -> Backbone:
    """A backbone made of timm's model of that name."""
    make_torchvision_importable()
    import timm

    known = timm.list_models()
    if name not in known:
        raise UsageError(f"timm has no model {name!r}: {nearest(name, known)}")
    return Backbone(partial(_build, name), multiple_of=1, weights=name)


def nearest(name: str, known: list[str]) -> str:
    """The tail of an error about a wrong name among a thousand: the nearest, and what lists all."""
    plain = list(dict.fromkeys(each.partition(".")[0] for each in known))  # less what learnt from
    near = get_close_matches(name, plain, n=5)
    hint = f"the nearest are {', '.join(near)}; " if near else ""
    family = name.split("_")[0]
    return f"{hint}`python -c \"import timm; print(timm.list_models('{family}*'))\"` lists more."


def _build(name: str, resolution: int, drop_path: float) -> nn.Module:
    wanted: dict[str, Any] = {"img_size": resolution, "drop_path_rate": drop_path}
    # Not every model takes both; which ones do is written nowhere but in their signatures.
    for keys in (("img_size", "drop_path_rate"), ("drop_path_rate",), ("img_size",), ()):
        try:
            return of_timm(name, **{key: wanted[key] for key in keys})
        except TypeError:
            continue
    raise UsageError(f"timm's {name} cannot be built without a head.")
