"""Miniatures of the published datasets: the true members and lists, few and small photographs.

Photographs are PNG whatever their names end in, so that a store must hold them exactly.
"""

import gzip
import io
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.io import savemat

Pixels = NDArray[np.uint8]
Rows = list[tuple[Pixels, int]]


@dataclass
class Miniature:
    """Archives by name with their members, files beside them, and what a store must hold."""

    archives: dict[str, dict[str, bytes]] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    class_names: list[str] = field(default_factory=list)
    train: Rows = field(default_factory=list)
    test: Rows = field(default_factory=list)
    seed: int = 0

    def photo(self, archive: str, member: str, rows: Rows | None, label: int = -1) -> None:
        """Make a photograph, in an archive and in what is expected; no rows: in no split."""
        self.seed += 1
        size = (4 + self.seed % 3, 5 + self.seed % 4, 3)
        pixels = np.random.default_rng(self.seed).integers(0, 256, size, dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        self.archives.setdefault(archive, {})[member] = file.getvalue()
        if rows is not None:
            rows.append((pixels, label))

    def text(self, archive: str, member: str, *lines: str, end: str = "\n") -> None:
        """A list of lines, in an archive or, with no name of one, beside them."""
        content = "\n".join(lines) + end
        place = self.archives.setdefault(archive, {}) if archive else self.files
        place[member] = content.encode("utf-8", "surrogateescape")

    def packed(self) -> dict[str, bytes]:
        """Everything as it is published: archives packed, lists as they are."""
        return {name: packed(name, members) for name, members in self.archives.items()} | self.files

    def unpack(self, folder: Path, *, but: str = "\0") -> Path:
        """Everything as it lies in an unpacked copy; members that begin with `but` left out."""
        everything = dict(self.files)
        for members in self.archives.values():
            everything |= members
        for member, content in everything.items():
            if not member.startswith(but):
                path = folder / member
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
        return folder


def packed(name: str, members: dict[str, bytes]) -> bytes:
    """A tar of these members, compressed as its name says, with the folders on their own."""
    file = io.BytesIO()
    made: set[str] = set()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for number, (member, content) in enumerate(members.items()):
            for parent in reversed([str(p) for p in Path(member).parents if str(p) != "."]):
                if parent not in made:
                    info = tarfile.TarInfo(parent)
                    info.type, info.mode = tarfile.DIRTYPE, 0o755
                    tar.addfile(info)
                    made.add(parent)
            info = tarfile.TarInfo(member)
            info.size, info.mtime = len(content), 1_100_000_000 + number
            tar.addfile(info, io.BytesIO(content))
    tar_bytes = file.getvalue()
    return tar_bytes if name.endswith(".tar") else gzip.compress(tar_bytes, mtime=0)


def mat(**variables: Any) -> bytes:
    """A compressed MATLAB file."""
    file = io.BytesIO()
    savemat(file, variables, do_compression=True)
    return file.getvalue()


def cells(texts: Sequence[str]) -> NDArray[Any]:
    """A row of texts, as MATLAB has it."""
    row = np.empty((1, len(texts)), object)
    row[0, :] = texts
    return row


def structs(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> NDArray[Any]:
    """A row of structs with these fields."""
    made = np.empty((1, len(rows)), [(name, object) for name in names])
    for index, values in enumerate(rows):
        made[0, index] = tuple(values)
    return made


def flowers() -> Miniature:
    """Eight images, of which one is in no split; numbers and labels count from 1."""
    from fastidmm.datasets.flowers import NAMES

    made = Miniature(class_names=NAMES.replace("\n", " ").strip().split(", "))
    labels = [77, 1, 102, 1, 50, 51, 9, 102]
    train, test = [3, 1, 6], [8, 2, 4, 5]
    for number in range(1, 9):
        made.photo("102flowers.tgz", f"jpg/image_{number:05d}.jpg", made.train, labels[number - 1])
    rows = made.train
    made.train, made.test = [rows[n - 1] for n in train], [rows[n - 1] for n in test]
    for split in (made.train, made.test):
        split[:] = [(pixels, label - 1) for pixels, label in split]
    made.files["imagelabels.mat"] = mat(labels=np.array([labels], np.uint8))
    sets = {"trnid": [[3, 1]], "valid": [[6]], "tstid": [test]}
    made.files["setid.mat"] = mat(**{name: np.array(v, np.uint16) for name, v in sets.items()})
    return made


def pets() -> Miniature:
    """Breeds in the order of their numbers, which is not that of their names."""
    made = Miniature(class_names=["Abyssinian", "american_bulldog", "Bengal_Cat"])
    images, lists = "images.tar.gz", "annotations.tar.gz"
    for split, rows, num in (("test", made.test, 2), ("trainval", made.train, 3)):
        lines = []
        for label, breed in reversed([*enumerate(made.class_names)]):
            for number in range(num):
                image = f"{breed}_{100 + number if rows is made.test else number}"
                made.photo(images, f"images/{image}.jpg", rows, label)
                lines.append(f"{image} {label + 1} 1 {number}")
        made.text(lists, f"annotations/{split}.txt", *lines)
    made.text(lists, "annotations/list.txt", "#Image CLASS-ID SPECIES BREED ID")
    made.photo(images, "images/Abyssinian_34.mat", None)
    return made


def dtd() -> Miniature:
    """Three lists of partition 1; those of another partition are not read."""
    made = Miniature(class_names=["banded", "dotted"])
    rows = {"val1": [], "test1": made.test, "train1": made.train}  # type: dict[str, Rows]
    lists: dict[str, list[str]] = {split: [] for split in rows}
    for number, split in enumerate(("test1", "val1", "train1", "train1")):
        for label, name in enumerate(made.class_names):
            file = f"{name}/{name}_{number:04d}.jpg"
            made.photo("dtd-r1.0.1.tar.gz", f"dtd/images/{file}", rows[split], label)
            lists[split].append(file)
    made.train += rows["val1"]
    for split, lines in lists.items():
        made.text("dtd-r1.0.1.tar.gz", f"dtd/labels/{split}.txt", *lines)
        other = split.replace("1", "2")
        made.text("dtd-r1.0.1.tar.gz", f"dtd/labels/{other}.txt", *reversed(lines))
    return made


def indoor67() -> Miniature:
    """More images than the lists name; no line end after the last, a name in Latin-1."""
    made = Miniature(class_names=["airport_inside", "bar", "bowling", "casino", "winecellar"])
    lists: dict[str, list[str]] = {"TrainImages.txt": [], "TestImages.txt": []}
    for name, rows in (("TrainImages.txt", made.train), ("TestImages.txt", made.test)):
        for label, place in reversed([*enumerate(made.class_names)]):
            for number in range(2 if rows is made.train else 1):
                file = f"{place}/{name[:2]}_caf\udce9 {number}.jpg"
                made.photo("indoorCVPR_09.tar", f"Images/{file}", rows, label)
                lists[name].append(file)
    made.photo("indoorCVPR_09.tar", "Images/bar/unlisted.jpg", None)
    for name, lines in lists.items():
        made.text("", name, *lines, end="")
    return made


def cub() -> Miniature:
    """Numbered lists; classes by number."""
    made = Miniature(class_names=["001.Black_footed_Albatross", "002.Crested_Auklet"])
    archive, top = "CUB_200_2011.tgz", "CUB_200_2011"
    images, labels, split = [], [], []
    for number in range(1, 8):
        label, train = number % 2, number % 3 > 0
        file = f"{made.class_names[label]}/Bird_{number:04d}.jpg"
        made.photo(archive, f"{top}/images/{file}", made.train if train else made.test, label)
        images.append(f"{number} {file}")
        labels.append(f"{number} {label + 1}")
        split.append(f"{number} {int(train)}")
    names = [f"{number} {name}" for number, name in enumerate(made.class_names, 1)]
    for list_name, lines in (
        ("classes", names),
        ("images", images),
        ("image_class_labels", labels),
        ("train_test_split", split),
    ):
        made.text(archive, f"{top}/{list_name}.txt", *lines)
    made.text(archive, "attributes.txt", "1 has_bill_shape::curved_(up_or_down)")
    return made


def aircraft() -> Miniature:
    """Variants with blanks in their names, in the order of the list of variants."""
    made = Miniature(class_names=["707-320", "Gulfstream IV", "An-12"])
    archive, data = "fgvc-aircraft-2013b.tar.gz", "fgvc-aircraft-2013b/data"
    for split, rows, first in (("trainval", made.train, 1234567), ("test", made.test, 65432)):
        lines = []
        for number in range(first, first + 5):
            label = number % 3
            made.photo(archive, f"{data}/images/{number:07d}.jpg", rows, label)
            lines.append(f"{number:07d} {made.class_names[label]}")
        made.text(archive, f"{data}/images_variant_{split}.txt", *lines)
    made.text(archive, f"{data}/variants.txt", *made.class_names)
    return made


BOX = ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2")
CARS = ["AM General Hummer SUV 2000", "Acura RL Sedan 2012"]


def cars() -> Miniature:
    """Three archives, and the labels of the test images beside them."""
    made = Miniature(class_names=CARS)
    annos = {}
    for split, rows, num in (("train", made.train, 4), ("test", made.test, 3)):
        found = []
        for number in range(1, num + 1):
            label, file = number % 2, f"{number:05d}.jpg"
            made.photo(f"cars_{split}.tgz", f"cars_{split}/{file}", rows, label)
            found.append((1, 2, 3, 4, np.uint8(label + 1), file))
        annos[split] = structs((*BOX, "class", "fname"), found)
    devkit = made.archives.setdefault("car_devkit.tgz", {})
    devkit["devkit/cars_meta.mat"] = mat(class_names=cells(CARS))
    devkit["devkit/cars_train_annos.mat"] = mat(annotations=annos["train"])
    made.files["cars_test_annos_withlabels.mat"] = mat(annotations=annos["test"])
    return made


def cars_of_one_folder() -> Miniature:
    """The other release: one folder and one list, which says what is for testing."""
    made, found = Miniature(class_names=CARS), []
    for number in range(1, 8):
        label, test, file = number % 2, number > 4, f"car_ims/{number:06d}.jpg"
        made.photo("car_ims.tgz", file, made.test if test else made.train, label)
        found.append((file, 1, 2, 3, 4, np.uint8(label + 1), np.uint8(test)))
    rows = structs(("relative_im_path", *BOX, "class", "test"), found)
    made.files["cars_annos.mat"] = mat(annotations=rows, class_names=cells(CARS))
    return made


BUILDERS: dict[str, Callable[[], Miniature]] = {
    "aircraft": aircraft,
    "cars": cars,
    "cub": cub,
    "dtd": dtd,
    "flowers": flowers,
    "indoor67": indoor67,
    "pets": pets,
}
