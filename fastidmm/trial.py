"""Try a few steps of every stage of a run, and forecast each: all of it in a folder soon gone."""

import gc
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from fastidmm.assemble import Parts, assemble
from fastidmm.capture import WARM_UP, stepped
from fastidmm.errors import DataError, OutOfMemoryError
from fastidmm.evaluate import linear_probe, outputs
from fastidmm.forecast import Costs, Course, Forecast, spell
from fastidmm.lock import LOCK, locked, running
from fastidmm.machine import device_of, peak_memory, synchronize
from fastidmm.plan import mix_of
from fastidmm.progress import Clock, say
from fastidmm.recipe import Recipe
from fastidmm.record import Record
from fastidmm.run import check
from fastidmm.scoring import scored_splits
from fastidmm.stages import begun, finetune_tables, high_tables
from fastidmm.store import Store
from fastidmm.train import course_of, save

STEPS, MOST_STEPS, FEWEST = 20, 60, 3  # full ones wanted, any made for them, full ones needed
SECONDS = 8.0  # for them, where they are slow
BLOCK = 5  # steps timed together
BEFORE_TAIL = 6  # the first step tried is so far from an epoch's end
IMAGES = {"cpu": 64, "cuda": 256}  # looked at: the time of a look is theirs, pro rata
PROBED = 512  # rows
LAUNCHED = 50_000  # rows up to which a GPU's probe takes the time of its launches, by estimate
SAMPLE = 0.1  # seconds between two looks at the power
DRAWING, SETTLING = 3.0, 1.5  # seconds of steps for these, and how many of them NVML averages over
Kind = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Block:
    """Steps of one kind, timed together."""

    tail: bool
    settled: bool  # neither warm-up nor capture
    steps: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Tried:
    """What was found by trying a stage."""

    record: Record
    course: Course
    opening: float  # seconds until the first step
    costs: Costs
    warm_up: float  # seconds in all, beyond what its steps take later
    fastest: float  # blocks' steps, over the mean
    slowest: float
    look: float  # seconds an image
    memory: int
    watts: float | None
    micro_batches: int
    short: bool
    width: int  # of features

    def forecast(self, stage: str) -> Forecast:
        """Of the whole stage."""
        events = self.course.after(0)
        steps = events.full * self.costs.full + events.tail * self.costs.tail
        seconds = self.opening + self.warm_up + events.seconds(self.costs)
        return Forecast(
            stage,
            self.course.steps,
            seconds,
            seconds - (1 - self.fastest) * steps,
            seconds + (self.slowest - 1) * steps,
            self.memory,
            self.watts,
            self.micro_batches,
            self.short,
        )


def forecasts(recipe: Recipe) -> list[Forecast]:
    """What `fastidmm run` will take, by stage; without labels or test images, its first stage."""
    alone = False
    try:
        check(recipe)
    except DataError as problem:
        alone = True
        say(f"only pretraining is forecast: {problem}")
    if device_of(recipe.run.device).type == "cpu":
        say(
            f"each stage is tried for {SECONDS:.0f} s or {WARM_UP + FEWEST} steps, whichever takes "
            "longer: minutes where the backbone is large for a CPU"
        )
    with soon_gone(".plan-") as work:
        folder = work / "run"
        first = tried(folder, recipe)
        found = [_told(first.forecast("pretrain"))]
        if alone:
            return found
        tables = finetune_tables(first.record, pretrained=False)
        second = tried(folder / "finetune", Recipe.of(tables))
        resolution = recipe.finetune.resolution
        # From random weights it is the same work.
        found += [
            _told(second.forecast(f"{name}-{resolution}")) for name in ("finetune", "scratch")
        ]
        looks = [(second.look, 2)]
        if recipe.finetune_high.epochs:
            tables = high_tables(second.record)
            tables["run"] |= {"init": "", "init_head": False}  # those steps' weights are no start
            high = tried(folder / "high", Recipe.of(tables))
            found.append(_told(high.forecast(f"finetune-{recipe.finetune_high.resolution}")))
            looks.append((high.look, 1))
        return [*found, evaluation(recipe, first, looks, found)]


@contextmanager
def soon_gone(prefix: str) -> Iterator[Path]:
    """A folder where the run will be, so that a checkpoint is written to the same disk.

    Gone at the end, and with it what those that were killed have left.
    """
    place = Path("runs") if Path("runs").is_dir() else Path()
    for left in place.glob(f"{prefix}*"):
        if (left / LOCK).exists() and not running(left):
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=place) as work, locked(Path(work)):
        yield Path(work)


