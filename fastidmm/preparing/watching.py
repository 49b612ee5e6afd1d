"""Tell a person how far something long has come."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SECONDS_BETWEEN_LINES = 60.0


@contextmanager
def watching(doing: str, total: int, *, quiet: bool) -> Iterator[Callable[[int], None]]:
    """A bar where a person is looking, a line a minute elsewhere; call it with the files done."""
    if quiet or not sys.stderr.isatty():
        said = time.monotonic()

        def say(num_done: int) -> None:
            nonlocal said
            if not quiet and time.monotonic() - said >= SECONDS_BETWEEN_LINES:
                said = time.monotonic()
                print(f"{doing}: {num_done:,} of {total:,} files", file=sys.stderr)

        yield say
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task(doing, total=total)
        yield lambda num_done: progress.update(bar, completed=num_done)
