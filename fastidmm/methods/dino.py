"""DINO: give every view the teacher's probabilities of another, over made-up classes.

Source: Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", ICCV 2021, and
its code; crops as the IDMM paper's comparison has them, all at one resolution. The rate is at its
peak a step later than the code's, and falls to 0 where the code stops at 1e-6; an epoch's last,
shorter batch, which the code leaves out, is learnt from.
"""

import math
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import linear, normalize

from fastidmm.batch import Area, Batch, Loss, Options, Share, forward_groups
from fastidmm.methods.teacher import Taught, Teacher, cosine, full, view

Temperature = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]


class DINOOptions(Options):
    """The published settings; a teacher of another temperature may come to it by a warm-up."""

    out_dim: Annotated[int, Field(ge=2)] = 65536  # made-up classes
    hidden: Annotated[int, Field(ge=1)] = 2048
    student_temperature: Temperature = 0.1
    teacher_temperature: Temperature = 0.04
    first_temperature: Temperature = 0.04  # of the teacher
    temperature_epochs: Count = 0  # from the first to the teacher's own
    momentum: Share = 0.996  # of the teacher at first; 1 at last
    centre_momentum: Share = 0.9
    weight_decay: tuple[Share, Share] = (0.04, 0.4)  # at first and at last; not [optim]'s
    frozen_epochs: Count = 1  # of the last layer
    num_local: Count = 2
    global_scale: Area = (0.4, 1.0)
    local_scale: Area = (0.05, 0.4)


class Head(nn.Module):
    """Features to logits of classes; each class is a direction, of length 1."""

    def __init__(self, width: int, options: DINOOptions) -> None:
        super().__init__()
        hidden = options.hidden
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(),
            nn.Linear(hidden, hidden), nn.GELU(),
            nn.Linear(hidden, 256),
        )  # fmt: skip
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.directions = nn.Parameter(torch.empty(options.out_dim, 256))
        nn.init.kaiming_uniform_(self.directions, a=math.sqrt(5))  # as torch's layers begin

    def forward(self, features: Tensor) -> Tensor:
        """features (C, D) to cosines (C, out_dim)."""
        return linear(normalize(self.mlp(features)), normalize(self.directions))


class DINO(Taught):
    """The teacher sees two large crops, the student small ones, too; a run is for the student."""

    lr_for_256 = 5e-4
    warmup_epochs = 10
    clip = 3.0

    Options = DINOOptions
    settings: ClassVar[dict[str, dict[str, Any]]] = {
        "run": {"batch_size": 256},
        "optim": {"weight_decay": 0.0},  # see `param_groups`
    }

    centre: Tensor  # (out_dim,): what the teacher says on average

    def __init__(
        self, backbone: nn.Module, options: DINOOptions, *, resolution: int, **_: int
    ) -> None:
        super().__init__(backbone)
        self.options = options
        self.head = Head(int(backbone.num_features), options)  # type: ignore[arg-type]
        self.teacher = Teacher(backbone=backbone, head=self.head)
        self.register_buffer("centre", torch.zeros(options.out_dim))
        large, small = options.global_scale, options.local_scale
        # A group for each view, so that a part of a batch has all views of its images.
        self.views = [
            view(resolution, large, blur=1.0, interpolation="bicubic"),
            view(resolution, large, blur=0.1, solarize=0.2, interpolation="bicubic"),
            *[view(resolution, small, blur=0.5, interpolation="bicubic")] * options.num_local,
        ]

    def guessing(self) -> float:
        """Every class as likely as any other, whatever the teacher says."""
        return math.log(self.options.out_dim)

    def forward(self, batch: Batch) -> Loss:
        """The mean over images and pairs of different views of the cross-entropy."""
        groups, total = batch.groups, batch.groups[0].total
        taught = self.head(torch.cat(forward_groups(self.backbone, groups)))
        with torch.no_grad():
            features = torch.cat(forward_groups(self.teacher["backbone"], groups[:2]))
            said = full(self.teacher["head"](features))
        with torch.autocast(said.device.type, enabled=False):
            sharp = (said - self.centre) / self.temperature(batch.step)
            logs = sharp.unflatten(0, (2, -1)).log_softmax(dim=2)
            goals = logs.exp()  # (2, B, K)
            logits = full(taught).unflatten(0, (len(groups), -1)) / self.options.student_temperature
            sums, every = logits.logsumexp(dim=2), logits.sum(dim=0)  # (V, B), (B, K)
            loss = sums.new_zeros(())
            for own, goal in enumerate(goals):
                # All views but the teacher's own; a goal sums to one.
                loss = loss + (sums.sum() - sums[own].sum()) - (goal * (every - logits[own])).sum()
            loss = loss / (2 * (len(groups) - 1) * total)
        entropy = -(goals * logs).sum() / (2 * total)
        centre = said.sum(dim=0) / (2 * total)
        return Loss(loss, {"teacher_entropy": entropy}, sums={"centre": centre})

    def temperature(self, step: Tensor | int) -> Tensor:
        """The teacher's, by epochs: a line that ends in the last epoch of the warm-up."""
        o = self.options
        epoch = (self.centre.new_zeros((), dtype=torch.int64) + step) // self.steps_per_epoch
        share = epoch.double() / max(o.temperature_epochs - 1, 1)
        line = o.first_temperature + share * (o.teacher_temperature - o.first_temperature)
        return torch.where(epoch < o.temperature_epochs, line, o.teacher_temperature)

    @torch.no_grad()
    def after_step(self, keep: dict[str, Tensor], step: Tensor, skipped: Tensor) -> None:
        """As `Method`: the teacher follows, ever more slowly; the centre by its own share."""
        o = self.options
        self.teacher.follow(1 - cosine(o.momentum, 1.0, step, self.num_steps), skipped)
        moved = self.centre.lerp(keep["centre"], 1 - o.centre_momentum)
        self.centre.copy_(torch.where(skipped, self.centre, moved))

    def param_groups(self) -> list[dict[str, Any]]:
        """As `Method`: decay grows by half a cosine; biases and scales of norms have none."""
        first, last = self.options.weight_decay
        trained = [p for p in self.parameters() if p.requires_grad]
        return [
            {
                "params": [p for p in trained if p.ndim > 1],
                # A function and no method: an optimizer copies its groups, and all within reach.
                "decay": lambda step: cosine(first, last, step, self.num_steps),
            },
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]

    def frozen(self, epoch: int) -> list[nn.Parameter]:
        """As `Method`: the directions of the classes, at first."""
        return [self.head.directions] if epoch < self.options.frozen_epochs else []
