"""Caltech-UCSD Birds 200 (2011): 200 birds of North America, about 60 photographs of each.

Wah and others, technical report 2011; photographs from Flickr, for research.
The whole photographs, without use of the bounding boxes.
"""

from fastidmm.datasets import About, Item
from fastidmm.preparing.fetch import Remote
from fastidmm.preparing.lists import lines
from fastidmm.preparing.official import Found, Layout, Listed, Official

SOURCE = "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz"
LISTS = ("classes.txt", "images.txt", "image_class_labels.txt", "train_test_split.txt")


class CUB(Official):
    """200 classes; 5,994 to train, 5,794 to test."""

    name = "cub"
    title = "CUB-200-2011"
    about = About(200, 5994, 5794)
    layouts = (
        Layout(
            archives=(
                Remote(
                    "CUB_200_2011.tgz",
                    (SOURCE, SOURCE + "?download=1"),
                    md5="97eceeb196236b17998738112f37df78",
                ),
            ),
            top="CUB_200_2011",
            inside=("images", *LISTS),
        ),
    )

    def read(self, found: Found) -> Listed:
        """Lines are `number value`; classes count from 1, and a 1 in the split is for training."""
        classes, files, labels, split = (
            dict(line.split(maxsplit=1) for line in lines(found.path(name))) for name in LISTS
        )
        train, test = (
            [
                Item(f"images/{file}", int(labels[number]) - 1)
                for number, file in files.items()
                if split[number] == wanted
            ]
            for wanted in ("1", "0")
        )
        return Listed([classes[str(n)] for n in range(1, len(classes) + 1)], train, test)
