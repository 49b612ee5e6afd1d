"""What a release leaves for later ones to go on with: a run and its stage, both in mid-epoch.

    python tests/releases/make.py

At each release, once: `tests/releases/VERSION/`, and the losses that follow. Never for an old one,
but for those losses, where a later version rounds otherwise on purpose.
"""

import hashlib
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image

import fastidmm
from fastidmm import checkpoint, optim, stages
from fastidmm import step as stepping
from fastidmm.backbones.build import Backbone
from fastidmm.backbones.vit import _vit
from fastidmm.bench.surroundings import surroundings
from fastidmm.datasets.folder import Folder
from fastidmm.errors import Interrupted
from fastidmm.preparing.prepare import prepare
from fastidmm.recipe import Recipe
from fastidmm.record import Record
from fastidmm.registry import BACKBONES

HERE = Path(__file__).parent
LOSSES = "next_losses.txt"
STOPPED, FOLLOWING = 4, 5  # steps, of 9; an epoch has 3
STAGE = "finetune-16"
# A vision transformer like the others, of 13,000 parameters: a folder is to stay below 300 kB.
vit_nano = Backbone(
    partial(_vit, "deit_tiny_patch16_224", patch_size=8, embed_dim=16, depth=2, num_heads=2),
    multiple_of=8,
)


def photographs(place: Path) -> Path:
    """Twenty to train on, six to test, in two classes: from SHA-3, whose bytes never change."""
    for split, count in (("train", 10), ("test", 3)):
        for label in range(2):
            folder = place / split / f"class{label}"
            folder.mkdir(parents=True)
            for number in range(count):
                high, wide = 20 + number % 5, 20 + number % 3
                made = hashlib.shake_256(f"{split} {label} {number}".encode())
                noise = np.frombuffer(made.digest(high * wide * 3), np.uint8)
                pixels = noise.reshape(high, wide, 3) // 2
                pixels[:, :, label] += 100
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return place


@contextmanager
def at(place: Path) -> Iterator[None]:
    """Work in `place`, where the photographs are prepared as `released`."""
    before, threads = Path.cwd(), torch.get_num_threads()
    os.chdir(place)
    home = {"FASTIDMM_HOME": str(place / "home"), "OMP_NUM_THREADS": "1"}
    try:
        with (
            mock.patch.dict(os.environ, home),
            mock.patch.dict(BACKBONES, vit_nano=f"{__name__}:vit_nano"),
        ):
            source = Folder().open(from_=photographs(place / "photos"), seed=0)
            prepare(source, "released", workers=0, quiet=True)
            yield
    finally:
        os.chdir(before)
        torch.set_num_threads(threads)


def recipe() -> Recipe:
    """Three epochs of 8, 8 and 4 images, then as many of fine-tuning.

    At a high rate: what is not taken up as it was must show within five steps.
    """
    run = {
        "dataset": "released", "backbone": "vit_nano", "epochs": 3, "batch_size": 8,
        "resolution": 16, "checkpoint_every": 1, "loader": "resident", "device": "cpu",
    }  # fmt: skip
    finetune = {"resolution": 16, "epochs": 3, "batch_size": 8}
    optim, backbone = {"lr": 0.01}, {"drop_path": 0.3}
    return Recipe.of({"run": run, "optim": optim, "backbone": backbone, "finetune": finetune})


@contextmanager
def stopped() -> Iterator[None]:
    """What is trained meanwhile is asked to stop in its step of that number."""
    calls, update = iter(range(1, 1000)), optim.update

    def asked(*given: Any) -> Any:
        if next(calls) == STOPPED:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(*given)

    with mock.patch.object(stepping, "update", asked):
        try:
            yield
        except Interrupted:
            return
    raise AssertionError("it was not stopped")


def following(run: Path) -> list[str]:
    """The losses of the run and its stage past where they were stopped, to the bit."""
    return [
        f"{folder.name} {line['step']} {line['loss'].hex()}"
        for folder in (run, run / STAGE)
        for line in Record(folder).metrics()
        if line["step"] > STOPPED
    ]


def machine() -> str:
    """What may round otherwise."""
    capability = torch.backends.cpu.get_cpu_capability()
    return f"torch {torch.__version__}, {surroundings()['cpu']}, {capability}"


def made() -> Path:
    """A run and its stage as they were when stopped, with no checkpoint but the last."""
    run, kept = Path("runs/run"), Path("kept/run")
    with stopped():
        stages.pretrain(recipe(), "run")
    shutil.copytree(run, kept)
    stages.resume(run)
    with stopped():
        stages.finetune(run, {}, [])
    shutil.copytree(run / STAGE, kept / STAGE)
    stages.resume(run)
    for folder in (kept, kept / STAGE):
        (folder / ".lock").unlink()
        *older, _ = checkpoint.found(folder / "checkpoints")
        for path in older:
            shutil.rmtree(path)
    (kept / LOSSES).write_text("\n".join([f"# {machine()}", *following(run)]) + "\n")
    return kept


def main() -> None:
    """Make the folder of this version, unless there is one."""
    release = HERE / fastidmm.__version__
    if release.exists():
        raise SystemExit(f"{release} exists, and never changes.")
    with tempfile.TemporaryDirectory() as place, at(Path(place).resolve()):
        shutil.copytree(made(), release)


if __name__ == "__main__":
    main()
