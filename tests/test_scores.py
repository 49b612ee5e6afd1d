"""Scores are of images that were not learnt, of weights as they are, and read in one way."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import Type, sentence
from test_cli import typed as typed
from toy_runs import FIRST, HIGH, RUN, Killed, kill_before_update, recipe

from fastidmm import runs, scoring, stages
from fastidmm.compare import Compared
from fastidmm.datasets.folder import Folder
from fastidmm.errors import DataError
from fastidmm.evaluate import Score, outputs
from fastidmm.preparing.prepare import prepare
from fastidmm.record import Record
from fastidmm.reporting.beside import others
from fastidmm.reporting.report import remaining, write

ONE: dict[str, Any] = {**FIRST, "run.epochs": 1}


def prepare_drawn(seed: int) -> None:
    """All photographs as 'drawn', a fifth of them for testing, by the seed."""
    source = Folder().open(from_=Path("photos/train"), seed=seed)
    prepare(source, "drawn", workers=0, quiet=True)


def test_images_prepared_anew_are_neither_scored_nor_learnt_from(toy: str) -> None:
    """Another draw has test images that the run learnt from."""
    prepare_drawn(0)
    stages.pretrain(recipe(dataset="drawn", epochs=1), "run")
    stages.finetune(RUN, ONE, [])
    first = scoring.evaluate(RUN)
    prepare_drawn(1)
    for pretrained in (True, False):
        with pytest.raises(DataError, match="'drawn' was prepared anew since runs/run began"):
            stages.finetune(RUN, ONE, [], pretrained=pretrained)
    with pytest.raises(DataError, match="prepared anew"):
        stages.transfer(RUN, {**ONE, "run.dataset": "drawn"}, [])
    with pytest.raises(DataError, match="prepared anew"):
        scoring.evaluate(RUN)
    assert sorted(path.name for path in Path("runs").glob("[!.]*")) == ["run"]
    prepare_drawn(0)
    assert scoring.evaluate(RUN)["scores"] == first["scores"]


def test_a_stage_of_other_images_is_neither_scored_nor_gone_on_from(
    toy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose run is of these: one that an older version has left behind."""
    prepare_drawn(0)
    stages.pretrain(recipe(dataset="drawn", epochs=1), "run")
    stages.finetune(RUN, ONE, [])
    path = RUN / "finetune-16" / "environment.json"
    own = path.read_text()
    path.write_text(own.replace(own.partition('"train_fingerprint": "')[2][:64], "0" * 64))
    told = "prepared anew since runs/run/finetune-16 began"
    with pytest.raises(DataError, match=told):
        scoring.evaluate(RUN)  # before anything is scored
    monkeypatch.setattr(Record, "check", lambda self: None)  # it would tell that it was changed
    with pytest.raises(DataError, match=told):
        stages.finetune(RUN, HIGH, [])


@pytest.mark.parametrize("broken", ["{", "[]", '{"scores": {"pretrained": {}}}', '{"scores": 3}'])
def test_scores_that_cannot_be_read_are_one_sentence_until_they_are_made_anew(
    typed: Type, toy: str, broken: str
) -> None:
    for name in ("run", "other"):
        stages.pretrain(recipe(epochs=1), name)
    path = RUN / scoring.EVALUATION
    path.write_text(broken)
    for words in (("compare", "run", "other"), ("report", "run"), ("export", "run", "--out", "o")):
        status, _, err = typed(*words)
        told = f"{path} cannot be read" in sentence(err)
        assert (status, told, "evaluate the run again" in err) == (3, True, True), err
    status, _, err = typed("evaluate", "run")
    assert status == 0 and "earlier looks at the test images are no longer counted" in err
    assert scoring.looks(RUN)["evaluate"] == 1 and typed("compare", "run", "other")[0] == 0


def test_with_images_held_out_a_run_has_the_scores_that_evaluate_found(toy: str) -> None:
    """Of the epoch that counts; nothing was told of test images while it learnt."""
    for name in ("run", "other"):
        stages.pretrain(recipe(epochs=1, holdout=0.2), name)
        stages.finetune(Path("runs") / name, ONE, [])
    assert not Compared.of(RUN).scores and runs.listed("toy")[0]["finetuned"] == {}
    found = scoring.evaluate(RUN)["scores"]["pretrained"]["finetuned_16"]
    measure = "fine-tuned accuracy at 16 px"
    assert Compared.of(RUN).scores[measure].score == Score(found["correct"], 8)
    listed = {row["run"]: row["finetuned"] for row in runs.listed("toy")}
    assert listed["run"][measure]["correct"] == found["correct"] and listed["other"] == {}
    assert [row["run"] for row in runs.best("toy")] == ["run", "other"]
    assert measure in others(RUN).measures
    evaluation = json.loads((RUN / scoring.EVALUATION).read_text())
    evaluation["scores"]["pretrained"]["finetuned_16"]["step"] += 1  # of other weights
    (RUN / scoring.EVALUATION).write_text(json.dumps(evaluation))
    assert measure not in Compared.of(RUN).scores


