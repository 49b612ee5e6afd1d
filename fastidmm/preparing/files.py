"""Files that several processes may want at once: locked, hashed, and put in place whole."""

import fcntl
import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from fastidmm.errors import UsageError

BLOCK = 1 << 20


@contextmanager
def locked(lock: Path, doing: str) -> Iterator[None]:
    """Hold `lock` for this process alone; a UsageError where another is `doing` the same."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        try:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"another process is {doing}: wait for it.") from None
        except OSError:
            pass  # Some network file systems have no locks.
        yield


def digests(path: Path, kinds: Iterable[str]) -> dict[str, str]:
    """The hex digests of a file by kind (md5, sha1, sha256), read once."""
    found = {kind: hashlib.new(kind, usedforsecurity=False) for kind in kinds}
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            for one in found.values():
                one.update(block)
    return {kind: one.hexdigest() for kind, one in found.items()}


def write_whole(path: Path, text: str) -> None:
    """Write a file so that it is never seen half-written; where that fails nothing is left."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with aside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        put_in_place(aside, path)
    except OSError as problem:  # names none, or the one aside
        raise OSError(problem.errno, problem.strerror, str(path)) from None
    finally:
        with suppress(OSError):  # not there, or refused as the file was
            aside.unlink()


def put_in_place(aside: Path, path: Path) -> None:
    """Rename, and see the folder's list of names onto the disk."""
    os.replace(aside, path)
    sync(path.parent)


def make_room(path: Path) -> None:
    """Make the folder that a path is to lie in."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UsageError(f"{path.parent} cannot be a folder: a file is in the way.") from None


def sync(path: Path) -> None:
    """See a file, or a folder's list of names, onto the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give the system's errors the file they are about: a full disk names none."""
    try:
        yield
    except OSError as problem:
        if problem.errno is None or problem.filename:
            raise
        raise OSError(problem.errno, problem.strerror, str(path)) from None


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A file beside `path`, which gets that name when all is written."""
    make_room(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        # Around the file, which is refused what it still holds once more when it is closed.
        with naming(path):
            with aside.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            put_in_place(aside, path)
    finally:
        aside.unlink(missing_ok=True)
