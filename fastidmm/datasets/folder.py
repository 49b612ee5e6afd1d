"""Your own photographs, in folders named after their classes or in none.

train/CLASS/*.jpg and test/CLASS/*.jpg   the split as it is; see below
CLASS/*.jpg                              one image in five of every class held out for testing
unlabelled/*.jpg                         beside either, or in train/: more for pretraining alone
*.jpg                                    no labels: all of them for pretraining
photos.csv                               a table of paths and labels, see `table.py`

training/ serves as train/; testing/, val/, valid/ and validation/ as test/; unlabeled/ as
unlabelled/; capitals do not matter.
Links to files within the folder are followed, other links are named and left out.
"""

import os
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from fastidmm.datasets import TEST_NAMES, Item, Source, Unusable, held_out, leaves
from fastidmm.errors import DataError, UsageError
from fastidmm.preparing.decode import SUFFIXES
from fastidmm.preparing.table import read
from fastidmm.terminal import printable

TRAIN_NAMES = ("train", "training")
UNLABELLED_NAMES = ("unlabelled", "unlabeled")
SOME = 3  # files to name where none can be read


@dataclass(slots=True)
class _Listing:
    """What a walk through a folder met."""

    images: list[PurePosixPath] = field(default_factory=list)
    unusable: list[Unusable] = field(default_factory=list)

    def left_out(
        self, used: Collection[str], reason: str, test_name: str = ""
    ) -> tuple[Unusable, ...]:
        """Every file met but the used ones, in order; `reason` is that of the images.

        Images that would be the test split, were there no folder `test_name`, have their own.
        """
        unused = []
        for path in self.images:
            top = path.parts[0]
            if test_name and top != test_name and top.lower() in TEST_NAMES:
                why = f"its folder {top} is not used beside {test_name}"
            else:
                why = reason
            if str(path) not in used:
                unused.append(Unusable(str(path), why))
        return tuple(sorted([*self.unusable, *unused], key=lambda left: left.file))


class Folder:
    """Photographs below one folder; nested folders belong to the class they are in."""

    def open(self, *, from_: Path | None, seed: int) -> Source:
        """List the photographs below `from_`, splitting by `seed` where no split is given."""
        root = _checked(from_)
        if root.is_file():
            return read(root, seed)
        listing = _walk(root)
        if not listing.images:
            met = [f"{printable(file.file)} ({file.reason})" for file in listing.unusable]
            found = ", ".join(met[:SOME]) + (", ..." if met[SOME:] else "")
            raise DataError(
                f"{root} holds no images{f' but {found}' if met else ''}: give a folder of "
                f"photographs ({', '.join(SUFFIXES)}), or save others as JPEG first."
            )
        tops = {path.parts[0] for path in listing.images if len(path.parts) > 1}
        train, test = _called(tops, TRAIN_NAMES), _called(tops, TEST_NAMES)
        bare = _bare(tops)
        classes = tops - bare
        if train and (test or classes == {train}):
            return _split_given(root, listing, train, test, bare)
        tests = {top for top in classes if top.lower() in TEST_NAMES}
        if bare and tests and classes == tests:
            # No classes to train on, be they several.
            images = [path for path in listing.images if path.parts[0] not in tests]
            return _unlabelled(root, listing, images, "no train/ beside it")
        if train:
            _check_no_split(root, listing, train)
        # One stray folder beside the photographs does not make classes.
        loose = any(len(path.parts) == 1 for path in listing.images)
        if len(classes) > 1 or (classes and not loose):
            return _split_made(root, listing, seed, bare)
        return _unlabelled(root, listing, listing.images)


def _checked(from_: Path | None) -> Path:
    if from_ is None:
        raise UsageError(
            "the dataset 'folder' needs photographs: type "
            "`fastidmm prepare --dataset folder --from PHOTOS --name NAME`."
        )
    root = from_.expanduser()
    if not root.exists():
        kind = "file" if root.suffix.lower() == ".csv" else "folder"
        raise UsageError(f"there is no {kind} {root}: check what follows --from.")
    if root.is_dir():
        return root.resolve()
    if root.suffix.lower() != ".csv" or not root.is_file():
        raise UsageError(
            f"{root} is a file: --from takes a folder or a .csv; unpack an archive first."
        )
    return root


def _walk(root: Path) -> _Listing:
    """Every file below `root` but the hidden; links to folders are not followed, so loops end."""
    listing = _Listing()
    folders = [PurePosixPath()]
    while folders:
        here = folders.pop()
        try:
            entries = sorted(os.scandir(root / here), key=lambda entry: entry.name)
        except OSError as problem:
            listing.unusable.append(Unusable(str(here), problem.strerror or "unreadable"))
            continue
        for entry in entries:
            path = here / entry.name
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                folders.append(path)
            elif reason := _left_out(root, path, entry):
                listing.unusable.append(Unusable(str(path), reason))
            else:
                listing.images.append(path)
    return listing


