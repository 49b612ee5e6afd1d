"""What SimCLR and SupCon share: two crops of each image, a projector, and one loss.

Sources: Chen et al., "A Simple Framework for Contrastive Learning", ICML 2020; Khosla et al.,
"Supervised Contrastive Learning", NeurIPS 2020, and its code (HobbitLong/SupContrast), which holds
both; Chen et al., "Improved Baselines with Momentum Contrastive Learning", 2020, for the views.
"""

import math
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import normalize

from fastidmm.batch import Area, Batch, Loss, Method, Options, ViewGroup, Views, forward_groups
from fastidmm.ranks import world

Width = Annotated[int, Field(ge=1)]


class ContrastOptions(Options):
    """Temperature 0.5 is as the IDMM paper's baselines have it; the views are MoCo v2's."""

    temperature: Annotated[float, Field(gt=0)] = 0.5
    dim: Width = 128  # of the projector
    scale: Area = (0.2, 1.0)


class Contrast(Method):
    """Crops of one kind attract each other, all others repel; a subclass says what is a kind."""

    # A crop is told from all others of the batch, so that the loss needs the features of all.
    rows_independent = False
    features_first = True
    Options = ContrastOptions
    # As a path of the IDMM paper's SupCon run names them. Its SimCLR was never published: the same.
    settings: ClassVar[dict[str, dict[str, Any]]] = {
        "run": {"batch_size": 512},
        "optim": {"lr": 5e-4, "weight_decay": 1e-3},
    }

    def __init__(
        self,
        backbone: nn.Module,
        options: ContrastOptions,
        *,
        resolution: int,
        num_rows: int,
        batch_size: int,
        **_: int,
    ) -> None:
        super().__init__(backbone)
        self.num_crops = 2 * min(batch_size, num_rows)
        self.temperature = options.temperature
        width = int(backbone.num_features)  # type: ignore[arg-type]
        # As SupContrast's: without BatchNorm, the hidden layer as wide as the features.
        self.projector = nn.Sequential(
            nn.Linear(width, width), nn.ReLU(), nn.Linear(width, options.dim)
        )
        # MoCo v2's "aug-plus", SimCLR's chain at half its jitter.
        self.views = [
            ViewGroup(
                count=2,
                size=resolution,
                scale=options.scale,
                jitter=0.8,
                brightness=(0.6, 1.4),
                contrast=(0.6, 1.4),
                saturation=(0.6, 1.4),
                hue=(-0.1, 0.1),
                gray=0.2,
                blur=0.5,
            )
        ]

    def kinds(self, views: Views) -> Tensor:
        """What is alike in crops that attract each other: (C,) int64."""
        raise NotImplementedError

    def guessing(self) -> float:
        """Every other crop of a full batch as near as any."""
        return math.log(self.num_crops - 1)

    def forward(self, batch: Batch) -> Loss:
        """The mean over crops of the contrastive loss, in float32."""
        return self.loss_of(self.features(batch), batch)

    def features(self, batch: Batch) -> Tensor:
        """Projections, of any length."""
        (z,) = forward_groups(self.backbone, batch.groups)
        projected: Tensor = self.projector(z)
        return projected

    def loss_of(self, features: Tensor, batch: Batch) -> Loss:
        """As `forward`, of projections."""
        (views,) = batch.groups
        sizes = [2 * num for num in batch.shares]
        with torch.autocast(features.device.type, enabled=False):
            z = world().gather(features.float(), sizes)
            kinds = world().gather(self.kinds(views), sizes)
            own = slice(*world().own(sizes))
            losses, hits = contrastive(z, kinds, self.temperature, own)
        total = views.total
        return Loss(losses.sum() / total, parts={"contrast_top1": hits.float().sum() / total})


def contrastive(
    z: Tensor, kinds: Tensor, temperature: float, own: slice = slice(None)
) -> tuple[Tensor, Tensor]:
    """SupCon's loss of each crop (C,), and whether the nearest other is of its kind: (C,) bool.

    z (C, D) in any length, kinds (C,). The mean over a crop's likes is outside the logarithm;
    where each has but one, that is SimCLR's NT-Xent. Every crop needs another of its kind. Of
    crops elsewhere than in `own` nothing is asked.
    """
    z = normalize(z, dim=1)
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)[own]
    logits = (z[own] @ z.T / temperature).masked_fill(itself, -torch.inf)
    alike = (kinds[own, None] == kinds) & ~itself
    attracted = logits.masked_fill(~alike, 0).sum(dim=1) / alike.sum(dim=1)
    nearest = logits.detach().argmax(dim=1, keepdim=True)
    return logits.logsumexp(dim=1) - attracted, alike.gather(1, nearest)[:, 0]
