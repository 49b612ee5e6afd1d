"""What a backbone makes of its training images: who is near whom, and whom it fits worst."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fastidmm import checkpoint
from fastidmm.assemble import build_method
from fastidmm.chance import Counters
from fastidmm.evaluate import evaluating, outputs
from fastidmm.loaders.memory import within_reach
from fastidmm.machine import dtype_of, set_up
from fastidmm.progress import say
from fastidmm.ranks import apart
from fastidmm.record import Record
from fastidmm.reporting.pictures import jpeg, names_of
from fastidmm.store import Store

ASKED, NEAREST, WORST = 12, 5, 12
SIDE = 112  # px
MOST_IMAGES = 10_000  # that are looked at: of a million a page would take an hour


@dataclass(frozen=True, slots=True)
class Face:
    """A training image, small."""

    name: str
    label: str  # "" where there are no labels
    uri: str


@dataclass(frozen=True, slots=True)
class Near:
    """An image, and those whose features are the most similar, with their cosines."""

    face: Face
    others: tuple[tuple[Face, float], ...]


@dataclass(frozen=True, slots=True)
class Unfit:
    """An image that the run tells badly from the others, and the one most like it to the run."""

    face: Face
    loss: float
    like: Face


@dataclass(frozen=True, slots=True)
class Inside:
    """Both, by one checkpoint."""

    step: int
    num: int  # images looked at
    near: tuple[Near, ...]
    unfit: tuple[Unfit, ...]  # of methods that learn every image as a class of its own
    mean: float | None  # of their losses


@apart()
def inside(record: Record, store: Store, path: Path) -> Inside:
    """One look at the central crop of every training image, by a run's checkpoint."""
    run = record.recipe.run
    device = set_up("auto", exact=run.exact)  # of this machine, which need not be the run's
    method = build_method(record.recipe, store, Counters(run.seed))
    method.load_state_dict(checkpoint.load(path, checkpoint.MODEL)[0][0])
    method.to(device)
    rows = torch.arange(len(store))
    if len(store) > MOST_IMAGES:
        rows = torch.arange(MOST_IMAGES) * len(store) // MOST_IMAGES
    say(f"looking at {len(rows):,} training images for the report")
    features = outputs(
        method.backbone_for_export(),
        within_reach(store.select(rows), device),
        resolution=run.resolution,
        dtype=dtype_of(run.precision, device),
    )
    with evaluating(method):
        losses = method.own_losses(features, rows.to(device))
    face = faces(store)
    return Inside(
        checkpoint.step_of(path),
        len(rows),
        _near(features.cpu(), rows, store.label[rows], face),
        _unfit(losses[0].cpu(), losses[1].cpu(), rows, face) if losses else (),
        float(losses[0].mean()) if losses else None,
    )


def _near(
    features: Tensor, rows: Tensor, labels: Tensor, face: Callable[[Tensor], Face]
) -> tuple[Near, ...]:
    """A few images, of every class in its share, each with its nearest."""
    num = len(rows)
    order = labels.argsort(stable=True)
    asked = order[torch.arange(min(ASKED, num)) * num // min(ASKED, num)]
    unit = nn.functional.normalize(features, dim=1)
    similar = (unit[asked] @ unit.T).scatter(1, asked[:, None], -torch.inf)
    cosines, found = similar.topk(min(NEAREST, num - 1), dim=1)
    return tuple(
        Near(
            face(rows[one]),
            tuple(
                (face(rows[other]), float(cosine))
                for other, cosine in zip(others, told, strict=True)
            ),
        )
        for one, others, told in zip(asked, found, cosines, strict=True)
    )


def _unfit(
    losses: Tensor, like: Tensor, rows: Tensor, face: Callable[[Tensor], Face]
) -> tuple[Unfit, ...]:
    """The images of the largest losses, the worst first."""
    worst = losses.argsort(descending=True, stable=True)[:WORST]
    return tuple(Unfit(face(rows[i]), float(losses[i]), face(like[i])) for i in worst)


def faces(store: Store) -> Callable[[Tensor], Face]:
    """What shows a training image by its row."""
    name = names_of(store)

    def face(row: Tensor) -> Face:
        number, label = int(row), int(store.label[row])
        return Face(
            name=name(number),
            label=store.class_names[label] if label >= 0 else "",
            uri=jpeg(store.image(number), SIDE),
        )

    return face
