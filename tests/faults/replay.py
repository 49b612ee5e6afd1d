"""Replay runs of every kind: the same bits, and planted differences found.

python tests/faults/replay.py [--trials 40]
"""

import argparse
import hashlib
import json
import random
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from forks import CASES, PRETRAIN, Bench, Case, bench, finish, start, told

from fastidmm import checkpoint
from fastidmm.folders import RECIPE
from fastidmm.record import METRICS, Record
from fastidmm.verify import FILES

LONG = "20 steps between two checkpoints"
CASE = Case(f"{PRETRAIN} --epochs 10 --set run.checkpoint_every=5")
PLANTS = ("line", "line", "weight", "moment", "seed")


@dataclass(slots=True)
class Figures:
    """What the replays found."""

    runs: int = 0
    identical: int = 0
    steps: int = 0
    losses: int = 0
    checkpoints: int = 0
    planted: int = 0
    found: int = 0
    touched: int = 0  # files that a replay changed, made or removed
    broken: list[str] = field(default_factory=list)


def tree(folder: Path) -> dict[str, tuple[str, int]]:
    """All there is in a folder: what each file holds, and when it was written."""
    return {
        str(path.relative_to(folder)): (
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "",
            path.stat().st_mtime_ns,
        )
        for path in sorted(folder.rglob("*"))
    }


def trained(work: Bench, name: str) -> tuple[Path, Case]:
    """Where a case was brought to its end, and which it is."""
    if name in CASES:
        work.truth(name)
        return work.work / f"truth {name}", CASES[name]
    place = work.place(name, CASE)
    finish(CASE, place)
    return place, CASE


def verified(place: Path, case: Case, found: Figures) -> tuple[int, str]:
    """The status of `fastidmm verify`, and what it said; the folder as it was."""
    before = tree(place / "runs")
    status = start(f"verify {case.folder}", place).status()
    found.touched += len(before.items() ^ tree(place / "runs").items())
    return status, (place / "said").read_text()


def identical(work: Bench, name: str, found: Figures) -> None:
    """Verify a run that nothing happened to."""
    place, case = trained(work, name)
    status, said = verified(place, case, found)
    found.runs += 1
    answer = re.search(
        r"steps (\d+) to (\d+) replayed, bit-identical \((\d+) losses(, weights)?", said
    )
    if status or not answer:
        found.broken.append(f"{name}: status {status}, {said[-300:]}")
        return
    first, last, losses = map(int, answer.groups()[:3])
    found.identical += 1
    found.steps += last + 1 - first
    found.losses += losses
    found.checkpoints += bool(answer[4])


def planted(work: Bench, name: str, plant: str, chance: random.Random, found: Figures) -> None:
    """Change one thing of a run, and see whether it is found and named."""
    source, case = trained(work, name)
    place = work.work / "planted"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(source, place)
    expected = change(place / case.folder, plant, chance)
    status, said = verified(place, case, found)
    found.planted += 1
    if status == 4 and f"differs first at {expected}" in said:
        found.found += 1
    else:
        found.broken.append(f"{name}: {expected} not found: status {status}, {said[-300:]}")


def change(folder: Path, plant: str, chance: random.Random) -> str:
    """Plant a difference by its kind; how it is to be told, from its step on."""
    older, newest = checkpoint.found(folder / "checkpoints")
    first, last = checkpoint.step_of(older) + 1, checkpoint.step_of(newest)
    if plant == "seed":
        recipe = folder / RECIPE
        recipe.write_text(recipe.read_text().replace("seed = 0", "seed = 1"))
        return f"step {first}: "
    if plant == "line":
        lines = Record(folder).metrics()
        number, key = chance.randint(first, last), chance.choice(["loss", "grad_norm", "lr"])
        line = next(line for line in lines if line["step"] == number)
        # The next number that float32 has.
        line[key] = float(torch.tensor(line[key]).nextafter(torch.tensor(9e9)))
        (folder / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
        return f"step {number}: {key} {line[key]!r} recorded"
    tensors, state = checkpoint.load(newest, *FILES)
    table = tensors[plant == "moment"]
    name = chance.choice(sorted(table))
    # A scalar has no view of another width.
    table[name] = table[name].reshape(-1) if (scalar := not table[name].ndim) else table[name]
    num_bytes = table[name].view(-1).view(torch.uint8)
    num_bytes[chance.randrange(len(num_bytes))] ^= 1 << chance.randrange(8)
    table[name] = table[name].reshape(()) if scalar else table[name]
    checkpoint.save(newest.parent, last, dict(zip(FILES, tensors, strict=True)), state)
    what = f"{name.partition('.')[2]} of " if plant == "moment" else name
    return f"step {last}: 1 of {sum(map(len, tensors))} weights and moments, the first {what}"


def trials(num: int, names: list[str], seed: int = 0) -> Figures:
    """Verify each of the cases, then so many planted differences among them."""
    chance, found = random.Random(seed), Figures()
    with bench() as work:
        for name in names:
            identical(work, name, found)
        for number in range(num):
            plant = PLANTS[number % len(PLANTS)]
            planted(work, names[number % len(names)], plant, chance, found)
    return found


def main() -> None:
    """Print the figures."""
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--trials", type=int, default=40)
    words.add_argument("--seed", type=int, default=0)
    options = words.parse_args()
    found = trials(options.trials, [*CASES, LONG], options.seed)
    compared = f"{found.steps} steps, {found.losses} lines, {found.checkpoints} checkpoints"
    told(
        "promised bit-identical replays of undisturbed runs",
        f"{found.identical} of {found.runs}: {compared}",
    )
    told(
        "promised planted differences (a digit, a bit, a seed) found where they are",
        f"{found.found} of {found.planted}",
    )
    told("promised 0 files of a run changed by a replay", found.touched)
    for each in found.broken:
        print(f"  broken: {each}")
    raise SystemExit(bool(found.broken or found.touched))


if __name__ == "__main__":
    main()
