"""How good features and classifiers are: kNN, linear probe, accuracy, intervals."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastidmm.batch import ViewGroup
from fastidmm.errors import NumericalError
from fastidmm.interrupt import Stop
from fastidmm.kernels.views import plain_views
from fastidmm.plan import central_crops
from fastidmm.store import Store

NEIGHBOURS = 20
TEMPERATURE = 0.07
CROPS_AT_ONCE = 256
Z = 1.959964  # of a normal distribution, two-sided 5 %

PLAIN = ViewGroup(count=1, size=0, scale=(1.0, 1.0))  # normalisation only: no chance, any size


@dataclass(frozen=True, slots=True)
class Score:
    """A share of right answers among `num`, with its 95 % interval."""

    correct: int
    num: int

    @property
    def value(self) -> float:
        """The share itself."""
        return self.correct / self.num

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval for a share of `num` independent answers."""
        z, p, n = Z, self.value, self.num
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
        return max(0.0, middle - half), min(1.0, middle + half)  # rounding goes beyond

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "value": self.value, "interval": list(self.interval)}

    def __str__(self) -> str:
        low, high = self.interval
        return f"{100 * self.value:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def differ(one: Score, other: Score) -> bool:
    """Whether two shares differ by a two-proportion z-test at 5 %, the variance pooled.

    As if each were of images of its own. Of the same test images it is conservative where answers
    go together, as they do: it claims less often than it may, and a paired test would find more.
    """
    pooled = (one.correct + other.correct) / (one.num + other.num)
    deviation: float = (pooled * (1 - pooled) * (1 / one.num + 1 / other.num)) ** 0.5
    return abs(one.value - other.value) > Z * deviation


def resized_side(resolution: int) -> int:
    """What the shorter side is resized to before the central crop, px: as the paper evaluates."""
    return round(resolution * 256 / 224)


def central_views(store: Store, rows: Tensor, resolution: int) -> Tensor:
    """Central crops of some rows, as everything here sees them: (C, 3, S, S) float32."""
    high, wide, resize = store.height[rows], store.width[rows], resized_side(resolution)
    crops = central_crops(rows, high, wide, size=resolution, resize=resize)
    return plain_views(store, crops, PLAIN)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """No gradients, no dropping, and the module's mode restored."""
    before = module.training
    module.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        module.train(before)


def outputs(
    model: nn.Module,
    store: Store,
    *,
    resolution: int,
    dtype: torch.dtype,
    stop: Stop | None = None,
) -> Tensor:
    """What a model gives for the central crop of every image, in the store's order: (N, D) float32.

    Asked to `stop`, it is `Left`.
    """
    device = store.device
    parts = []
    with evaluating(model):
        for some, rows in _a_few_at_once(store, stop):
            images = central_views(some, rows, resolution)
            # Around the model only: a resize in bfloat16 would be off by 2/255.
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                found = model(images.contiguous(memory_format=torch.channels_last))
            parts.append(found.float())
    return torch.cat(parts)


def _a_few_at_once(store: Store, stop: Stop | None) -> Iterator[tuple[Store, Tensor]]:
    """The store's rows in parts, each with a store that the device can read them from."""
    before: torch.cuda.Event | None = None
    for rows in torch.arange(len(store), device=store.device).split(CROPS_AT_ONCE):
        if stop is not None:
            # Were all parts given to a GPU at once, it would be too late to leave any.
            if before is not None:
                before.synchronize()
            if store.device.type == "cuda":
                before = torch.cuda.Event()
                before.record()
            stop.leave()
        if store.readable:
            yield store, rows
        else:
            yield store.gathered(rows), rows - rows[0]


