"""Describable Textures: 47 words for textures, 120 photographs of each.

Cimpoi and others, CVPR 2014; photographs found on the web, for research.
Of its ten partitions the first, its training and validation sets together.
"""

from fastidmm.datasets import About, Item
from fastidmm.preparing.fetch import Remote
from fastidmm.preparing.lists import lines
from fastidmm.preparing.official import Found, Layout, Listed, Official

SOURCE = "https://www.robots.ox.ac.uk/~vgg/data/dtd/download/dtd-r1.0.1.tar.gz"


class DTD(Official):
    """47 classes; 3,760 to train, 1,880 to test."""

    name = "dtd"
    title = "DTD, partition 1"
    about = About(47, 3760, 1880)
    layouts = (
        Layout(
            archives=(
                Remote("dtd-r1.0.1.tar.gz", (SOURCE,), md5="fff73e5086ae6bdbea199a49dfb8a4c1"),
            ),
            top="dtd",
            inside=("images", "labels/train1.txt", "labels/val1.txt", "labels/test1.txt"),
        ),
    )

    def read(self, found: Found) -> Listed:
        """Lines are `class/file`."""
        train = [
            f for split in ("train1", "val1") for f in lines(found.path(f"labels/{split}.txt"))
        ]
        test = lines(found.path("labels/test1.txt"))
        names = sorted({file.split("/")[0] for file in train})
        label = {name: index for index, name in enumerate(names)}

        def items(files: list[str]) -> list[Item]:
            return [Item(f"images/{file}", label[file.split("/")[0]]) for file in files]

        return Listed(names, items(train), items(test))
