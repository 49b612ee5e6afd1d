"""Tables made again on a toy dataset: forecast, cut, interrupted, gone on with, told."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from made_runs import made_run, save
from test_cli import Type, sentence
from test_cli import typed as typed

from fastidmm import registry
from fastidmm.batch import Batch, Loss
from fastidmm.errors import DataError, UsageError
from fastidmm.evaluate import Score
from fastidmm.methods.idmm import IDMM
from fastidmm.paper import reproduce
from fastidmm.paper.budget import Cost, fitting, seconds_of
from fastidmm.paper.protocol import Cut, Run, Work, work
from fastidmm.paper.published import TABLES, Cell, chosen
from fastidmm.paper.sheet import Row, Sheet
from fastidmm.record import Record

ASKED = ("reproduce", "T1", "--dataset", "toy", "--budget", "60s", "--seeds", 1)


@pytest.fixture
def two_arms(monkeypatch: pytest.MonkeyPatch) -> None:
    """A registry of IDMM alone, on a machine where every image costs the same."""
    kept = {name: registry.METHODS[name] for name in ("idmm", "supervised")}
    monkeypatch.setattr(reproduce, "METHODS", kept)

    def cost(tables: Any, *, epochs: int, images: int) -> Cost:
        return Cost(epochs, images, per_image=0.5, fixed=1.0)

    monkeypatch.setattr(reproduce, "measured", cost)


# --- the arithmetic -----------------------------------------------------------------------------


def test_budgets_are_times() -> None:
    assert [seconds_of(text) for text in ("90s", "10m", "1.5h")] == [90, 600, 5400]
    for text in ("10", "m", "-1m", "0s", "1d", "ten"):
        with pytest.raises(UsageError, match="such as 90s, 10m or 2h"):
            seconds_of(text)


@pytest.mark.parametrize("seconds", [3.2e5, 4e4, 5e3, 3e3, 900, 300, 60, 25])
def test_what_fits_is_the_most_that_fits(seconds: float) -> None:
    costs = [Cost(800, 2000, 0.01, 5), Cost(200, 2000, 0.02, 5), Cost(100, 500, 0.1, 5)]

    def total(share: float, num: int) -> float:
        each = ((800, 2000, 0.01), (200, 2000, 0.02), (100, 500, 0.1))
        return 15 + sum(p * min(num, n) * max(1, round(share * e)) for e, n, p in each)

    share, num = fitting(costs, seconds)
    assert total(share, num) <= seconds
    if share == 1:
        assert num == 2000
    elif share > 1 / 50:  # epochs alone are cut
        assert num == 2000 and total(share * 1.05, num) > seconds
    elif share == 1 / 50:  # then images
        assert 128 <= num < 2000 and total(share, num + 20) > seconds
    elif share > 1 / 800:  # then epochs again
        assert num == 128 and total(share * 1.2, num) > seconds
    else:  # then images again
        assert 32 <= num < 128 and total(share, num + 1) > seconds


def test_a_budget_that_is_too_small_names_the_least() -> None:
    """One epoch of each of 32 images: 0.32 + 2 x 5 seconds, of which 85 % are spent."""
    costs = [Cost(800, 2000, 0.005, 5), Cost(200, 2000, 0.005, 5)]
    with pytest.raises(UsageError, match=r"takes 0\.2 minutes here"):
        fitting(costs, 10.3)
    assert fitting(costs, 10.4) == (1 / 800, 40)


# --- what is told -------------------------------------------------------------------------------


def row(*correct: int | None, num: int = 1000, published: float | None = 79.9, **more: Any) -> Row:
    scores = [None if c is None else Score(c, num) for c in correct]
    cell = Cell("T1", "flowers", "deit_tiny", "idmm", 224, 200, published)
    seconds = [None if c is None else 60.0 for c in correct]
    return Row(cell, [f"run{i}" for i in range(len(scores))], scores, seconds, **more)


def test_a_mean_its_interval_and_its_difference() -> None:
    """Student's t of three seeds by hand: 4.303 x 0.012 / sqrt(3) = 0.0298 about 0.80."""
    found = row(795, 800, 805)
    assert found.mean == Score(800, 1000) and found.interval == Score(800, 1000).interval
    assert found.difference == pytest.approx(0.1) and found.differs is False
    apart = row(788, 800, 812)
    assert apart.interval == pytest.approx((0.8 - 0.02981, 0.8 + 0.02981), abs=1e-5)
    assert row(700).differs is True
    # Far by the test images, but not by how far the seeds are apart.
    assert row(600, 700, 800).differs is False and row(600, 700, 800).difference is not None


