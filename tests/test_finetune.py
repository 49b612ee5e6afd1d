"""Fine-tuning's stages: what they start from, the same bits after a kill, golden losses."""

import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from toy_runs import FIRST, HIGH, RUN, Killed, losses, recipe, weights

from fastidmm import checkpoint, optim, scoring, stages
from fastidmm import step as stepping
from fastidmm.assemble import assemble, training_rows
from fastidmm.datasets.folder import Folder
from fastidmm.errors import UsageError
from fastidmm.preparing.prepare import prepare
from fastidmm.recipe import Recipe, read_tables
from fastidmm.record import Record
from fastidmm.reporting.report import write

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def run(toy: str) -> Path:
    """A pretrained run."""
    stages.pretrain(recipe(epochs=2), "run")
    return RUN


# --- what a stage starts from -------------------------------------------------------------------


def test_the_higher_stage_takes_every_tensor_and_the_head(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stages.finetune(run, FIRST, [])
    assert "54 of 54 tensors, head new: from runs/run\n" in capsys.readouterr().err
    stages.finetune(run, HIGH, [])
    said = "56 of 56 tensors, head included: from runs/run/finetune-16\n"
    assert said in capsys.readouterr().err
    stage = Record(run / "finetune-32")
    last = weights(Record(run / "finetune-16").result)
    (stage.checkpoints / "gone").mkdir()
    for path in checkpoint.found(stage.checkpoints):
        path.rename(stage.checkpoints / "gone" / path.name)
    begun = assemble(stage).method.state_dict()  # as before its first step
    assert begun.keys() == last.keys()
    for name, tensor in last.items():
        if name.endswith("pos_embed"):
            grid = tensor[:, 1:].transpose(1, 2).unflatten(2, (2, 2))
            grid = torch.nn.functional.interpolate(grid, size=(4, 4), mode="bicubic")
            expected = torch.cat((tensor[:, :1], grid.flatten(2).transpose(1, 2)), dim=1)
            torch.testing.assert_close(begun[name], expected)
        else:
            assert torch.equal(begun[name], tensor), name


def test_stages_go_on_within_their_arm(run: Path) -> None:
    """Both arms at 16 px, then each at 32; a second at 16 px begins anew."""
    one = {"run.epochs": 1, "run.batch_size": 8}
    for resolution in (16, 32):
        for pretrained in (True, False):
            stages.finetune(run, {**one, "run.resolution": resolution}, [], pretrained=pretrained)
    for resolution in (16, 32):
        stages.finetune(run, {**one, "run.resolution": resolution}, [])
    found = {p.name: Record(p) for p in (run / name for name in os.listdir(run)) if p.is_dir()
             and (p / "recipe.toml").exists()}  # fmt: skip
    starts = {name: record.init and record.init.parent.parent for name, record in found.items()}
    assert starts == {
        "finetune-16": run,
        "finetune-16-2": run,
        "finetune-32": run / "finetune-16",
        "finetune-32-2": run / "finetune-16-2",
        "scratch-16": None,
        "scratch-32": run / "scratch-16",
    }
    assert {n for n, r in found.items() if r.pretrained} == {n for n in found if n[0] == "f"}
    scores = scoring.evaluate(run)["scores"]
    assert scores["pretrained"]["finetuned_16"]["stage"] == "finetune-16-2"
    assert scores["random"]["finetuned_32"]["stage"] == "scratch-32"


@pytest.mark.parametrize(
    ("run", "flags"),
    [
        ({}, ""),  # the paper's
        ({"resolution": 32}, "--resolution 64"),
        ({"epochs": 200}, ""),
        ({"epochs": 51}, "--epochs 25"),
        ({"epochs": 1, "batch_size": 32}, "--epochs 1 --batch-size 32"),
    ],
)
def test_what_follows_is_in_proportion(run: dict[str, Any], flags: str) -> None:
    recipe = Recipe.of({"run": {"dataset": "mine", **run}})
    assert " ".join(stages.flags_in_proportion(recipe)) == flags


def test_without_a_lower_stage_a_high_one_starts_from_the_backbone(run: Path) -> None:
    settings = {**HIGH, "run.epochs": 1}
    stages.finetune(run, settings, [])
    options = Record(run / "finetune-32").recipe.run
    assert not options.init_head and options.init.startswith("../checkpoints/")


def test_an_unfinished_stage_is_not_gone_on_from(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stepping, "update", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        stages.finetune(run, FIRST, [])
    with pytest.raises(UsageError, match="finetune-16 is not finished: `fastidmm resume"):
        stages.finetune(run, HIGH, [])


@pytest.mark.parametrize(("backbone", "lr"), [("deit_tiny", 5e-4), ("pvtv2_b3", 1e-3)])
def test_stages_have_the_published_settings(toy: str, backbone: str, lr: float) -> None:
    """Batch 256 at 224 px, then 128 at 448 for 100 epochs at 5e-5; warm-up as in pretraining."""
    whole = Recipe.of({"run": {"dataset": "toy", "backbone": backbone}})
    record = Record.create(Path("runs/run"), whole, training_rows(whole))
    first = Recipe.of(stages.finetune_tables(record, pretrained=False))
    stage = Record.create(RUN / "scratch-224", first, training_rows(first))
    checkpoint.save(stage.checkpoints, 1, {}, {})
    high = Recipe.of(stages.high_tables(stage))
    for tuned, size, batch, epochs, rate in (
        (first, 224, 256, 200, lr),
        (high, 448, 128, 100, 5e-5),
    ):
        run = tuned.run
        assert (run.resolution, run.batch_size, run.epochs) == (size, batch, epochs)
        assert tuned.optim.lr == rate and tuned.optim.weight_decay == 1e-3
        assert tuned.optim.warmup_epochs == whole.optim.warmup_epochs
    options = first.method.model_dump()
    assert options == high.method.model_dump() == {
        "smoothing": 0.1, "scale": (0.08, 1.0), "jitter": 0.4, "gray": 0.2, "randaugment": 2,
        "mix": "alternate", "mix_alpha": 0.5, "cutmix_groups": 4,
    }  # fmt: skip


def test_official_keeps_its_quirks_in_every_stage(toy: str) -> None:
    tables = read_tables("official")
    tables["run"]["dataset"] = "toy"
    record = Record.create(RUN, Recipe.of(tables), training_rows(Recipe.of(tables)))
    first = Recipe.of(stages.finetune_tables(record, pretrained=False))
    assert first.optim.schedule == "idmm_legacy" and first.run.precision == "fp32"
    assert first.method.model_dump()["smoothing"] == 0.1  # pretraining alone had none


def test_stages_keep_what_is_their_runs(toy: str) -> None:
    """How steps are made and judged, and drop-path; each stage the optimizer of the one before."""
    kept: dict[str, Any] = {
        "loader": "torch", "seed": 3, "precision": "bf16", "optimizer": "fused_lamb",
        "exact": True, "capture": False, "views_ahead": True, "compile": True, "num_images": 9,
        "holdout": 0.25, "patience": 4, "score_every": 5, "log": "tensorboard",
    }  # fmt: skip
    tables = recipe(**kept).tables() | {
        "finetune_high": {"resolution": 32, "epochs": 3, "batch_size": 4, "lr": 7e-5}
    }
    record = Record.create(RUN, Recipe.of(tables), training_rows(Recipe.of(tables)))
    first = Recipe.of(stages.finetune_tables(record, pretrained=False))
    other = Recipe.of(
        {**first.tables(), "optim": {**first.tables()["optim"], "weight_decay": 0.07}}
    )
    stage = Record.create(RUN / "scratch-16", other, training_rows(other))
    checkpoint.save(stage.checkpoints, 1, {}, {})
    high = Recipe.of(stages.high_tables(stage))
    for tuned in (first, high):
        assert tuned.run.model_dump(include=set(kept)) == kept
        assert tuned.backbone.drop_path == 0.3
    assert (high.run.epochs, high.run.batch_size, high.optim.lr) == (3, 4, 7e-5)
    assert (first.optim.weight_decay, high.optim.weight_decay) == (1e-3, 0.07)


def test_a_higher_resolution_by_set_is_a_higher_resolution(toy: str) -> None:
    """And a run whose recipe has no such stage takes the usual number of epochs, unless told."""
    run, without = RUN, {"finetune_high": {"epochs": 0}}
    stages.pretrain(Recipe.of({**recipe(epochs=2).tables(), **without}), "run")
    stages.finetune(run, {**FIRST, "run.epochs": 1}, [])
    tables = stages.high_tables(Record(run / "finetune-16"))
    assert tables["run"]["epochs"] == 100
    words = ["run.resolution=32", "run.epochs=1", "run.batch_size=8"]
    stages.finetune(run, {}, words)
    assert Record(run / "finetune-32").recipe.run.init_head
    with pytest.raises(UsageError, match="trained with vit_micro, not deit_tiny"):
        stages.finetune(run, {}, ["run.backbone=deit_tiny"], pretrained=False)


def test_a_stage_outlives_the_one_it_went_on_from(run: Path) -> None:
    for settings in (FIRST, HIGH):
        stages.finetune(run, {**settings, "run.epochs": 1}, [])
    shutil.rmtree(run / "finetune-16")
    assert "finetuned_32" in scoring.evaluate(run)["scores"]["pretrained"]
    page = write(run).read_text()
    assert "# the stage at 32 px cannot be repeated: the one it went on from is gone\n" in page
    assert "fastidmm finetune --run run-again" not in page


def test_a_start_that_is_not_there_leaves_nothing_behind(toy: str) -> None:
    with pytest.raises(UsageError, match="which is not there"):
        stages.pretrain(recipe(init="../checkpoints/step_000000007"), "run")
    assert not RUN.exists()


def test_a_stage_has_the_loader_settings_of_the_one_it_goes_on_from(run: Path) -> None:
    one = {"run.epochs": 1, "run.batch_size": 8}
    torchs = {**one, "run.loader": "torch"}
    stages.finetune(run, {**torchs, "run.resolution": 16}, ["loader.workers=1"])
    stages.finetune(run, {**torchs, "run.resolution": 32}, [])
    stages.finetune(run, {**one, "run.resolution": 64, "run.loader": "resident"}, [])
    found = [Record(run / f"finetune-{side}").recipe.tables()["loader"] for side in (16, 32, 64)]
    assert found == [{"workers": 1}, {"workers": 1}, {"tier": "auto"}]


def test_a_loader_that_cannot_begin_leaves_nothing_behind(
    toy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.statvfs", lambda path: SimpleNamespace(f_bavail=0, f_frsize=1))
    with pytest.raises(UsageError, match="through /dev/shm, where 0 MB are free"):
        stages.pretrain(recipe(loader="torch"), "none")
    assert not (RUN.parent / "none").exists()


def test_a_high_stage_must_be_higher(toy: str) -> None:
    tables: dict[str, Any] = {"run": {"dataset": "toy"}, "finetune_high": {"resolution": 224}}
    with pytest.raises(UsageError, match="not above the first's, 224"):
        Recipe.of(tables)
    tables["finetune_high"]["epochs"] = 0
    assert Recipe.of(tables).finetune_high.resolution == 224


# --- the same bits ------------------------------------------------------------------------------

STAGES = {  # by folder: settings, whether from pretrained weights, what must be there before
    "finetune-16": (FIRST, True, []),
    "scratch-16": (FIRST, False, []),
    "finetune-32": (HIGH, True, ["finetune-16"]),
}


@pytest.mark.parametrize("name", list(STAGES))
def test_every_stage_resumes_to_the_same_bits(
    run: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in step 11 of 21, in a CutMix epoch, its newest checkpoint two steps back."""
    settings, pretrained, before = STAGES[name]
    for other in before:
        stages.finetune(run, {**STAGES[other][0], "run.epochs": 2}, [])
    stages.finetune(run, settings, [], pretrained=pretrained)
    calls, update = iter(range(1000)), optim.update

    def dying(*args: Any) -> Any:
        if next(calls) == 10:
            raise Killed
        return update(*args)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(stepping, "update", dying)
        stages.finetune(run, settings, [], pretrained=pretrained)
    stages.resume(run)
    whole, again = run / name, run / f"{name}-2"
    assert losses(whole) == losses(again) and len(losses(whole)) == 21
    mine, theirs = (weights(Record(folder).result) for folder in (whole, again))
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_twenty_golden_losses_of_every_stage(toy: str) -> None:
    """As they were when last changed on purpose; see `test_golden_losses` for how to."""
    stages.pretrain(recipe(), "run")
    for settings, pretrained, _ in STAGES.values():
        stages.finetune(RUN, settings, [], pretrained=pretrained)
    for name, folder in {"pretrain": RUN, **{name: RUN / name for name in STAGES}}.items():
        found, path = losses(folder)[:20], GOLDEN / f"stage_{name}.txt"
        if os.environ.get("FASTIDMM_WRITE_GOLDEN"):
            path.write_text("".join(f"{loss:.6f}\n" for loss in found))
        golden = [float(line) for line in path.read_text().split()]
        assert len(golden) == 20 and found == pytest.approx(golden, rel=1e-4), name


# --- on another dataset -------------------------------------------------------------------------


def test_a_run_is_fine_tuned_on_another_dataset(toy: str, tmp_path: Path) -> None:
    """As a run of its own, from the run's backbone alone; scored on the other's test images."""
    prepare(Folder().open(from_=tmp_path / "photos", seed=0), "other", workers=0, quiet=True)
    settings = {**FIRST, "run.epochs": 1, "run.dataset": "other"}
    stages.pretrain(recipe(epochs=1, num_images=12), "run")
    told = "is of 'toy', and so are its stages: `fastidmm finetune --dataset other` makes a run"
    for given in (settings, FIRST):
        with pytest.raises(UsageError, match=told):
            stages.finetune(RUN, given, ["run.dataset=other"])
    with pytest.raises(UsageError, match="learns the classes: `fastidmm pretrain --method dino`"):
        stages.finetune(RUN, FIRST, ["run.method=dino"])
    found = stages.transfer(RUN, settings, [])
    assert found["run"] == "runs/other_vit_micro_from_run" and found["dataset"] == "other"
    tuned = Record(Path(found["run"]))
    assert tuned.init == Record(RUN).result and not tuned.recipe.run.init_head
    assert tuned.recipe.run.num_images == 0 and tuned.recipe.run.seed == 0
    begun, last = weights(tuned.checkpoints / "step_000000000"), weights(Record(RUN).result)
    names = [n for n in begun if n.startswith("backbone.")]
    assert names and all(torch.equal(begun[n], last[n]) for n in names)
    scores = scoring.evaluate(tuned.folder)["scores"]
    assert scores["pretrained"]["finetuned_16"]["stage"] == tuned.folder.name
    assert stages.transfer(RUN, settings, [])["run"] == "runs/other_vit_micro_from_run-2"
    odd = RUN.rename(RUN.with_name("my run"))
    assert stages.transfer(odd, settings, [])["run"] == "runs/other_vit_micro_from_my-run"
