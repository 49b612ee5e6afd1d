"""Fine-tuning: the classes' labels, a new linear head, smoothed cross-entropy."""

import torch
from torch import nn

from fastidmm.batch import Area, Batch, Loss, Method, Options, Share, ViewGroup, forward_groups
from fastidmm.kernels.instance_loss import instance_loss


class SupervisedOptions(Options):
    """Settings of fine-tuning in its simplest form."""

    smoothing: Share = 0.1
    scale: Area = (0.08, 1.0)


class Supervised(Method):
    """One view per image, resized crop and flip; the head has a row per class."""

    needs_labels = True

    Options = SupervisedOptions

    def __init__(
        self,
        backbone: nn.Module,
        options: SupervisedOptions,
        *,
        resolution: int,
        num_classes: int,
        **_: int,
    ) -> None:
        super().__init__(backbone)
        self.smoothing = options.smoothing
        self.head = nn.Linear(int(backbone.num_features), num_classes)  # type: ignore[arg-type]
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        self.views = [
            ViewGroup(count=1, size=resolution, scale=options.scale, interpolation="bicubic")
        ]

    def forward(self, batch: Batch) -> Loss:
        """The mean over crops of the smoothed cross-entropy: instance loss with labels for rows."""
        (views,) = batch.groups
        (z,) = forward_groups(self.backbone, batch.groups)
        share = torch.full_like(views.weights, 1 / views.total)
        loss, stats = instance_loss(
            z,
            self.head.weight,
            views.labels,
            views.partner_labels,
            views.weights,
            bias=self.head.bias,
            smoothing=self.smoothing,
            row_weight=share,
            return_stats=True,
        )
        return Loss(loss, parts={"train_top1": (stats.hits * share).sum()})