def test_what_is_not_by_the_protocol_is_not_set_against_it() -> None:
    found = row(700, cut=Cut(0.1, 100, 1.0, "5m"))
    assert found.difference is None and found.differs is None and found.mean
    assert row(700, published=None).difference is None


def test_rows_say_how_far_they_are() -> None:
    assert row(1, 2).status == "done" and row(1, 2).forecast is None
    assert row(None, None, problem="not built: dino").status == "not run (not built: dino)"
    half = row(1, None, None)
    assert half.status == "1 of 3 seeds" and half.forecast == 120
    assert row(None).forecast is None


def test_markdown_and_json_say_the_same(home: Path) -> None:
    sheet = Sheet("reproduce-T1", "T1", [row(700, 701), row(None, problem="why")], ["A note."])
    sheet.write()
    text, told = Path("runs/reproduce-T1.md").read_text(), Path("runs/reproduce-T1.json")
    found = json.loads(told.read_text())
    assert text == sheet.markdown() and found == json.loads(json.dumps(sheet.as_dict()))
    lines = text.splitlines()
    assert lines[2] == "A note."
    head, rule, first, second = (line for line in lines if line.startswith("|"))
    assert len({len(line) for line in (head, rule, first, second)}) == 1
    cells = [part.strip() for part in first.strip("|").split("|")]
    assert cells[:7] == ["flowers", "deit_tiny", "idmm", "224", "200", "79.9", "70.0"]
    assert cells[8] == "-9.9" and found["rows"][0]["mean"] == 70.0
    assert "not run (why)" in second and "no forecast" in second
    assert sorted(os.listdir("runs")) == ["reproduce-T1.json", "reproduce-T1.md"]


@pytest.mark.parametrize("table", TABLES)
def test_dry_runs_need_nothing(typed: Type, home: Path, table: str) -> None:
    status, out, _ = typed("reproduce", table, "--dry-run", "--json")
    found = json.loads(out)
    text, datasets = TABLES[table]
    assert status == 0 and len(found["rows"]) == len(text.strip().splitlines()) * len(datasets)
    assert all(r["status"].startswith("not run (") for r in found["rows"])
    assert typed("reproduce", table, "--dry-run", "--budget", "5m")[0] == 0
    assert not Path("runs").exists() and not home.exists()


def test_a_stage_that_was_killed_has_no_score_though_it_told_some(toy: str) -> None:
    """Three of six steps are kept, after which the test images were scored; then all are."""
    made_run(Path("runs/one"))
    stage = Path("runs/one/finetune-48")
    method, record = made_run(stage, "vit_micro", 48, "supervised"), Record(stage)
    asked = Work(Run("one", {}), resolutions=(32, 48))
    shutil.rmtree(record.checkpoints)
    save(record, 3, method)
    line = {"epoch": 1, "step": 3, "loss": 1.0, "skipped": 0, "test_top1": 0.5, "test_num": 8}
    record.log(line)
    record.flush(wait=True)
    assert reproduce.scored(asked) is None and reproduce.seconds_spent(asked) is None
    save(record, 6, method)
    found = reproduce.scored(asked)
    assert found and found.folder == stage and reproduce.score_of(found) == Score(4, 8)


def test_seconds_spent_are_those_of_the_run_and_of_every_stage(toy: str) -> None:
    for name, seconds in (("one", 3.0), ("one/finetune-32", 5.0), ("one/finetune-48", 7.5)):
        folder = Path("runs") / name
        method = made_run(folder, method="idmm" if name == "one" else "supervised")
        save(Record(folder), 6, method, seconds=seconds)
    assert reproduce.seconds_spent(Work(Run("one", {}), resolutions=(32, 48))) == 15.5
    assert reproduce.seconds_spent(Work(Run("one", {}))) == 3.0


