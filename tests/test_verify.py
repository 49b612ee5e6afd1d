"""Replays: identical where nothing happened, the planted difference named where something did."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import replay
import torch
from conftest import make_photos
from test_cli import Type, sentence
from test_cli import typed as typed
from test_train import FORKS, fail_at
from toy_runs import FIRST, HIGH, RUN, recipe

from fastidmm import capture, checkpoint, stages, verify
from fastidmm import step as stepping
from fastidmm.datasets.folder import Folder
from fastidmm.errors import DataError, NumericalError, UsageError
from fastidmm.folders import RECIPE
from fastidmm.preparing.prepare import prepare
from fastidmm.record import ENVIRONMENT, METRICS, Record

STAGE = RUN / "finetune-16"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a dataset is prepared and a run of 9 steps is."""
    place = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTIDMM_HOME", str(place / "home"))
        patch.chdir(place)
        make_photos(place / "photos" / "train", per_class=10)
        make_photos(place / "photos" / "test", per_class=4)
        prepare(Folder().open(from_=place / "photos", seed=0), "toy", workers=0, quiet=True)
        stages.pretrain(recipe(epochs=3), "run")
    return place


@pytest.fixture
def toy(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The dataset, and no run."""
    monkeypatch.setenv("FASTIDMM_HOME", str(trained / "home"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run(toy: None, trained: Path) -> Path:
    """A copy of the run: checkpoints after 6 and 9 steps."""
    shutil.copytree(trained / "runs", "runs")
    return RUN


def rewrite(path: Path, old: str, new: str) -> None:
    """Change a file in one place."""
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


def rewrite_line(folder: Path, number: int, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a metric line."""
    lines = Record(folder).metrics()
    change(next(line for line in lines if line["step"] == number))
    (folder / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))


def resave(path: Path, file: str, name: str, tensor: Callable[[torch.Tensor], None]) -> None:
    """Change a tensor of a checkpoint, its sums right again."""
    names = [checkpoint.MODEL, checkpoint.OPTIMIZER]
    tensors, state = checkpoint.load(path, *names)
    tensor(tensors[names.index(file)][name])
    checkpoint.save(
        path.parent, checkpoint.step_of(path), dict(zip(names, tensors, strict=True)), state
    )


def flip(tensor: torch.Tensor) -> None:
    """The last bit of the first number."""
    tensor.reshape(-1).view(torch.int32)[0] ^= 1


# --- identical ----------------------------------------------------------------------------------


def test_a_run_and_its_stages_are_identical_and_untouched(run: Path) -> None:
    stages.finetune(run, {**FIRST, "run.epochs": 3}, [])
    stages.finetune(run, {**HIGH, "run.epochs": 3}, [])
    before = replay.tree(run)
    found = verify.verify(run, 20)
    assert replay.tree(run) == before
    verify.settle(found)
    assert [str(each) for each in found] == [
        f"{folder}: steps 7 to 9 replayed, bit-identical (3 losses, weights and moments at step 9)"
        for folder in (run, STAGE, run / "finetune-32")
    ]
    (alone,) = verify.verify(STAGE, 20)
    assert alone == found[1]


def test_a_stage_that_patience_ended_is_identical(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**FIRST, "run.holdout": 0.2, "run.patience": 1, "run.score_every": 1}
    ended = stages.finetune(run, {**settings, "run.epochs": 12}, [])["steps"]
    (found,) = verify.verify(STAGE, 20)
    assert ended < 24 and found.last == ended == found.checkpoints[0] and not found.difference


def test_with_more_to_compare_than_steps_losses_are_compared(toy: None) -> None:
    """From the older of the two kept, whose successor is out of reach."""
    stages.pretrain(recipe(checkpoint_every=3, epochs=6), "run")
    (found,) = verify.verify(RUN, 4)
    assert (found.first, found.last, found.losses, found.checkpoints) == (10, 13, 4, [])
    (found,) = verify.verify(RUN, 9)
    assert (found.first, found.last, found.losses, found.checkpoints) == (10, 18, 9, [18])


