"""What every method shows of its images, as published: whole groups of views, written out."""

from dataclasses import replace
from typing import Any

import pytest
from synthetic import SMALL

from fastidmm.backbones.build import BackboneOptions, build_encoder
from fastidmm.batch import Range, ViewGroup
from fastidmm.chance import Counters
from fastidmm.registry import find

SIDE = 40


def seen(name: str, **options: Any) -> list[ViewGroup]:
    """A method's views at 40 px."""
    kind = find("method", name)
    encoder = build_encoder("vit_micro", BackboneOptions(), resolution=SIDE, counters=Counters(0))
    given = kind.Options(**SMALL.get(name, {}) | options)
    shape = {"resolution": SIDE, "num_rows": 9, "num_classes": 3, "batch_size": 4}
    found: list[ViewGroup] = kind(encoder, given, **shape).views
    return found


def jitter(span: Range) -> dict[str, Any]:
    """Of brightness, contrast and saturation, by factors, in eight crops of ten."""
    return {"jitter": 0.8, "brightness": span, "contrast": span, "saturation": span}


ANY: dict[str, Any] = {
    "count": 1, "size": SIDE, "ratio": (3 / 4, 4 / 3), "interpolation": "bilinear", "flip": 0.5,
    "gray": 0.2, "blur": 0.5, "sigma": (0.1, 2.0), "solarize": 0.0, "randaugment": 0,
    "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "mix": "none", "alpha": 0.5,
}  # fmt: skip
IDMM = ViewGroup(
    **ANY
    | jitter((0.2, 1.8))
    | {"count": 2, "scale": (0.14, 1.0), "hue": (-0.2, 0.2), "mix": "cutmix"}
)
MOCO = ViewGroup(**ANY | jitter((0.6, 1.4)), scale=(0.2, 1.0), hue=(-0.1, 0.1))
# BYOL's chain, whose saturation varies by half as much.
BYOL = replace(MOCO, saturation=(0.8, 1.2))
V3, DINO = replace(BYOL, scale=(0.08, 1.0)), replace(BYOL, interpolation="bicubic")
FINE = ViewGroup(
    **ANY | jitter((0.6, 1.4)) | {"jitter": 0.4, "interpolation": "bicubic", "blur": 0.0},
    scale=(0.08, 1.0), hue=(-0.1, 0.1),
)  # fmt: skip
PUBLISHED = {
    "idmm": [IDMM, replace(IDMM, count=4, scale=(0.05, 0.4))],
    "simclr": [replace(MOCO, count=2)],
    "supcon": [replace(MOCO, count=2)],
    "mocov2": [MOCO, MOCO],
    "mocov3": [replace(V3, blur=1.0), replace(V3, blur=0.1, solarize=0.2)],
    "dino": [
        replace(DINO, scale=(0.4, 1.0), blur=1.0),
        replace(DINO, scale=(0.4, 1.0), blur=0.1, solarize=0.2),
        *[replace(DINO, scale=(0.05, 0.4))] * 2,
    ],
    "supervised": [replace(FINE, randaugment=2, mix="alternate")],
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_views_are_the_published_ones(name: str) -> None:
    assert seen(name) == PUBLISHED[name]


def test_settings_reach_the_views() -> None:
    own: dict[str, Any] = {"sigma": (0.3, 1.1), "std": (0.228, 0.224, 0.225)}
    asked = {**own, "cutmix_alpha": 0.7, "num_large": 3, "small_scale": (0.1, 0.2)}
    large, small = PUBLISHED["idmm"]
    assert seen("idmm", **asked) == [
        replace(large, **own, alpha=0.7, count=3),
        replace(small, **own, alpha=0.7, scale=(0.1, 0.2)),
    ]
    assert [group.mix for group in seen("idmm", cutmix=False)] == ["none", "none"]
    asked = {"mix_alpha": 0.7, "mix": "mixup", "jitter": 0.1, "gray": 0.3, "randaugment": 1}
    expected = {**asked, "scale": (0.5, 0.9), "alpha": asked.pop("mix_alpha")}
    del expected["mix_alpha"]
    (tuned,) = PUBLISHED["supervised"]
    assert seen("supervised", mix_alpha=0.7, scale=(0.5, 0.9), **asked) == [
        replace(tuned, **expected)
    ]
    for name in ("simclr", "supcon", "mocov2", "mocov3"):
        assert {group.scale for group in seen(name, scale=(0.3, 0.4))} == {(0.3, 0.4)}
