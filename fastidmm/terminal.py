"""What goes to a terminal: names of files and classes in it may hold anything, and harm nothing.

A control character could move the cursor, or change a line above it; bytes that are no UTF-8
could not be printed at all. `show` is the only place that prints.
"""

import errno
import os
import sys
from contextlib import suppress
from typing import Any, TextIO

# As JSON escapes them, so that an answer in JSON stays one.
CONTROL = {code: f"\\u{code:04x}" for code in (*range(32), *range(127, 160))}
KEPT = ord("\n")


def show(text: str, to: TextIO | None = None) -> None:
    """Print lines, to stdout unless told otherwise; OSError where an answer cannot be kept."""
    place = to or sys.stdout
    try:
        print(safe(text), file=place, flush=True)
    except OSError as problem:
        # Of an answer whoever reads, such as `head`, has had enough.
        if place is not sys.stderr and problem.errno != errno.EPIPE:
            raise
        _give_up(place)


class Remarks:
    """stderr for what draws there: what it refuses is left out.

    The terminal may be closed, the pipe's reader gone (`| tee` hears Ctrl-C, too), the log's disk
    full: a run is worth more than its remarks.
    """

    def __init__(self) -> None:
        self.place = sys.stderr

    def write(self, text: str) -> int:
        """All of it, or nothing."""
        try:
            self.place.write(text)
        except OSError:
            _give_up(self.place)
        return len(text)

    def flush(self) -> None:
        """What is refused here has been given up, too."""
        try:
            self.place.flush()
        except OSError:
            _give_up(self.place)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.place, name)


def _give_up(stream: TextIO) -> None:
    """From here on it leads nowhere; what it holds would be refused again at the end."""
    with suppress(OSError):  # a stream in memory has no number
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def safe(text: str) -> str:
    """Lines of text, everything else that controls a terminal written out."""
    table = {code: escape for code, escape in CONTROL.items() if code != KEPT}
    return written_out(text).translate(table)


def line(text: str) -> str:
    """The same on one line."""
    return safe(text.replace("\n", "\\n"))


def written_out(text: str) -> str:
    """Text that UTF-8 can hold: a file's name may have bytes that it cannot."""
    return text.encode(errors="backslashreplace").decode()


def printable(name: str) -> str:
    """A file's or a class's name on one line, whatever it consists of."""
    return name if name.isprintable() else repr(name)
