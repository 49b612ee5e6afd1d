"""Fine-tuning's stages: what they start from, the same bits after a kill, images held out."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from fastidmm import checkpoint, optim, scoring, stages
from fastidmm import train as training
from fastidmm.assemble import Cadence, assemble, split_rows, training_rows
from fastidmm.errors import UsageError
from fastidmm.evaluate import Score
from fastidmm.recipe import Recipe, read_tables
from fastidmm.record import Record
from fastidmm.store import folder_of, open_store

GOLDEN = Path(__file__).parent / "golden"
RUN = Path("runs/run")
FIRST = {"run.resolution": 16, "run.epochs": 7, "run.batch_size": 8}
HIGH = {"run.resolution": 32, "run.epochs": 7, "run.batch_size": 8}


def recipe(**changes: Any) -> Recipe:
    """Pretraining of 21 steps, 7 epochs of 8, 8 and 4 images, and stages at 16 px and above."""
    run = {
        "dataset": "toy", "backbone": "vit_micro", "epochs": 7, "batch_size": 8, "resolution": 16,
        "checkpoint_every": 1, **changes,
    }  # fmt: skip
    finetune = {"resolution": 16, "epochs": 7, "batch_size": 8}
    return Recipe.of({"run": run, "backbone": {"drop_path": 0.3}, "finetune": finetune})


@pytest.fixture
def run(toy: str) -> Path:
    """A pretrained run."""
    stages.pretrain(recipe(epochs=2), "run")
    return RUN


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in Record(folder).metrics()]


def weights(path: Path) -> dict[str, torch.Tensor]:
    (tensors,), _ = checkpoint.load(path, checkpoint.MODEL)
    return tensors


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
    for pretrained in (True, False):
        for resolution in (16, 32):
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


def test_without_a_lower_stage_a_high_one_starts_from_the_backbone(run: Path) -> None:
    settings = {**HIGH, "run.epochs": 1}
    stages.finetune(run, settings, [])
    options = Record(run / "finetune-32").recipe.run
    assert not options.init_head and options.init.startswith("../checkpoints/")


def test_an_unfinished_stage_is_not_gone_on_from(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "update", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
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
    (stage.checkpoints / "step_000000001").mkdir(parents=True)
    (stage.checkpoints / "step_000000001" / checkpoint.STATE).write_text('{"state": {}}')
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


# --- the same bits ------------------------------------------------------------------------------

STAGES = {  # by folder: settings, whether from pretrained weights, what must be there before
    "finetune-16": (FIRST, True, []),
    "scratch-16": (FIRST, False, []),
    "finetune-32": (HIGH, True, ["finetune-16"]),
}


class Killed(Exception):
    """Stands for a kill: nothing of ours may catch it."""


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
        patch.setattr(training, "update", dying)
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


# --- images held out, and looks at the test images ----------------------------------------------


def test_held_out_rows_are_stratified_and_never_learnt(toy: str) -> None:
    store = open_store(folder_of("toy"), "train")
    learnt, held = split_rows(recipe(holdout=0.2), store)
    assert sorted([*learnt.tolist(), *held.tolist()]) == list(range(20))
    assert store.label[held].bincount().tolist() == [2, 2]
    other = split_rows(recipe(holdout=0.2, seed=1), store)[1]
    assert held.tolist() != other.tolist()
    both = split_rows(recipe(holdout=0.2, num_images=6), store)
    assert torch.equal(both[1], held) and not set(both[0].tolist()) & set(held.tolist())
    assert len(both[0]) == 6
    stages.pretrain(recipe(holdout=0.2, epochs=1), "run")
    assert Record(RUN).environment()["num_train"] == 16


@pytest.mark.parametrize("share", [0.01, 0.95])
def test_shares_that_leave_nothing_are_refused(toy: str, share: float) -> None:
    with pytest.raises(UsageError, match="--holdout 0"):
        stages.pretrain(recipe(holdout=share), "run")
    assert not RUN.exists()


def test_with_images_held_out_the_test_split_is_not_read(toy: str) -> None:
    """It is not even there; choosing goes by the images held out."""
    (folder_of("toy") / "test.safetensors").unlink()
    stages.pretrain(recipe(holdout=0.2, epochs=1, score_every=2), "run")
    found = stages.finetune(RUN, FIRST, [])
    lines = Record(RUN / "finetune-16").metrics()
    scored = [line for line in lines if "holdout_top1" in line]
    assert [line["epoch"] for line in scored] == [2, 4, 6, 7]
    assert {line["holdout_num"] for line in scored} == {4}
    assert not any("test_top1" in line for line in lines)
    best = max(line["holdout_top1"] for line in scored)
    first = next(line for line in scored if line["holdout_top1"] == best)
    assert found["best_holdout_top1"] == {
        "value": best, "epoch": first["epoch"], "of": 4, "selected_on": "holdout",
    }  # fmt: skip
    assert checkpoint.step_of(Record(RUN / "finetune-16").result) == first["step"]


def scripted(monkeypatch: pytest.MonkeyPatch, correct: list[int]) -> None:
    """Scores of a classifier as written down, by epoch."""
    monkeypatch.setattr(
        training,
        "classified",
        lambda parts, store: Score(correct[parts.state.step // 3 - 1], len(store)),
    )


def test_patience_ends_a_stage_and_the_best_counts(
    toy: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Best in epoch 2, equalled but not beaten in the two that patience allows."""
    stages.pretrain(recipe(epochs=2), "run")
    scripted(monkeypatch, [1, 3, 2, 3, 4, 4, 4])
    judged = {**FIRST, "run.holdout": 0.2, "run.patience": 2, "run.score_every": 1}
    found = stages.finetune(RUN, {**judged, "run.batch_size": 6}, [])
    stage = Record(RUN / "finetune-16")
    assert stage.finished and found["steps"] == 12 and stage.total_steps == 21
    assert "no better score on held-out images since epoch 2." in capsys.readouterr().err
    assert found["best_holdout_top1"]["epoch"] == 2
    assert checkpoint.step_of(stage.result) == 6
    kept = weights(stage.result)
    assert any(
        not torch.equal(t, kept[n])
        for n, t in weights(stage.checkpoints / "step_000000012").items()
    )
    capsys.readouterr()
    stages.resume(RUN)
    assert "finetune-16 is finished: 12 steps of 21" in capsys.readouterr().err
    scored = scoring.evaluate(RUN)["scores"]["pretrained"]["finetuned_16"]
    assert scored["step"] == 6 and scored["chosen"] == "best on held-out images"
    high = stages.finetune(RUN, {**HIGH, "run.epochs": 1, "run.score_every": 1}, [])
    assert Record(Path(high["run"])).recipe.run.init == "../finetune-16/best/step_000000006"


