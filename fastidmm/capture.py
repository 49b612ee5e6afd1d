"""Whole steps as CUDA graphs: plan, views, forward, loss, backward and update in one launch.

A graph repeats what it was captured with: addresses, shapes, and the numbers that the host gave.
So whatever changes from step to step is read from one counter on the device, and whatever changes
shapes or branches makes a step of another kind, with a graph of its own. The first steps of a kind
are made one operation at a time: kernels are compiled, memory is settled. The next one is captured,
and from there on replayed: the same kernels on the same numbers, so the same bits.

With `run.views_ahead` a captured step finds its views made, and makes the next one's on a stream
of its own beside the rest: a fork and a join within the graph, for one more copy of the views.
"""

import logging
from collections import Counter, deque
from collections.abc import Callable, Generator
from contextlib import ExitStack, closing, suppress
from dataclasses import replace
from functools import partial
from itertools import count
from typing import Any, Protocol

import torch
from torch import Tensor

from fastidmm.assemble import Parts, nothing
from fastidmm.batch import Batch
from fastidmm.plan import mix_of
from fastidmm.progress import Clock, say
from fastidmm.ranks import world
from fastidmm.step import Stepped, step

WARM_UP = 2  # steps of a kind before it is captured
AHEAD = 2  # steps the host may be ahead of the device: who asks a run to stop waits for these

Kind = tuple[Any, ...]


class Recording(Protocol):
    """Work that was recorded, to be done again."""

    def record(self, work: Callable[[], Stepped]) -> Stepped:
        """What the work gives, in memory that every replay writes to; it is not done yet."""
        ...

    def replay(self) -> None:
        """Do it."""
        ...


class CudaGraph:
    """A `Recording` on a GPU; those of one pool share its memory, since they never run at once."""

    def __init__(self, pool: Any) -> None:
        """`pool`: of `torch.cuda.graph_pool_handle`."""
        self._graph, self._pool = torch.cuda.CUDAGraph(), pool

    def record(self, work: Callable[[], Any]) -> Any:
        """As `Recording`; whatever stands in the way is raised, and all is as before."""
        stream = torch.cuda.current_stream()
        # Threads of a loader may use the device meanwhile.
        capture = torch.cuda.graph(self._graph, pool=self._pool, capture_error_mode="thread_local")
        problem: Exception | None = None
        try:
            with capture:
                try:
                    made = work()
                except Exception as first:
                    problem = first
        except Exception as refused:
            # Where the end of a capture is refused, torch stays on its stream, and before version
            # 2.13 its allocator goes on as if memory were still being captured, and keeps the pool.
            torch.cuda.set_stream(stream)
            with suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self._pool)
                torch._C._cuda_releasePool(torch.cuda.current_device(), self._pool)
            problem = problem or refused  # the end's own error says less than what led to it
        if problem is None:
            return made
        try:
            raise problem
        finally:
            del problem  # whose frames hold what was made, and would be held by this one

    def replay(self) -> None:
        """As `Recording`."""
        self._graph.replay()


