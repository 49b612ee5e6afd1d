"""ImageNet-1k (ILSVRC 2012): 1,000 kinds of things, up to 1,300 photographs of each.

Russakovsky and others, IJCV 2015; to be had from image-net.org, for research, by who signs for it.
Training is train/ and testing val/, both with a folder per class (n01440764, ...).
"""

import os
import re
from pathlib import Path

from fastidmm.datasets import About, Item, Source
from fastidmm.errors import DataError, UsageError
from fastidmm.preparing.decode import SUFFIXES
from fastidmm.preparing.lists import check_inside


class ImageNet:
    """1,000 classes, called and ordered by their WordNet numbers; 1,281,167 and 50,000 images."""

    about = About(1000, 1_281_167, 50_000, fetched=False)

    def open(self, *, from_: Path | None, seed: int) -> Source:
        """List train/ and val/ below `from_`, or it and val/ beside it; the counts are asserted."""
        folder, about = class_folders(from_, "imagenet", self.about), self.about
        root = folder.parent
        if not (root / "val").is_dir() or not _classes(root / "val"):
            raise UsageError(
                f"{root / 'val'} has no folder per class: sort the 50,000 images of "
                "ILSVRC2012_img_val.tar into folders named as those of train/."
            )
        names = _classes(folder)
        train, test = (tuple(listing(split, below=root)) for split in (folder, root / "val"))
        numbers = (len(train), len(test), _classes(root / "val"))
        if numbers != (about.num_train, about.num_test, names):
            raise DataError(
                f"{root} has {len(train):,} training and {len(test):,} test images, and ImageNet "
                f"has {about.num_train:,} and {about.num_test:,}, same classes: unpack it again."
            )
        title = "ImageNet-1k, the official split"
        return Source(title, root, tuple(names), train, test, official=True)


def class_folders(from_: Path | None, name: str, about: About) -> Path:
    """The folder train/ of an ImageNet, found below `from_`, or `from_` itself."""
    if from_ is None:
        raise UsageError(
            "ImageNet is only for who signs for it at image-net.org: get ILSVRC2012_img_train.tar "
            "there, unpack it to train/n01440764/*.JPEG and so on, and type "
            f"`fastidmm prepare --dataset {name} --from FOLDER`."
        )
    given = from_.expanduser().resolve()
    if not given.is_dir():
        raise UsageError(f"there is no folder {given}: check what follows --from.")
    for train in (given / "train", given / "ILSVRC/Data/CLS-LOC/train", given):
        if train.is_dir() and len(_classes(train)) == about.num_classes:
            check_inside(train, given)
            return train
    raise UsageError(
        f"{given} has no train/ with {about.num_classes:,} folders such as n01440764: unpack "
        "ILSVRC2012_img_train.tar, and the archive of every class in it, into one each."
    )


def _classes(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if re.fullmatch(r"n\d{8}", entry.name))


def listing(folder: Path, *, below: Path) -> list[Item]:
    """Every photograph by class and then by name; names are relative to `below`."""
    items, prefix = [], "" if folder == below else f"{folder.relative_to(below)}/"
    for label, name in enumerate(_classes(folder)):
        check_inside(folder / name, below)
        with os.scandir(folder / name) as entries:
            found = sorted((e.name, e.is_symlink()) for e in entries if e.name[0] != ".")
        for file, link in found:
            if link:
                check_inside(folder / name / file, below)
            if file.lower().endswith(SUFFIXES):
                items.append(Item(f"{prefix}{name}/{file}", label))
    return items
