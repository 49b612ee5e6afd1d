"""Flip bits and cut ends of checkpoints and stores, and see each noticed.

python tests/faults/corruption.py [--trials N]
"""

import contextlib
import io
import json
import shutil
from pathlib import Path

import numpy as np
from trials import Figure, main, outcome, prepare_toy, same, stopped, whole

from fastidmm import checkpoint, stages
from fastidmm.errors import DataError, FastidmmError
from fastidmm.folders import RECIPE
from fastidmm.places import folder_of, read_json
from fastidmm.preparing.pack import fingerprint_of
from fastidmm.record import ENVIRONMENT, METRICS, Record
from fastidmm.store import open_store

KINDS = ("flip", "cut")


def damage(files: list[Path], kind: str, chance: np.random.Generator) -> str:
    """Flip a bit of one of the files, or cut its end off; what was done."""
    path = files[chance.integers(len(files))]
    data = bytearray(path.read_bytes())
    at = int(chance.integers(len(data)))
    if kind == "cut":
        del data[at:]
    else:
        data[at] ^= 1 << int(chance.integers(8))
    path.write_bytes(data)
    return f"{kind} of {path.name} at byte {at}"


def checkpoints(trials: int) -> list[Figure]:
    """Damage to any file of a run's newest checkpoint: the one before is used, and it is said."""
    run, chance = stopped("begun", 5), np.random.default_rng(0)
    bad, good = reversed(checkpoint.found(run / "checkpoints"))
    kept = Path(shutil.copytree(bad, "kept"))
    found = []
    for kind in KINDS:
        broken = []
        for _ in range(trials):
            shutil.rmtree(bad)
            shutil.copytree(kept, bad)
            what = damage(sorted(bad.iterdir()), kind, chance)
            said = io.StringIO()
            with contextlib.redirect_stderr(said):
                used = checkpoint.newest(run / "checkpoints")
            if used != good or f"{bad} is damaged" not in said.getvalue():
                broken.append(f"{what}: {used} was used, {said.getvalue()!r} said")
        promised = f"a {kind} in the newest checkpoint is noticed, the one before used and it said"
        found.append(Figure(promised, trials, broken))
    truth = whole()
    stages.resume(run)
    differ = [] if same(outcome(run), truth) else ["the bits differ"]
    promised = "a run that goes on from the checkpoint before comes to the same bits"
    return [*found, Figure(promised, 1, differ)]


def refused(trials: int) -> Figure:
    """Damage to what a run began with: one sentence, and nothing is trained by it."""
    begun, chance, broken = stopped("fixed", 5), np.random.default_rng(2), []
    run, steps = Path("runs/changed"), Record(begun).steps
    for _ in range(trials):
        shutil.copytree(begun, run)
        what = damage([run / RECIPE, run / ENVIRONMENT], "flip", chance)
        said = ""
        try:
            stages.resume(run)
        except FastidmmError as problem:
            said = str(problem)
        newest = checkpoint.newest(run / "checkpoints")
        if not said or "\n" in said or not newest or checkpoint.step_of(newest) != steps:
            broken.append(f"{what}: {said!r} said")
        shutil.rmtree(run)
    return Figure("a flip in a run's recipe or environment is refused", trials, broken)


def told(trials: int) -> Figure:
    """Damage to the metric lines a checkpoint counts on: said, and the weights are the same."""
    begun, chance, broken = stopped("told", 5), np.random.default_rng(3), []
    run, truth = Path("runs/changed"), whole("untold")
    newest = checkpoint.newest(begun / "checkpoints")
    assert newest is not None
    lines = (begun / METRICS).read_bytes()[: checkpoint.beside(newest)[METRICS]["bytes"]]
    (begun / METRICS).write_bytes(lines)
    for number in range(trials):
        shutil.copytree(begun, run)
        what = damage([run / METRICS], KINDS[number % 2], chance)
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            stages.resume(run)
        learnt = same((truth[0], outcome(run)[1]), truth)
        if f"{run / METRICS} was changed or damaged" not in said.getvalue() or not learnt:
            broken.append(f"{what}: {said.getvalue()!r} said")
        shutil.rmtree(run)
    promised = "a flip or cut in a run's metric lines is said, and it learns the same weights"
    return Figure(promised, trials, broken)


def read(folder: Path) -> bytes:
    """All that training reads of a store, or of its description."""
    parts = [json.dumps(read_json(folder)).encode()]
    for split in ("train", "test"):
        store = open_store(folder, split)
        parts += [store.label.numpy().tobytes(), store.height.numpy().tobytes()]
        parts += [store.image(row).numpy().tobytes() for row in range(len(store))]
    return b"|".join(parts)


def noticed(folder: Path) -> str:
    """Where damage to a store is noticed: when it is opened, or when it is prepared again."""
    try:
        told = read_json(folder)["splits"]
        for split in told:
            open_store(folder, split)
    except DataError as said:
        assert "prepare the dataset again" in str(said) and "\n" not in str(said), said
        return "opened"
    same = all(fingerprint_of(folder, s, t) == t["fingerprint"] for s, t in told.items())
    return "" if same else "prepared again"


def stores(trials: int) -> list[Figure]:
    """Damage to a store: noticed when opened, else when prepared again, else nothing reads it."""
    folder, chance = folder_of("toy"), np.random.default_rng(1)
    kept, truth = Path(shutil.copytree(folder, "store")), read(folder)
    found = []
    for kind in KINDS:
        where = {"opened": 0, "prepared again": 0, "": 0}
        broken = []
        for _ in range(trials):
            shutil.copytree(kept, folder, dirs_exist_ok=True)
            files = [p for p in sorted(folder.iterdir()) if p.name != "prepare.json"]
            what = damage(files, kind, chance)
            where[found_at := noticed(folder)] += 1
            # Filling, and what says that torch wrote it: no picture, size or label differs.
            if not found_at and read(folder) != truth:
                broken.append(what)
        told = (
            f"{where['opened']} when opened, {where['prepared again']} when prepared again, "
            f"{where['']} in bytes that nothing reads, {len(broken)} missed"
        )
        found.append(Figure(f"a {kind} in a store is noticed", trials, broken, told))
    shutil.copytree(kept, folder, dirs_exist_ok=True)
    path = folder / "train.safetensors"
    data = bytearray(path.read_bytes())
    data[1500] ^= 1
    path.write_bytes(data)
    made = prepare_toy(Path.cwd()) and read(folder) == truth
    promised = "preparing again mends a store of which one pixel's bit was flipped"
    return [*found, Figure(promised, 1, [] if made else ["it was left as it is"])]


def figures(trials: int) -> list[Figure]:
    """All of them."""
    records = [refused(trials), told(min(trials, 20))]
    return [*checkpoints(trials), *records, *stores(trials)]


if __name__ == "__main__":
    main(__doc__, figures, 200)
