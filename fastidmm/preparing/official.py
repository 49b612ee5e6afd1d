"""What the published datasets have in common: found or fetched, verified, unpacked, counted."""

import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from fastidmm.datasets import About, Item, Source
from fastidmm.errors import DataError, FastidmmError, UsageError
from fastidmm.places import home
from fastidmm.preparing.fetch import Remote, fetch, forget, recorded, verify
from fastidmm.preparing.files import digests
from fastidmm.preparing.lists import check_files, check_inside
from fastidmm.preparing.unpack import unpack, unpacked
from fastidmm.terminal import line, show


@dataclass(frozen=True, slots=True)
class Layout:
    """One form in which a dataset is published."""

    archives: tuple[Remote, ...]  # unpacked into one folder; the photographs' comes first
    inside: tuple[str, ...]  # what is then in `top`, by which a copy is known
    top: str = "."  # the folder in that folder that holds everything
    files: tuple[Remote, ...] = ()  # lists that come beside the archives

    @property
    def live(self) -> bool:
        """Whether everything can be fetched."""
        return all(remote.sources for remote in (*self.archives, *self.files))

    def needed(self) -> str:
        """Its files, in words."""
        return ", ".join(remote.file for remote in (*self.archives, *self.files))


@dataclass(frozen=True, slots=True)
class Found:
    """A dataset on this machine."""

    root: Path  # `top` of the layout
    layout: Layout
    files: Mapping[str, Path] = field(default_factory=dict)  # those beside the archives, by name
    note: str = ""  # what a user should know of it

    def path(self, name: str) -> Path:
        """A file below the root that is there and no way out of it."""
        path = self.files.get(name) or self.root / name
        if not path.is_file():
            raise DataError(f"there is no {path}: unpack {self.layout.needed()} again.")
        if name not in self.files:
            check_inside(path, self.root)
        return path


@dataclass(frozen=True, slots=True)
class Listed:
    """What a dataset's own lists say."""

    class_names: Sequence[str]
    train: Sequence[Item]
    test: Sequence[Item]


class Official:
    """A published dataset; a subclass says what to fetch and how to read its split."""

    name: ClassVar[str]
    title: ClassVar[str]
    about: ClassVar[About]
    layouts: ClassVar[tuple[Layout, ...]]

    def read(self, found: Found) -> Listed:
        """The official split, as the files that were found tell it."""
        raise NotImplementedError

    def wrong_copy(self, folder: Path) -> str:
        """What a folder is that is known not to be this dataset; empty where it is not known."""
        return ""

    def open(self, *, from_: Path | None, seed: int) -> Source:
        """List the official split: of the files below `from_`, or of those fetched.

        A UsageError where files are missing, a DataError where they are not the official ones.
        """
        folder = home() / "downloads" / self.name
        found = self._located(from_, folder)
        try:
            listed = self._listed(found)
        except DataError:
            # What a server sent instead of a list must not be met again.
            for remote in found.layout.files:
                if not remote.published and found.files[remote.file].parent == folder:
                    forget(remote, folder)
            raise
        return Source(
            description=f"{self.title}, the official split",
            root=found.root,
            class_names=tuple(listed.class_names),
            train=tuple(listed.train),
            test=tuple(listed.test),
            notes=(found.note,) if found.note else (),
            official=True,
        )

    def _listed(self, found: Found) -> Listed:
        """The split, read and checked."""
        try:
            listed = self.read(found)
        except (ValueError, LookupError, TypeError) as problem:
            raise DataError(
                f"the lists in {found.root} are not those of {self.title} ({problem}): get "
                f"{found.layout.needed()} again."
            ) from None
        self._check(listed, found)
        check_files(found.root, [*listed.train, *listed.test])
        return listed

    def _located(self, from_: Path | None, folder: Path) -> Found:
        if from_ is None:
            return self._fetched(folder)
        given = from_.expanduser()
        if not given.exists():
            raise UsageError(f"there is no {given}: check what follows --from.")
        given = given.resolve()
        for layout in self.layouts:
            found = _from_archives(layout, given, folder) or _from_copy(layout, given, folder)
            if found:
                return found
        if wrong := self.wrong_copy(given):
            raise DataError(f"{given} {wrong}")
        raise self._missing(f"{given} does not have all files of {self.title}")

    def _fetched(self, folder: Path) -> Found:
        """What was unpacked before, or else what has to be fetched."""
        for layout in self.layouts:
            sums = {recorded(remote, folder) for remote in layout.archives}
            if sums == set(unpacked(folder / "unpacked").values()) and layout.live:
                files = {remote.file: fetch(remote, folder) for remote in layout.files}
                return Found(folder / "unpacked" / layout.top, layout, files)
        live = next((layout for layout in self.layouts if layout.live), None)
        if live is None:
            raise self._missing(f"{self.title} can no longer be fetched from anywhere")
        files = {remote.file: fetch(remote, folder) for remote in live.files}
        archives = {fetch(remote, folder): recorded(remote, folder) for remote in live.archives}
        return Found(_unpacked(archives, folder) / live.top, live, files)

    def _missing(self, problem: str) -> FastidmmError:
        """The error that says which files to put where."""
        ways = " or ".join(
            f"{layout.needed()} (or, unpacked, {', '.join(layout.inside)}"
            + "".join(f", {remote.file}" for remote in layout.files)
            + ")"
            for layout in self.layouts
        )
        return UsageError(
            f"{problem}: put {ways} into one folder and type `fastidmm prepare --dataset "
            f"{self.name} --from FOLDER`."
        )

    def _check(self, listed: Listed, found: Found) -> None:
        """Compare the split with the published numbers."""
        about = self.about
        right = (about.num_classes, about.num_train, about.num_test)
        sizes = (len(listed.class_names), len(listed.train), len(listed.test))
        if sizes != right:
            raise DataError(
                f"{found.root} lists {sizes[0]:,} classes, {sizes[1]:,} training and "
                f"{sizes[2]:,} test images, and {self.title} has {right[0]:,}, {right[1]:,} and "
                f"{right[2]:,}: results would not compare; get {found.layout.needed()} again."
            )
        both = [*listed.train, *listed.test]
        twice = [file for file, num in Counter(item.file for item in both).items() if num > 1]
        strange = [item.file for item in both if not 0 <= item.label < about.num_classes]
        for files, what in ((twice, "twice"), (strange, "of a class that there is not")):
            if files:
                raise DataError(
                    f"the lists in {found.root} have {files[0]!r} {what}: get "
                    f"{found.layout.needed()} again."
                )


