"""Photographs decoded anew for every step by NVIDIA DALI: nvJPEG on a GPU, its threads on a CPU.

One decode serves all views of an image, which our kernels make by the plan: DALI shuffles nothing
and draws nothing, so it can begin at any step.

Deviation of pixels from the store's, in 1/255: none on a CPU (2,039 photographs of Flowers, and
every kind of file that is not refused, but for 1 in TIFFs of a palette or of YCbCr), and so none of
views from those of `resident`. Pictures that `prepare` made smaller are made so by DALI's Lanczos:
pixels 0.15 on average and 19 at most, IDMM's views 0.09 and 9. nvJPEG's: not measured yet.
"""

import ctypes
import os
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor

from fastidmm.batch import Batch, Options
from fastidmm.errors import DataError, UsageError
from fastidmm.facts import num_cores
from fastidmm.loaders import files
from fastidmm.loaders.files import RESIDENT, Files
from fastidmm.loaders.planned import Planned
from fastidmm.plan import Plan
from fastidmm.preparing.decode import ROOM, Room, Seat, decode
from fastidmm.store import Store

NOT_READ = (".gif", ".webp")  # no GIF, and no WebP with EXIF, a colour profile or frames
READ_OTHERWISE = {"transparent", "LAB"}  # no white behind it; other colours
ENGINES = 0.65  # share of a batch for a GPU's JPEG engines, DALI's own choice
Sizes = list[tuple[int, ...]]  # height and width of each picture, px


class DaliOptions(Options):
    """The table `[loader]`."""

    threads: Annotated[int, Field(ge=0)] = 0  # that decode; 0: one per core
    cache: Annotated[int, Field(ge=0)] = 0  # MB of decoded pictures that stay on the device


