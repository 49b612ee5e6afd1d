"""Forecasts: their arithmetic, a run's of itself, and `fastidmm plan`, which leaves nothing."""

import json
import math
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from recorded import Recorded
from test_capture import parts_of
from test_cli import TINY, Type, sentence
from test_cli import typed as typed
from toy_runs import Killed, kill_before_update

from fastidmm import checkpoint, cli_plan, forecast, stages, train, trial
from fastidmm.batch import Batch, Loss
from fastidmm.capture import Captured
from fastidmm.forecast import (
    Costs,
    Course,
    Events,
    Forecast,
    Outlook,
    kept,
    middle_mean,
    spell,
    total,
)
from fastidmm.lock import LOCK
from fastidmm.methods.idmm import IDMM
from fastidmm.progress import Clock
from fastidmm.recipe import Recipe

# Epochs of 8, 8 and 4 images; a look after steps 6 and 9, checkpoints after 0, 3, 6 and 9.
COURSE = Course(20, 8, epochs=3, knn=6, score=0, checkpoint=3)
STAGES = [
    "--set=finetune.resolution=16", "--set=finetune.epochs=2", "--set=finetune.batch_size=8",
    "--set=finetune_high.epochs=1", "--set=finetune_high.batch_size=8",
]  # fmt: skip


def recipe(**changes: Any) -> Recipe:
    """Fifty steps, ten an epoch, each with a metric line."""
    run = {
        "dataset": "toy", "backbone": "vit_micro", "epochs": 5, "batch_size": 2, "resolution": 16,
        "knn_every": 2, "checkpoint_every": 2, **changes,
    }  # fmt: skip
    return Recipe.of({"run": run, "method": {"num_small": 0}})


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four steps of a stage are enough, so that tests are soon over."""
    monkeypatch.setattr(trial, "STEPS", 4)


def test_what_is_left_is_counted() -> None:
    assert COURSE.after(0) == Events(full=6, tail=3, knn=2, score=0, checkpoint=4)
    assert COURSE.after(4) == Events(full=3, tail=2, knn=2, score=0, checkpoint=2)
    assert COURSE.after(6) == Events(full=2, tail=1, knn=1, score=0, checkpoint=1)
    assert COURSE.after(9) == Events(0, 0, 0, 0, 0)
    assert [COURSE.images(step) for step in (0, 1, 3, 5, 9)] == [0, 8, 20, 36, 60]
    # Whole batches alone, and fewer images than one.
    assert Course(16, 8, 2, 0, 3, 5).after(0) == Events(4, 0, 0, 2, 2)
    assert Course(5, 8, 4, 0, 0, 9).after(1) == Events(3, 0, 0, 0, 1)
    assert Course(5, 8, 4, 0, 0, 9).images(4) == 20


@pytest.mark.parametrize("num", [20, 16, 3])
def test_a_run_does_what_was_counted(toy: str, num: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run's own looks, checkpoints and steps, counted as they happen."""
    met: list[object] = []

    def noting(module: Any, name: str, mark: Callable[[Any], object]) -> None:
        made = getattr(module, name)

        def noted(*args: Any, **more: Any) -> Any:
            met.append(mark(args))
            return made(*args, **more)

        monkeypatch.setattr(module, name, noted)

    noting(train, "features_seen", lambda _: "knn")
    noting(train, "classified", lambda _: "score")
    noting(checkpoint, "save", lambda _: "checkpoint")
    noting(IDMM, "forward", lambda a: a[1].num_images)
    settings = {"num_images": num, "batch_size": 8, "epochs": 7, "checkpoint_every": 3}
    stages.pretrain(recipe(**settings), "run")
    spe = math.ceil(num / 8)
    course = Course(num, 8, 7, knn=2 * spe, score=0, checkpoint=3 * spe)
    counted = course.after(0)
    assert (met.count("knn"), met.count("score")) == (counted.knn, counted.score) == (4, 0)
    assert met.count("checkpoint") == counted.checkpoint == 4
    assert met.count(course.batch) == counted.full
    assert counted.tail == (met.count(course.tail) if course.tail else 0)


