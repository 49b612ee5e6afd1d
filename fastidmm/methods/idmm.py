"""IDMM: parametric instance discrimination with multi-crop, CutMix and label smoothing.

Source: Cao, Yu, Wu, "Training Vision Transformers with Only 2040 Images", ECCV 2022.
"""

import math
from typing import Annotated, Literal

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
    Views,
    forward_groups,
)
from fastidmm.kernels.instance_loss import instance_loss
from fastidmm.ranks import world
from fastidmm.sharded import cut, sharded_loss, worth_it


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
    # Among several ranks: whole on each, or its rows dealt out, which pays where they are many.
    head: Literal["auto", "replicated", "sharded"] = "auto"


class IDMM(Method):
    """Every image of the store is a class; the head is one linear layer with a row per image."""

    Options = IDMMOptions

    def __init__(
        self,
        backbone: nn.Module,
        options: IDMMOptions,
        *,
        resolution: int,
        num_rows: int,
        batch_size: int,
        **_: int,
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
        self.num_rows = num_rows
        crops = min(batch_size, num_rows) * sum(group.count for group in self.views)
        asked = options.head == "sharded" and world().size > 1
        if asked or (options.head == "auto" and worth_it(num_rows, crops)):
            sizes = cut(self.head)
            self.shards = {"head.weight": sizes, "head.bias": sizes}
            self.rows_independent = False  # ranks exchange something within a pass

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
        return len(self.views) * math.log(self.num_rows)

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
            loss, hit = self._loss(z, views, share, batch)
            losses.append(loss)
            hits.append((hit * share).sum())
        # The large crops' top-1: the share that is recognised as its own image.
        return Loss(torch.stack(losses).sum(), parts={"instance_top1": hits[0]})

    def _loss(self, z: Tensor, views: Views, share: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """The sum of a group's losses, weighted, and whether each crop was recognised."""
        if self.shards:
            return sharded_loss(
                z,
                self.head,
                views.rows,
                views.partners,
                views.weights,
                share,
                smoothing=self.smoothing,
                shards=self.shards["head.weight"],
                crops=[views.total // batch.num_images * images for images in batch.shares],
            )
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
        return loss, stats.hits