class Dali(Planned):
    """Batches rendered from files that DALI reads and decodes two steps ahead."""

    Options: ClassVar[type[Options]] = DaliOptions

    @staticmethod
    def unusable() -> str | None:
        """Why DALI cannot be used here, with what to install."""
        try:
            found = find_spec("nvidia.dali")
        except ModuleNotFoundError:  # there is no `nvidia` to look in
            found = None
        return None if found else "DALI is not installed: pip install 'fastidmm[dali]'"

    @classmethod
    def unfit(cls, store: Store) -> str | None:
        """Why DALI would not decode a store's files as `prepare` did."""
        if problem := files.unfit(store):
            return problem
        found = Files.of(store)
        for path in found.paths:
            if path.lower().endswith(NOT_READ):
                return f"DALI does not read {path}: {RESIDENT}"
        if READ_OTHERWISE & found.converted.keys():
            for path in found.paths:
                if kind := _read_otherwise(path):
                    return f"{path} is {kind}, which DALI makes other pixels of: {RESIDENT}"
        return None

    def set_up(self) -> None:
        """Know each row's file, its size in the store, and what it was made smaller to."""
        self.files = Files.of(self.store)
        self.shape = torch.stack((self.store.height, self.store.width), dim=1).cpu()  # (N, 2)
        reaches = self.shape.amax(dim=1, keepdim=True) == self.files.max_side
        self.shrunk = self.shape.float() * reaches  # (N, 2), 0 where it was not

    def made(self, start_step: int) -> Generator[Batch]:
        """Batches from `start_step` on, each made when it is asked for."""
        assert isinstance(self.options, DaliOptions)
        num_bytes = self.shape.long().prod(dim=1) * 3
        places = Places(num_bytes, self.options.cache * 10**6, self.batch_size)
        memory = torch.empty(places.num_bytes, dtype=torch.uint8, device=self.device)
        shares = (places.share(self.rows(step)) for step in count(start_step))
        ahead: deque[Share] = deque()
        # An engine's share of all batches is fixed by the first. One that begins with an epoch's
        # short last step is given the step before it, too, as an unbroken run had it.
        before = self.rows(start_step - 1) if start_step else self.rows(0)
        short = not self.options.cache and len(self.rows(start_step)) < len(before)

        def wanted() -> Iterator[Tensor]:
            if short:
                yield before
            while not places.complete:
                ahead.append(next(shares))
                if len(ahead[-1].fresh):
                    yield ahead[-1].fresh

        with closing(self._decoder(wanted(), self.batch_size)) as decoder:
            if short:
                self._decoded(decoder, before)
            for step in count(start_step):
                share = ahead.popleft() if ahead else next(shares)
                if len(share.fresh):
                    self._fetch(decoder, share, memory)
                plan = self.plan(step)
                yield self.batch_of(plan, self.render(self._images(plan, share, memory), plan))

    def _decoder(self, wanted: Iterator[Tensor], batch_size: int) -> "Decoder":
        """A decoder of the files of these rows, (b,) int64 each, to their sizes in the store."""
        assert isinstance(self.options, DaliOptions)

        def asked() -> Iterator[tuple[list[Any], list[Any]]]:
            for rows in wanted:
                names = [os.fsencode(self.files.paths[row]) for row in rows.tolist()]
                yield [np.frombuffer(n, np.uint8) for n in names], list(self.shrunk[rows].numpy())

        return Decoder(
            asked(),
            self.device,
            batch_size=batch_size,
            threads=self.options.threads or num_cores(),
            # Engines and kernels of a GPU differ in a last bit. Which of them decodes a picture
            # hangs on its batch, and on a restart pictures that were kept come in others.
            engines=0.0 if self.options.cache else ENGINES,
        )

    def _decoded(self, decoder: "Decoder", rows: Tensor) -> tuple[Any, Sizes]:
        """The next batch's pixels and their sizes, of the files of these rows."""
        try:
            return decoder.next()
        except DataError as problem:
            raise DataError(f"{self._culprit(rows, problem)}.") from None

    def _fetch(self, decoder: "Decoder", share: "Share", memory: Tensor) -> None:
        """Bring a step's fresh pictures into memory; a file that stands in the way is named."""
        pixels, sizes = self._decoded(decoder, share.fresh)
        for row, now, then in zip(
            share.fresh.tolist(), sizes, self.shape[share.fresh].tolist(), strict=True
        ):
            if not _as_prepared(now, then, self.files.max_side):
                raise DataError(
                    f"{self.files.paths[row]} has changed since it was prepared: prepare the "
                    "dataset again."
                )
        decoder.copy(pixels, memory[share.start :])

    def _culprit(self, rows: Tensor, problem: DataError) -> str:
        """Which of some rows' files DALI could not decode, and what to do."""
        for row in rows.tolist():
            path = self.files.paths[row]
            found = decode(Path(path), 0, Seat(Room(ROOM), 0))
            if isinstance(found, str):
                return f"{path} can no longer be read ({found}): prepare the dataset again"
            with closing(self._decoder(iter([torch.tensor([row])]), 1)) as decoder:
                try:
                    decoder.next()
                except DataError:
                    return f"DALI does not read {path}: {RESIDENT}"
        return f"DALI gave up ({problem}): `fastidmm resume` tries again, or {RESIDENT}"

    def _images(self, plan: Plan, share: "Share", memory: Tensor) -> Store:
        """A step's pictures as a store, in the order of its rows."""
        offset = share.offset
        if self.device.type == "cuda":
            offset = offset.pin_memory().to(self.device, non_blocking=True)
        return replace(
            self.store,
            pixels=memory,
            offset=offset,
            height=self.sizes[0][plan.rows],
            width=self.sizes[1][plan.rows],
            label=self.label[plan.rows],
            row=None,
        )


@dataclass(frozen=True, slots=True)
class Share:
    """Where the pictures of a step lie in memory, on the host."""

    fresh: Tensor  # (b,) int64: rows that have to be decoded
    start: int  # where in memory those go, one after the other
    offset: Tensor  # (B,) int64: where each row's picture is by then


