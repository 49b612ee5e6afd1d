"""What a power cut would leave of a folder: files and lists of names as they were last synced."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

State = bytes | frozenset[tuple[str, int]]


class Disk:
    """Stands between the code and the system's calls for all that lies below `root`.

    A system may write a new name before the contents, unless those were synced; and the name
    itself is sure only once its folder is.
    """

    def __init__(self, root: Path, patch: pytest.MonkeyPatch) -> None:
        self.root = root.resolve()
        self.synced: list[tuple[Path, list[str]]] = []  # and what was then still to be synced
        self.renamed: list[Path] = []  # to what
        self._kept: dict[int, State] = {}  # by inode: renaming changes nothing of it
        self._amiss: list[str] = []
        acts: dict[str, Callable[..., Any]] = {
            "fsync": self._sync, "rename": self._rename, "replace": self._rename,
            "unlink": self._remove, "rmdir": self._remove,
        }  # fmt: skip
        for name, act in acts.items():
            patch.setattr(os, name, partial(act, getattr(os, name)))

    def amiss(self) -> list[str]:
        """What came in the wrong order, and names that are not sure by now."""
        return self._amiss + self._unsure("now")

    def kept(self, path: Path) -> State | None:
        """What a power cut would leave of a file or a folder."""
        return self._kept.get(path.stat().st_ino)

    def _sync(self, real: Callable[[int], None], handle: int) -> None:
        real(handle)
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        if path.is_relative_to(self.root):
            self._kept[path.stat().st_ino] = _state(path)
            self.synced.append((path, self._to_sync(self.root)))

    def _rename(self, real: Callable[..., None], old: Any, new: Any, **folders: int) -> None:
        path, target = Path(old).resolve(), Path(new).resolve()
        if path.is_relative_to(self.root):
            self._amiss += [f"{name} before it was synced" for name in self._to_sync(path)]
            self.renamed.append(target)
        real(old, new, **folders)

    def _remove(self, real: Callable[..., None], *given: Any, **folders: int) -> None:
        self._amiss += self._unsure("when something was removed")
        real(*given, **folders)

    def _to_sync(self, top: Path) -> list[str]:
        """The names of files and folders that have changed since they were synced."""
        every = (top, *top.rglob("*"))
        return [path.name for path in every if self.kept(path) != _state(path)]

    def _unsure(self, when: str) -> list[str]:
        """Renamed files and folders whose new names are not on the disk."""
        return [
            f"the name {path.name} was not synced {when}"
            for path in self.renamed
            if path.exists() and (path.name, path.stat().st_ino) not in self._names(path.parent)
        ]

    def _names(self, folder: Path) -> frozenset[tuple[str, int]]:
        kept = self.kept(folder)
        return kept if isinstance(kept, frozenset) else frozenset()


def _state(path: Path) -> State:
    """A file's bytes, or the names in a folder and what they stand for."""
    if path.is_dir():
        return frozenset((inner.name, inner.stat().st_ino) for inner in path.iterdir())
    return path.read_bytes()
