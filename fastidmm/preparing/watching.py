"""Tell a person how far something long has come."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, cast

from fastidmm.terminal import Remarks, line, show

SECONDS_BETWEEN_LINES = 60.0


@contextmanager
def watching(doing: str, total: int, *, quiet: bool) -> Iterator[Callable[[int], None]]:
    """A bar where a person is looking, a line a minute elsewhere; call it with the files done."""
    doing = line(doing)
    if quiet or not sys.stderr.isatty():
        said = time.monotonic()

        def say(num_done: int) -> None:
            nonlocal said
            if not quiet and time.monotonic() - said >= SECONDS_BETWEEN_LINES:
                said = time.monotonic()
                show(f"{doing}: {num_done:,} of {total:,} files", sys.stderr)

        yield say
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress

    remarks = cast(IO[str], Remarks())
    with Progress(console=Console(file=remarks), transient=True) as progress:
        progress.console.show_cursor()  # a killed command would leave none
        bar = progress.add_task(escape(doing), total=total)
        yield lambda num_done: progress.update(bar, completed=num_done)
