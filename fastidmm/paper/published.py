"""Every number of the paper's five tables, and which of them a command asks for.

Source: Cao, Yu, Wu, "Training Vision Transformers with Only 2040 Images", ECCV 2022. Top-1 in %
on the official test splits; "-" is a cell without a number.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from fastidmm.errors import UsageError, did_you_mean

DATASETS = ("flowers", "pets", "dtd", "indoor67", "cub", "aircraft", "cars")
RANDOM, TIMM = "random", "timm"  # arms without pretraining of ours: no weights, ImageNet's labels

TITLES = {
    "T1": "Pretraining methods, DeiT-Tiny: 800 epochs at 112 px, then 200 at 224",
    "T2": "From scratch: 800 epochs at 112 px, 800 at 224, then 100 at 448",
    "T3": "Transfer: 800 epochs at 112 px on SIN-10k, then 200 at 224 on another dataset",
    "T4": "ImageNet: from random weights, and from SIN-10k",
    "T5": "Ablation on Flowers, DeiT-Tiny: each arm adds one part, then 200 epochs at 224 px",
}

# Backbone, what it begins with, px and epochs of fine-tuning; then a number for each dataset.
T1 = """
deit_tiny random 224 200  58.1 31.8 49.4 31.0 23.8 14.6 12.3
deit_tiny simclr 224 200  71.1 52.1 55.9 50.7 36.2 43.2 64.3
deit_tiny supcon 224 200  72.3 50.3 55.6 49.3 37.8 29.4 66.2
deit_tiny mocov2 224 200  61.8 41.5 50.6 41.1 31.6 37.7 44.0
deit_tiny mocov3 224 200  67.0 52.9 52.9 49.4 20.5 32.0 53.7
deit_tiny dino   224 200  64.1 51.3 51.7 46.9 41.8 45.7 65.3
deit_tiny idmm   224 200  79.9 56.7 61.2 53.9 43.1 43.2 66.4
"""
T2 = """
deit_tiny timm   224 200  97.3 88.6 73.2 75.6 76.8 78.7 90.3
deit_tiny random 224 800  67.8 44.5 54.5 40.6 24.3 33.2 38.8
deit_tiny idmm   224 800  83.4 59.0 61.8 56.1 45.0 46.0 73.7
deit_tiny idmm   448 800  85.6 64.2 64.9 59.9 50.9 48.6 77.8
deit_base timm   224 200  97.7 91.4 74.9 78.1 81.9 82.8 92.6
deit_base random 224 800  67.3 48.4 -    44.0 27.7 30.1 33.3
deit_base idmm   224 800  88.1 63.2 62.3 57.4 47.8 43.1 64.5
deit_base idmm   448 800  90.6 67.2 67.3 61.7 54.3 46.6 70.7
pvtv2_b0  timm   224 200  98.0 90.5 75.9 76.7 81.4 88.3 92.6
pvtv2_b0  random 224 800  90.3 80.5 57.7 66.3 66.6 74.8 87.9
pvtv2_b0  idmm   224 800  94.6 84.7 69.3 69.6 73.8 79.8 90.9
pvtv2_b0  idmm   448 800  95.9 88.0 73.2 73.7 77.6 83.3 92.0
pvtv2_b3  timm   224 200  98.7 93.6 78.1 80.8 85.5 91.7 94.4
pvtv2_b3  random 224 800  90.5 83.4 64.5 67.5 66.2 85.0 89.9
pvtv2_b3  idmm   224 800  95.9 89.8 68.9 73.2 79.0 90.5 94.0
pvtv2_b3  idmm   448 800  96.7 91.9 71.8 76.3 82.8 91.8 94.3
t2t_vit_7 timm   224 200  97.7 90.5 75.2 76.6 79.0 83.8 92.8
t2t_vit_7 random 224 800  82.1 66.2 58.5 57.7 35.7 57.2 60.3
t2t_vit_7 idmm   224 800  90.8 75.0 64.7 66.0 59.0 71.4 89.9
t2t_vit_7 idmm   448 800  91.7 76.9 65.7 68.9 63.2 72.9 91.2
"""
T3 = """
pvtv2_b0  idmm       224 200  93.8 83.6 66.8 69.4 70.7 81.3 87.5
pvtv2_b0  mocov3     224 200  91.0 81.4 62.3 66.3 63.7 74.5 86.2
pvtv2_b0  dino       224 200  92.3 82.3 65.9 68.5 65.8 76.9 86.4
pvtv2_b0  supervised 224 200  92.9 81.7 66.1 65.9 66.6 78.7 86.0
pvtv2_b3  idmm       224 200  95.9 88.4 70.1 73.6 76.8 87.5 92.9
pvtv2_b3  mocov3     224 200  93.7 87.1 66.0 70.5 63.7 82.2 92.3
pvtv2_b3  dino       224 200  95.0 87.8 68.3 73.4 72.4 86.1 92.5
pvtv2_b3  supervised 224 200  90.9 80.9 62.9 63.3 65.6 83.8 89.7
t2t_vit_7 idmm       224 200  89.8 74.1 63.5 62.6 55.2 72.7 82.4
t2t_vit_7 supervised 224 200  80.8 57.8 57.5 50.7 35.6 56.8 59.9
"""
T4 = """
pvtv2_b0  random 224 100  68.6
pvtv2_b0  mocov3 224 100  68.8
pvtv2_b0  idmm   224 100  69.5
pvtv2_b0  random 224 300  70.0
pvtv2_b0  idmm   224 300  70.9
deit_tiny random 224 100  66.8
deit_tiny idmm   224 100  67.8
deit_tiny random 224 300  72.2
deit_tiny idmm   224 300  72.9
"""
T5 = """
deit_tiny insdis    224 200  69.6
deit_tiny smoothing 224 200  70.4
deit_tiny small     224 200  73.1
deit_tiny multicrop 224 200  76.9
deit_tiny cutmix    224 200  79.9
"""
TABLES = {
    "T1": (T1, DATASETS),
    "T2": (T2, DATASETS),
    "T3": (T3, DATASETS),
    "T4": (T4, ("imagenet",)),
    "T5": (T5, ("flowers",)),
}
ABLATION = ("insdis", "smoothing", "small", "multicrop", "cutmix")  # each is what is before it, too
SOURCE = {"T3": "sin10k", "T4": "sin10k"}  # what is pretrained on, where it is another dataset


@dataclass(frozen=True, slots=True)
class Cell:
    """One number of one table, and what it takes to measure it."""

    table: str
    dataset: str
    backbone: str
    arm: str  # what fine-tuning begins with: a method's features, `random`, `timm`, a rung of T5
    resolution: int  # of the stage that is scored, px
    epochs: int  # of fine-tuning at 224 px
    published: float | None

    @property
    def pretrained(self) -> bool:
        """Whether there is a pretraining of ours to do."""
        return self.arm not in (RANDOM, TIMM)

    @property
    def method(self) -> str:
        """The method in the registry that it is pretrained by, or fine-tuned."""
        if not self.pretrained:
            return "supervised"
        return "idmm" if self.arm in ABLATION else self.arm

    @property
    def source(self) -> str:
        """The dataset that is pretrained on."""
        return SOURCE.get(self.table, self.dataset) if self.pretrained else self.dataset


def cells(table: str) -> list[Cell]:
    """A table's cells: row by row, a dataset after the other."""
    if table not in TABLES:
        raise UsageError(f"the paper has no table {table!r}: {did_you_mean(table, list(TABLES))}")
    return list(_read(table))


def _read(table: str) -> Iterator[Cell]:
    text, datasets = TABLES[table]
    for line in text.strip().splitlines():
        backbone, arm, resolution, epochs, *numbers = line.split()
        for dataset, number in zip(datasets, numbers, strict=True):
            published = None if number == "-" else float(number)
            yield Cell(table, dataset, backbone, arm, int(resolution), int(epochs), published)


def chosen(table: str, dataset: str | None, backbone: str | None) -> list[Cell]:
    """A table's cells for one dataset and one backbone, where they are given.

    Of a dataset or a backbone that the paper has no numbers for, the table's arms without them.
    """
    found = cells(table)
    for key, wanted in (("dataset", dataset), ("backbone", backbone)):
        if wanted is None:
            continue
        if any(getattr(cell, key) == wanted for cell in found):
            found = [cell for cell in found if getattr(cell, key) == wanted]
        else:
            found = unpublished(found, **{key: wanted})
    return found


def unpublished(found: list[Cell], **other: str) -> list[Cell]:
    """The same arms of another dataset or backbone, each once, without the paper's numbers."""
    return list(dict.fromkeys(replace(cell, published=None, **other) for cell in found))  # type: ignore[arg-type]
