"""What fits a budget: stages measured, those of every seed summed, and a share of the time kept."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fastidmm.forecast import Costs, Course
from fastidmm.paper import budget, reproduce
from fastidmm.paper.budget import Cost
from fastidmm.paper.published import chosen
from fastidmm.recipe import Recipe


def test_a_stage_costs_its_steps_and_all_that_is_done_once(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Powers of two, so that what is left out or counted twice is seen: two checkpoints of 16 s."""
    costs = Costs(full=3.0, tail=64.0, knn=4.0, score=8.0, checkpoint=16.0)
    course = Course(20, 8, epochs=2, knn=6, score=0, checkpoint=6)
    found = SimpleNamespace(opening=1.0, warm_up=2.0, costs=costs, course=course)
    asked: list[Recipe] = []

    def tried(folder: Path, recipe: Recipe) -> Any:
        asked.append(recipe)
        return found

    monkeypatch.setattr(budget, "tried", tried)
    tables = {"run": {"dataset": "toy", "backbone": "vit_micro", "method": "idmm", "epochs": 2}}
    told = budget.measured(tables, epochs=7, images=20)
    assert told == Cost(7, 20, per_image=3 / 8, fixed=1 + 2 + 4 + 8 + 2 * 16)
    assert [each.run.epochs for each in asked] == [2]


def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Time for `reproduce` that passes only when it is told to."""
    now = [1000.0]
    monkeypatch.setattr(reproduce, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def passed(seconds: float) -> None:
        now[0] += seconds

    return passed


@pytest.mark.parametrize("seeds", [1, 2])
def test_what_is_cut_fills_85_percent_of_what_measuring_left(
    toy: str, seeds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An hour, of which two stages take 500 s each to measure: random's is the fine-tuned arm's.

    Of every seed there are a pretraining of 800 epochs and two fine-tunings of 200.
    """
    passed, measured = clock(monkeypatch), []

    def cost(tables: Any, *, epochs: int, images: int) -> Cost:
        passed(500)
        measured.append(tables["run"]["method"])
        return Cost(epochs, images, per_image=0.001, fixed=10.0)

    monkeypatch.setattr(reproduce, "measured", cost)
    arms = [c for c in chosen("T1", toy, "vit_micro") if c.arm in ("random", "idmm")]
    asked = reproduce.Table("name", "T1", arms, seeds, images={toy: 2000})
    reproduce.cut_short(asked, "1h", measure=True)
    assert sorted(measured) == ["idmm", "supervised"]

    def total(share: float, num: int) -> float:
        epochs = round(800 * share) + 2 * round(200 * share)
        return seeds * (3 * 10.0 + 0.001 * epochs * num)

    spent = total(asked.cut.share, asked.cut.num_images)
    assert asked.cut.num_images == 2000 and 0.97 < spent / (0.85 * (3600 - 1000)) <= 1
    assert f"Forecast for all of it: {spent / 60:.1f} minutes." in asked.notes
