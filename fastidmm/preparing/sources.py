"""What every dataset's `Source` must keep to, whoever wrote the dataset."""

from itertools import chain
from posixpath import normpath

from fastidmm.datasets import Source
from fastidmm.errors import DataError


def check_source(source: Source, name: str) -> None:
    """Refuse files outside the root, files listed again, and labels without a class.

    Training images may have none, -1, and test images where there are no classes. A store would
    take the others, and could not be opened, or be scored on what it was trained on.
    """
    num = len(source.class_names)
    seen: set[str] = set()
    for place, item in enumerate(chain(source.train, source.test)):
        lowest = 0 if num and place >= len(source.train) else -1
        file, label = item.file, item.label
        whole = normpath(file)  # one spelling of a file that has several
        outside = whole.startswith(("/", "../")) or whole in (".", "..")
        if outside or type(file) is not str or "\0" in file:
            raise DataError(
                f"the dataset {name!r} lists {file!r}, which does not name a file below "
                f"{source.root}: give every file's path from there, as text."
            )
        if whole in seen:
            raise DataError(
                f"the dataset {name!r} lists {file!r} more than once: list every file once, in "
                "one of its splits."
            )
        seen.add(file if whole == file else whole)
        if type(label) is not int or not lowest <= label < num:
            known = f"its {num} classes are 0 to {num - 1}" if num else "it has no classes, only -1"
            raise DataError(
                f"the dataset {name!r} gives {file!r} the label {label!r}, and {known}: give each "
                "file the number, a plain int, of its class."
            )