@pytest.mark.parametrize(
    ("there", "lacking"),
    [(["flowers"], "sin10k"), (["sin10k"], "flowers"), ([], "sin10k"), (["flowers", "sin10k"], "")],
)
def test_a_transfer_lacks_what_it_begins_with(
    there: list[str], lacking: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is to be done first is told first."""
    monkeypatch.setattr(reproduce, "prepared", lambda: there)
    (asked,) = (c for c in chosen("T3", "flowers", "pvtv2_b0") if c.arm == "idmm")
    assert reproduce.lack(asked) == (f"fastidmm prepare --dataset {lacking}" if lacking else "")


# --- made again ---------------------------------------------------------------------------------


def test_cut_interrupted_and_gone_on_with(
    typed: Type, toy: str, two_arms: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The same bits as without the interruption; what is done is not done again."""
    status, out, err = typed(*ASKED)
    assert err.splitlines()[-1] == "in runs/reproduce-T1-toy-60s.md and .json"
    assert status == 0 and "not by the paper's protocol" in out.splitlines()[2]
    whole = json.loads(Path("runs/reproduce-T1-toy-60s.json").read_text())
    rows = {r["arm"]: r for r in whole["rows"]}
    assert {a: r["status"] for a, r in rows.items() if r["mean"] is not None} == {
        "random": "done", "idmm": "done"
    }  # fmt: skip
    assert rows["dino"]["status"] == "not run (not built: dino)"
    stage = Record(Path("runs/T1-toy-idmm-vit_micro-s0-60s/finetune-64"))
    assert rows["idmm"]["epochs"] == stage.recipe.run.epochs == 1 and stage.resolution == 64
    assert rows["idmm"]["seeds"][0]["top1"]["num"] == 8

    forward: Callable[[IDMM, Batch], Loss] = IDMM.forward

    def signalled(self: IDMM, batch: Batch) -> Loss:
        if batch.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(self, batch)

    (tmp_path / "again").mkdir()
    monkeypatch.chdir(tmp_path / "again")
    with monkeypatch.context() as patch:
        patch.setattr(IDMM, "forward", signalled)
        status, _, err = typed(*ASKED)
    assert (status, sentence(err)) == (75, "fastidmm: stopped; the same command goes on.")
    half = json.loads(Path("runs/reproduce-T1-toy-60s.json").read_text())
    assert [r["arm"] for r in half["rows"] if r["mean"] is not None] == ["random"]
    status, _, err = typed(*ASKED)
    assert status == 0 and "measuring" not in err and "random-vit_micro-s0-60s: epoch" not in err
    again = json.loads(Path("runs/reproduce-T1-toy-60s.json").read_text())
    for before, now in zip(whole["rows"], again["rows"], strict=True):
        assert (before["arm"], before["mean"]) == (now["arm"], now["mean"])
    losses = [
        [line["loss"] for line in Record(tmp_path / place / name).metrics()]
        for place in ("runs", "again/runs")
        for name in ("T1-toy-idmm-vit_micro-s0-60s/finetune-64",)
    ]
    assert losses[0] == losses[1] and losses[0]


def test_a_stage_that_was_cut_is_gone_on_with(
    typed: Type, toy: str, two_arms: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastidmm.methods.supervised import Supervised

    forward: Callable[[Supervised, Batch], Loss] = Supervised.forward

    def signalled(self: Supervised, batch: Batch) -> Loss:
        if batch.step == 1 and Path("runs/T1-toy-idmm-vit_micro-s0-60s/finetune-64").exists():
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Supervised, "forward", signalled)
        assert typed(*ASKED)[0] == 75
    assert typed(*ASKED)[0] == 0
    names = [p.name for p in Path("runs/T1-toy-idmm-vit_micro-s0-60s").glob("finetune*")]
    assert names == ["finetune-64"]


def test_one_cells_failure_loses_no_other(
    typed: Type, toy: str, two_arms: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    bring = reproduce.bring

    def failing(work: Work) -> None:
        if "random" in work.run.name:
            raise DataError("a photograph is broken: mend it.")
        bring(work)

    monkeypatch.setattr(reproduce, "bring", failing)
    status, out, err = typed(*ASKED, "--json")
    rows = {r["arm"]: r["status"] for r in json.loads(out)["rows"]}
    assert status == DataError.status and rows["idmm"] == "done"
    assert rows["random"] == "not run (a photograph is broken: mend it.)"
    assert "random on toy: a photograph is broken" in err


def test_what_was_made_by_another_recipe_is_told(typed: Type, toy: str, two_arms: None) -> None:
    words = ("--backbone", "vit_micro", "--epochs", 1, "--batch-size", 8, "--resolution", 16)
    assert typed("pretrain", *words, "--run", "T1-toy-idmm-vit_micro-s0-60s")[0] == 0
    status, out, _ = typed(*ASKED)
    assert status == 2 and "was made by another recipe than this table's: move it away" in out


@pytest.mark.parametrize(
    ("table", "key", "value"),
    [("optim", "lr", 1e-5), ("run", "seed", 3), ("backbone", "drop_path", 0.3)],
)
def test_a_single_number_makes_another_recipe(toy: str, table: str, key: str, value: float) -> None:
    """Where batches come from does not: that is settled by the machine."""
    made_run(Path("runs/one"))
    tables = Record(Path("runs/one")).recipe.tables()
    same = {**tables, "loader": {}, "run": {**tables["run"], "loader": "torch"}}
    assert reproduce.begun(Run("one", same)).folder == Path("runs/one")
    other = {**tables, table: {**tables[table], key: value}}
    with pytest.raises(UsageError, match=r"runs/one was made by another recipe than this table's"):
        reproduce.begun(Run("one", other))


def test_transfer_goes_on_from_one_run(
    typed: Type, toy: str, two_arms: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the toy for SIN-10k and for another dataset: pretrained once, tuned on the other."""
    from fastidmm.datasets.folder import Folder
    from fastidmm.preparing.prepare import prepare

    source = Folder().open(from_=Path("photos"), seed=0)
    for name in ("sin10k", "pets"):
        prepare(source, name, workers=0, quiet=True)
    words = ("reproduce", "T3", "--dataset", "pets", "--budget", "60s", "--seeds", 1)
    status, _, err = typed(*words)
    assert status == 0 and err.count("head new: from runs/T3-sin10k-idmm-vit_micro-s0-60s") == 1
    tuned = Record(Path("runs/T3-pets-idmm-vit_micro-s0-60s"))
    assert tuned.init and tuned.init.is_dir() and tuned.recipe.run.dataset == "pets"
    assert tuned.pretrained and tuned.recipe.run.method == "supervised"


def test_cost_is_measured_by_steps(toy: str) -> None:
    from fastidmm.paper.budget import measured

    run = {"dataset": toy, "backbone": "vit_micro", "batch_size": 8, "resolution": 16}
    for method in ("idmm", "supervised"):
        found = measured({"run": {**run, "method": method}}, epochs=7, images=20)
        assert (found.epochs, found.images) == (7, 20)
        assert found.per_image > 0 and found.fixed > 0
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("T9",), "no table 'T9'"),
        (("T1", "--dataset", "flwers"), "did you mean 'flowers'"),
        (("T1", "--backbone", "deit_tinny"), "did you mean 'deit_tiny'"),
        (("T1", "--budget", "soon"), "such as 90s, 10m or 2h"),
        (("T1", "--dataset", "flowers"), "can be run here yet: fastidmm prepare --dataset flowers"),
        (("T4",), "a recipe only: configs/imagenet.toml"),
    ],
)
def test_wrong_uses(typed: Type, home: Path, words: tuple[str, ...], message: str) -> None:
    status, _, err = typed("reproduce", *words)
    assert (status, message in sentence(err)) == (2, True), err
    assert not Path("runs").exists()


def test_names_of_runs_that_would_be_too_long_are_told(home: Path) -> None:
    (cell,) = (c for c in chosen("T1", "x" * 40, "t2t_vit_7") if c.arm == "idmm")
    assert work(cell, 0, Cut(), {}).run.name == f"T1-{'x' * 40}-idmm-t2t_vit_7-s0"
    (cell,) = (c for c in chosen("T1", "x" * 45, "t2t_vit_7") if c.arm == "idmm")
    with pytest.raises(UsageError, match=r"longer than 64 letters: prepare 'x+' again"):
        work(cell, 0, Cut(), {})


def test_other_seeds_are_another_cut(typed: Type, toy: str, two_arms: None) -> None:
    Path("runs").mkdir()
    cut = {"share": 0.02, "num_images": 8, "scale": 2 / 7, "suffix": "60s", "seeds": 3}
    Path("runs/reproduce-T1-toy-60s.json").write_text(json.dumps({"cut": cut}))
    status, _, err = typed(*ASKED)
    assert status == 2 and "begun with other --seeds" in sentence(err)
    Path("runs/reproduce-T1-toy-60s.json").write_text("{")
    status, _, err = typed(*ASKED)
    assert status == 3 and "cannot be read" in sentence(err)
