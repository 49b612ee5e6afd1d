"""What FFCV is given to run: a decoder that follows a plan, and an epoch without end.

FFCV hands the numbers of a batch's samples to compiled code at run time, as it hands the batch's
memory. Here they are rows of a table, each a sample's number and the boxes of its crops, drawn
right before the batch is cut: nothing is shared between batches, so nothing can be overtaken.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from queue import Empty
from typing import Any

import numba
import numpy as np
from ffcv.fields.rgb_image import SimpleRGBImageDecoder
from ffcv.libffcv import resize_crop
from ffcv.loader import Loader
from ffcv.loader.epoch_iterator import EpochIterator
from ffcv.pipeline.allocation_query import AllocationQuery
from ffcv.pipeline.compiler import Compiler
from ffcv.pipeline.state import State
from numpy.typing import NDArray

from fastidmm.preparing.beton import FIELD

MOST_THREADS: int = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
BATCHES_AHEAD = 2

Pixels = NDArray[np.uint8]
Table = NDArray[np.int64]


def _set_num_threads(kind: type[Compiler], num: int) -> None:
    kind.num_threads = num
    numba.set_num_threads(num)


# FFCV's sets torch's threads as well, from its own thread while others compute: their sums would
# run in another order.
Compiler.set_num_threads = classmethod(_set_num_threads)


class Crops(SimpleRGBImageDecoder):  # type: ignore[misc]
    """Cuts all crops of a picture from one look at its pixels, and resizes them as FFCV does.

    `groups` are (views, S). Takes (B, 1 + 4 * all views) int64, sample, then top, left, bottom and
    right of each view; gives for every group (B, views, S, S, 3) uint8.
    """

    def __init__(self, groups: list[tuple[int, int]]) -> None:
        super().__init__()
        self.groups = groups

    def declare_state_and_memory(self, before: State) -> tuple[State, tuple[AllocationQuery, ...]]:
        """What comes out, and the memory for it."""
        byte = np.dtype("u1")
        queries = tuple(AllocationQuery((num, size, size, 3), byte) for num, size in self.groups)
        return replace(before, jit_mode=True, shape=queries[0].shape, dtype=byte), queries

    def generate_code(self) -> Callable[..., tuple[Pixels, ...]]:
        """The function that FFCV compiles."""
        read, each = self.memory_read, Compiler.get_iterator()
        cut = Compiler.compile(resize_crop)

        def decode(
            wanted: Table, found: tuple[Pixels, ...], samples: Any, storage: Any
        ) -> tuple[Pixels, ...]:
            for i in each(len(wanted)):
                row = wanted[i]
                sample = samples[row[0]]
                high, wide = np.int64(sample["height"]), np.int64(sample["width"])
                image = read(sample["data_ptr"], storage).reshape(high, wide, 3)
                k = 1
                for group in range(len(found)):
                    for view in range(found[group].shape[1]):
                        top, left, bottom, right = row[k], row[k + 1], row[k + 2], row[k + 3]
                        cut(image, top, bottom, left, right, found[group][i, view])
                        k += 4
            return found

        decode.is_parallel = True  # type: ignore[attr-defined]
        return decode


def source(path: Path, groups: list[tuple[int, int]], *, batch_size: int, threads: int) -> Loader:
    """FFCV's loader of a file; of its pixels the system keeps what its memory has room for."""
    return Loader(
        str(path),
        batch_size=batch_size,
        num_workers=threads,
        os_cache=True,
        drop_last=False,
        batches_ahead=BATCHES_AHEAD,
        pipelines={FIELD: [Crops(groups)]},
    )


def holds(source: Loader, sample: NDArray[np.int64], sizes: NDArray[np.int32]) -> bool:
    """Whether those samples, (N,), are in the file, and of those heights and widths, (N, 2)."""
    told = source.reader.metadata["f0"]
    if len(source.reader.alloc_table) != len(told) or sample.max() >= len(told):
        return False
    found = np.stack((told["height"], told["width"]), axis=1)[sample]
    return bool((found == sizes).all())


class Cut(EpochIterator):  # type: ignore[misc]
    """Crops of one batch after the other, as many as are asked for; `end` ends the thread.

    Crops lie in FFCV's memory, and are written over once the next are asked for.
    """

    def __init__(self, loader: Loader, wanted: Iterable[Table]) -> None:
        self.wanted = wanted
        self.problem: BaseException | None = None
        super().__init__(loader, [])

    def run(self) -> None:
        """In FFCV's thread: make batches until told to end."""
        self.iter_ixes: Iterator[Table] = takewhile(
            lambda _: not self.terminate_event.is_set(), self.wanted
        )
        try:
            super().run()
        except BaseException as problem:
            self.problem = problem
            self.output_queue.put(None)

    def __next__(self) -> tuple[Pixels, ...]:
        """The crops of a batch, group by group; whatever went wrong in FFCV's thread."""
        try:
            crops: tuple[Pixels, ...] = super().__next__()[0]
        except StopIteration:
            if self.problem:
                raise self.problem from None
            raise
        return crops

    def end(self) -> None:
        """End the thread, and wait for it: FFCV leaves it to itself."""
        self.terminate_event.set()
        while self.is_alive():
            with suppress(Empty):
                self.output_queue.get_nowait()  # where it waits for room
            self.join(timeout=0.01)
