"""One file per dataset: where its photographs are, and how to read its split.

A dataset is a class with one method, `open(self, *, from_: Path | None, seed: int) -> Source`:
it lists files and labels, and reads no pixel.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Item:
    """One photograph: its file below the source's root, with '/', and its class."""

    file: str
    label: int  # -1 where unknown


@dataclass(frozen=True, slots=True)
class Unusable:
    """A file that is left out, and why."""

    file: str
    reason: str


@dataclass(frozen=True, slots=True)
class Source:
    """Where a dataset's photographs lie, in the order in which a store keeps them."""

    description: str
    root: Path
    class_names: tuple[str, ...]  # empty where there are no labels
    train: tuple[Item, ...]
    test: tuple[Item, ...] = ()
    split_seed: int | None = None  # None where the split is the dataset's own
    unusable: tuple[Unusable, ...] = ()  # files that need no decoding to be left out
    notes: tuple[str, ...] = ()  # sentences a user should read


@dataclass(frozen=True, slots=True)
class About:
    """What is published of a dataset, for a list of them."""

    num_classes: int
    num_train: int
    num_test: int
    fetched: bool = True  # False where `--from` is needed


Split = tuple[tuple[Item, ...], tuple[Item, ...]]


def stratified(items: Sequence[Item], *, seed: int, one_in: int) -> Split:
    """Hold one image in `one_in` of every class out for testing, in the order given.

    A class of two or more gives at least one image, a class of one gives none. Which ones is
    a function of the seed and the file names alone, so that adding a class moves no image of
    another.
    """
    classes = defaultdict(list)
    for item in items:
        classes[item.label].append(item.file)
    held: set[str] = set()
    for files in classes.values():
        count = max(len(files) // one_in, 1) if len(files) > 1 else 0
        held.update(sorted(files, key=lambda file: rank(seed, file))[:count])
    train = tuple(item for item in items if item.file not in held)
    return train, tuple(item for item in items if item.file in held)


def rank(seed: int, file: str) -> bytes:
    """Where a file stands in the order in which a seed draws."""
    return sha256(f"{seed}/{file}".encode("utf-8", "surrogateescape")).digest()
