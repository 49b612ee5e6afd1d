"""All stages in a row: stopped and gone on with, and what a stage names as the next."""

import json
from pathlib import Path
from typing import Any

import pytest
from test_cli import TINY, MakePhotos, Type, sentence
from test_cli import typed as typed

from fastidmm import train
from fastidmm.assemble import Parts
from fastidmm.interrupt import Stop


def test_a_run_that_was_stopped_goes_on_through_all_stages(
    typed: Type, toy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In whichever stage: those done are passed over, and what comes of it is as undisturbed."""
    stages = ("finetune.resolution=16", "finetune.epochs=1", "finetune_high.epochs=0")
    words = ["run", "--dataset", toy, *TINY, *(f"--set={each}" for each in stages), "--run"]
    status, whole, err = typed(*words, "whole", "--json")
    assert status == 0
    assert "pretraining 1 epochs at 16 px, then fine-tuning 1 at 16 px" in err

    def interrupted(name: str) -> str:
        steps = train.steps

        def asked(parts: Parts, stop: Stop, *others: Any) -> bool:
            stop.requested = parts.record.folder.name == name
            return steps(parts, stop, *others)

        with monkeypatch.context() as patch:
            patch.setattr(train, "steps", asked)
            status, _, err = typed(*words, "cut")
        assert status == 75
        return err

    for name in ("cut", "finetune-16", "scratch-16"):
        err = interrupted(name)
        remedy = "the same `fastidmm run` with `--run runs/cut` through all stages."
        assert sentence(err).endswith(remedy)
    status, found, err = typed(*words, "cut", "--json")
    assert status == 0 and "runs/cut is finished" in err and "scratch-16 goes on from" in err
    assert sorted(p.parent.name for p in Path("runs/cut").glob("*/recipe.toml")) == [
        "finetune-16", "scratch-16",
    ]  # fmt: skip
    assert json.loads(found)["scores"] == json.loads(whole)["scores"]
    status, _, err = typed(*words, "cut", "--seed", "7")
    assert status == 2 and "begun by another recipe" in sentence(err)


@pytest.mark.parametrize(("tested", "following"), [(True, "evaluate"), (False, "report")])
def test_what_follows_fine_tuning(
    typed: Type, home: Path, photos: MakePhotos, tested: bool, following: str
) -> None:
    """Scoring where there are test images, the report where there are none."""
    photos(Path("two/train"), per_class=4)
    if tested:
        photos(Path("two/test"), per_class=2)
    typed("prepare", "--dataset", "folder", "--from", "two", "--name", "two")
    assert typed("pretrain", *TINY, "--run", "two")[0] == 0
    stage = ("finetune", "two", "--resolution", 16, "--epochs", 1, "--batch-size", 8)
    status, out, _ = typed(*stage)
    assert status == 0 and out.splitlines()[-1] == f"next: fastidmm {following} --run runs/two"
    assert typed(following, "--run", "runs/two")[0] == 0