def test_scores_of_weights_trained_on_since_are_none_of_the_run_s(
    toy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Evaluated when two of its three epochs were made; then gone on with."""
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_before_update(patch, 7)
        stages.pretrain(recipe(epochs=3), "run")
    before = scoring.evaluate(RUN)
    assert before["step"] == 6 and scoring.current(RUN) == scoring.kept(RUN)
    stages.resume(RUN)
    found = scoring.current(RUN)
    assert found is not None and found["scores"] == {**before["scores"], "pretrained": {}}
    assert not Compared.of(RUN).scores
    page = write(RUN).read_text()
    assert "trained on since it was scored" in page and "has not been compared" in page
    assert remaining(RUN)[-2] == "fastidmm evaluate --run run"


def test_of_stages_alike_the_newest_is_scored_and_said(
    toy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    stages.pretrain(recipe(epochs=1), "run")
    for _ in range(2):
        stages.finetune(RUN, ONE, [])
    stages.finetune(RUN, ONE, [], pretrained=False)
    capsys.readouterr()
    scoring.evaluate(RUN)
    told = "not scored: runs/run/finetune-16, since runs/run/finetune-16-2 is newer"
    assert [told in line for line in capsys.readouterr().err.splitlines()].count(True) == 1
    page = write(RUN).read_text()
    assert "1 epoch, finetune-16-2<" in page and "1 epoch, scratch-16<" in page
    assert "fastidmm evaluate --run run" not in remaining(RUN)
    stages.finetune(RUN, ONE, [])
    found = scoring.current(RUN)
    assert found is not None and "finetuned_16" not in found["scores"]["pretrained"]
    assert "finetuned_16" in found["scores"]["random"]
    assert "fastidmm evaluate --run run" in remaining(RUN)


def test_a_stage_that_is_not_finished_hides_no_score(
    toy: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Though it is the newer of two alike: there is nothing to score it by yet."""
    stages.pretrain(recipe(epochs=1), "run")
    stages.finetune(RUN, ONE, [])
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_before_update(patch, 1)
        stages.finetune(RUN, ONE, [])
    cell = scoring.evaluate(RUN)["scores"]["pretrained"]["finetuned_16"]
    assert (cell["stage"], cell["step"]) == ("finetune-16", 3)
    assert "not scored: runs/run/finetune-16-2 is not finished" in capsys.readouterr().err
    found = scoring.current(RUN)
    assert found is not None and found["scores"]["pretrained"]["finetuned_16"] == cell


def test_a_run_is_scored_in_the_precision_that_it_learnt_in(
    toy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Features of both splits, learnt and random, and the classifier's answers."""
    stages.pretrain(recipe(epochs=1, precision="bf16"), "run")
    stages.finetune(RUN, ONE, [])
    seen: list[torch.dtype] = []

    def watched(*given: Any, dtype: torch.dtype, **more: Any) -> torch.Tensor:
        seen.append(dtype)
        return outputs(*given, dtype=dtype, **more)

    monkeypatch.setattr(scoring, "outputs", watched)
    scoring.evaluate(RUN)
    assert seen == [torch.bfloat16] * 5


def test_of_a_run_that_began_with_another_s_weights_no_pretraining_is_claimed(
    typed: Type, toy: str
) -> None:
    """Nor is it asked for stages; what its weights brought is told beside random ones."""
    prepare_drawn(0)
    stages.pretrain(recipe(epochs=1), "run")
    tuned = Path(stages.transfer(RUN, {**ONE, "run.dataset": "drawn"}, [])["run"])
    assert remaining(tuned)[0] == f"fastidmm evaluate --run {tuned.name}"
    scoring.evaluate(tuned)
    assert remaining(tuned) == [f"fastidmm report --run {tuned.name}"]
    told = "Beginning with run&#39;s weights has not been compared with random initialisation"
    page = write(tuned).read_text()
    assert told in page and "frozen features" not in page and "This pretraining" not in page
    assert "not fine-tuned" not in page and "fine-tuned accuracy at 16 px" in page
    stages.finetune(tuned, ONE, [], pretrained=False)
    scoring.evaluate(tuned)
    assert (
        "<h1>Beginning with run&#39;s weights made no difference that" in write(tuned).read_text()
    )
    stages.pretrain(recipe(epochs=1, method="supervised"), "plain")
    scoring.evaluate(Path("runs/plain"))
    assert "there is no pretraining to tell of" in write(Path("runs/plain")).read_text()


def test_a_stage_is_scored_with_its_run_and_resumed_to_its_run_s_next_step(
    typed: Type, toy: str
) -> None:
    stages.pretrain(recipe(epochs=1), "run")
    stages.finetune(RUN, ONE, [])
    status, _, err = typed("evaluate", "runs/run/finetune-16")
    told = "is a stage, scored with its run: `fastidmm evaluate --run runs/run`."
    assert status == 2 and told in sentence(err)
    status, out, _ = typed("resume", "runs/run/finetune-16")
    assert status == 0 and [f"next: {line}" for line in remaining(RUN)] == out.splitlines()[1:]


def test_a_run_of_another_device_is_scored_on_this_one(
    typed: Type, toy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages.pretrain(recipe(epochs=1), "run")
    stages.finetune(RUN, ONE, [])
    first = scoring.evaluate(RUN)["scores"]
    for path in (RUN / "recipe.toml", RUN / "finetune-16" / "recipe.toml"):
        own = path.read_text()
        path.write_text(own.replace('device = "auto"', 'device = "cuda:7"'))
        assert path.read_text() != own
    monkeypatch.setattr(Record, "check", lambda self: None)  # it would tell that these were changed
    assert typed("evaluate", "run")[0] == 2
    status, out, _ = typed("evaluate", "run", "--device", "cpu", "--json")
    assert status == 0 and json.loads(out)["scores"] == first
