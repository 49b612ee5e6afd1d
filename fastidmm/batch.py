"""What passes between the parts: view groups, batches, losses; and the seam to methods.

Letters in shapes: B images of a batch, C crops of a group, S side of a crop in pixels, N rows of
the store, D features.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from torch import Tensor, nn

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Range = tuple[float, float]
Share = Annotated[float, Field(ge=0, le=1)]


def _rising(area: Range) -> Range:
    if not 0 < area[0] <= area[1] <= 1:
        raise ValueError("a share of the area needs 0 < low <= high <= 1")
    return area


Area = Annotated[Range, AfterValidator(_rising)]  # shares of an image's area
Interpolation = Literal["bilinear", "bicubic"]
Mix = Literal["none", "cutmix", "mixup"]


class Options(BaseModel):
    """A table of a recipe; the class that reads it declares it, and unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewGroup:
    """How the views of one group are made: `count` crops of `size` px, by one chain of chances."""

    count: int
    size: int
    scale: Range  # share of the image's area
    ratio: Range = (3 / 4, 4 / 3)
    interpolation: Interpolation = "bilinear"
    flip: float = 0.5  # probabilities, here and below
    jitter: float = 0.0
    brightness: Range = (1.0, 1.0)  # factors
    contrast: Range = (1.0, 1.0)
    saturation: Range = (1.0, 1.0)
    hue: Range = (0.0, 0.0)  # turns of the colour circle
    gray: float = 0.0
    blur: float = 0.0
    sigma: Range = (0.1, 2.0)  # px of the crop
    solarize: float = 0.0
    randaugment: int = 0  # operations drawn, each applied with probability 1/2
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    mix: Mix | Literal["alternate"] = "none"  # alternate: Mixup in even epochs, CutMix in odd ones
    alpha: float = 0.5  # of the Beta distribution of mixing weights


@dataclass(frozen=True, slots=True)
class Views:
    """The crops of one group, crop-major: view 1 of all images, then view 2."""

    pixels: Tensor  # (C, 3, S, S), normalised
    rows: Tensor  # (C,) int64: the image each crop is of
    partners: Tensor  # (C,) int64: the image its pasted part is of
    weights: Tensor  # (C,) float32: share of the crop that is its own
    labels: Tensor  # (C,) int64, -1 where unknown
    partner_labels: Tensor  # (C,) int64
    place: Tensor  # (C,) int64: position in the step's global batch, over all groups
    total: int  # crops of the group in the global batch, for means over micro-batches


TENSORS = tuple(f.name for f in fields(Views) if f.name != "total")


@dataclass(frozen=True, slots=True)
class Batch:
    """What a method sees in one step."""

    groups: tuple[Views, ...]
    step: Tensor | int  # where the step is drawn: see `plan.draw`
    epoch: int  # from 0, known to the host
    shares: tuple[int, ...]  # images of each rank; the groups hold this one's crops

    @property
    def num_images(self) -> int:
        """Images of the global batch."""
        return sum(self.shares)

    @property
    def num_crops(self) -> int:
        """Crops of all groups."""
        return sum(views.rows.numel() for views in self.groups)

    def tensors(self) -> list[Tensor]:
        """All tensors of its groups, always in the same order."""
        return [getattr(views, name) for views in self.groups for name in TENSORS]

    def changed(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """The same batch with every tensor of its groups changed."""
        groups = []
        for views in self.groups:
            tensors: dict[str, Any] = {name: change(getattr(views, name)) for name in TENSORS}
            groups.append(replace(views, **tensors))
        return replace(self, groups=tuple(groups))

    def micro(self, num: int) -> list["Batch"]:
        """The batch cut into `num` parts, each with its share of every group's crops."""
        cut = [_split(views, num) for views in self.groups]
        return [replace(self, groups=parts) for parts in zip(*cut, strict=True)]


def _split(views: Views, num: int) -> list[Views]:
    parts = {name: getattr(views, name).tensor_split(num) for name in TENSORS}
    return [replace(views, **{name: parts[name][i] for name in TENSORS}) for i in range(num)]


@dataclass(frozen=True, slots=True)
class Loss:
    """The number to minimise, the parts worth logging, and what `after_step` needs; all tensors.

    Of a part of a batch, its share: those of all parts and ranks are summed, and `keep`, which has
    a row for each image, is put together again.
    """

    total: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)
    keep: dict[str, Tensor] = field(default_factory=dict)
    sums: dict[str, Tensor] = field(default_factory=dict)  # for `after_step`, too