class Captured:
    """Steps of a run, captured by kind; a step that cannot be is made as it is without."""

    def __init__(self, parts: Parts, recording: Callable[[], Recording] | None = None) -> None:
        """`recording` makes a new one; by default, graphs on the run's GPU."""
        self.parts, self._given = parts, recording
        self._recording = self._recordings()
        self._micro_batches = parts.state.micro_batches
        parts.release = self.release
        self._counter = torch.zeros((), dtype=torch.int64, device=parts.store.device)
        self._seen: Counter[Kind] = Counter()
        self._graphs: dict[Kind, tuple[Recording, Stepped, Batch | None]] = {}
        self._impossible = False
        self._ahead = parts.recipe.run.views_ahead
        on_gpu = parts.store.device.type == "cuda"
        self._beside = torch.cuda.Stream(parts.store.device) if on_gpu and self._ahead else None
        self._held: dict[int, Batch] = {}  # where views made ahead lie, by the rows of the batch
        self._made = -1  # the step that they are of

    def step(self, number: int, batch: Batch | None = None) -> Stepped:
        """Make the step of that number, from `batch` or else from what the loader makes of it.

        What it gives is overwritten by the next step: graphs share their memory.
        """
        if self._micro_batches != self.parts.state.micro_batches:
            self._micro_batches = self.parts.state.micro_batches
            self.release()  # graphs of larger parts would hold their memory for nothing
            self._seen.clear()  # kernels of other shapes are yet to be compiled
        kind = self._kind(number) if batch is None else self._kind_of(batch)
        self._counter.fill_(number)
        if kind not in self._graphs and not self._capture(kind, number, batch):
            return step(self.parts, batch or self._views_with_room(number, self._counter))
        graph, made, held = self._graphs[kind]
        if held is not None and (batch is not None or self._made != number):
            fresh = batch or self._views_with_room(number)
            if kind not in self._graphs:  # their memory went for these views
                return step(self.parts, fresh)
            _copy(fresh, held)
        graph.replay()
        if self._ahead and batch is None:
            self._made = number + 1
        return made

    def release(self) -> bool:
        """Give back the memory that graphs hold, to record them anew; whether there were any."""
        held = bool(self._graphs)
        self._graphs.clear()
        self._held.clear()
        self._made = -1
        self._recording = self._recordings()
        if held and self.parts.store.device.type == "cuda":
            torch.cuda.empty_cache()
        return held

    def close(self) -> None:
        """Make no step any more: what is left of a run is then freed as soon as nobody holds it."""
        self.release()
        self.parts.release = nothing

    @property
    def num_kinds(self) -> int:
        """Kinds of steps that are replayed by now."""
        return len(self._graphs)

    @property
    def is_emptied(self) -> bool:
        """Whether there are no graphs, and could be."""
        return not self._graphs and not self._impossible

    def _recordings(self) -> Callable[[], Recording]:
        return self._given or partial(CudaGraph, torch.cuda.graph_pool_handle())

    def _kind(self, number: int) -> Kind:
        """What decides shapes and branches of a step that the device makes from its counter."""
        if self._ahead:
            return *self._own_kind(number), *self._own_kind(number + 1)
        return self._own_kind(number)

    def _own_kind(self, number: int) -> Kind:
        views = self.parts.method.views
        epoch = number // self.parts.loader.steps_per_epoch
        mixes = (mix_of(group, epoch) for group in views)
        return self._num_rows(number), *mixes, *self._frozen(epoch)

    def _num_rows(self, number: int) -> int:
        loader = self.parts.loader
        first = number % loader.steps_per_epoch * loader.batch_size
        return min(loader.batch_size, len(loader.store) - first)

    def _frozen(self, epoch: int) -> Kind:
        return tuple(map(id, self.parts.method.frozen(epoch)))

    def _kind_of(self, batch: Batch) -> Kind:
        """The same of a step whose batch is there already."""
        return batch.num_images, *self._frozen(batch.epoch)

    def _views(self, number: int, counter: Tensor | None = None) -> Batch:
        """The batch of a step that the device makes alone; by the counter, where a graph may."""
        return self.parts.loader.batch(number, counter)

    def _views_with_room(self, number: int, counter: Tensor | None = None) -> Batch:
        """The same outside of a graph, whose memory they may need."""
        return self.parts.with_room(lambda: self._views(number, counter))

    def _place(self, number: int) -> Batch:
        """Where the views of a step lie, if they are made ahead."""
        rows = self._num_rows(number)
        if rows not in self._held:
            self._held[rows] = self._views(number).changed(torch.clone)
        epoch = number // self.parts.loader.steps_per_epoch
        return replace(self._held[rows], step=self._counter, epoch=epoch)

    def _with_next(self, number: int, held: Batch, place: Batch) -> Stepped:
        """A step whose views are there, and beside it the next one's."""
        following = self._counter + 1  # which is held until the other stream has read it
        if self._beside is not None:
            self._beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._beside):  # None, without a GPU, is where we are
            coming = self._views(number + 1, following)
        made = step(self.parts, held)
        if self._beside is not None:
            torch.cuda.current_stream().wait_stream(self._beside)
        _copy(coming, place)
        return made

    def _work(self, number: int, batch: Batch | None) -> tuple[Callable[[], Stepped], Batch | None]:
        """What is recorded of a step, and where it finds its batch if it does not make it."""
        if batch is not None:
            held = replace(batch.changed(torch.clone), step=self._counter)
            return lambda: step(self.parts, held), held
        if not self._ahead:
            return lambda: step(self.parts, self._views(number, self._counter)), None
        held, place = self._place(number), self._place(number + 1)
        return lambda: self._with_next(number, held, place), held

    def _capture(self, kind: Kind, number: int, batch: Batch | None) -> bool:
        """Record a kind of step; false while it is too early, and where it cannot be done."""
        self._seen[kind] += 1
        if self._impossible or self._seen[kind] <= WARM_UP:
            return False
        try:
            work, held = self._work(number, batch)
            graph = self._recording()
            made = graph.record(work)
        except Exception as problem:
            # Gradients that were recorded and never computed must not be used.
            self.parts.optimizer.zero_grad(set_to_none=True)
            if isinstance(problem, torch.OutOfMemoryError) and self.release():
                return False  # without the other graphs there is room: with the next of its kind
            self._impossible = True
            logging.getLogger(__name__).debug("not captured", exc_info=problem)
            why = (str(problem) or type(problem).__name__).splitlines()[0]
            say(f"steps are not captured ({why}): they are made one operation at a time.")
            return False
        self._graphs[kind] = graph, made, held
        return True