def test_seconds_are_the_events() -> None:
    costs = Costs(full=2.0, tail=0.5, knn=3.0, score=7.0, checkpoint=0.25)
    assert COURSE.after(0).seconds(costs) == 6 * 2 + 3 * 0.5 + 2 * 3 + 4 * 0.25
    assert Events(0, 0, 0, 2, 0).seconds(costs) == 14


def test_a_middle_mean_is_of_neither_end() -> None:
    """A quarter at each is left out, in whatever order: the fastest, and a graph's capture."""
    assert middle_mean([0, 1, 1, 1, 1, 1, 1, 9]) == middle_mean([1, 9, 1, 1, 0, 1, 1, 1]) == 1
    assert middle_mean([2, 4, 9]) == 5  # no quarter of three


def test_steps_tried_are_told_apart() -> None:
    """Warm-up is what the first steps took beyond a settled one, 10 - 2 x 3; medians are not it."""
    blocks = [
        trial.Block(tail=False, settled=False, steps=2, seconds=10.0),
        trial.Block(tail=False, settled=True, steps=5, seconds=10.0),
        trial.Block(tail=True, settled=True, steps=1, seconds=1.75),
        trial.Block(tail=False, settled=True, steps=5, seconds=20.0),
    ]
    assert trial.settled(blocks, COURSE) == (3.0, 1.75, 4.0)
    del blocks[2]  # then by its images, 4 of 8
    assert trial.settled(blocks, COURSE) == (3.0, 1.5, 4.0)
    assert not trial.enough(blocks, COURSE, late=False)
    assert trial.enough(blocks, COURSE, late=True)
    assert not trial.enough(blocks[:1], COURSE, late=True)


@pytest.mark.parametrize(("ahead", "num"), [(False, 4), (True, 6)])
def test_kinds_are_those_that_share_a_graph(ahead: bool, num: int, tmp_path: Path) -> None:
    parts = parts_of("supervised", tmp_path / "run", views_ahead=ahead)
    captured, steps = Captured(parts, Recorded), range(16)
    kind = trial.kinds(parts, train.course_of(parts))
    alike = [[kind(a) == kind(b) for b in steps] for a in steps]
    assert alike == [[captured._kind(a) == captured._kind(b) for b in steps] for a in steps]
    assert len(set(map(kind, steps))) == num  # Mixup and CutMix, whole and shorter, and what next


def test_a_forecast_and_its_total() -> None:
    one = Forecast("a", 10, 1800, 1700, 2000, memory=5, watts=400.0, micro_batches=4)
    other = Forecast("b", 0, 3600, 3600, 3600, memory=7, watts=100.0)
    assert one.as_dict(2.5) == {
        "stage": "a", "steps": 10, "seconds": 1800, "interval": [1700, 2000], "memory_bytes": 5,
        "energy_wh": 200, "cost": 1.25, "micro_batches": 4,
    }  # fmt: skip
    both = total([one, other])
    assert (both.steps, both.seconds, both.low, both.high, both.memory) == (10, 5400, 5300, 5600, 7)
    assert both.energy == pytest.approx(300) and both.cost(2) == 3
    unknown = Forecast("c", 1, 1, 1, 1, memory=1)
    assert total([one, unknown]).energy is None and unknown.as_dict(None)["cost"] is None
    assert [*map(spell, (0.04, 9.96, 119, 119.6, 7199, 7300))] == [
        "0.0 s", "10 s", "119 s", "2 min 00 s", "119 min 59 s", "2.0 h",
    ]  # fmt: skip
    head, *rows = forecast.table([one, other], 2.0).splitlines()
    assert head.split() == ["steps", "time", "between", "memory", "energy", "cost"]
    assert rows[0].split("  ")[-1].strip() == "1.00" and "200.0 Wh" in rows[0]
    assert rows[-1].startswith("total") and "90 min 00 s" in rows[-1]


