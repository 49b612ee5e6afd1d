"""What a user should know of a dataset before training on it: duplicates, labels, sizes.

Every finding is a count and the first `LISTED` cases, as `prepare.json` keeps them. Pictures of the
test split are compared with training, not with one another.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from fastidmm.datasets import Unusable
from fastidmm.preparing.lookalike import nearest
from fastidmm.preparing.pack import Packed

Case = dict[str, Any]
Found = dict[str, Any]

LISTED = 1000
FEW = 5  # training images in a class
TINY = 32  # px
# Classes, training images: what such a split is, which published results do not have.
KNOWN_SPLITS = {
    (102, 6552): "this is the Kaggle split of Flowers (6,552 training images), not the official "
    "one (2,040): results will not compare with published ones",
    (102, 6149): "this is the split of Flowers with training and test exchanged (6,149 training "
    "images, not 2,040): results will not compare with published ones",
}


def check(
    train: Packed, test: Packed, class_names: Sequence[str], unusable: Sequence[Unusable]
) -> Found:
    """Look over what was decoded; the result can be written as JSON."""
    like, bits = _likes(train, test)
    num = len(train.files)
    exact, near = (like >= 0) & (bits == 0), (like >= 0) & (bits > 0)
    labels = np.array([*train.labels, *test.labels], np.int64)
    known = (labels >= 0) & (labels[like] >= 0)
    differ = (like >= 0) & known & (labels != labels[like])

    def cases(kept: Any) -> Found:
        rows = np.nonzero(kept)[0]
        shown = [_case(row, like, bits, train, test, class_names) for row in rows[:LISTED].tolist()]
        return {"count": len(rows), "cases": shown}

    training = np.arange(len(labels)) < num
    return {
        "unusable": _found([asdict(file) for file in unusable]),
        "same_in_train": cases(exact & training),
        "same_in_test": cases(exact & ~training),
        "alike_in_train": cases(near & training),
        "alike_in_test": cases(near & ~training),
        "labels_differ": cases(differ),
        "small_classes": _small_classes(train, class_names),
        "tiny": _tiny(train, test),
        "warnings": [KNOWN_SPLITS[key] for key in [(len(class_names), num)] if key in KNOWN_SPLITS],
    }


def _likes(train: Packed, test: Packed) -> tuple[Any, Any]:
    """For each picture the training picture that it repeats, or one before it that it looks like.

    Of equal ones the first with a label is repeated, or else labels that differ would go unseen.
    Returns (N,) rows, -1 where there is none, and (N,) bits: 0 for equal pixels, else one more
    than the bits in which the looks differ.
    """
    digests = [*train.digests, *test.digests]
    looks = [*train.looks, *test.looks]
    num = len(train.digests)
    firsts: dict[str, int] = {}
    for row in sorted(range(num), key=lambda row: train.labels[row] < 0):
        firsts.setdefault(train.digests[row], row)
    like = np.array([firsts.get(digest, -1) for digest in digests], np.int64)
    like[like == np.arange(len(like))] = -1
    bits = np.zeros(len(like), np.int64)
    new = [row for row in np.nonzero(like < 0)[0].tolist() if looks[row] is not None]
    rows = np.array(new, np.int64)
    num_train = int((rows < num).sum())
    found, apart = nearest(np.array([looks[row] for row in new], np.uint64), num_train)
    near = found >= 0
    like[rows[near]] = rows[found[near]]
    bits[rows[near]] = apart[near] + 1
    return like, bits


def _case(
    row: int, like: Any, bits: Any, train: Packed, test: Packed, class_names: Sequence[str]
) -> Case:
    """One repeated picture, in words."""
    num, other = len(train.files), int(like[row])
    split, place = (train, row) if row < num else (test, row - num)
    case: Case = {"file": split.files[place], "like": train.files[other]}
    if bits[row]:
        case["bits"] = int(bits[row]) - 1
    own, its = split.labels[place], train.labels[other]
    if own != its and min(own, its) >= 0:
        case |= {"label": class_names[own], "like_label": class_names[its]}
    return case


def _small_classes(train: Packed, class_names: Sequence[str]) -> Found:
    counts = Counter(train.labels)
    few = [(counts[label], name) for label, name in enumerate(class_names) if counts[label] < FEW]
    return _found([{"class": name, "num_train": count} for count, name in sorted(few)])


def _tiny(train: Packed, test: Packed) -> Found:
    return _found(
        [
            {"file": file, "height": high, "width": wide}
            for split in (train, test)
            for file, high, wide in zip(split.files, split.heights, split.widths, strict=True)
            if min(high, wide) < TINY
        ]
    )


def _found(cases: list[Case]) -> Found:
    return {"count": len(cases), "cases": cases[:LISTED]}
