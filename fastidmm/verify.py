"""Make steps of a run again from one of its checkpoints: every bit recorded, or where not.

Nothing is written, and no lock is taken: a run that is being trained can be looked at.
"""

from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastidmm import checkpoint
from fastidmm.assemble import Cadence, Parts, assemble, training_rows
from fastidmm.errors import FastidmmError, NumericalError, OutOfMemoryError, UsageError
from fastidmm.folders import stages
from fastidmm.progress import say
from fastidmm.record import Record, plain
from fastidmm.step import step
from fastidmm.train import changes, take_up

Tables = list[dict[str, Tensor]]  # the model's and the optimizer's
FILES = checkpoint.MODEL, checkpoint.OPTIMIZER
# How near losses are to those of several ranks, whose sums round otherwise.
NEAR = 1e-3


class NothingToCompare(UsageError):
    """A run that keeps nothing past its checkpoint."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a run keeps of the steps past one of its checkpoints; tensors on the CPU."""

    first: int  # steps made at the checkpoint
    last: int
    start: tuple[Tables, dict[str, Any]]
    attempt: int
    ranks: int  # that made the steps
    cut_anew: bool  # whether memory became short on the way, and batches were cut smaller
    lines: dict[int, dict[str, Any]]
    checkpoints: dict[int, Tables]


@dataclass(frozen=True, slots=True)
class Replay:
    """What a replay came to."""

    run: str
    first: int
    last: int
    losses: int  # metric lines there were to compare with
    checkpoints: list[int]  # and checkpoints, by their steps
    ranks: int = 1  # that made the steps; by several, losses alone are compared, and not to the bit
    difference: str = ""
    reason: str = ""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "identical": not self.difference}

    def __str__(self) -> str:
        span = f"s {self.first} to {self.last}" if self.last > self.first else f" {self.last}"
        begun = f"{self.run}: step{span} replayed, "
        if self.difference:
            return begun + f"differs first at {self.difference}"
        losses = [f"{self.losses} loss{'es' * (self.losses > 1)}"] if self.losses else []
        if self.ranks > 1:
            near = f"within {NEAR:g} of those of {self.ranks} ranks, which round otherwise"
            return begun + f"{', '.join(losses)} {near}"
        weights = [f"weights and moments at step {number}" for number in self.checkpoints]
        return begun + f"bit-identical ({', '.join(losses + weights)})"


def verify(folder: Path, steps: int) -> list[Replay]:
    """Replay so many steps of a run and of each of its stages, where they keep any to compare."""
    found, nothing = [], []
    for place in (folder, *stages(folder)):
        try:
            found.append(replay(Record(place), steps))
        except NothingToCompare as problem:
            nothing.append(problem)
    if not found:
        raise nothing[0]
    for why in nothing:
        say(f"not verified: {why}")
    return found


def settle(found: list[Replay]) -> None:
    """An error that names the first difference, where there is one, and what likely made it."""
    for each in found:
        if each.difference:
            raise NumericalError(f"{each.run} differs first at {each.difference}; {each.reason}.")


def replay(record: Record, steps: int) -> Replay:
    """Replay so many steps of one run or stage by the function that trains."""
    kept = evidence(record, steps)
    say(f"{record.folder}: replaying steps {kept.first + 1} to {kept.last}")
    try:
        # Given its rows, it opens no images to judge by.
        parts = assemble(record, training_rows(record.recipe))
        take_up(parts, *kept.start)
        parts.state.attempt = parts.counters.attempt = kept.attempt
        difference = compare(parts, kept)
    except torch.OutOfMemoryError:
        raise OutOfMemoryError(
            "the GPU's memory cannot hold a step: close what else runs there, or wait for it."
        ) from None
    return Replay(
        run=str(record.folder),
        first=kept.first + 1,
        last=kept.last,
        losses=len(kept.lines),
        checkpoints=list(kept.checkpoints),
        ranks=kept.ranks,
        difference=difference,
        reason=reason(parts, kept) if difference else "",
    )


def evidence(record: Record, steps: int) -> Evidence:
    """What there is to compare with, all of it read before the first step is made."""
    while True:
        told = checkpoint.found(record.checkpoints)
        try:
            return _evidence(record, steps)
        except (FastidmmError, OSError):
            # Where the run is being trained a checkpoint may go while it is read.
            if checkpoint.found(record.checkpoints) == told:
                raise


