"""The page on scale: what it says is what the code has, and is what its script prints today."""

from pathlib import Path

import pytest

from fastidmm.backbones.build import BackboneOptions, build_encoder
from fastidmm.bench import scaling
from fastidmm.bench.scaling import CROPS, Step
from fastidmm.chance import Counters

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"


def test_the_page_is_current() -> None:
    assert PAGE.read_text() == scaling.page(), "python -m fastidmm.bench.scaling > docs/scaling.md"


def test_the_backbone_is_the_one_meant() -> None:
    model = build_encoder("deit_tiny", BackboneOptions(), resolution=112, counters=Counters(0))
    assert sum(p.numel() for p in model.parameters()) == scaling.PARAMETERS
    assert model.num_features == scaling.WIDTH


def test_a_head_of_a_million_rows_by_hand() -> None:
    one, eight = Step(1_000_000, 1), Step(1_000_000, 8)
    assert not one.sharded and eight.sharded and not Step(6_144, 8).sharded
    assert one.sent == 0 and one.head_flop == 6 * 1536 * 1e6 * 192
    assert one.state == 16 * 1e6 * 193 == 8 * eight.state
    assert eight.summed == pytest.approx(2 * 7 / 8 * 4 * 1e6 * 193)
    # Features to all, their gradients summed, 32 bytes of what was drawn, 4 numbers of each rank.
    by_hand = 7 / 8 * 4 * 192 * CROPS * 3 + 7 / 8 * 32 * CROPS + 7 * 16 * CROPS
    assert eight.exchanged == pytest.approx(by_hand)
    assert eight.logits == 4 * 1536 * 125_000


def test_pixels_lie_where_half_of_the_memory_holds_them() -> None:
    places = [scaling.tier(num) for num in (2_040, 125_000, 126_000, 800_000, 900_000)]
    assert places == ["GPU", "GPU", "host", "host", "read in every step"]