class Places:
    """Shares out a piece of memory: kept pictures in front, those of one step alone behind.

    Pictures are kept in the order in which they come, as long as all that a step brings still fit.
    """

    def __init__(self, num_bytes: Tensor, room: int, batch_size: int) -> None:
        """num_bytes (N,) int64 of each picture; `room` bytes are for those that are kept."""
        total, largest = int(num_bytes.sum()), num_bytes.topk(min(batch_size, len(num_bytes)))
        self._each, self._total = num_bytes, total
        self._room = min(room // 3 * 3, total)  # whole pixels, which renderers count in
        self._end = 0
        self._kept = torch.full_like(num_bytes, -1)
        self.num_bytes = self._room + (int(largest.values.sum()) if self._room < total else 0)

    @property
    def complete(self) -> bool:
        """Whether every picture is kept, or will be by the shares given out."""
        return self._end == self._total

    def share(self, rows: Tensor) -> Share:
        """The next step's share; rows (B,) int64."""
        offset = self._kept[rows]
        missing = offset < 0
        fresh = rows[missing]
        sizes = self._each[fresh]
        ends = sizes.cumsum(0)
        start, num_bytes = self._end, int(sizes.sum())
        offset[missing] = start + ends - sizes
        if start + num_bytes <= self._room:
            self._kept[fresh] = offset[missing]
            self._end += num_bytes
        return Share(fresh, start, offset)


class Decoder:
    """A DALI pipeline from the names of files to their pixels, one batch after the other."""

    def __init__(
        self,
        asked: Iterator[tuple[list[Any], list[Any]]],
        device: torch.device,
        *,
        batch_size: int,
        threads: int,
        engines: float = ENGINES,
    ) -> None:
        """`asked`: of each batch, names as bytes, and sizes to shrink to or zeros."""
        from nvidia.dali import pipeline_def

        self._device, gpu = device, device.type == "cuda"
        index = torch.cuda.current_device() if gpu and device.index is None else device.index
        self._pipe = pipeline_def(_graph, enable_conditionals=True)(
            asked,
            "mixed" if gpu else "cpu",
            engines,
            batch_size=batch_size,
            num_threads=threads,
            device_id=index if gpu else None,
        )
        try:
            self._pipe.build()
        except RuntimeError as problem:
            raise UsageError(
                f"--loader dali: DALI cannot use {device} ({_message(problem)}): with a driver for "
                "CUDA 12 install fastidmm[dali-cuda12], or choose --loader resident."
            ) from None
        self._pipe.schedule_run()

    def next(self) -> tuple[Any, Sizes]:
        """The next batch's pixels, for `copy`, and the sizes they were decoded at.

        The host waits for DALI's threads, not for the device.
        """
        outputs, told = None, ""
        try:
            outputs = self._pipe.share_outputs(cuda_stream=self._stream())
        except RuntimeError as problem:
            told = _message(problem)
        if outputs is None:
            raise DataError(told)  # out here, since DALI's own error would hold its threads
        self._pipe.release_outputs()  # pixels stay while they are held, or in use on the stream
        self._pipe.schedule_run()
        pixels, images = outputs
        return pixels, [tuple(shape[:2]) for shape in images.shape()]

    def copy(self, pixels: Any, memory: Tensor) -> None:
        """Pixels of a batch, one picture after the other, to the beginning of `memory`."""
        there, stream = ctypes.c_void_p(memory.data_ptr()), self._stream()
        if stream is None:
            pixels.copy_to_external(there)
        else:
            raw = ctypes.c_void_p(stream.cuda_stream)
            pixels.copy_to_external(there, raw, non_blocking=True, use_copy_kernel=True)

    def _stream(self) -> torch.cuda.Stream | None:
        return torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None

    def close(self) -> None:
        """End the threads: the pipeline ends with the last that holds it."""
        del self._pipe


def _graph(
    asked: Iterator[tuple[list[Any], list[Any]]], device: str, engines: float
) -> tuple[Any, Any]:
    """Names to pixels, and to pixels before they were made smaller; DALI rewrites its `if`."""
    from nvidia.dali import fn, types

    names, size = fn.external_source(
        source=asked, num_outputs=2, dtype=[types.UINT8, types.FLOAT], ndim=1
    )
    images = fn.decoders.image(
        # A reader of DALI's would go by an order of its own; its cache takes no other's pictures.
        fn.io.file.read(names),
        device=device,
        output_type=types.RGB,
        hw_decoder_load=engines,
        jpeg_fancy_upsampling=True,  # as libjpeg-turbo, by which the store was prepared
    )
    if size[0] > 0:
        pixels = fn.resize(images, size=size, interp_type=types.INTERP_LANCZOS3)
    else:
        pixels = images
    return pixels, images


def _read_otherwise(path: str) -> str:
    """What a picture is that DALI makes other pixels of than `prepare`; "" where it does not."""
    with Image.open(path) as image:
        if image.mode == "LAB":
            return "in LAB"
        return "transparent" if image.has_transparency_data else ""


def _as_prepared(now: tuple[int, ...], then: list[int], max_side: int) -> bool:
    """Whether a picture of the size (height, width) `now` became one of the size `then`."""
    if max(then) != max_side or max(now) <= max_side:
        return list(now) == then
    # Pillow may have halved it on the way, and rounded twice.
    shrink = max_side / max(now)
    return all(abs(side * shrink - kept) <= 1 for side, kept in zip(now, then, strict=True))


def _message(problem: RuntimeError) -> str:
    """What DALI says went wrong, without where in its graph."""
    return str(problem).rpartition("encountered:")[2].strip().partition("\n")[0]
