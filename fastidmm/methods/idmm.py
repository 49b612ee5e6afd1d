"""IDMM: parametric instance discrimination with multi-crop, CutMix and label smoothing.

Source: Cao, Yu, Wu, "Training Vision Transformers with Only 2040 Images", ECCV 2022.
"""

import math
from typing import Annotated

import torch
from pydantic import AfterValidator, Field
from torch import Tensor, nn

from fastidmm.batch import (
    IMAGENET_STD,
    Area,
    Batch,
    Loss,
    Method,
    Options,
    Range,
    Share,
    ViewGroup,
    forward_groups,
)
from fastidmm.kernels.instance_loss import instance_loss


def _blurs(sigma: Range) -> Range:
    if not 0 < sigma[0] <= sigma[1]:
        raise ValueError("a blur needs 0 < low <= high")
    return sigma


class IDMMOptions(Options):
    """The paper's settings; `official` as a recipe has those of the published code."""

    smoothing: Share = 0.1
    num_large: Annotated[int, Field(ge=1)] = 2
    num_small: Annotated[int, Field(ge=0)] = 4
    large_scale: Area = (0.14, 1.0)
    small_scale: Area = (0.05, 0.4)
    cutmix: bool = True
    cutmix_alpha: Annotated[float, Field(gt=0)] = 0.5
    # The published runs mix within each of 4 GPUs; here it is the recipe's own number.
    cutmix_groups: Annotated[int, Field(ge=1)] = 4
    # Of blur, in px of the crop: the paper's, at its 112 px.
    sigma: Annotated[Range, AfterValidator(_blurs)] = (0.1, 2.0)
    std: tuple[float, float, float] = IMAGENET_STD


class IDMM(Method):
    """Every image of the store is a class; the head is one linear layer with a row per image."""

    Options = IDMMOptions

    def __init__(
        self, backbone: nn.Module, options: IDMMOptions, *, resolution: int, num_rows: int, **_: int
    ) -> None:
        super().__init__(backbone)
        self.smoothing = options.smoothing
        self.cutmix_groups = options.cutmix_groups
        self.head = nn.Linear(int(backbone.num_features), num_rows)  # type: ignore[arg-type]
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        kinds = ((options.num_large, options.large_scale), (options.num_small, options.small_scale))
        self.views = [
            self._views(options, count, scale, resolution) for count, scale in kinds if count
        ]

    @staticmethod
    def _views(options: IDMMOptions, count: int, scale: Range, resolution: int) -> ViewGroup:
        return ViewGroup(
            count=count,
            size=resolution,
            scale=scale,
            jitter=0.8,
            brightness=(0.2, 1.8),
            contrast=(0.2, 1.8),
            saturation=(0.2, 1.8),
            hue=(-0.2, 0.2),
            gray=0.2,
            blur=0.5,
            sigma=options.sigma,
            std=options.std,
            mix="cutmix" if options.cutmix else "none",
            alpha=options.cutmix_alpha,
        )

    def guessing(self) -> float:
        """Every image as likely as any other, for each group of crops."""
        return len(self.views) * math.log(self.head.out_features)

    def own_losses(self, features: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of who is plainly seen, smoothed as in training."""
        losses, others = [], []
        for z, own in zip(features.split(1024), rows.split(1024), strict=True):
            logits = self.head(z)
            losses.append(
                nn.functional.cross_entropy(
                    logits, own, label_smoothing=self.smoothing, reduction="none"
                )
            )
            others.append(logits.scatter(1, own[:, None], -torch.inf).argmax(dim=1))
        return torch.cat(losses), torch.cat(others)

    def forward(self, batch: Batch) -> Loss:
        """The sum of the groups' means: a large crop weighs num_small / num_large small ones."""
        losses, hits = [], []
        for z, views in zip(forward_groups(self.backbone, batch.groups), batch.groups, strict=True):
            share = torch.full_like(views.weights, 1 / views.total)
            loss, stats = instance_loss(
                z,
                self.head.weight,
                views.rows,
                views.partners,
                views.weights,
                bias=self.head.bias,
                smoothing=self.smoothing,
                row_weight=share,
                return_stats=True,
            )
            losses.append(loss)
            hits.append((stats.hits * share).sum())
        # The large crops' top-1: the share that is recognised as its own image.
        return Loss(torch.stack(losses).sum(), parts={"instance_top1": hits[0]})
