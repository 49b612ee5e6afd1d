"""The store in the device's memory, views rendered there: follows the plan exactly."""

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from fastidmm.batch import Batch, Method, ViewGroup, Views
from fastidmm.chance import Counters
from fastidmm.kernels.views import views
from fastidmm.plan import GroupPlan, draw, num_steps
from fastidmm.store import Store


class Resident:
    """Batches rendered from pixels that never leave the device."""

    def __init__(
        self,
        store: Store,
        method: Method,
        counters: Counters,
        *,
        batch_size: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.store, self.method, self.counters = store, method, counters
        self.batch_size, self.dtype = batch_size, dtype
        self.steps_per_epoch = num_steps(len(store), batch_size)

    def batches(self, start_step: int) -> Iterator[Batch]:
        """Batches from `start_step` on, without end; a restart gives the same ones."""
        steps = itertools.count(start_step)
        if self.store.pixels.is_cuda:
            yield from map(self.batch, steps)
        # On a CPU a thread renders the next batch while the others train on this one.
        with ThreadPoolExecutor(max_workers=1) as renderer:
            coming = renderer.submit(self.batch, next(steps))
            for step in steps:
                batch = coming.result()
                coming = renderer.submit(self.batch, step)
                yield batch

    def batch(self, step: int) -> Batch:
        """The batch of one step."""
        plan = draw(
            (self.store.height, self.store.width),
            self.method.views,
            self.counters,
            step=step,
            batch_size=self.batch_size,
            cutmix_groups=self.method.cutmix_groups,
        )
        groups, first = [], 0
        for group_plan, group in zip(plan.groups, self.method.views, strict=True):
            groups.append(self._views(group_plan, group, first))
            first += groups[-1].total
        return Batch(tuple(groups), step, plan.rows.numel())

    def _views(self, plan: GroupPlan, group: ViewGroup, first: int) -> Views:
        rows = plan.crops.rows
        partners = rows[plan.partner]
        return Views(
            pixels=views(self.store, plan, group, self.dtype),
            rows=rows,
            partners=partners,
            weights=plan.weight,
            labels=self.store.label[rows],
            partner_labels=self.store.label[partners],
            place=torch.arange(first, first + rows.numel(), device=rows.device),
            total=rows.numel(),
        )