def _evidence(record: Record, steps: int) -> Evidence:
    kept = {checkpoint.step_of(path): path for path in checkpoint.whole(record.checkpoints)}
    lines = {line["step"]: line for line in record.metrics()}
    if not kept:
        remedy = f"`fastidmm resume {record.folder}`"
        raise NothingToCompare(f"{record.folder} has no checkpoint: {remedy}.")

    def within(first: int) -> tuple[list[int], list[int]]:
        """Checkpoints and metric lines that can be reached, by their steps."""
        reach = range(first + 1, first + steps + 1)
        return [n for n in sorted(kept) if n in reach], [n for n in lines if n in reach]

    # Weights tell more than losses do, and the older checkpoint has more behind it.
    first = max(sorted(kept), key=lambda n: (bool(within(n)[0]), len(within(n)[1])))
    ahead, logged = within(first)
    if not ahead and not logged:
        later = [n for n in (*kept, *lines) if n > min(kept)]
        first, within_steps, remedy = min(kept), "", "train it further, a run keeps two checkpoints"
        if later:
            within_steps = f" in {steps} steps"
            remedy = f"--steps {min(later) - first} reaches what it has"
        raise NothingToCompare(
            f"{record.folder} keeps nothing{within_steps} past its checkpoint of step {first} to "
            f"compare a replay with: {remedy}."
        )
    start = checkpoint.load(kept[first], *FILES)
    # A run that went back made the steps up to its next checkpoint in that one's attempt.
    following = min((n for n in kept if n > first), default=first)
    after = checkpoint.load(kept[following])[1]
    return Evidence(
        first=first,
        last=max(ahead + logged),
        start=start,
        attempt=after["attempt"],
        ranks=max(state.get("ranks", 1) for state in (start[1], after)),
        cut_anew=after["micro_batches"] != start[1]["micro_batches"],
        lines={n: lines[n] for n in logged},
        checkpoints={n: checkpoint.load(kept[n], *FILES)[0] for n in ahead},
    )


def compare(parts: Parts, kept: Evidence) -> str:
    """Make the steps: "" or what differs first; scores on whole images are not made again."""
    logs = Cadence.of(parts).log
    skipped = torch.full((), parts.state.skipped, device=parts.store.device)
    parts.method.train()
    with closing(parts.loader.batches(kept.first)) as batches:
        for number in range(kept.first + 1, kept.last + 1):
            made = step(parts, next(batches))
            skipped = skipped + made.skipped
            difference = ""
            if line := kept.lines.get(number):
                epoch = -(-number // parts.loader.steps_per_epoch)
                now = {"epoch": epoch, **made.numbers(), "skipped": skipped}
                difference = _lines_differ(line, now, kept.ranks)
                skipped = torch.zeros_like(skipped)
            elif Cadence.due(number, logs) and number < max(kept.lines, default=0):
                difference = "no metric line of it, and of later ones"
            if not difference and kept.ranks == 1 and number in kept.checkpoints:
                difference = _tensors_differ(kept.checkpoints[number], parts)
            if difference:
                return f"step {number}: {difference}"
    return ""


def _lines_differ(line: dict[str, Any], now: dict[str, Any], ranks: int) -> str:
    for key, value in plain(now).items():
        if key not in line:
            return f"{key} not recorded"
        if ranks > 1 and (key not in ("loss", "skipped") or _near(line[key], value)):
            continue
        if line[key] != value:
            return f"{key} {line[key]!r} recorded, {value!r} now"
    return ""


def _near(recorded: float | None, value: float | None) -> bool:
    if recorded is None or value is None:
        return recorded is value
    return abs(recorded - value) <= NEAR * abs(recorded)


def _tensors_differ(then: Tables, parts: Parts) -> str:
    names = {id(param): name for name, param in parts.method.named_parameters()}
    params = [names[id(p)] for group in parts.optimizer.param_groups for p in group["params"]]

    def flat(model: dict[str, Tensor], optimizer: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights and moments by one kind of name, on the CPU."""
        moments = {}
        for name, tensor in optimizer.items():
            number, _, key = name.partition(".")
            told = f"{key} of {params[int(number)]}" if number.isdecimal() else name
            moments[told] = tensor
        return {name: t.detach().cpu() for name, t in {**model, **moments}.items()}

    before = flat(*then)
    now = flat(
        parts.method.state_dict(), checkpoint.optimizer_tensors(parts.optimizer, parts.scaler)
    )
    differing = [
        n
        for n in (*now, *sorted(before.keys() - now.keys()))
        if not _same(before.get(n), now.get(n))
    ]
    if not differing:
        return ""
    share = f"{len(differing)} of {len(now)} weights and moments, the first {differing[0]}"
    largest = max(
        (
            float((before[name].double() - now[name].double()).abs().max())
            for name in differing
            if name in before and name in now and before[name].shape == now[name].shape
        ),
        default=float("nan"),
    )
    return f"{share}, by {largest:.3g} at most"


def _same(tensor: Tensor | None, other: Tensor | None) -> bool:
    if tensor is None or other is None or tensor.dtype != other.dtype:
        return False
    bits = [t.contiguous().reshape(-1).view(torch.uint8) for t in (tensor, other)]
    return tensor.shape == other.shape and torch.equal(*bits)


def reason(parts: Parts, kept: Evidence) -> str:
    """What a difference likely comes from."""
    if changed := changes(parts):
        return f"likely since {changed}"
    if parts.store.device.type == "cuda" and not parts.recipe.run.exact:
        return "on a GPU the same bits are promised with --exact alone"
    if kept.cut_anew:
        return "likely since memory became short on the way, and batches were cut smaller"
    return (
        "the environment is the one it began with: a file or the code changed, the CPU's kind, or "
        "it was resumed in another"
    )
