"""What goes to a terminal: names of files and classes in it may hold anything, and harm nothing.

A control character could move the cursor, or change a line above it; bytes that are no UTF-8
could not be printed at all. `show` is the only place that prints.
"""

import sys
from typing import TextIO

# As JSON escapes them, so that an answer in JSON stays one.
CONTROL = {code: f"\\u{code:04x}" for code in (*range(32), *range(127, 160))}
KEPT = ord("\n")


def show(text: str, to: TextIO | None = None) -> None:
    """Print lines, to stdout unless told otherwise."""
    print(safe(text), file=to or sys.stdout, flush=True)


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
