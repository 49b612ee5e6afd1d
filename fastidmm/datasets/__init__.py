"""One file per dataset: where its photographs are, and how to read its split.

A dataset is a class with one method, `open(self, *, from_: Path | None, seed: int) -> Source`:
it lists files and labels, and reads no pixel.
"""

import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from fastidmm.terminal import printable


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
    # A published split, which it no longer is without every one of its files.
    official: bool = False
    own: bool = False  # a user's photographs, known by their folder and by nothing else


@dataclass(frozen=True, slots=True)
class About:
    """What is published of a dataset, for a list of them."""

    num_classes: int
    num_train: int
    num_test: int
    fetched: bool = True  # False where `--from` is needed


TEST_NAMES = ("test", "testing", "val", "valid", "validation")  # the first found is used
HELD_OUT_ONE_IN = 5

Split = tuple[tuple[Item, ...], tuple[Item, ...]]


def stratified(items: Sequence[Item], *, seed: int, one_in: int) -> Split:
    """Hold one image in `one_in` of every class out for testing, in the order given.

    A class of two or more gives at least one image; a class of one, and images without labels,
    give none. Which ones is a function of the seed and the file names alone, so that adding a
    class moves no image of another.
    """
    classes = defaultdict(list)
    for item in items:
        if item.label >= 0:
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


def held_out(
    items: tuple[Item, ...], names: Sequence[str], seed: int
) -> tuple[tuple[Item, ...], tuple[Item, ...], tuple[str, ...]]:
    """Training and test items where no split is given, and what a user should know of them."""
    if len(names) < 2:
        return items, (), _untested(names, ())
    train, test = stratified(items, seed=seed, one_in=HELD_OUT_ONE_IN)
    return train, test, _untested(names, test)


def _untested(names: Sequence[str], test: tuple[Item, ...]) -> tuple[str, ...]:
    """A note on the classes of which nothing could be held out."""
    if len(names) == 1:
        return (f"one class only ({printable(names[0])}), so every image is for training",)
    tested = {item.label for item in test}
    alone = ", ".join(printable(name) for label, name in enumerate(names) if label not in tested)
    return (f"one image only, so none for testing: {alone}",) if alone else ()


def leaves(root: Path, file: str) -> bool:
    """Whether a file, its links followed, is not below `root`, whose own links have been."""
    real, base = os.path.realpath(file), os.fspath(root)
    return os.path.commonpath((base, real)) != base