class Method(nn.Module):
    """A training objective with its own views and heads; the loop knows nothing else of it."""

    Options: ClassVar[type[Options]]
    # Whether no crop's loss depends on the batch's other crops; see `can_be_cut`.
    rows_independent: bool = True
    # Whether the loss is `loss_of(features(batch), batch)`: then it can be cut all the same.
    features_first: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = False
    # What a recipe's [run] and [optim] have for this method where they say nothing else.
    settings: ClassVar[dict[str, dict[str, Any]]] = {}
    # Peak rate for a batch of 256, in proportion for any other that is asked for, whether or not
    # there are images to fill it; and warm-up. None: the backbone's.
    lr_for_256: ClassVar[float | None] = None
    warmup_epochs: ClassVar[int | None] = None
    clip: ClassVar[float | None] = None  # most that the gradient of one tensor may measure

    backbone: nn.Module
    views: list[ViewGroup]
    # Tensors of which each rank has its own rows, by name, and how many.
    shards: Mapping[str, tuple[int, ...]] = MappingProxyType({})
    cutmix_groups: int = 1
    num_steps: int = 1  # of the run and of an epoch, told before the first: for schedules
    steps_per_epoch: int = 1

    def __init__(self, backbone: nn.Module) -> None:
        """A subclass takes (backbone, options, *, resolution, num_rows, num_classes, batch_size).

        Whichever of these it needs.
        """
        super().__init__()
        self.backbone = backbone

    def forward(self, batch: Batch) -> Loss:
        """The loss of a batch; changes no state but BatchNorm statistics."""
        raise NotImplementedError

    def features(self, batch: Batch) -> Tensor:
        """All that the loss needs of each crop by itself: (C, D), group after group."""
        raise NotImplementedError

    def loss_of(self, features: Tensor, batch: Batch) -> Loss:
        """The loss of a whole batch, from the features of its crops."""
        raise NotImplementedError

    def begin(self) -> None:
        """Told when the student has taken trained weights: teachers take them over."""

    def after_step(self, keep: dict[str, Tensor], step: Tensor, skipped: Tensor) -> None:
        """Move what follows the student, teachers and queues, on the device.

        `step` () int64 is the one just made, from 0; where `skipped` () is true nothing may move.
        """

    def param_groups(self) -> list[dict[str, Any]]:
        """What the optimizer is given: all parameters, decayed alike, unless a method differs.

        A group's `decay`, a `Schedule`, stands for a weight decay that changes from step to step.
        """
        return [{"params": [p for p in self.parameters() if p.requires_grad]}]

    def frozen(self, epoch: int) -> list[nn.Parameter]:
        """Parameters that stay as they are in an epoch, from 0."""
        return []

    def guessing(self) -> float | None:
        """The loss of who cannot tell anything apart; None: not known."""
        return None

    def own_losses(self, features: Tensor, rows: Tensor) -> tuple[Tensor, Tensor] | None:
        """Each image's loss, and the likeliest other row, by features (C, D) and rows (C,).

        None: this method tells no image from the others.
        """
        return None

    def can_be_cut(self) -> bool:
        """Whether a batch's gradient is the sum of its micro-batches', whatever the backbone."""
        norms = (nn.modules.batchnorm._BatchNorm,)
        apart = self.rows_independent or self.features_first
        return apart and not any(isinstance(m, norms) for m in self.modules())

    def classifier(self) -> nn.Module | None:
        """Images to logits of the classes, from a method that learns them."""
        return None

    def backbone_for_export(self) -> nn.Module:
        """The backbone whose weights a run is for."""
        return self.backbone


def forward_groups(backbone: nn.Module, groups: tuple[Views, ...]) -> list[Tensor]:
    """Features of each group, (C, D) each; groups of one size share a forward pass.

    A rank that has no crops sends one of zeros through, so that its gradients are there, and zero.
    """
    set_place = getattr(backbone, "set_place", lambda place: None)
    sizes = [views.pixels.shape[-1] for views in groups]
    features: dict[int, Tensor] = {}
    for size in dict.fromkeys(sizes):
        chosen = [i for i, other in enumerate(sizes) if other == size]
        places, pixels = (
            torch.cat([getattr(groups[i], name) for i in chosen]) for name in ("place", "pixels")
        )
        counts = [groups[i].rows.numel() for i in chosen]
        if not sum(counts):
            places, pixels = places.new_zeros(1), pixels.new_zeros(1, *pixels.shape[1:])
        set_place(places)
        joined = backbone(pixels)[: sum(counts)]
        features.update(zip(chosen, joined.split(counts), strict=True))
    return [features[i] for i in range(len(groups))]
