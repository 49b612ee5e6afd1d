"""FFCV cuts the plan's boxes out of `train.beton` on its threads; the device does the rest.

Crops are resized by FFCV's resize, OpenCV's INTER_AREA in 8 bits, whatever interpolation the
recipe asks for: fine-tuning's are not bicubic. Where both axes shrink it averages the source pixels
under each output pixel, half the reach of the plain renderer's triangle; where one does not, it
comes near to taking the nearest pixel.

Deviation from the plain renderer on Flowers' photographs, mean and max in 1/255:

    IDMM at 112 px             shrunk 0.98 and 41                           finished 0.57 and 99
    IDMM at 64 px              shrunk 1.5 and 45                            finished 0.89 and 97
    fine-tuning at 224 px      shrunk 0.63 and 28, enlarged 0.74 and 112    finished 0.62 and 204
    fine-tuning at 448 px      shrunk 0.50 and 30, enlarged 0.87 and 107    finished 0.72 and 209

Finished maxima are of jitter, which multiplies, and of RandAugment's thresholds.
"""

from collections.abc import Generator, Iterator
from itertools import count
from queue import SimpleQueue
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from fastidmm.batch import Batch, Options
from fastidmm.errors import DataError, UsageError
from fastidmm.facts import num_cores
from fastidmm.kernels.views import finish
from fastidmm.loaders.planned import Planned
from fastidmm.plan import Plan
from fastidmm.preparing import beton
from fastidmm.store import Store

if TYPE_CHECKING:
    from fastidmm.loaders.ffcv_crops import Pixels, Table

REMEDY = "repeat the `fastidmm prepare` that made it with --format beton, which decodes none again"


class FFCVOptions(Options):
    """The table `[loader]`."""

    threads: Annotated[int, Field(ge=0)] = 0  # 0: one per core


class FFCV(Planned):
    """Batches of crops that FFCV cuts and resizes, finished on the device."""

    Options: ClassVar[type[Options]] = FFCVOptions
    deviation: ClassVar[float] = 1.0

    @staticmethod
    def unusable() -> str | None:
        """Why FFCV cannot be used here."""
        return beton.unusable()

    @classmethod
    def unfit(cls, store: Store) -> str | None:
        """Why FFCV has nothing to read."""
        if store.folder is None:
            return "the images were not prepared into a folder: choose --loader resident"
        if not (store.folder / beton.NAME).exists():
            return f"{store.folder} holds no {beton.NAME}: {REMEDY}"
        return None

    def set_up(self) -> None:
        """Open the file, and have FFCV make its code."""
        beton.load()
        from fastidmm.loaders import ffcv_crops

        assert isinstance(self.options, FFCVOptions) and self.store.folder
        most = ffcv_crops.MOST_THREADS
        threads = self.options.threads or min(num_cores(), most)
        if threads > most:
            raise UsageError(
                f"loader.threads = {threads}: FFCV's compiler takes at most {most} here; "
                "give no more, or 0 for one per core."
            )
        path = self.store.folder / beton.NAME
        groups = [(group.count, group.size) for group in self.method.views]
        self.source = ffcv_crops.source(path, groups, batch_size=self.batch_size, threads=threads)
        every = torch.arange(len(self.store))
        self.sample = every if self.store.row is None else self.store.row
        sizes = torch.stack((self.store.height, self.store.width), dim=1)
        # Compiled code would read beyond the end of another file.
        if not ffcv_crops.holds(self.source, self.sample.numpy(), sizes.numpy()):
            raise DataError(f"--loader ffcv: {path} is not of this store: delete it, and {REMEDY}.")
        # Nothing else is queued there, so that to wait for it is to wait for no step.
        self.copying = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def made(self, start_step: int) -> Generator[Batch]:
        """Batches from `start_step` on."""
        from fastidmm.loaders.ffcv_crops import Cut

        plans: SimpleQueue[Plan] = SimpleQueue()
        cut = Cut(self.source, self._wanted(start_step, plans))
        try:
            for step, crops in enumerate(cut, start_step):
                plan = self.plan(step) if self.copying else plans.get()
                there = self._brought(crops)
                pixels = [
                    # From (B, views, S, S, 3) to one view of all images after the other.
                    finish(each.transpose(0, 1).flatten(0, 1), group_plan, group, self.dtype)
                    for each, group_plan, group in zip(
                        there, plan.groups, self.method.views, strict=True
                    )
                ]
                yield self.batch_of(plan, pixels)
                if self.copying:
                    self.copying.synchronize()  # FFCV writes over crops once the next are wanted.
        finally:
            cut.end()

    def _wanted(self, start_step: int, plans: SimpleQueue[Plan]) -> Iterator["Table"]:
        """What to cut in each step, as `ffcv_crops.Crops` takes it; drawn in FFCV's thread."""
        for step in count(start_step):
            plan = self.plan(step, (self.store.height, self.store.width))
            if not self.copying:
                plans.put(plan)
            num = plan.rows.numel()
            boxes = [group.crops.window.view(-1, num, 4) for group in plan.groups]
            of_image = torch.cat(boxes).transpose(0, 1).reshape(num, -1)
            yield torch.cat((self.sample[plan.rows, None], of_image), dim=1).numpy()

    def _brought(self, crops: tuple["Pixels", ...]) -> list[Tensor]:
        """Crops on the device; a GPU's are on the way, and what uses them waits for them."""
        here = [torch.from_numpy(each) for each in crops]
        if self.copying is None:
            return here
        with torch.cuda.stream(self.copying):
            there = [each.to(self.device, non_blocking=True) for each in here]
        user = torch.cuda.current_stream(self.device)
        user.wait_stream(self.copying)
        for each in there:
            each.record_stream(user)
        return there
