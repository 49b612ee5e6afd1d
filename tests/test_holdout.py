"""Images held out of training, patience by them, and looks at the test images."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_runs import FIRST, HIGH, RUN, Killed, recipe, weights

from fastidmm import checkpoint, optim, scoring, stages
from fastidmm import step as stepping
from fastidmm import train as training
from fastidmm.assemble import Cadence, assemble, split_rows
from fastidmm.backbones.build import build_encoder
from fastidmm.chance import Counters
from fastidmm.errors import UsageError
from fastidmm.evaluate import Score, knn, outputs
from fastidmm.record import Record, encoder_weights
from fastidmm.store import folder_of, open_store


@pytest.fixture
def run(toy: str) -> Path:
    """A pretrained run."""
    stages.pretrain(recipe(epochs=2), "run")
    return RUN


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


def test_a_share_that_holds_nothing_out_is_refused(toy: str) -> None:
    with pytest.raises(UsageError, match=r"--holdout 0.01 would hold none of 20 images out"):
        stages.pretrain(recipe(holdout=0.01), "run")
    assert not RUN.exists()


def test_small_classes_are_held_out_by_chance_and_keep_an_image(toy: str) -> None:
    """Of 100 classes of 4, a tenth: one image each of 40, not the first 40; singletons stay."""
    labels = torch.arange(100).repeat_interleave(4)
    labels = torch.cat((labels, torch.arange(100, 130)))
    ones = torch.ones(430, dtype=torch.int64)
    toys = open_store(folder_of("toy"), "train")
    store = replace(toys, offset=ones, height=ones, width=ones, label=labels)
    by_seed = []
    for seed in range(3):
        learnt, held = split_rows(recipe(holdout=0.1, seed=seed), store)
        classes = labels[held].tolist()
        assert len(set(classes)) == len(classes) and max(classes) < 100
        assert 25 < len(held) <= 43 and len(set(labels[learnt].tolist())) == 130
        assert sum(label >= 50 for label in classes) > 5
        by_seed.append(classes)
    assert by_seed[0] != by_seed[1] != by_seed[2]


@pytest.mark.parametrize(
    "change", [{"run.holdout": 0.2}, {"run.seed": 1}, {"run.holdout": 0.3}, {"run.num_images": 8}]
)
def test_a_stage_is_not_judged_by_what_the_one_before_learnt(
    toy: str, change: dict[str, Any]
) -> None:
    before = 0.2 if change != {"run.holdout": 0.2} else 0.0
    stages.pretrain(recipe(epochs=1, holdout=before), "run")
    stages.finetune(RUN, {**FIRST, "run.epochs": 1}, [])
    with pytest.raises(UsageError, match=r"finetune-16, whose classifier is taken over, learnt"):
        stages.finetune(RUN, {**HIGH, "run.epochs": 1, **change}, [])
    assert not (RUN / "finetune-32").exists()


@pytest.mark.parametrize("of_run", [{}, {"holdout": 0.2, "seed": 5}])
@pytest.mark.parametrize("method", ["idmm", "supervised"])
def test_a_stage_is_not_judged_by_images_that_its_run_learnt(
    toy: str, of_run: dict[str, Any], method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused where with their labels, said where without; a share of its own is never learnt."""
    stages.pretrain(recipe(epochs=1, method=method, **of_run), "run")
    held = {**FIRST, "run.epochs": 1, "run.holdout": 0.2, "run.seed": 0}
    told = r"[34] of the 4 images held out were learnt by runs/run, with"
    remedy = "give --holdout 0.2 --seed 5, as it had" if of_run else "leave --holdout out"
    capsys.readouterr()
    if method == "supervised":
        for tune in (stages.finetune, stages.transfer):
            with pytest.raises(UsageError, match=f"{told} their labels: {remedy}"):
                tune(RUN, {**held, "run.dataset": "toy"}, [])
    else:
        stages.finetune(RUN, held, [])
        assert re.search(f"warning: {told}out their labels: .*{remedy}", capsys.readouterr().err)
    stages.finetune(RUN, {**FIRST, "run.epochs": 1}, [])  # as the run has it
    stages.finetune(RUN, held, [], pretrained=False)  # begins without what the run learnt
    assert "images held out were learnt" not in capsys.readouterr().err


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
        lambda parts, store, _: Score(correct[parts.state.step // 3 - 1], len(store)),
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


@pytest.mark.parametrize("answer", [0, 1])
def test_the_best_weights_are_those_that_are_scored(
    toy: str, answer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In their place lie some that always give one answer; the last epoch's would not."""
    stages.pretrain(recipe(epochs=1), "run")
    scripted(monkeypatch, [3, 1])
    judged = {**FIRST, "run.epochs": 2, "run.holdout": 0.2, "run.score_every": 1}
    stages.finetune(RUN, {**judged, "run.batch_size": 6}, [])
    stage = Record(RUN / "finetune-16")
    best = weights(stage.result)
    best["head.weight"].zero_()
    best["head.bias"].copy_(torch.tensor([0.0, 1.0]) == answer)
    checkpoint.save(stage.best, 3, {checkpoint.MODEL: best}, {})
    scored = scoring.evaluate(RUN)["scores"]["pretrained"]["finetuned_16"]
    assert scored["per_class"] == [[4 * (answer == 0), 4], [4 * (answer == 1), 4]]


def test_frozen_features_are_judged_by_training_labels_alone(run: Path) -> None:
    """Taught each class for the other, kNN and probe are as wrong as they were right."""
    asked = Record(run).recipe
    store, test = scoring.scored_splits(asked)
    other = replace(store, label=1 - store.label)
    truth, amiss = (scoring.frozen_scores(asked, None, each, test) for each in (store, other))
    for name in ("knn", "linear_probe"):
        right, wrong = truth[name]["correct"], amiss[name]["correct"]
        assert right >= 7 and wrong == 8 - right, name


def test_knn_is_scored_by_votes(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All for the second of seven classes, which four of the eight images are of."""
    votes = torch.zeros(8, 7)
    votes[:, 1] = 1
    monkeypatch.setattr(scoring, "knn", lambda *given: votes)
    asked = Record(run).recipe
    found = scoring.frozen_scores(asked, None, *scoring.scored_splits(asked))["knn"]
    assert found["correct"] == found["top5"]["correct"] == 4


@pytest.mark.parametrize("seed", [0, 3])
def test_random_weights_are_the_seeds_own(
    toy: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What pretraining is compared with: features of the encoder as it was built."""
    stages.pretrain(recipe(epochs=2, seed=seed), "run")
    known: list[torch.Tensor] = []

    def watched(*given: Any) -> torch.Tensor:
        known.append(given[0])
        return knn(*given)

    monkeypatch.setattr(scoring, "knn", watched)
    scoring.evaluate(RUN)
    asked, store = Record(RUN).recipe, scoring.scored_splits(Record(RUN).recipe)[0]
    encoder = build_encoder("vit_micro", asked.backbone, resolution=16, counters=Counters(seed))
    random = outputs(encoder, store, resolution=16, dtype=torch.float32)
    encoder.load_state_dict(encoder_weights(Record(RUN).result))
    trained = outputs(encoder, store, resolution=16, dtype=torch.float32)
    assert torch.equal(known[0], trained) and torch.equal(known[1], random)
    assert not torch.equal(trained, random)


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
        patch.setattr(stepping, "update", dying)
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
