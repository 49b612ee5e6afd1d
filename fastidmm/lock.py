"""Whose a run is: one process at a time trains it, and others can see that one does."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from fastidmm.errors import UsageError

LOCK = ".lock"
GLANCE = 0.05  # seconds, more than another process takes to look whether a run is being trained

_held: set[Path] = set()  # folders that this process has locked


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a run's folder: a second process that would train it is refused."""
    with (folder / LOCK).open("w") as file:
        if not (_locked(file) or _locked(file, after=GLANCE)):
            raise UsageError(f"{folder} is being trained by another process.")
        _held.add(folder.resolve())
        try:
            yield
        finally:
            _held.discard(folder.resolve())


def running(folder: Path) -> bool:
    """Whether another process holds it at this moment."""
    if folder.resolve() in _held:
        return False  # and to close its lock's file once more would give up the lock
    try:
        with (folder / LOCK).open("rb") as file:
            return not _locked(file, kind=fcntl.LOCK_SH)
    except OSError:  # none yet; or a disk without locks
        return False


def _locked(file: IO[Any], *, kind: int = fcntl.LOCK_EX, after: float = 0.0) -> bool:
    """Lock an open file, unless another process has."""
    time.sleep(after)
    try:
        # Not flock, which a loader's workers would go on holding when this is killed.
        fcntl.lockf(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def alive(process: int) -> bool:
    """Whether a process of that number is there and has not ended."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another's
        return True
    with suppress(OSError):  # elsewhere than on Linux
        # A process that nobody has waited for yet is a zombie.
        # Bytes: a program's name is cut after fifteen, be that amid a letter.
        return Path(f"/proc/{process}/stat").read_bytes().rpartition(b")")[2].split()[0] != b"Z"
    return True
