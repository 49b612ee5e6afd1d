"""What can go wrong for a user, each with the exit status a script can rely on."""


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
    """Training kept producing numbers that are not finite."""

    status = 4


class OutOfMemoryError(FastidmmError):
    """The device cannot hold the step, however it is cut."""

    status = 5


class Interrupted(FastidmmError):
    """Stopped from outside; `fastidmm resume`, or `prepare` again, goes on to the same bits."""

    status = 75


def did_you_mean(name: str, known: list[str]) -> str:
    """The tail of an error about a wrong name: the nearest right one, and all of them."""
    import difflib

    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}Known: {', '.join(sorted(known))}."
