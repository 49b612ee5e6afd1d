"""Fine-tuning: the classes' labels, a new linear head, smoothed cross-entropy of mixed crops.

Source: Cao, Yu, Wu, "Training Vision Transformers with Only 2040 Images", ECCV 2022, and its code.
"""

import math
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import nn

from fastidmm.batch import Area, Batch, Loss, Method, Mix, Options, Share, ViewGroup, forward_groups
from fastidmm.kernels.instance_loss import instance_loss


class SupervisedOptions(Options):
    """The paper's settings; all at zero and `mix = "none"` is resized crop and flip."""

    smoothing: Share = 0.1
    scale: Area = (0.08, 1.0)
    jitter: Share = 0.4  # probability, as of gray
    gray: Share = 0.2
    randaugment: Annotated[int, Field(ge=0)] = 2  # operations drawn for each image
    mix: Literal[Mix, "alternate"] = "alternate"  # Mixup in even epochs, CutMix in odd ones
    mix_alpha: Annotated[float, Field(gt=0)] = 0.5
    # The published runs mix within each of 4 GPUs; here it is the recipe's own number.
    cutmix_groups: Annotated[int, Field(ge=1)] = 4


class Supervised(Method):
    """One view per image; the head has a row per class."""

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
        self.cutmix_groups = options.cutmix_groups
        self.head = nn.Linear(int(backbone.num_features), num_classes)  # type: ignore[arg-type]
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        self.views = [
            ViewGroup(
                count=1,
                size=resolution,
                scale=options.scale,
                interpolation="bicubic",
                jitter=options.jitter,
                brightness=(0.6, 1.4),
                contrast=(0.6, 1.4),
                saturation=(0.6, 1.4),
                hue=(-0.1, 0.1),
                gray=options.gray,
                randaugment=options.randaugment,
                mix=options.mix,
                alpha=options.mix_alpha,
            )
        ]

    def guessing(self) -> float:
        """Every class as likely as any other."""
        return math.log(self.head.out_features)

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

    def classifier(self) -> nn.Module:
        """Images (C, 3, S, S) to logits (C, classes)."""
        return nn.Sequential(self.backbone, self.head)
