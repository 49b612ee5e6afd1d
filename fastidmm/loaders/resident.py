"""The store in memory that the device reads, views rendered there: follows the plan exactly.

On a GPU that is its own memory, or else pinned memory of the host, which kernels read over the bus
as they need it. On a CPU it is the memory map of the store.

Deviation from the plain renderer: that of `kernels/views.py`, and nothing else.
"""

from typing import ClassVar

from torch import Tensor

from fastidmm.batch import Batch, Options
from fastidmm.kernels.views import views
from fastidmm.loaders.memory import Tier, place
from fastidmm.loaders.planned import Planned


class ResidentOptions(Options):
    """The table `[loader]`."""

    tier: Tier = "auto"  # of memory, where the device is a GPU


class Resident(Planned):
    """Batches rendered from pixels that stay where the device reads them."""

    Options: ClassVar[type[Options]] = ResidentOptions
    on_device = True
    reads_partners = True

    def set_up(self) -> None:
        """Bring the pixels there."""
        assert isinstance(self.options, ResidentOptions)
        self.store = place(self.store, self.device, self.options.tier)

    def batch(self, step: int, counter: Tensor | None = None) -> Batch:
        """The batch of one step; nothing of it but its shapes is known to the host."""
        plan = self.plan(step, counter=counter)
        pixels = [
            views(self.store, group_plan, group, self.dtype)
            for group_plan, group in zip(plan.groups, self.method.views, strict=True)
        ]
        return self.batch_of(plan, pixels)