def _left_out(root: Path, path: PurePosixPath, entry: os.DirEntry[str]) -> str:
    """Why a file is no photograph to take; empty where it is one."""
    if entry.is_symlink():
        if leaves(root, entry.path):
            return "a link out of the folder"
        if os.path.isdir(entry.path):
            return "a link to a folder"
    return "" if path.suffix.lower() in SUFFIXES else _no_image(path)


def _no_image(path: PurePosixPath) -> str:
    return f"{printable(path.suffix)} is not read" if path.suffix else "no suffix such as .jpg"


def _called(tops: set[str], names: tuple[str, ...]) -> str:
    """The folder with the first of some names, in capitals or not; empty where none has one."""
    found = (top for name in names for top in sorted(tops, reverse=True) if top.lower() == name)
    return next(found, "")


def _check_no_split(root: Path, listing: _Listing, train: str) -> None:
    """Refuse what is neither a split nor classes: train/ beside a folder with the same classes."""
    below: defaultdict[str, set[str]] = defaultdict(set)
    for path in listing.images:
        if len(path.parts) > 2:
            below[path.parts[0]].add(path.parts[1])
    own = below.pop(train, set())
    for top, names in below.items():
        if names & own:
            raise UsageError(
                f"{root} has {train}/ and {top}/ with the same folders inside: call the one for "
                f"testing test/, or rename {train}/ if it is a class."
            )


def _split_given(
    root: Path, listing: _Listing, train_name: str, test_name: str, bare: Collection[str]
) -> Source:
    """The split that the folders train/ and test/ make; those in `bare` are for training, too."""
    train, test = (
        _by_class(_below(listing, {split}), depth=1) for split in (train_name, test_name)
    )
    # With test images of its own it is a class that is called so.
    within = _bare({*train.values()} - {*test.values()})
    inside = [PurePosixPath(file) for file, name in train.items() if name in within]
    train = {file: name for file, name in train.items() if name not in within}
    if not train:
        return _unlabelled(root, listing, _below(listing, {train_name, *bare}))
    unknown = sorted(set(test.values()) - set(train.values()))
    if unknown:
        raise DataError(
            f"{root / test_name} has classes that {root / train_name} has not: "
            f"{', '.join(map(printable, unknown))}; rename or remove them."
        )
    names = sorted(set(train.values()))
    spare = _classless([*_below(listing, bare), *inside])
    return Source(
        description=f"photographs in {train_name}/" + (f" and {test_name}/" if test_name else ""),
        root=root,
        class_names=tuple(names),
        train=_items(train, names) + spare,
        test=_items(test, names),
        unusable=listing.left_out(
            {*train, *test, *(item.file for item in spare)}, "outside the class folders", test_name
        ),
        notes=_empty(root / train_name, [*names, *within]),
        own=True,
    )


def _split_made(root: Path, listing: _Listing, seed: int, bare: Collection[str]) -> Source:
    """A split of our own of the class folders in `root`; those in `bare` are for training."""
    spare = set(_below(listing, bare))
    files = _by_class([path for path in listing.images if path not in spare], depth=0)
    names = sorted(set(files.values()))
    train, test, notes = held_out(_items(files, names), names, seed)
    return Source(
        description="photographs in a folder per class",
        root=root,
        class_names=tuple(names),
        train=train + _classless(spare),
        test=test,
        split_seed=seed if test else None,
        unusable=listing.left_out({*files, *map(str, spare)}, "outside the class folders"),
        notes=_empty(root, [*names, *bare]) + notes,
        own=True,
    )


def _unlabelled(
    root: Path,
    listing: _Listing,
    images: list[PurePosixPath],
    others: str = "outside train/, which has no class folders",
) -> Source:
    train = _classless(images)
    return Source(
        description="photographs without labels",
        root=root,
        class_names=(),
        train=train,
        unusable=listing.left_out({item.file for item in train}, others),
        own=True,
    )


def _bare(names: Collection[str]) -> set[str]:
    """Those folders whose images have no label."""
    return {name for name in names if name.lower() in UNLABELLED_NAMES}


def _below(listing: _Listing, folders: Collection[str]) -> list[PurePosixPath]:
    """The images in some of the folders at the top."""
    return [path for path in listing.images if path.parts[0] in folders]


def _classless(images: Iterable[PurePosixPath]) -> tuple[Item, ...]:
    return tuple(Item(file, -1) for file in sorted(map(str, images)))


def _by_class(images: list[PurePosixPath], *, depth: int) -> dict[str, str]:
    """The class of every file in a class folder, sorted by class and then by file."""
    found = [(path.parts[depth], str(path)) for path in images if len(path.parts) > depth + 1]
    return {file: name for name, file in sorted(found)}


def _items(files: dict[str, str], names: list[str]) -> tuple[Item, ...]:
    label = {name: index for index, name in enumerate(names)}
    return tuple(Item(file, label[name]) for file, name in files.items())


def _empty(folder: Path, names: list[str]) -> tuple[str, ...]:
    """A note on the class folders without images."""
    folders = {entry.name for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False)}
    empty = sorted(name for name in folders - set(names) if not name.startswith("."))
    return (f"no images in: {', '.join(map(printable, empty))}",) if empty else ()
