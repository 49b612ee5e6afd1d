"""Every line of the registry names something that is there; wrong names are answered kindly."""

import pytest

from fastidmm.backbones.build import backbone
from fastidmm.errors import UsageError
from fastidmm.registry import TABLES, find

LINES = [(kind, name) for kind, table in TABLES.items() for name in table]


@pytest.mark.parametrize(("kind", "name"), LINES)
def test_every_line_resolves(kind: str, name: str) -> None:
    assert callable(getattr(find(kind, name), "build", None) or find(kind, name))


def test_a_misspelt_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(
        UsageError, match=r"unknown backbone 'deit_tinny': did you mean 'deit_tiny'"
    ):
        find("backbone", "deit_tinny")


def test_any_model_of_timm_is_a_backbone() -> None:
    from fastidmm.backbones.torchvision_ops import make_torchvision_importable

    make_torchvision_importable()
    assert backbone("timm:vit_tiny_patch16_224").lr == 5e-4
    with pytest.raises(UsageError, match="the nearest are vit_tiny_patch16_224, "):
        backbone("timm:vit_tiny_patch16_2244")