def _copy(fresh: Batch, fixed: Batch) -> None:
    """Bring a batch to where a graph reads it: a few launches for all of its tensors."""
    pairs: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
    for source, place in zip(fresh.tensors(), fixed.tensors(), strict=True):
        sources, places = pairs.setdefault(source.dtype, ([], []))
        sources.append(source)
        places.append(place)
    for sources, places in pairs.values():
        torch._foreach_copy_(places, sources)


class Brake:
    """Keeps the host within so many steps of the device; called after each step."""

    def __init__(self) -> None:
        self._under_way: deque[torch.cuda.Event] = deque()

    def __call__(self) -> None:
        """Wait for the step that is too far behind, if there is one."""
        self._under_way.append(torch.cuda.current_stream().record_event())
        if len(self._under_way) > AHEAD:
            self._under_way.popleft().synchronize()


def left_uncaptured(parts: Parts) -> str:
    """Why steps of a GPU that were to be captured are not, from the start; "" where nothing is."""
    wanted = parts.store.device.type == "cuda" and parts.recipe.run.capture
    # What travels between ranks can be captured; it has not been tried.
    if wanted and world().size > 1:
        return "steps of several ranks are not captured: they are made one operation at a time."
    return ""


def stepped(parts: Parts, clock: Clock) -> Generator[Stepped]:
    """Steps from where a run stands on, each made when it is asked for, and soon overwritten.

    Closing it ends every thread and process behind it.
    """
    loader = parts.loader
    on_gpu = parts.store.device.type == "cuda"
    capture = on_gpu and parts.recipe.run.capture and not left_uncaptured(parts)
    captured = Captured(parts) if capture else None
    brake = Brake()
    with ExitStack() as ends:
        batches = ends.enter_context(closing(loader.batches(parts.state.step)))
        if captured is not None:
            ends.enter_context(closing(captured))
        for number in count(parts.state.step):
            if captured is None:
                yield step(parts, clock.wait_for(batches))
            elif loader.on_device:
                yield captured.step(number)
            else:
                yield captured.step(number, clock.wait_for(batches))
            if on_gpu:
                brake()
