"""What became of every file so far, a line each, so that a stopped `prepare` goes on.

The first line says what the journal is of. Each further one is a picture's facts, or the reason
why a file is unusable, in the order of the source; `null` says that everything above has reached
the disk.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastidmm.preparing.decode import Facts


@dataclass(frozen=True, slots=True)
class Noted:
    """A line read back."""

    outcome: Facts | str
    on_disk: bool  # whether its pixels are known to have outlived even a power cut


class Journal:
    """An open journal; it begins anew where the file is of something else."""

    def __init__(self, path: Path, identity: str) -> None:
        self._head = json.dumps({"journal": 1, "of": identity}).encode() + b"\n"
        self._end = len(self._head)  # up to where lines have been taken
        self._file = path.open("a+b")
        self._file.seek(0)
        self.found = self._file.read(len(self._head)) == self._head
        if not self.found:
            self._file.truncate(0)
            self._file.write(self._head)
            self._file.flush()

    def close(self) -> None:
        """Close the file; it stays."""
        self._file.close()

    def known(self) -> Iterator[Noted]:
        """The lines that can be trusted; one counts as taken when the next is asked for."""
        last = max((row for row, line in self._lines() if line == b"null\n"), default=-1)
        for row, line in self._lines():
            if line != b"null\n":
                outcome = _outcome(line)
                if outcome is None:
                    return
                yield Noted(outcome, row < last)
            self._end += len(line)

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        with open(self._file.name, "rb") as file:
            file.seek(len(self._head))
            yield from enumerate(file)

    def cut(self) -> None:
        """Drop what has not been taken; writing goes on there."""
        self._file.truncate(self._end)

    def add(self, outcome: Facts | str) -> None:
        """Note what became of the next file; its pixels must have been written before."""
        told = outcome if isinstance(outcome, str) else _told(outcome)
        self._file.write(json.dumps(told, separators=(",", ":")).encode() + b"\n")
        self._file.flush()

    def mark(self) -> None:
        """Note that all pixels are on the disk, and see that onto the disk too."""
        self._file.write(b"null\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def _told(facts: Facts) -> list[Any]:
    return [facts.height, facts.width, facts.digest, facts.look, facts.conversions]


def _outcome(line: bytes) -> Facts | str | None:
    """A line's meaning; None where it was cut short or never reached the disk."""
    if not line.endswith(b"\n"):
        return None
    try:
        told = json.loads(line)
        if isinstance(told, str):
            return told
        height, width, digest, look, conversions = told
        return Facts(height, width, digest, look, tuple(conversions))
    except (ValueError, TypeError):
        return None