@pytest.mark.parametrize("failing", [5, 9])
def test_a_skipped_step_is_skipped_again(
    toy: None, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    """Before the checkpoint, and the next line tells; or after it, and a line has no loss."""
    fail_at(monkeypatch, lambda attempt, step: step == failing)
    stages.pretrain(recipe(epochs=4, log_every=5, knn_every=100, checkpoint_every=2), "run")
    lines = Record(RUN).metrics()
    assert [(line["step"], line["skipped"]) for line in lines] == [(5, 0), (10, 1), (12, 0)]
    assert (lines[1]["loss"] is None) == (failing == 9)
    (found,) = verify.verify(RUN, 20)
    assert (found.first, found.losses, found.difference) == (7, 2, "")


def test_a_run_that_went_back_is_replayed_in_its_attempt(
    toy: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_at(monkeypatch, lambda attempt, step: attempt == 0 and step in (7, 8))
    stages.pretrain(recipe(epochs=3), "run")
    kept = [checkpoint.load(path)[1]["attempt"] for path in checkpoint.found(RUN / "checkpoints")]
    assert kept == [0, 1]
    (found,) = verify.verify(RUN, 20)
    assert (found.first, found.losses, found.difference) == (7, 3, "")


def test_micro_batches_are_those_of_the_run(toy: None) -> None:
    stages.pretrain(recipe(micro_batches=3, epochs=1), "run")
    assert not verify.verify(RUN, 20)[0].difference


@pytest.mark.slow
@FORKS
def test_every_kind_of_difference_is_found_by_the_command() -> None:
    found = replay.trials(5, ["pretrain idmm", "holdout", replay.LONG])
    assert not found.broken and (found.identical, found.found, found.touched) == (3, 5, 0)
    assert found.steps > 20 and found.checkpoints == 3


# --- different ----------------------------------------------------------------------------------


def test_a_digit_of_a_loss_is_found_at_its_step(run: Path) -> None:
    loss = Record(run).metrics()[7]["loss"]
    changed = float(torch.tensor(loss).nextafter(torch.tensor(9.0)))
    rewrite_line(run, 8, lambda line: line.update(loss=changed))
    found = verify.verify(run, 20)
    assert found[0].difference == f"step 8: loss {changed!r} recorded, {loss!r} now"
    assert str(found[0]).endswith(f"replayed, differs first at {found[0].difference}")
    with pytest.raises(NumericalError, match=r"runs/run differs first at step 8: .*the code"):
        verify.settle(found)


@pytest.mark.parametrize("key", ["epoch", "instance_top1", "grad_norm", "lr", "skipped"])
def test_every_number_of_a_line_is_compared(run: Path, key: str) -> None:
    rewrite_line(run, 7, lambda line: line.update({key: line[key] + 1}))
    assert verify.verify(run, 20)[0].difference.startswith(f"step 7: {key} ")


def test_a_number_or_a_line_that_is_missing_is_found(run: Path) -> None:
    rewrite_line(run, 8, lambda line: line.pop("lr"))
    assert verify.verify(run, 20)[0].difference == "step 8: lr not recorded"
    rewrite_line(run, 8, lambda line: line.update(step=0))
    assert verify.verify(run, 20)[0].difference.startswith("step 8: no metric line of it")


def test_a_bit_of_a_weight_is_found_by_name(run: Path) -> None:
    name = "backbone.model.blocks.1.mlp.fc1.bias"
    resave(checkpoint.at(run / "checkpoints", 9), checkpoint.MODEL, name, flip)
    difference = verify.verify(run, 20)[0].difference
    assert difference.startswith("step 9: 1 of ")
    assert f"weights and moments, the first {name}, by " in difference


def test_a_bit_of_a_moment_is_found_by_its_weights_name(run: Path) -> None:
    """The one convolution's, which its shape tells."""
    newest = checkpoint.at(run / "checkpoints", 9)
    (moments,), _ = checkpoint.load(newest, checkpoint.OPTIMIZER)
    (number,) = (n for n, t in moments.items() if t.ndim == 4 and n.endswith(".exp_avg_sq"))
    resave(newest, checkpoint.OPTIMIZER, number, flip)
    told = "the first exp_avg_sq of backbone.model.patch_embed.proj.weight, by "
    assert told in verify.verify(run, 20)[0].difference


def test_how_far_weights_are_apart_is_told(run: Path) -> None:
    known = checkpoint.load(checkpoint.at(run / "checkpoints", 9), checkpoint.MODEL)[0][0]
    names = iter(sorted(known)[:2])
    for change in (0.5, -2.0):
        name = next(names)
        resave(
            checkpoint.at(run / "checkpoints", 9),
            checkpoint.MODEL,
            name,
            lambda t, change=change: t.add_(change),  # type: ignore[misc]
        )
    assert verify.verify(run, 20)[0].difference.endswith("by 2 at most")


def test_another_seed_is_found_at_the_first_step(run: Path) -> None:
    rewrite(run / RECIPE, "seed = 0", "seed = 1")
    assert verify.verify(run, 20)[0].difference.startswith("step 7: loss ")


def test_another_torch_is_named(run: Path) -> None:
    rewrite_line(run, 7, lambda line: line.update(loss=1.0))
    rewrite(run / ENVIRONMENT, f'"torch": "{torch.__version__}"', '"torch": "1.0"')
    version = re.escape(torch.__version__)
    with pytest.raises(NumericalError, match=rf"since torch 1\.0 is {version} today\.$"):
        verify.settle(verify.verify(run, 20))


# --- nothing to compare with, or not to be read ---------------------------------------------------


def test_the_newest_damaged_the_one_before_it_is_replayed(run: Path) -> None:
    (checkpoint.at(run / "checkpoints", 9) / checkpoint.MODEL).write_bytes(b"")
    (found,) = verify.verify(run, 20)
    assert (found.first, found.losses, found.checkpoints, found.difference) == (7, 3, [], "")


def test_without_anything_to_compare_with_the_remedy_is_told(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stages.finetune(run, {**FIRST, "run.epochs": 1}, [])
    shutil.rmtree(checkpoint.at(STAGE / "checkpoints", 0))
    with pytest.raises(UsageError, match=r"finetune-16 keeps nothing past .* step 3 .*further"):
        verify.verify(STAGE, 20)
    assert [each.run for each in verify.verify(run, 20)] == [str(run)]
    assert "not verified: runs/run/finetune-16 keeps nothing past" in capsys.readouterr().err
    shutil.rmtree(STAGE / "checkpoints")
    with pytest.raises(UsageError, match=r"finetune-16 has no checkpoint: `fastidmm resume"):
        verify.verify(STAGE, 20)


def test_what_lies_further_away_is_told(toy: None) -> None:
    stages.pretrain(recipe(log_every=100, knn_every=100, epochs=2), "run")
    with pytest.raises(UsageError, match=r"nothing in 2 steps .* step 3 .*--steps 3 reaches"):
        verify.verify(RUN, 2)
    assert verify.verify(RUN, 3)[0].checkpoints == [6]


def test_a_dataset_prepared_anew_and_damage_are_the_errors_they_are(run: Path) -> None:
    rewrite(run / ENVIRONMENT, '_fingerprint": "', '_fingerprint": "0')
    with pytest.raises(DataError, match="prepared anew"):
        verify.verify(run, 20)
    for path in checkpoint.found(run / "checkpoints"):
        (path / checkpoint.STATE).unlink()
    with pytest.raises(DataError, match=r"every checkpoint in .* is damaged"):
        verify.verify(run, 20)


def test_a_run_being_trained_is_verified_by_what_it_keeps(
    toy: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its lock held, in its fifth step: replayed from the start to what it has come to."""
    found: list[verify.Replay] = []
    real = stepping.step

    def looked_at(parts: Any, batch: Any) -> Any:
        if batch.step == 4:
            found.extend(verify.verify(RUN, 20))
        return real(parts, batch)

    monkeypatch.setattr(capture, "step", looked_at)
    stages.pretrain(recipe(epochs=2), "run")
    assert found and (found[0].first, found[0].last, found[0].losses) == (1, 4, 4)
    assert found[0].checkpoints == [3] and not found[0].difference


def test_a_checkpoint_that_goes_while_it_is_read_is_not_missed(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run's next one came in its place: what there is now counts."""
    folder, real = run / "checkpoints", checkpoint.load
    state = real(checkpoint.at(folder, 9))[1]

    def going(path: Path, *names: str) -> Any:
        if checkpoint.step_of(path) == 6 and names:
            monkeypatch.setattr(checkpoint, "load", real)
            tensors, _ = real(checkpoint.at(folder, 9), *verify.FILES)
            checkpoint.save(folder, 12, dict(zip(verify.FILES, tensors, strict=True)), state)
        return real(path, *names)

    monkeypatch.setattr(checkpoint, "load", going)
    assert list(verify.evidence(Record(run), 20).checkpoints) == [12]


# --- the command ---------------------------------------------------------------------------------


def test_the_command(typed: Type, run: Path) -> None:
    status, out, err = typed("verify")
    assert status == 0 and "bit-identical (3 losses" in out and "runs/run, the newest" in err
    rewrite_line(run, 8, lambda line: line.update(loss=1.0))
    status, out, err = typed("verify", "run", "--json")
    (told,) = json.loads(out)
    assert status == 4 and told["difference"].startswith("step 8: loss 1.0 recorded")
    assert not told["identical"] and (told["first"], told["last"]) == (7, 9)
    assert "runs/run differs first at step 8: loss 1.0 recorded" in sentence(err)
    status, out, err = typed("verify", "run", "--steps", "1")
    assert (status, out.strip()) == (0, "runs/run: step 7 replayed, bit-identical (1 loss)")
    (run / METRICS).unlink()
    shutil.rmtree(checkpoint.at(run / "checkpoints", 6))
    status, _, err = typed("verify", "run")
    assert status == 2 and "a run keeps two checkpoints" in sentence(err)
