"""What loaders share: the plan of a step, the batch of its views, the next one made ahead."""

from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from itertools import count
from typing import ClassVar

import torch
from torch import Tensor

from fastidmm.batch import Batch, Method, Views
from fastidmm.batch import Options as NoOptions
from fastidmm.chance import Counters
from fastidmm.errors import DataError, UsageError
from fastidmm.kernels.views import views
from fastidmm.plan import GroupPlan, Plan, draw, epoch_order, num_steps
from fastidmm.ranks import World, world
from fastidmm.shares import share, shares_of
from fastidmm.store import Store


class Planned:
    """A loader less its way to pixels: a subclass gives `made`, one batch after the other."""

    Options: ClassVar[type[NoOptions]] = NoOptions  # the recipe's table [loader]
    # Whether `batch` is made by the device alone, from a counter that it reads: see `capture`.
    on_device: ClassVar[bool] = False
    # Whether it reads pictures of other ranks where they are mixed with this one's.
    reads_partners: ClassVar[bool] = False
    # Most that its views may differ from `augment.render`'s on average, in 1/255 of the range.
    deviation: ClassVar[float] = 0.5

    def __init__(
        self,
        store: Store,
        method: Method,
        counters: Counters,
        *,
        batch_size: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
        options: NoOptions | None = None,
    ) -> None:
        """`store` as it was opened; views are made on `device`, by default where the store is."""
        self.check(store)
        self.store, self.method, self.counters = store, method, counters
        self.batch_size, self.dtype = batch_size, dtype
        self.device = device or store.device
        self.options = options or self.Options()
        self.sizes = store.height.to(self.device), store.width.to(self.device)
        self.label = store.label.to(self.device)
        self.steps_per_epoch = num_steps(len(store), batch_size)
        self.part = world().rank, world().size
        self.check_ranks(world())
        self.set_up()

    def set_up(self) -> None:
        """Whatever a loader needs beyond its plan: files, memory, a library."""

    @staticmethod
    def unusable() -> str | None:
        """Why this loader cannot work on this machine, with the remedy; None where it can."""
        return None

    @classmethod
    def unfit(cls, store: Store) -> str | None:
        """Why this loader cannot deliver this store, with the remedy; None where it can."""
        return None

    @classmethod
    def check(cls, store: Store) -> None:
        """Refuse what cannot be done, before anything is."""
        name = cls.__name__.lower()
        if problem := cls.unusable():
            raise UsageError(f"--loader {name}: {problem}.")
        if problem := cls.unfit(store):
            raise DataError(f"--loader {name}: {problem}.")

    def check_ranks(self, world: World) -> None:
        """Refuse what would have a rank read photographs of another's."""
        if world.size == 1 or self.reads_partners:
            return
        last = len(self.store) % self.batch_size or min(self.batch_size, len(self.store))
        parts = self.method.cutmix_groups
        mixes = any(group.mix != "none" for group in self.method.views)
        name = type(self).__name__.lower()
        if mixes and parts % world.size:
            raise UsageError(
                f"--loader {name} mixes images of one rank only: method.cutmix_groups = {parts} "
                f"must be a multiple of the {world.size} ranks; choose --loader resident, or "
                f"--set method.cutmix_groups={world.size}."
            )
        if 0 in shares_of(last, world.size, parts):
            raise UsageError(
                f"--loader {name}: an epoch's last batch has {last} images, too few for "
                f"{world.size} ranks: choose --loader resident, or another --batch-size."
            )

    def batches(self, start_step: int) -> Generator[Batch]:
        """Batches from `start_step` on, without end; a restart gives the same ones.

        Closing the iterator ends every thread and process behind it.
        """
        with closing(self.made(start_step)) as made:
            if self.device.type == "cuda":
                yield from made
                return
            # On a CPU a thread renders the next batch while the others train on this one.
            with ThreadPoolExecutor(max_workers=1) as renderer:
                coming = renderer.submit(next, made)
                while True:
                    batch = coming.result()
                    coming = renderer.submit(next, made)
                    yield batch

    def made(self, start_step: int) -> Generator[Batch]:
        """Batches from `start_step` on, each made when it is asked for."""
        for step in count(start_step):
            yield self.batch(step)

    def batch(self, step: int, counter: Tensor | None = None) -> Batch:
        """The batch of one step, for loaders that can make any at any time; as `plan`."""
        raise NotImplementedError

    def plan(
        self,
        step: int,
        sizes: tuple[Tensor, Tensor] | None = None,
        counter: Tensor | None = None,
    ) -> Plan:
        """What chance decides in a rank's step: where `sizes` are, by default on the device.

        `counter` as for `plan.draw`; on a GPU there is always one.
        """
        sizes = sizes or self.sizes
        if counter is None and sizes[0].is_cuda:
            counter = torch.full((), step, device=sizes[0].device)
        parts = self.method.cutmix_groups
        plan = draw(
            sizes,
            self.method.views,
            self.counters,
            step=step,
            batch_size=self.batch_size,
            cutmix_groups=parts,
            counter=counter,
        )
        return share(plan, self.part, parts)

    def rows(self, step: int) -> Tensor:
        """The rows of a rank's step on the host, which asks no device: (B,) int64."""
        epoch, place = divmod(step, self.steps_per_epoch)
        order = epoch_order(len(self.store), self.counters, epoch, torch.device("cpu"))
        rows = order[place * self.batch_size : (place + 1) * self.batch_size]
        rank, ranks = self.part
        shares = shares_of(len(rows), ranks, self.method.cutmix_groups)
        first = sum(shares[:rank])
        return rows[first : first + shares[rank]]

    def render(self, images: Store, plan: Plan) -> list[Tensor]:
        """The views of a step by our kernels, from a store of the step's images in its order."""
        num = plan.rows.numel()
        return [
            views(images, among(group_plan, num), group, self.dtype)
            for group_plan, group in zip(plan.groups, self.method.views, strict=True)
        ]

    def batch_of(self, plan: Plan, pixels: Sequence[Tensor]) -> Batch:
        """The batch of a step from the finished views of its groups, (C, 3, S, S) each."""
        groups, first = [], 0
        for group_plan, finished in zip(plan.groups, pixels, strict=True):
            num = group_plan.place.numel()
            rows = group_plan.crops.rows[:num]
            partners = group_plan.crops.rows[group_plan.partner[:num]]
            groups.append(
                Views(
                    pixels=finished[:num],
                    rows=rows,
                    partners=partners,
                    weights=group_plan.weight[:num],
                    labels=self.label[rows],
                    partner_labels=self.label[partners],
                    place=first + group_plan.place,
                    total=group_plan.total,
                )
            )
            first += group_plan.total
        return Batch(tuple(groups), plan.step, plan.epoch, plan.shares)


def among(plan: GroupPlan, num_images: int) -> GroupPlan:
    """A group's plan for a store that holds the images of its batch alone, in the batch's order."""
    rows = plan.crops.rows
    place = torch.arange(num_images, device=rows.device)
    return replace(plan, crops=replace(plan.crops, rows=place.repeat(len(rows) // num_images)))
