"""The pipeline everybody writes: files, a DataLoader, PIL and torchvision; the baseline.

Each worker makes whole batches: it draws the step's plan, decodes every photograph once and makes
its views with Pillow; the device normalises and mixes them.

Deviation from the plain renderer: pictures are rounded to 8 bits after every operation, hue turns
in 8-bit HSV, and a blur is Pillow's three boxes. Over photographs of Flowers at 112 px IDMM's views
are 1.2/255 off on average, 7 at the 99th percentile, 32 at most; those of fine-tuning 0.7 to 1.0,
and up to 200 where RandAugment's equalize meets a value that was rounded the other way.
"""

import os
from collections.abc import Generator
from itertools import count
from typing import Annotated, ClassVar

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastidmm import augment
from fastidmm.batch import Batch, Options, ViewGroup
from fastidmm.errors import DataError, OutOfMemoryError, UsageError
from fastidmm.facts import num_cores
from fastidmm.interrupt import unheard
from fastidmm.kernels import views_cpu
from fastidmm.loaders.files import Files, unfit
from fastidmm.loaders.pillow import chances, view
from fastidmm.loaders.planned import Planned
from fastidmm.plan import GroupPlan, Plan, draw
from fastidmm.preparing.decode import FORMATS, sketch, upright
from fastidmm.shares import share
from fastidmm.store import Store

AHEAD = 3  # batches of a worker: two that wait, one in the making
# What a worker's death looks like: to DataLoader's watch, and where a batch was being handed over.
DEATHS = (RuntimeError, ConnectionError, EOFError, FileNotFoundError)


class TorchOptions(Options):
    """The table `[loader]`."""

    workers: Annotated[int, Field(ge=0)] = 0  # processes; 0: one per core, less one on a CPU


class Torch(Planned):
    """Batches from a DataLoader's worker processes."""

    Options: ClassVar[type[Options]] = TorchOptions
    deviation: ClassVar[float] = 2.0

    @classmethod
    def unfit(cls, store: Store) -> str | None:
        """The photographs must still be there."""
        return unfit(store)

    def set_up(self) -> None:
        """Find the photographs."""
        self._check_shared_memory()
        self.scale, self.bias = {}, {}
        for group in self.method.views:
            mean, std = torch.tensor(group.mean), torch.tensor(group.std)
            self.scale[group] = (1 / (255 * std)).to(self.device)
            self.bias[group] = (-mean / std).to(self.device)
        files, store = Files.of(self.store), self.store
        self.steps = Steps(files, (store.height, store.width), self)

    def made(self, start_step: int) -> Generator[Batch]:
        """Batches from `start_step` on, as the workers finish them, in order."""
        on_gpu = self.device.type == "cuda"
        loader = DataLoader(
            self.steps,
            batch_size=None,  # a worker's answer is a batch
            sampler=count(start_step),
            num_workers=self._workers(),
            pin_memory=on_gpu,
            worker_init_fn=_alone,
        )
        with unheard():
            steps = iter(loader)
        try:
            for step in count(start_step):
                try:
                    problem, crops = next(steps)
                except DEATHS as died:  # by the system, which has no more memory, as a rule
                    raise OutOfMemoryError(
                        "a worker of --loader torch was killed "
                        f"({str(died) or 'it is gone'}): lower loader.workers, "
                        "then `fastidmm resume` goes on."
                    ) from None
                if problem:
                    raise DataError(problem)
                yield self._batch(self.plan(step), crops)
        finally:
            del steps  # ends the workers

    def _workers(self) -> int:
        assert isinstance(self.options, TorchOptions)
        spare = self.device.type == "cpu"  # a core trains
        return self.options.workers or max(1, num_cores() - spare)

    def _check_shared_memory(self) -> None:
        """Workers would wait for ever where what they hand over does not fit /dev/shm."""
        if not os.path.isdir("/dev/shm"):
            return
        pixels = sum(group.count * group.size**2 for group in self.method.views)
        needed = self._workers() * AHEAD * min(self.batch_size, len(self.store)) * pixels * 3
        found = os.statvfs("/dev/shm")
        if needed > (free := found.f_bavail * found.f_frsize):
            raise UsageError(
                f"--loader torch: its workers hand over {needed / 1e6:.0f} MB through /dev/shm, "
                f"where {free / 1e6:.0f} MB are free: lower --batch-size or --set "
                "loader.workers=N, or make it larger (docker run --shm-size=8g)."
            )

    def _batch(self, plan: Plan, crops: list[Tensor]) -> Batch:
        groups = zip(crops, plan.groups, self.method.views, strict=True)
        return self.batch_of(plan, [self._finished(*each) for each in groups])

    def _finished(self, crops: Tensor, plan: GroupPlan, group: ViewGroup) -> Tensor:
        """Crops (C, S, S, 3) uint8 of the host, normalised and mixed on the device."""
        there = crops.to(self.device, non_blocking=True).float()
        x = torch.addcmul(self.bias[group], there, self.scale[group])
        if self.device.type == "cpu":
            mixed = views_cpu.MIXES[plan.mix](x, plan).permute(0, 3, 1, 2)
        else:
            mixed = augment.MIXES[plan.mix](x.permute(0, 3, 1, 2), plan)
        return mixed.to(self.dtype, memory_format=torch.channels_last)


Made = tuple[str, list[Tensor]]  # what went wrong, or "", and each group's crops


class Steps(Dataset[Made]):
    """The crops of any step, as a worker makes them; nothing of a device in it."""

    def __init__(self, files: Files, sizes: tuple[Tensor, Tensor], loader: Planned) -> None:
        self.files, self.sizes = files, sizes
        self.groups, self.counters = loader.method.views, loader.counters
        self.batch_size, self.cutmix_groups = loader.batch_size, loader.method.cutmix_groups
        self.part = loader.part

    def __getitem__(self, step: int) -> Made:
        """Crops of each group, (C, S, S, 3) uint8, all but normalised and mixed."""
        whole = draw(
            self.sizes,
            self.groups,
            self.counters,
            step=step,
            batch_size=self.batch_size,
            cutmix_groups=self.cutmix_groups,
        )
        plan = share(whole, self.part, self.cutmix_groups)
        drawn = [chances(group) for group in plan.groups]
        found = [
            np.empty((len(crops), group.size, group.size, 3), np.uint8)
            for crops, group in zip(drawn, self.groups, strict=True)
        ]
        num = plan.rows.numel()
        for place, row in enumerate(plan.rows.tolist()):
            image = self._opened(row)
            if isinstance(image, str):
                return image, []
            for crops, mine, group in zip(drawn, found, self.groups, strict=True):
                for crop in range(place, len(crops), num):
                    mine[crop] = view(image, crops[crop], group.size, group.interpolation)
        return "", [torch.from_numpy(crops) for crops in found]

    def _opened(self, row: int) -> Image.Image | str:
        """The photograph of a row as the store holds it, or what is wrong with it."""
        path, side = self.files.paths[row], self.files.max_side
        try:
            with Image.open(path, formats=FORMATS) as image:
                sketch(image, side)
                found = upright(image, side)
        except Exception as problem:
            return f"{path} can no longer be read ({problem}): prepare the dataset again."
        if found.size != (int(self.sizes[1][row]), int(self.sizes[0][row])):
            return f"{path} has changed since it was prepared: prepare the dataset again."
        return found


def _alone(_: int) -> None:
    """A worker has one core."""
    torch.set_num_threads(1)