def _told(found: Forecast) -> Forecast:
    """Said at once: the next stage may take long to try."""
    say(f"{found.stage}: {spell(found.seconds)}")
    return found


def evaluation(
    recipe: Recipe, first: Tried, looks: list[tuple[float, int]], found: list[Forecast]
) -> Forecast:
    """Of scoring: features of two backbones by kNN and probe, and each stage's classifier."""
    store, test = scored_splits(recipe)
    probe, num_test = probe_seconds(store, first.width, recipe.run.device), len(test)
    images = len(store) + num_test
    seconds = 2 * (images * first.look + probe)
    seconds += sum(num_test * look * times for look, times in looks)
    memory = max(each.memory for each in found)
    return Forecast("evaluate", 0, seconds, seconds, seconds, memory, first.watts)


def tried(folder: Path, recipe: Recipe) -> Tried:
    """Some steps of a stage, a checkpoint and a look, by the functions that train."""
    began = time.perf_counter()
    parts = assemble(begun(folder, recipe))
    run, device = recipe.run, parts.store.device
    size = course_of(parts).batch
    say(
        f"{run.method} at {run.resolution} px: {WARM_UP + FEWEST} to {MOST_STEPS} steps of "
        f"{size} images are tried"
    )
    parts.method.train()
    width = parts.method.backbone.num_features
    assert isinstance(width, int)
    synchronize(device)
    opening = time.perf_counter() - began
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    guess = parts.state.micro_batches
    try:
        power = Power(device)
        blocks, repeats = walk(parts, power)
        look = look_seconds(parts)
    except torch.OutOfMemoryError:
        raise OutOfMemoryError(
            f"the GPU's memory cannot hold a step of {parts.recipe.run.method} at "
            f"{parts.recipe.run.resolution} px: lower --batch-size or --resolution."
        ) from None
    course = course_of(parts)
    full, tail, warm_up = settled(blocks, course)
    began = time.perf_counter()
    save(parts, Clock())
    written = time.perf_counter() - began
    judge = 0 if parts.judge is None else len(parts.judge)
    costs = Costs(full, tail, course.num_images * look, judge * look, written)
    each = [b.seconds / b.steps / full for b in blocks if b.settled and not b.tail]
    found = Tried(
        parts.record, course, opening, costs, warm_up * repeats, min(each), max(each), look,
        memory_of(device), power.watts, parts.state.micro_batches,
        parts.state.micro_batches > guess, width,
    )  # fmt: skip
    del parts
    gc.collect()  # its tensors go before the next stage's come
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return found


def walk(parts: Parts, power: "Power") -> tuple[list[Block], float]:
    """Steps across an epoch's end, as blocks; how many kinds a run has for each one met.

    What they draw, where it can be measured, by some more of them.
    """
    state, course, device = parts.state, course_of(parts), parts.store.device
    kind_of = kinds(parts, course) if device.type == "cuda" else lambda number: ()
    # A captured step is recorded, too, before it is what it will be.
    warm_up = WARM_UP + (device.type == "cuda")
    state.step = max(0, course.steps_per_epoch - BEFORE_TAIL)
    seen: Counter[Kind] = Counter()
    blocks: list[Block] = []
    deadline = float("inf")  # from the second block on: the first may compile
    with closing(stepped(parts, Clock())) as coming:
        while not enough(blocks, course, late=time.perf_counter() > deadline):
            first = now = (is_tail(course, state.step), seen[kind_of(state.step)] >= warm_up)
            began, num = time.perf_counter(), 0
            while now == first and num < BLOCK and time.perf_counter() - began < SECONDS / BLOCK:
                seen[kind_of(state.step)] += 1
                next(coming)
                state.step, num = state.step + 1, num + 1
                now = (is_tail(course, state.step), seen[kind_of(state.step)] >= warm_up)
            synchronize(device)
            blocks.append(Block(*first, num, time.perf_counter() - began))
            deadline = min(deadline, time.perf_counter() + SECONDS)
        if device.type == "cuda":
            with power:
                until = time.perf_counter() + DRAWING
                while time.perf_counter() < until:
                    next(coming)
                    state.step += 1
    ends = [n for n in range(course.steps) if n % course.steps_per_epoch in (0, course.last)]
    return blocks, len(set(map(kind_of, ends))) / len(seen)


