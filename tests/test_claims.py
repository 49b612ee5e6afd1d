"""The verdict claims what a test of two proportions allows, and no more."""

from typing import Any

import pytest

from fastidmm.evaluate import Score
from fastidmm.reporting.claims import measures, verdict


def scores(**arms: tuple[int, int]) -> dict[str, Any]:
    """Right answers of 1000, pretrained and random, by measure."""
    return {
        arm: {key: Score(right[i], 1000).as_dict() for key, right in arms.items()}
        for i, arm in enumerate(("pretrained", "random"))
    }


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (
            scores(knn=(684, 612), finetuned_48=(801, 796)),
            "Pretraining on these 400 images lifted kNN accuracy on frozen features from "
            "61.2 % to 68.4 %; for fine-tuned accuracy at 48 px (80.1 % with it, 79.6 % without) "
            "no difference can be claimed.",
        ),
        (
            scores(knn=(684, 612), linear_probe=(700, 600)),
            "Pretraining on these 400 images lifted kNN accuracy on frozen features from "
            "61.2 % to 68.4 % and linear-probe accuracy on frozen features from 60.0 % to 70.0 %.",
        ),
        (
            scores(knn=(500, 700)),
            "Pretraining on these 400 images lowered kNN accuracy on frozen features from "
            "70.0 % to 50.0 %.",
        ),
        (  # z = 2.08: the intervals overlap, and the test still finds the harm
            scores(knn=(600, 645)),
            "Pretraining on these 400 images lowered kNN accuracy on frozen features from "
            "64.5 % to 60.0 %.",
        ),
        (  # z = 1.84
            scores(knn=(640, 600)),
            "Pretraining on these 400 images made no difference that 1,000 test images can show: "
            "for kNN accuracy on frozen features (64.0 % with it, 60.0 % without) no difference "
            "can be claimed.",
        ),
        (
            scores(knn=(620, 612)),
            "Pretraining on these 400 images made no difference that 1,000 test images can show: "
            "for kNN accuracy on frozen features (62.0 % with it, 61.2 % without) no difference "
            "can be claimed.",
        ),
        (
            {"pretrained": {"knn": Score(900, 1000).as_dict()}, "random": {}},
            "Pretraining on these 400 images has not been compared with random initialisation on "
            "equal terms yet.",
        ),
    ],
)
def test_the_verdict_claims_what_a_test_allows(found: dict[str, Any], expected: str) -> None:
    said = verdict(measures(found), "Pretraining on these 400 images", num_test=1000)
    assert said.replace("\N{NO-BREAK SPACE}", " ") == expected


def test_unequal_fine_tunings_are_not_compared() -> None:
    found = scores(knn=(500, 500), finetuned_48=(900, 100))
    found["pretrained"]["finetuned_48"]["epochs"] = 200
    found["random"]["finetuned_48"]["epochs"] = 100
    assert [m.outcome for m in measures(found)] == ["open", "missing", "unequal"]
    assert "fine-tuned" not in verdict(
        measures(found), "Pretraining on these 400 images", num_test=1000
    )
