"""What can go wrong for a user, each with the exit status a script can rely on."""

import errno
import os
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
LOCKED = (errno.EACCES, errno.EPERM, errno.EROFS)


class FastidmmError(Exception):
    """Something the user can mend: one sentence with the remedy, and an exit status."""

    status = 2


class UsageError(FastidmmError):
    """A wrong name, key, folder or combination."""

    status = 2


class DataError(FastidmmError):
    """Photographs, stores or checkpoints that cannot be used as they are."""

    status = 3


class NumericalError(FastidmmError):
    """Training kept producing numbers that are not finite, or a replay other ones."""

    status = 4


class OutOfMemoryError(FastidmmError):
    """The device cannot hold the step, however it is cut."""

    status = 5


class Interrupted(FastidmmError):
    """Stopped from outside; `fastidmm resume`, or `prepare` again, goes on to the same bits."""

    status = 75


class Gone(Interrupted):
    """Another process of the same run has ended."""


class Followed(FastidmmError):
    """Another rank has told of an error and ended; this one ends with the same status."""

    def __init__(self, status: int) -> None:
        super().__init__("another rank has ended the run.")
        self.status = status


def as_told(problem: Exception) -> FastidmmError | None:
    """What a user is told of an error: itself where it is meant for one; None: a defect."""
    if isinstance(problem, FastidmmError):
        return problem
    if isinstance(problem, MemoryError):
        return OutOfMemoryError(
            "this machine's memory is full: lower --batch-size, or --max-side when preparing."
        )
    # torch's own class, by name: torch is not imported here.
    if type(problem).__name__ == "OutOfMemoryError":
        return OutOfMemoryError(
            "the GPU's memory is full: lower --resolution, or prepare with --max-side."
        )
    if isinstance(problem, OSError):
        return unwritable(problem, problem.filename or "the disk")
    return None


def unwritable(problem: OSError, where: str | Path, *, num_bytes: int = 0) -> FastidmmError | None:
    """A disk's refusal as one sentence, with the bytes needed where known; None: no disk's."""
    if problem.errno not in (*FULL, *LOCKED, errno.EIO):
        return None
    why = os.strerror(problem.errno)
    elsewhere = "or choose another place with --run or FASTIDMM_HOME"
    if problem.errno in LOCKED:
        return UsageError(f"cannot write {where}: {why}; check its permissions, {elsewhere}.")
    if problem.errno == errno.EIO:
        return DataError(f"cannot write {where}: {why}; look after that disk, {elsewhere}.")
    needed = f", and {num_bytes:,} bytes are needed" if num_bytes else ""
    return DataError(f"cannot write {where}: {why}{needed}; free some space, {elsewhere}.")


def did_you_mean(name: str, known: list[str]) -> str:
    """The tail of an error about a wrong name: the nearest right one, and all of them."""
    import difflib

    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}Known: {', '.join(sorted(known))}."
