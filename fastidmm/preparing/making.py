"""A store or an export in the making: the lock, the dot folder and the journal beside its place."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fastidmm.errors import UsageError
from fastidmm.preparing.files import sync


class Making:
    """What exists beside `folder` while it is made, and after a process was stopped."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.part, self.old, self.journal, self.lock = (
            folder.with_name(f".{folder.name}.{what}")
            for what in ("part", "old", "journal", "lock")
        )

    def clear(self) -> None:
        """Remove all of it, what goes on from a part before the part."""
        self.journal.unlink(missing_ok=True)
        shutil.rmtree(self.part, ignore_errors=True)
        shutil.rmtree(self.old, ignore_errors=True)

    def put_in_place(self) -> None:
        """Give a finished store its name, instead of whatever had it."""
        shutil.rmtree(self.old, ignore_errors=True)
        if self.folder.exists():
            self.folder.rename(self.old)
        self.part.rename(self.folder)
        sync(self.folder.parent)
        self.clear()


@contextmanager
def alone(folder: Path) -> Iterator[Making]:
    """Be the only process that makes `folder`; an error with what to do where another does."""
    making = Making(folder)
    lock = _lock(making.lock, folder.name)
    try:
        yield making
    finally:
        # Before it is let go of, so that no one can hold a file that another has replaced.
        making.lock.unlink(missing_ok=True)
        os.close(lock)


def _lock(path: Path, name: str) -> int:
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            raise UsageError(f"{name!r} is being made by another process: wait for it.") from None
        except OSError:
            return file  # Some network file systems have no locks.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), os.stat(path)):
                return file
        os.close(file)  # Whoever had it before has ended since, and took the file away.
