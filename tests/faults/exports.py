"""Exports put to the test: other programs' numbers, and kills while a folder is written.

    python tests/faults/exports.py [--trials 60]

Every backbone is exported with its features and with a classifier; then so many exports are killed
at random times, each of which is done again.
"""

import os
import random
import shutil
import signal
import time
import traceback
from pathlib import Path

from made_runs import made_run
from trials import Figure, main

from fastidmm.errors import FastidmmError
from fastidmm.exporting.export import TOLERANCE, export
from fastidmm.exporting.formats import FORMS, check_installed

BACKBONES = {
    "vit_micro": 32, "deit_tiny": 112, "pvtv2_b0": 112, "t2t_vit_7": 112, "timm:test_resnet": 64,
}  # fmt: skip
METHODS = ("idmm", "supervised")
OUT, KILLED = Path("out"), Path("runs/killed")
FILES = {"README.md", "config.json", "model.safetensors"}


def agreements(to: str, backbones: dict[str, int]) -> Figure:
    """Whether what is loaded again gives the run's numbers."""
    promised = f"an export to {to} gives the run's own numbers, to {TOLERANCE:g} of the largest"
    try:
        check_installed(to)
    except FastidmmError as problem:
        return Figure(promised, 0, [], f"not tried: {problem}")
    broken, most, trials = [], 0.0, 0
    for backbone, resolution in backbones.items():
        for method in METHODS:
            trials += 1
            run = Path("runs") / f"{backbone.replace(':', '-')}-{method}-{to}"
            made_run(run, backbone, resolution, method)
            try:
                difference = export(run, to, Path("exports") / run.name)["difference"]
            except FastidmmError as problem:
                broken.append(f"{backbone}, {method}: {problem}")
                continue
            if difference is None:
                return Figure(promised, 0, [], "not tried: onnxruntime is not installed")
            most = max(most, difference)
    found = f"{trials - len(broken)} of {trials}, off by {most:.0e} at most"
    return Figure(promised, trials, broken, found)


def kills(trials: int) -> Figure:
    """Kill as many exports at random times: a whole folder is there, or none."""
    promised = "an export killed at any time leaves a whole folder or none; again, it is made"
    made_run(KILLED)
    began = time.perf_counter()
    os.waitpid(_exporting(), 0)  # as a child, which takes longer: its memory is copied as it writes
    lasts, broken, done = time.perf_counter() - began, [], 0
    shutil.rmtree(OUT)
    chance = random.Random(0)
    for number in range(trials):
        child = _exporting()
        time.sleep(chance.uniform(0, 1.2 * lasts))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if OUT.exists():
            done += 1
            if {path.name for path in OUT.iterdir()} != FILES:
                broken.append(f"{number}: {sorted(path.name for path in OUT.iterdir())}")
            shutil.rmtree(OUT)
        export(KILLED, "timm", OUT)
        left = sorted(path.name for path in Path().glob(f".{OUT}*"))
        if {path.name for path in OUT.iterdir()} != FILES or left:
            broken.append(f"{number}, again: {left}")
        shutil.rmtree(OUT)
    return Figure(promised, trials, broken, f"{trials - len(broken)} of {trials}, {done} were done")


def _exporting() -> int:
    """A child that exports."""
    child = os.fork()
    if not child:
        try:
            export(KILLED, "timm", OUT)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    return child


def figures(trials: int) -> list[Figure]:
    """All there are."""
    return [*(agreements(to, BACKBONES) for to in FORMS), kills(trials)]


if __name__ == "__main__":
    main(__doc__ or "", figures, trials=60)
