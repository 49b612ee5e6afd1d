"""Stanford Cars: 196 cars by make, model and year, about 80 photographs of each.

Krause and others, 3dRR 2013; photographs found on the web, for research.
Its pages are gone; the MD5 sums are those of the originals, which many copies still are.
"""

from collections.abc import Iterable
from typing import Any

from numpy.typing import NDArray

from fastidmm.datasets import About, Item
from fastidmm.preparing.fetch import Remote
from fastidmm.preparing.lists import mat
from fastidmm.preparing.official import Found, Layout, Listed, Official

TEST = "cars_test_annos_withlabels.mat"
ALL = "cars_annos.mat"


class Cars(Official):
    """196 classes; 8,144 to train, 8,041 to test."""

    name = "cars"
    title = "Stanford Cars"
    about = About(196, 8144, 8041, fetched=False)
    layouts = (
        Layout(
            archives=(
                Remote("cars_train.tgz", md5="065e5b463ae28d29e77c1b4b166cfe61"),
                Remote("cars_test.tgz", md5="4ce7ebf6a94d07f1952d94dd34c4d501"),
                Remote("car_devkit.tgz", md5="c3b158d763b6e2245038c8ad08e45376"),
            ),
            inside=("cars_train", "cars_test", "devkit"),
            files=(Remote(TEST, md5="b0a2b23655a3edd16d84508592a98d10"),),
        ),
        Layout(
            archives=(Remote("car_ims.tgz", md5="d5c8f0aa497503f355e17dc7886c3f14"),),
            inside=("car_ims",),
            files=(Remote(ALL, md5="b407c6086d669747186bd1d764ff9dbc"),),
        ),
    )

    def read(self, found: Found) -> Listed:
        """Classes count from 1."""
        if ALL in found.files:
            return _of_one_folder(mat(found.path(ALL)))
        names = mat(found.path("devkit/cars_meta.mat"))["class_names"]
        train = mat(found.path("devkit/cars_train_annos.mat"))["annotations"]
        test = mat(found.path(TEST))["annotations"]

        def items(folder: str, rows: Iterable[dict[str, object]]) -> list[Item]:
            # One common copy has every folder inside another of its name.
            nested = (found.root / folder / folder).is_dir()
            below = f"{folder}/{folder}" if nested else folder
            return [Item(f"{below}/{row['fname']}", int(str(row["class"])) - 1) for row in rows]

        return Listed([str(n) for n in names], items("cars_train", train), items("cars_test", test))


def _of_one_folder(found: dict[str, NDArray[Any]]) -> Listed:
    """The release with all photographs in one folder, where each says if it is for testing."""
    train, test = (
        [
            Item(str(row["relative_im_path"]), int(str(row["class"])) - 1)
            for row in found["annotations"]
            if int(str(row["test"])) == wanted
        ]
        for wanted in (0, 1)
    )
    return Listed([str(name) for name in found["class_names"]], train, test)