def test_an_outlook_counts_images_and_looks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By hand: 0.1 s an image, 50 s of capture once, looks of 2 and 4 s, checkpoints of 0.5 s."""
    course = Course(20, 8, epochs=20, knn=6, score=0, checkpoint=60)
    now = SimpleNamespace(time=100.0)
    monkeypatch.setattr(forecast, "time", SimpleNamespace(perf_counter=lambda: now.time))
    outlook, clock = Outlook(course, crops=2), Clock()
    outlook.restart(0)
    for step in range(1, 26):
        now.time += 0.1 * (4 if step % 3 == 0 else 8) + 50 * (step == 8)
        clock.apart["checkpoint"].append(0.5)
        now.time += 0.5
        if step in (6, 12):
            clock.apart["knn"].append(2.0 * step / 6)
            now.time += 2.0 * step / 6
        outlook.arrived([{"step": step}], clock)
    # 60 steps, of which 35 are left: 232 images; six looks, after 30, 36, ..., 60; a checkpoint.
    assert capsys.readouterr().err == "forecast: 42 s for the 35 steps left\n"
    now.time += 44
    outlook.end()
    assert capsys.readouterr().err == "forecast 42 s, took 44 s\n"
    assert outlook.told == {"forecast_seconds": 41.7, "forecast_took": 44.0}
    # Before the first look: a third of a step's time for each of two crops.
    marks = [(step, 0.1 * course.images(step)) for step in range(5, 10)]
    assert outlook.seconds_after(57, marks, {}) == pytest.approx(2.0 + 20 * 0.1 / 6)


def test_a_run_tells_its_forecast_and_what_came_of_it(
    toy: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = stages.pretrain(recipe(), "whole")
    said = [line for line in capsys.readouterr().err.splitlines() if "forecast" in line]
    assert len(said) == 2 and said[0].endswith(" for the 25 steps left")
    assert said[1] == (
        f"forecast {spell(found['forecast_seconds'])}, took {spell(found['forecast_took'])}"
    )
    assert 0 < found["forecast_took"] <= found["seconds"]
    assert "forecast_seconds" not in stages.resume(Path("runs/whole"))[0]  # nothing was left
    assert kept(Path("runs/whole")) == {key: v for key, v in found.items() if "forecast" in key}
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_before_update(patch, 22)
        stages.pretrain(recipe(), "killed")
    assert "forecast" not in capsys.readouterr().err
    assert kept(Path("runs/killed")) == {}
    assert "forecast_seconds" in stages.resume(Path("runs/killed"))[0]
    assert kept(Path("runs/killed"))["forecast_took"] >= 0
    assert " for the 5 steps left" in capsys.readouterr().err  # from the checkpoint of step 20


def tree() -> dict[str, bytes]:
    """Every file below the working directory."""
    return {str(p): p.read_bytes() for p in Path().rglob("*") if p.is_file()}


def test_plan_forecasts_every_stage_and_leaves_nothing(typed: Type, toy: str, brief: None) -> None:
    Path("runs").mkdir()
    before = tree()
    status, out, _ = typed("plan", *TINY, *STAGES, "--price", "3.6", "--json")
    assert status == 0
    assert tree() == before and not list(Path("runs").iterdir())
    found = json.loads(out)
    rows = {row["stage"]: row for row in found["stages"]}
    steps = {name: row["steps"] for name, row in rows.items()}
    assert steps == {
        "pretrain": 3, "finetune-16": 6, "scratch-16": 6, "finetune-32": 3, "evaluate": 0,
    }  # fmt: skip
    for row in (*found["stages"], found["total"]):
        low, high = row["interval"]
        assert 0 < low <= row["seconds"] <= high and row["memory_bytes"] > 1e6
        assert row["cost"] == pytest.approx(row["seconds"] / 1000, abs=1e-4)
        assert row["energy_wh"] is None
    assert found["total"]["seconds"] == pytest.approx(
        sum(row["seconds"] for row in rows.values()), abs=0.05
    )


def test_what_a_killed_trial_has_left_is_removed_by_the_next(home: Path) -> None:
    """But not what one that still goes on has made."""
    for name in ("dead", "alive"):
        Path("runs", f".plan-{name}").mkdir(parents=True)
        Path("runs", f".plan-{name}", LOCK).touch()
    holds = (
        "import fcntl; held = open('runs/.plan-alive/.lock', 'w'); "
        "fcntl.lockf(held, fcntl.LOCK_EX); print('held', flush=True); input()"
    )
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", holds], stdin=pipe, stdout=pipe) as other:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        with trial.soon_gone(".plan-") as work:
            assert sorted(os.listdir("runs")) == sorted([work.name, ".plan-alive"])
        assert os.listdir("runs") == [".plan-alive"]
        other.communicate(b"\n")


def test_plan_of_photographs_without_labels(typed: Type, bare: str, brief: None) -> None:
    status, out, err = typed("plan", *TINY)
    assert status == 0 and "only pretraining is forecast: the images of 'bare' have no" in err
    assert "each stage is tried for 8 s or 5 steps, whichever takes longer: minutes" in err
    assert "idmm at 16 px: 5 to 60 steps of 8 images are tried" in err
    assert [line.split()[0] for line in out.splitlines()[1:]] == ["pretrain", "total"]
    assert not Path("runs").exists() and not list(Path().glob(".plan*"))


def test_plan_of_a_long_run_on_a_cpu_names_a_short_one(
    typed: Type, bare: str, brief: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, out, _ = typed("plan", *TINY, "--epochs", 10**6)
    assert out.splitlines()[-1] == f"a run of minutes on a CPU: {cli_plan.SMALL}"
    assert typed("plan", *TINY, *shlex.split(cli_plan.SMALL), "--json")[0] == 0


def test_wrong_uses_of_plan(typed: Type, toy: str) -> None:
    status, _, err = typed("plan", "--dataset", "nothing")
    assert status == 2 and "no dataset 'nothing' is prepared" in sentence(err)
    assert typed("plan", "--price", "-1")[0] == 2
    status, _, err = typed("plan", *TINY, "--set", "finetune.resolution=17")
    assert status == 2 and "17" in sentence(err)
    assert not list(Path().glob(".plan*"))


def scarce(monkeypatch: pytest.MonkeyPatch, crops: int) -> None:
    """Memory for so many crops at once."""
    forward = IDMM.forward

    def with_little(self: IDMM, batch: Batch) -> Loss:
        if batch.num_crops > crops:
            raise torch.OutOfMemoryError("too many")
        return forward(self, batch)

    monkeypatch.setattr(IDMM, "forward", with_little)


def test_plan_finds_the_micro_batches_that_memory_asks_for(
    typed: Type, toy: str, monkeypatch: pytest.MonkeyPatch, brief: None
) -> None:
    scarce(monkeypatch, 12)  # of 48
    _, out, _ = typed("plan", *TINY, *STAGES[:3], "--set=finetune_high.epochs=0")
    assert out.splitlines()[-1] == (
        "pretrain: memory is short; --set run.micro_batches=4 cuts batches so from the start"
    )


def test_plan_says_where_memory_does_not_do(
    typed: Type, toy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scarce(monkeypatch, 0)
    status, _, err = typed("plan", *TINY, *STAGES)
    assert status == 5 and "a step of idmm at 16 px: lower --batch-size" in sentence(err)
    assert not list(Path().glob(".plan*"))


def test_power_is_asked_for_while_steps_are_made(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    watts = iter([250_000, 350_000])
    monkeypatch.setattr(torch.cuda, "power_draw", lambda device: next(watts))
    monkeypatch.setattr(trial, "SAMPLE", 0.001)
    with trial.Power(torch.device("cuda")) as power:
        while power._thread.is_alive():  # until there is no third
            time.sleep(0.001)
    assert power.watts == 300
    power._found = [100.0] * 15 + [400.0, 500.0]  # NVML tells a mean of the second before
    monkeypatch.setattr(trial, "SAMPLE", 0.1)
    assert power.watts == 450
    assert "energy is not measured" in capsys.readouterr().err
    with trial.Power(torch.device("cpu")) as power:
        pass
    assert power.watts is None
