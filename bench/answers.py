"""Where a result goes: the terminal, a JSON file, a page."""

import json
import os
from pathlib import Path
from typing import Any

from fastidmm.bench import figures, page
from fastidmm.errors import UsageError
from fastidmm.preparing.files import write_whole
from fastidmm.terminal import show, written_out

STDOUT = Path("-")


def check(**files: Path | None) -> None:
    """Refuse a place that nothing can be written to, before anything is measured."""
    for flag, path in files.items():
        if path is None or (path == STDOUT and flag == "json"):
            continue
        try:
            if path.is_dir() or not path.parent.is_dir():
                raise UsageError(f"--{flag} {path}: name a file in a folder that is there.")
            aside = path.with_name(f".{path.name}.{os.getpid()}")  # as `write_whole` calls it
            aside.touch()
            aside.unlink()
        except OSError as problem:
            raise UsageError(
                f"--{flag} {path} cannot be written ({problem.strerror}): name a file elsewhere."
            ) from None


def tell(found: dict[str, Any], *, json_file: Path | None, html_file: Path | None) -> None:
    """Print a result, or several under "subjects", and write it to the files asked for.

    With `--json -` the JSON alone is printed. Printed first: a disk that is full by now costs no
    measurement.
    """
    told = json.dumps(found, indent=2)
    alone = json_file == STDOUT
    show(told if alone else "\n\n".join(map(figures.text, page.subjects(found))))
    if html_file is not None:
        write_whole(html_file, written_out(page.html(found)))
    if json_file is not None and not alone:
        write_whole(json_file, told + "\n")