def kinds(parts: Parts, course: Course) -> Callable[[int], Kind]:
    """Which steps have a graph in common, by their numbers."""

    def own(number: int) -> Kind:
        epoch, method = number // course.steps_per_epoch, parts.method
        mixes = (mix_of(group, epoch) for group in method.views)
        return is_tail(course, number), *mixes, len(method.frozen(epoch))

    ahead = parts.recipe.run.views_ahead
    return (lambda number: (own(number), own(number + 1))) if ahead else own


def is_tail(course: Course, number: int) -> bool:
    """Whether the step of that number is the shorter one that ends an epoch."""
    return bool(course.tail) and number % course.steps_per_epoch == course.last


def enough(blocks: list[Block], course: Course, *, late: bool) -> bool:
    """Whether the steps tried will do."""
    full = sum(b.steps for b in blocks if b.settled and not b.tail)
    if late:
        return full >= FEWEST
    tail = not course.tail or any(b.settled and b.tail for b in blocks)
    return full >= STEPS and (tail or sum(b.steps for b in blocks) >= MOST_STEPS)


def settled(blocks: list[Block], course: Course) -> tuple[float, float, float]:
    """Seconds of a full step, of a tail, and of all warm-up beyond what its steps are later.

    A tail that was not met beyond its warm-up counts by its images.
    """

    def mean(tail: bool) -> float | None:
        found = [b for b in blocks if b.settled and b.tail is tail]
        return sum(b.seconds for b in found) / sum(b.steps for b in found) if found else None

    full = mean(False)
    assert full is not None, "the steps tried are not enough without"
    tail = mean(True) or full * course.tail / course.batch
    first = [b.seconds - b.steps * (tail if b.tail else full) for b in blocks if not b.settled]
    return full, tail, max(0.0, sum(first))


def look_seconds(parts: Parts) -> float:
    """Seconds to look at an image whole; the votes of a kNN are little beside it."""
    store = parts.store
    num = min(len(store), IMAGES[store.device.type])
    some = store.select(torch.linspace(0, len(store) - 1, num, device=store.device).long())
    model = parts.method.backbone_for_export()
    for _ in range(2):  # the first finds memory and algorithms
        began = time.perf_counter()
        outputs(model, some, resolution=parts.recipe.run.resolution, dtype=parts.dtype)
        synchronize(store.device)
        spent = time.perf_counter() - began
    return spent / num


def probe_seconds(store: Store, width: int, device_name: str) -> float:
    """Seconds of a linear probe of a store's images by features so wide, which are made up."""
    labels, classes = store.label[:PROBED], store.num_classes
    device = device_of(device_name)
    chance = torch.Generator().manual_seed(0)
    features = torch.randn(len(labels), width, generator=chance).to(device)
    gpu = device.type == "cuda"
    for _ in range(1 + gpu):  # a GPU's first finds its algorithms
        began = time.perf_counter()
        linear_probe(features, labels.to(device), features, classes)
        synchronize(device)
        spent = time.perf_counter() - began
    return spent * (max(1.0, len(store) / LAUNCHED) if gpu else len(store) / len(labels))


def memory_of(device: torch.device) -> int:
    """Bytes at most: reserved on the GPU, or of this process resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)  # graphs' pools, too
    return peak_memory()


class Power:
    """The watts a GPU draws, as NVML tells them; `watts` is None where it does not."""

    def __init__(self, device: torch.device) -> None:
        self._asked = device.type == "cuda"
        self._found: list[float] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._ask, args=(device,), daemon=True)

    def _ask(self, device: torch.device) -> None:
        while not self._over.wait(SAMPLE):
            try:
                self._found.append(torch.cuda.power_draw(device) / 1000)
            except Exception as problem:  # no NVML for Python, or not on this GPU: its own errors
                say(f"energy is not measured ({problem}).")
                return

    def __enter__(self) -> "Power":
        if self._asked:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self._over.set()
        if self._asked:
            self._thread.join()

    @property
    def watts(self) -> float | None:
        """The mean of what was told once it had settled."""
        found = self._found[round(SETTLING / SAMPLE) :] or self._found
        return sum(found) / len(found) if found else None
