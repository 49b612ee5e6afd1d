"""MoCo v2: find the other view's key among the keys of many images before.

Source: Chen, Fan, Girshick, He, "Improved Baselines with Momentum Contrastive Learning", 2020.
Keys are a teacher's in evaluation mode, which no other crop has a part in: nothing is shuffled.
"""

import math
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from fastidmm.batch import Area, Batch, Loss, Options, Share, forward_groups
from fastidmm.methods.teacher import Taught, Teacher, full, view


class MoCoV2Options(Options):
    """The published settings."""

    temperature: Annotated[float, Field(gt=0)] = 0.2
    momentum: Share = 0.999  # of the teacher
    queue: Annotated[int, Field(ge=1)] = 4096  # keys, at most: see `queue_size`
    scale: Area = (0.2, 1.0)


def queue_size(most: int, num_rows: int, batch_size: int) -> int:
    """Whole batches of an epoch, and one at least.

    With two keys an image, its own key of the epoch before is always a negative of it; with one, in
    half of all cases.
    """
    batch_size = min(batch_size, num_rows)
    return max(batch_size, min(most, num_rows // batch_size * batch_size))


class MoCoV2(Taught):
    """The student sees the first view, the teacher the second; a crop's loss is its own."""

    Options = MoCoV2Options
    settings: ClassVar[dict[str, dict[str, Any]]] = {
        "run": {"batch_size": 256},
        "optim": {"lr": 5e-4, "weight_decay": 1e-3},
    }

    queue: Tensor  # (Q, 128), of length 1 each
    oldest: Tensor  # () int64: the key that is replaced next

    def __init__(
        self,
        backbone: nn.Module,
        options: MoCoV2Options,
        *,
        resolution: int,
        num_rows: int,
        batch_size: int,
        **_: int,
    ) -> None:
        super().__init__(backbone)
        self.temperature, self.rate = options.temperature, 1 - options.momentum
        width = int(backbone.num_features)  # type: ignore[arg-type]
        self.head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 128))
        self.teacher = Teacher(backbone=backbone, head=self.head)
        size = queue_size(options.queue, num_rows, batch_size)
        self.register_buffer("queue", normalize(torch.randn(size, 128)))
        self.register_buffer("oldest", torch.zeros((), dtype=torch.int64))
        self.views = [view(resolution, options.scale, blur=0.5, saturation=0.4) for _ in range(2)]

    def guessing(self) -> float:
        """Every key as near as any."""
        return math.log(1 + len(self.queue))

    def forward(self, batch: Batch) -> Loss:
        """Cross-entropy of the positive among all keys, the mean over images."""
        seen, other = batch.groups
        query = self.head(forward_groups(self.backbone, (seen,))[0])
        with torch.no_grad():
            (features,) = forward_groups(self.teacher["backbone"], (other,))
            key = self.teacher["head"](features)
        with torch.autocast(query.device.type, enabled=False):
            query, key = (normalize(full(z)) for z in (query, key))
            positive = (query * key).sum(dim=1, keepdim=True)
            logits = torch.cat((positive, query @ self.queue.T), dim=1) / self.temperature
            losses = cross_entropy(logits, torch.zeros_like(seen.rows), reduction="none")
        hits = (logits.argmax(dim=1) == 0).sum() / seen.total
        return Loss(losses.sum() / seen.total, {"contrast_top1": hits}, {"keys": key})

    @torch.no_grad()
    def after_step(self, keep: dict[str, Tensor], step: Tensor, skipped: Tensor) -> None:
        """As `Method`: the teacher follows, the oldest keys make way for the step's."""
        self.teacher.follow(self.rate, skipped)
        keys, size = keep["keys"], len(self.queue)
        places = (self.oldest + torch.arange(len(keys), device=keys.device)) % size
        self.queue.index_copy_(0, places, torch.where(skipped, self.queue[places], keys))
        self.oldest.copy_(torch.where(skipped, self.oldest, (self.oldest + len(keys)) % size))
