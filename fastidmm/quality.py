"""How good features look without labels, and whether a longer run may pay.

Sources: Garrido et al., "RankMe", ICML 2023; Wang and Isola, "Understanding Contrastive
Representation Learning through Alignment and Uniformity", ICML 2020.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from fastidmm.batch import ViewGroup
from fastidmm.chance import Counters
from fastidmm.evaluate import evaluating
from fastidmm.kernels.views import views
from fastidmm.plan import unmixed
from fastidmm.store import Store

MOST_PAIRED = 256  # images of which two crops each are made
MOST_PAIRS = 2048  # images whose distances to one another count
NO_EPOCH = 2**32 - 1  # whose crops no training meets
LEAST_RISE = 0.002  # of kNN top-1 in 100 epochs, that is worth telling
# Standard errors, by which a slope is clear. Were there none, and points independent, chance alone
# would pass this 1 time in 20 by the fewest points (t of 2 degrees of freedom), 1 in 100 by nine.
CLEAR = 3.0
FEWEST = 4  # points that a line is drawn through


def spread(features: Tensor) -> float:
    """How far features (N, D) lie from their mean, as a share of their length: 0 to 1."""
    lengths = features.double().square().sum(dim=1).mean().sqrt()
    apart = (features - features.mean(dim=0)).double().square().sum(dim=1).mean().sqrt()
    return float(apart / lengths) if lengths else 0.0


def rankme(features: Tensor) -> float:
    """Directions that features (N, D) use, 1 to min(N, D): exp of the singular values' entropy.

    nan where any is not finite, which eigvalsh would take for an error.
    """
    tall = features.double()
    if not tall.isfinite().all():
        return math.nan
    gram = tall.T @ tall if len(tall) >= tall.shape[1] else tall @ tall.T
    values = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    shares = values / values.sum().clamp(min=1e-300)
    return float(torch.exp(-torch.xlogy(shares, shares).sum()))


def uniformity(features: Tensor) -> float:
    """Log of the mean Gaussian potential (t = 2) over pairs of (N, D): 0 when alike, to about -4.

    Of more than 2,048 images, as many at even distances.
    """
    z = normalize(features[:: -(-len(features) // MOST_PAIRS)].double(), dim=1)
    return float(nn.functional.pdist(z).square().mul(-2).exp().mean().log())


def alignment(one: Tensor, other: Tensor) -> float:
    """Mean squared distance between two crops' features on the sphere: 0 when alike, to 4."""
    return float((normalize(one, dim=1) - normalize(other, dim=1)).square().sum(dim=1).mean())


def retrieval(one: Tensor, other: Tensor) -> float:
    """How often an image's crop finds the other crop of it, among one of every image."""
    nearest = (normalize(one, dim=1) @ normalize(other, dim=1).T).argmax(dim=1)
    return float((nearest == torch.arange(len(one), device=one.device)).float().mean())


def two_crops(
    backbone: nn.Module, store: Store, group: ViewGroup, seed: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Features of two crops each of at most 256 images, as training makes them but unmixed.

    The same crops whenever it is asked for; two (N, D) float32.
    """
    device = store.device
    rows = torch.arange(0, len(store), -(-len(store) // MOST_PAIRED), device=device)
    group = replace(group, mix="none")
    plans = (
        unmixed((store.height, store.width), group, Counters(seed), rows, view=view, epoch=NO_EPOCH)
        for view in (0, 1)
    )
    if not store.readable:
        store = store.gathered(rows)
        own = torch.arange(len(rows), device=device)
        plans = (replace(plan, crops=replace(plan.crops, rows=own)) for plan in plans)
    with evaluating(backbone):
        crops = [views(store, plan, group, dtype) for plan in plans]
        # Around the backbone only: what makes views by products would make them in half precision.
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            one, other = (backbone(each).float() for each in crops)
    return one, other


def rising(points: Sequence[tuple[float, float]]) -> float | None:
    """By how much a score still rises in 100 epochs, by the later half of (epoch, score).

    None: it does not, or not clearly: a rule of thumb, and no test.
    """
    later = torch.tensor(points[len(points) // 2 :], dtype=torch.float64).view(-1, 2)
    if len(later) < FEWEST:
        return None
    x, y = later.T
    x, y = x - x.mean(), y - y.mean()
    slope = (x * y).sum() / x.square().sum()
    error = ((y - slope * x).square().sum() / (len(x) - 2) / x.square().sum()).sqrt()
    found = 100 * float(slope)
    return found if found >= LEAST_RISE and slope > CLEAR * error else None
