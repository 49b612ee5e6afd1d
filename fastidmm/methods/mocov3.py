"""MoCo v3: find the other view among the batch's, in both directions, with a teacher and no queue.

Source: Chen, Xie, He, "An Empirical Study of Training Self-Supervised Vision Transformers", ICCV
2021, and its code, but for the fixed position embedding and first weights, which are the backbone's
own here; for the student's drop-path, which `[backbone]` sets and the code has none of; and for an
epoch's last, shorter batch, which the code leaves out. The projection that makes patches into
tokens keeps its first weights.
"""

import math
from itertools import pairwise
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from fastidmm.batch import Area, Batch, Loss, Options, Share, forward_groups
from fastidmm.methods.teacher import Taught, Teacher, cosine, full, view
from fastidmm.norms import batch_norm
from fastidmm.ranks import world


class MoCoV3Options(Options):
    """The settings published for vision transformers, with the paper's smallest crops."""

    temperature: Annotated[float, Field(gt=0)] = 0.2
    momentum: Share = 0.99  # of the teacher at first; 1 at last
    hidden: Annotated[int, Field(ge=1)] = 4096  # width of the heads
    scale: Area = (0.08, 1.0)
    freeze_patches: bool = True


class BatchNorm(nn.BatchNorm1d):
    """By the batch's own statistics always, in teachers too; a lone row becomes zeros.

    The batch is the one of all ranks.
    """

    def __init__(self, width: int, *, affine: bool) -> None:
        super().__init__(width, affine=affine, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (C, D); torch's own refuses the one row that an epoch may leave for its last batch."""
        if world().size > 1:
            return batch_norm(x, self.weight, self.bias, self.eps)[0]
        return torch.batch_norm(x, self.weight, self.bias, None, None, True, 0.0, self.eps, True)


def head(*widths: int) -> nn.Sequential:
    """Linear layers, each normalised; after the last neither scale nor ReLU."""
    layers: list[nn.Module] = []
    for inner, outer in pairwise(widths):
        layers += [nn.Linear(inner, outer, bias=False), BatchNorm(outer, affine=True), nn.ReLU()]
    return nn.Sequential(*layers[:-2], BatchNorm(widths[-1], affine=False))


class MoCoV3(Taught):
    """Student, projector and predictor against teacher and its projector."""

    rows_independent = False
    lr_for_256 = 1.5e-4
    warmup_epochs = 40

    Options = MoCoV3Options
    settings: ClassVar[dict[str, dict[str, Any]]] = {
        "run": {"batch_size": 512},
        "optim": {"weight_decay": 0.1},
    }

    def __init__(
        self,
        backbone: nn.Module,
        options: MoCoV3Options,
        *,
        resolution: int,
        num_rows: int,
        batch_size: int,
        **_: int,
    ) -> None:
        super().__init__(backbone)
        self.num_keys = min(batch_size, num_rows)
        self.temperature, self.momentum = options.temperature, options.momentum
        width, hidden = int(backbone.num_features), options.hidden  # type: ignore[arg-type]
        self.projector = head(width, hidden, hidden, 256)
        self.predictor = head(256, hidden, 256)
        self.teacher = Teacher(backbone=backbone, projector=self.projector)
        if options.freeze_patches:
            freeze_patches(backbone)
        self.views = [
            view(resolution, options.scale, blur=1.0),
            view(resolution, options.scale, blur=0.1, solarize=0.2),
        ]

    def guessing(self) -> float:
        """Every key of a full batch as near as any."""
        return 4 * self.temperature * math.log(self.num_keys)

    def forward(self, batch: Batch) -> Loss:
        """Both directions' cross-entropies of the positive, times twice the temperature."""
        features = forward_groups(self.backbone, batch.groups)
        # Statistics are those of one view at a time.
        queries = [self.predictor(self.projector(z)) for z in features]
        with torch.no_grad():
            features = forward_groups(self.teacher["backbone"], batch.groups)
            keys = [self.teacher["projector"](z) for z in features]
            keys = [world().gather(key, batch.shares) for key in keys]
        total, (first, last) = 2 * batch.num_images, world().own(batch.shares)
        with torch.autocast(keys[0].device.type, enabled=False):
            logits = torch.stack(
                [self._compare(q, k) for q, k in zip(queries, reversed(keys), strict=True)]
            )
            own = torch.arange(first, last, device=logits.device).expand(2, -1)
            loss = cross_entropy(logits.flatten(0, 1), own.flatten(), reduction="sum") / total
        hits = (logits.argmax(dim=2) == own).to(loss.dtype).sum() / total
        return Loss(4 * self.temperature * loss, {"contrast_top1": hits})

    def _compare(self, query: Tensor, key: Tensor) -> Tensor:
        """Every query of this rank with every key: (B, B)."""
        return normalize(full(query)) @ normalize(full(key)).T / self.temperature

    def after_step(self, keep: dict[str, Tensor], step: Tensor, skipped: Tensor) -> None:
        """As `Method`: the teacher follows, ever more slowly."""
        self.teacher.follow(1 - cosine(self.momentum, 1.0, step, self.num_steps), skipped)


def freeze_patches(backbone: nn.Module) -> None:
    """Leave a plain ViT's projection of patches at its first weights; other backbones learn all.

    What is published is of such patches: a convolution whose windows overlap, PVTv2's, is none.
    """
    patches = getattr(getattr(backbone, "model", None), "patch_embed", None)
    projection = getattr(patches, "proj", None)
    if isinstance(projection, nn.Conv2d) and projection.kernel_size == projection.stride:
        projection.requires_grad_(False)
