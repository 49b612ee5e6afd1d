"""SIN-10k: ten training photographs of each of ImageNet's thousand classes.

What the paper calls a small ImageNet; its authors drew theirs without a fixed seed, so that ours
is another draw. Terms are those of ImageNet. There is no test split: models learnt on it are
judged on other datasets.
"""

from pathlib import Path

from fastidmm.datasets import About, Item, Source, rank
from fastidmm.datasets.imagenet import ImageNet, class_folders, listing
from fastidmm.errors import DataError

PER_CLASS = 10


class SIN10k:
    """1,000 classes, 10 images of each to train."""

    about = About(1000, 10_000, 0, fetched=False)

    def open(self, *, from_: Path | None, seed: int) -> Source:
        """Draw from train/ below `from_`: a function of the seed and the names class/file alone."""
        root = class_folders(from_, "sin10k", self.about)
        everything = listing(root, below=root)
        classes: dict[int, list[Item]] = {}
        for item in everything:
            classes.setdefault(item.label, []).append(item)
        names = sorted({item.file.split("/")[0] for item in everything})
        drawn = []
        for label in range(self.about.num_classes):
            items = classes.get(label, [])
            if len(items) < PER_CLASS:
                raise DataError(
                    f"{root} has a class with {len(items)} images, and {PER_CLASS} of each are "
                    "drawn: unpack ILSVRC2012_img_train.tar again."
                )
            chosen = sorted(items, key=lambda item: rank(seed, item.file))[:PER_CLASS]
            drawn += sorted(chosen, key=lambda item: item.file)
        note = f"{PER_CLASS} images of each class drawn by seed {seed}; store.json lists them"
        if len(everything) != ImageNet.about.num_train:
            note += f" (from {len(everything):,} images; all of ImageNet gives another draw)"
        return Source(
            description="SIN-10k, drawn from ImageNet-1k",
            root=root,
            class_names=tuple(names),
            train=tuple(drawn),
            split_seed=seed,
            notes=(note,),
        )
