"""Read the lists that come with published datasets, and see that their files are there."""

import os
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastidmm.datasets import Item
from fastidmm.errors import DataError

MAX_LIST = 16_000_000  # bytes of a list of files, and of a .mat
MAX_UNPACKED_MAT = 64_000_000
MAT_HEADER = 128
MAT_COMPRESSED = 15


def check_files(root: Path, items: Sequence[Item]) -> None:
    """See that every listed file is there, below the root, and no link out of it."""
    names: dict[PurePosixPath, dict[str, bool]] = {}  # whether it is a link, by folder and name
    missing = []
    for item in items:
        path = PurePosixPath(item.file)
        if path.is_absolute() or ".." in path.parts:
            raise DataError(
                f"{root}: the lists name {item.file!r}, which lies outside: get them again."
            )
        if path.parent not in names:
            check_inside(root / path.parent, root)
            names[path.parent] = _entries(root / path.parent)
        link = names[path.parent].get(path.name)
        if link is None:
            missing.append(item.file)
        elif link:
            check_inside(root / path, root)
    if missing:
        shown = ", ".join(missing[:3])
        raise DataError(
            f"{root} lacks {len(missing):,} of the {len(items):,} images that its lists name "
            f"({shown}{', ...' if len(missing) > 3 else ''}): unpack the archives again."
        )


def _entries(folder: Path) -> dict[str, bool]:
    if not folder.is_dir():
        return {}
    with os.scandir(folder) as entries:
        return {entry.name: entry.is_symlink() for entry in entries}


def check_inside(path: Path, root: Path) -> None:
    """Refuse, by name, what is or goes through a link out of the root."""
    if not path.resolve().is_relative_to(root.resolve()):
        raise DataError(
            f"{path} leads out of {root} by a link, to {path.resolve()}: put a copy in its place."
        )


def lines(path: Path) -> list[str]:
    """The lines of a list, without empty ones; names keep whatever bytes they consist of."""
    if _size(path) > MAX_LIST:
        raise DataError(
            f"{path} has more than {MAX_LIST:,} bytes, too many for a list: get it again."
        )
    text = path.read_text(encoding="utf-8", errors="surrogateescape")
    return [line.strip() for line in text.split("\n") if line.strip()]


def mat(path: Path) -> dict[str, NDArray[Any]]:
    """The rows of a small MATLAB file by name, each with one dimension; a DataError otherwise."""
    from scipy.io import loadmat

    if _size(path) > MAX_LIST or _expanded(path.read_bytes()) > MAX_UNPACKED_MAT:
        raise DataError(f"{path} is larger than any list of images; get it again.")
    try:
        found = loadmat(path, squeeze_me=True)
    # scipy raises whatever its parser happens to meet.
    except Exception as problem:
        raise DataError(f"{path} is no MATLAB file ({problem}); get it again.") from None
    return {name: np.atleast_1d(values) for name, values in found.items() if name[0] != "_"}


def _size(path: Path) -> int:
    """Bytes of a list; a DataError where there is none, for datasets that did not look before."""
    if not path.is_file():
        raise DataError(f"there is no list {path}: get it, or check what follows --from.")
    return path.stat().st_size


def _expanded(content: bytes) -> int:
    """How many bytes a MATLAB file holds in memory, counted as far as the limit."""
    total, place = 0, MAT_HEADER
    while place + 8 <= len(content):
        kind, size = struct.unpack_from("<II", content, place)
        part = content[place + 8 : place + 8 + size]
        place += 8 + size
        total += len(part)
        if kind == MAT_COMPRESSED:
            try:
                total += len(zlib.decompressobj().decompress(part, MAX_UNPACKED_MAT))
            except zlib.error:
                continue  # for the reader to tell
        if total > MAX_UNPACKED_MAT:
            break
    return total