def test_patience_survives_a_kill(toy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stages.pretrain(recipe(epochs=2), "run")
    scripted(monkeypatch, [1, 3, 2, 3, 4, 4, 4])
    judged = {**FIRST, "run.holdout": 0.2, "run.patience": 2, "run.score_every": 1}
    judged["run.batch_size"] = 6
    calls, update = iter(range(1000)), optim.update

    def dying(*args: Any) -> Any:
        if next(calls) == 10:
            raise Killed
        return update(*args)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(training, "update", dying)
        stages.finetune(RUN, judged, [])
    stages.resume(RUN)
    stage = Record(RUN / "finetune-16")
    assert stage.steps == 12 and checkpoint.step_of(stage.result) == 6


def test_patience_needs_images_to_judge_by(toy: str) -> None:
    with pytest.raises(UsageError, match=r"run\.patience needs images to judge by"):
        recipe(patience=3)


def test_looks_at_the_test_images_are_counted(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every second epoch of seven and the last; the last counts, the best stands beside it."""
    scripted(monkeypatch, [8, 3, 8, 5, 8, 4, 2])
    found = stages.finetune(run, {**FIRST, "run.score_every": 2}, [])
    lines = Record(run / "finetune-16").metrics()
    scored = {line["epoch"]: line["test_top1"] for line in lines if "test_top1" in line}
    assert scored == {2: 3 / 8, 4: 5 / 8, 6: 4 / 8, 7: 2 / 8}
    best = {"value": 5 / 8, "epoch": 4, "of": 4, "selected_on": "test"}
    assert found["test_top1"]["correct"] == 2 and found["best_test_top1"] == best
    assert scoring.looks(run) == {"finetune": 4, "evaluate": 0}
    for number in (1, 2):
        evaluated = scoring.evaluate(run)
        assert scoring.looks(run) == {"finetune": 4, "evaluate": number}
    cell = evaluated["scores"]["pretrained"]["finetuned_16"]
    assert cell["best"] == best and cell["chosen"] == "last epoch" and cell["num"] == 8
    rows = scoring.evaluation_text(evaluated).splitlines()
    assert [row for row in rows if "62.5 % (epoch 4)" in row and "selected on test" in row]


def test_the_text_names_hard_classes_and_mistakes() -> None:
    measure = {
        "correct": 5, "num": 9, "top5": {"correct": 8, "num": 9},
        "per_class": [[3, 3], [0, 2], [2, 4]], "confusion": [[2, 1, 2], [1, 0, 1], [1, 2, 1]],
    }  # fmt: skip
    found = {
        "num_test": 9, "class_names": ["ant", "bee", "cat"],
        "scores": {"pretrained": {"knn": measure}, "random": {}},
    }  # fmt: skip
    rows = scoring.evaluation_text(found).splitlines()
    assert rows[1].split() == ["knn", "55.6", "%", "[26.7,", "81.1]", "not", "run"]
    assert rows[2].split()[:3] == ["top-5", "88.9", "%"]
    assert rows[-2:] == [
        "  hardest: bee 0/2, cat 2/4",
        "  confused: cat taken for bee (2), bee taken for ant (1), bee taken for cat (1)",
    ]


def test_scores_are_due_by_the_epoch(run: Path) -> None:
    stages.finetune(run, {**FIRST, "run.epochs": 1}, [])
    assert Cadence.of(assemble(Record(run / "finetune-16"))).score == 20 * 3