def knn(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    num_classes: int,
    *,
    own: bool = False,
    stop: Stop | None = None,
) -> Tensor:
    """Votes for each class by weighted kNN over cosine similarity: (M, classes) float32.

    k = 20, weights exp(similarity / 0.07): Wu et al., CVPR 2018. With `own`, test rows are the
    train rows, and none is its own neighbour (leave-one-out). Asked to `stop`, it is `Left`.
    """
    bank = nn.functional.normalize(train, dim=1)
    k = min(NEIGHBOURS, len(train) - own)
    found = []
    for start, queries in zip(range(0, len(test), 1024), test.split(1024), strict=True):
        if stop is not None:
            stop.leave()
        similar = nn.functional.normalize(queries, dim=1) @ bank.T
        if own:
            place = torch.arange(len(queries), device=test.device)
            similar[place, start + place] = -torch.inf
        top, rows = similar.topk(k, dim=1)
        weights = torch.exp((top - 1) / TEMPERATURE)[..., None]
        # By the labels of the few, one a place: of a million images' a table would take 4 GB.
        votes = torch.zeros(len(queries), k, num_classes, device=test.device, dtype=top.dtype)
        found.append(votes.scatter_(2, train_labels[rows][..., None], weights).sum(dim=1))
    return torch.cat(found)


def linear_probe(train: Tensor, labels: Tensor, test: Tensor, num_classes: int) -> Tensor:
    """Logits of a logistic regression on standardised features: (M, classes) float32.

    Full-batch L-BFGS from zero, weight decay 1e-2: the same for every backbone compared.
    """
    check_finite(train, test)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        mean, deviation = train.mean(dim=0), train.std(dim=0).clamp(min=1e-6)
        x = ((train - mean) / deviation).clone()
        weight = torch.zeros(num_classes, x.shape[1], device=x.device, requires_grad=True)
        bias = torch.zeros(num_classes, device=x.device, requires_grad=True)
        solver = torch.optim.LBFGS(
            [weight, bias], max_iter=200, history_size=10, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            solver.zero_grad()
            fit = nn.functional.cross_entropy(x @ weight.T + bias, labels)
            loss: Tensor = fit + 0.5e-2 * weight.square().sum()
            loss.backward()
            return loss

        solver.step(closure)
    return ((test - mean) / deviation) @ weight.detach().T + bias.detach()


def check_finite(*found: Tensor) -> None:
    """Refuse features or logits of which no score would mean anything."""
    if not all(bool(each.isfinite().all()) for each in found):
        raise NumericalError(
            "what the backbone makes of the images is not finite, and cannot be scored: train "
            "anew with a lower --set optim.lr, or with --precision fp32."
        )


def score(found: Tensor, labels: Tensor, *, top: int = 1, votes: bool = False) -> Score:
    """How often the right class is among the `top` of (M, classes) logits or votes.

    A class without any of the `votes` was not named, though it be among as many.
    """
    right = found.topk(top, dim=1).indices == labels[:, None]
    if votes:
        right &= found.gather(1, labels[:, None]) > 0
    return Score(correct=int(right.sum()), num=labels.numel())


def measured(found: Tensor, labels: Tensor, *, votes: bool = False) -> dict[str, Any]:
    """All there is to say of (M, classes) logits or votes, for JSON.

    Top-1 with its interval; top-5, where there are more classes than that; right answers and
    images of each class; [class, class it was taken for, how often], the most frequent first.
    """
    check_finite(found)
    num_classes, taken = found.shape[1], found.topk(1, dim=1).indices[:, 0]
    table = (labels * num_classes + taken).bincount(minlength=num_classes**2)
    table = table.view(num_classes, num_classes).cpu()  # or each number would be waited for
    wrong = table.clone().fill_diagonal_(0)
    confusion = [
        [*pair, num]
        for pair, num in zip(wrong.nonzero().tolist(), wrong[wrong > 0].tolist(), strict=True)
    ]
    return {
        **score(found, labels).as_dict(),
        "top5": score(found, labels, top=5, votes=votes).as_dict() if num_classes > 5 else None,
        "per_class": torch.stack((table.diagonal(), table.sum(dim=1)), dim=1).tolist(),
        "confusion": sorted(confusion, key=lambda row: -row[2]),
    }
