"""Oxford-IIIT Pet: 37 breeds of cats and dogs, about 200 photographs of each.

Parkhi and others, CVPR 2012; CC BY-SA 4.0.
Some files called .jpg are GIF or PNG; they are read for what they are.
"""

from fastidmm.datasets import About, Item
from fastidmm.preparing.fetch import Remote
from fastidmm.preparing.lists import lines
from fastidmm.preparing.official import Found, Layout, Listed, Official

BASE = "https://www.robots.ox.ac.uk/~vgg/data/pets/data/"


def _remote(file: str, md5: str) -> Remote:
    return Remote(file, (BASE + file,), md5=md5)


class Pets(Official):
    """37 classes; 3,680 to train, 3,669 to test."""

    name = "pets"
    title = "Oxford-IIIT Pet"
    about = About(37, 3680, 3669)
    layouts = (
        Layout(
            archives=(
                _remote("images.tar.gz", "5c4f3ee8e5d25df40f4fd59a7f44e54c"),
                _remote("annotations.tar.gz", "95a8c909bbe2e81eed6a22bccdf3f68f"),
            ),
            inside=("images", "annotations/trainval.txt", "annotations/test.txt"),
        ),
    )

    def read(self, found: Found) -> Listed:
        """Lines are `image class species breed`; a breed's name is in those of its images."""
        names: dict[int, str] = {}

        def items(file: str) -> list[Item]:
            listed = []
            for line in lines(found.path(file)):
                if line.startswith("#"):
                    continue
                image, number, _, _ = line.split()
                breed, label = image.rpartition("_")[0], int(number) - 1
                if names.setdefault(label, breed) != breed:
                    raise ValueError(f"{image} is no {names[label]}")
                listed.append(Item(f"images/{image}.jpg", label))
            return listed

        train, test = items("annotations/trainval.txt"), items("annotations/test.txt")
        return Listed([names[label] for label in sorted(names)], train, test)
