"""FGVC-Aircraft (2013b): 100 variants of aircraft, 100 photographs of each.

Maji and others, technical report 2013; photographs by airliners.net, for research.
Labels are variants; training is the published training and validation sets together.
Photographs keep the strip at the bottom that names their authors.
"""

from fastidmm.datasets import About, Item
from fastidmm.preparing.fetch import Remote
from fastidmm.preparing.lists import lines
from fastidmm.preparing.official import Found, Layout, Listed, Official

SOURCE = "https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/archives/fgvc-aircraft-2013b.tar.gz"
NAMES, TRAIN, TEST = "variants.txt", "images_variant_trainval.txt", "images_variant_test.txt"


class Aircraft(Official):
    """100 classes; 6,667 to train, 3,333 to test."""

    name = "aircraft"
    title = "FGVC-Aircraft 2013b, variants"
    about = About(100, 6667, 3333)
    layouts = (
        Layout(
            archives=(
                Remote(
                    "fgvc-aircraft-2013b.tar.gz",
                    (SOURCE,),
                    md5="d4acdd33327262359767eeaa97a4f732",
                ),
            ),
            top="fgvc-aircraft-2013b/data",
            inside=("images", NAMES, TRAIN, TEST),
        ),
    )

    def read(self, found: Found) -> Listed:
        """Lines are `number variant`, and a variant's name may have blanks."""
        names = lines(found.path(NAMES))
        label = {name: index for index, name in enumerate(names)}

        def items(file: str) -> list[Item]:
            pairs = [line.split(maxsplit=1) for line in lines(found.path(file))]
            return [Item(f"images/{number}.jpg", label[name]) for number, name in pairs]

        return Listed(names, items(TRAIN), items(TEST))
