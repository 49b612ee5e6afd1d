"""MIT Indoor67: 67 kinds of rooms and other places indoors, 100 photographs of each in the split.

Quattoni and Torralba, CVPR 2009; photographs found on the web, for research.
The archive has 15,620 photographs, of which the official lists name 6,700.
"""

from fastidmm.datasets import About, Item
from fastidmm.preparing.fetch import Remote
from fastidmm.preparing.lists import lines
from fastidmm.preparing.official import Found, Layout, Listed, Official

IMAGES = "http://groups.csail.mit.edu/vision/LabelMe/NewImages/indoorCVPR_09.tar"
LISTS = "https://web.mit.edu/torralba/www/"
TRAIN, TEST = "TrainImages.txt", "TestImages.txt"


class Indoor67(Official):
    """67 classes; 5,360 to train, 1,340 to test."""

    name = "indoor67"
    title = "MIT Indoor67"
    about = About(67, 5360, 1340)
    layouts = (
        Layout(
            archives=(
                Remote(
                    "indoorCVPR_09.tar",
                    (IMAGES,),
                    sha1="0b252516e746ba428b96af408d2e8162d9b08ac5",
                ),
            ),
            inside=("Images",),
            files=tuple(Remote(file, (LISTS + file,)) for file in (TRAIN, TEST)),
        ),
    )

    def read(self, found: Found) -> Listed:
        """Lines are `class/file`."""
        train, test = (lines(found.path(file)) for file in (TRAIN, TEST))
        names = sorted({file.split("/")[0] for file in train})
        label = {name: index for index, name in enumerate(names)}

        def items(files: list[str]) -> list[Item]:
            return [Item(f"Images/{file}", label[file.split("/")[0]]) for file in files]

        return Listed(names, items(train), items(test))