def _from_archives(layout: Layout, given: Path, folder: Path) -> Found | None:
    """The dataset from archives on disk: `given`, or those in it; lists are fetched if need be."""
    here = given if given.is_dir() else given.parent
    paths: dict[str, Path] = {}
    for remote in (*layout.archives, *layout.files):
        if path := _on_disk(remote, given, here):
            paths[remote.file] = path
        elif layout.archives[0].file not in paths or not remote.sources:
            return None
    sums = {}
    for remote in layout.archives:
        path = paths.get(remote.file) or fetch(remote, folder)
        sums[path] = verify(path, remote, folder)
    files = _files(layout, paths, folder)
    return Found(_unpacked(sums, folder) / layout.top, layout, files)


def _on_disk(remote: Remote, given: Path, here: Path) -> Path | None:
    """A file of that name, or `given` itself where a browser has named it otherwise."""
    renamed = given.is_file() and given.name != remote.file and remote.published
    if renamed and digests(given, remote.published) == remote.published:
        return given
    path = here / remote.file
    return path if path.is_file() else None


def _files(layout: Layout, paths: Mapping[str, Path], folder: Path) -> dict[str, Path]:
    """The lists beside the archives: those on disk verified, the others fetched."""
    files = {
        remote.file: paths.get(remote.file) or fetch(remote, folder) for remote in layout.files
    }
    for remote in layout.files:
        verify(files[remote.file], remote, folder)
    return files


def _from_copy(layout: Layout, given: Path, folder: Path) -> Found | None:
    """The dataset from an unpacked copy: then the lists and their numbers decide."""
    places = list(folders(given))
    root = next((p for p in places if all((p / name).exists() for name in layout.inside)), None)
    if root is None:
        return None
    paths: dict[str, Path] = {}
    for remote in layout.files:
        place = next((place for place in places if (place / remote.file).is_file()), None)
        if place:
            check_inside(place / remote.file, given)
            paths[remote.file] = place / remote.file
        elif not remote.sources:
            return None
    files = _files(layout, paths, folder)
    archives = ", ".join(remote.file for remote in layout.archives)
    known = [remote.file for remote in layout.files if remote.published]
    note = f"an unpacked copy: that it is what {archives} holds was not verified"
    note += f", but {', '.join(known)} and the counts were" if known else ", only the counts were"
    return Found(root, layout, files, note)


def folders(given: Path) -> Iterator[Path]:
    """A folder and what is below it, three folders deep; hidden ones and links are left out."""
    if not given.is_dir():
        return
    yield given
    level = [given]
    for _ in range(3):
        level = [below for folder in level for below in _below(folder)]
        yield from level


def _below(folder: Path) -> list[Path]:
    with os.scandir(folder) as entries:
        found = [e.path for e in entries if e.is_dir(follow_symlinks=False) and e.name[0] != "."]
    return [Path(path) for path in sorted(found)]


def _unpacked(archives: Mapping[Path, str], folder: Path) -> Path:
    into = folder / "unpacked"
    if sys.stderr.isatty():
        show(line(f"unpacking into {into}"), sys.stderr)
    return unpack(archives, into)
