"""Your own photographs, listed in a CSV file.

    path,label,split          split may be left out: one image in five of every class is held out
    cats/1.jpg,cat,train      paths are relative to the file's folder, with '/', and stay inside
    dogs/7.jpg,dog,test       testing, val, valid and validation serve as test

UTF-8, comma separated, quoted where needed. Labels are text; the classes are their sorted names.
A training image whose label is empty is for pretraining alone; where all are, there are no classes.
"""

import csv
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import TextIOWrapper
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import NoReturn

from fastidmm.datasets import TEST_NAMES, Item, Source, Unusable, held_out, leaves
from fastidmm.errors import DataError

MAX_BYTES = 1 << 28  # 200 bytes for each image of ImageNet
COLUMNS = ("path", "label", "split")


@dataclass(frozen=True, slots=True)
class _Row:
    """One line: where it stands, and what it says."""

    line: int
    file: str
    label: str
    split: str


@dataclass(slots=True)
class _Table:
    """A CSV file being read."""

    path: Path
    line: int = 1
    seen: dict[str, int] = field(default_factory=dict)  # file -> line
    real: dict[str, bool] = field(default_factory=dict)  # folder -> whether it leaves

    def wrong(self, what: str, remedy: str, line: int | None = None) -> NoReturn:
        """Refuse the file for one line of it."""
        raise DataError(f"{self.path}, line {line or self.line}: {what}; {remedy}.")


def read(path: Path, seed: int) -> Source:
    """The photographs a CSV file lists, in its order; split by `seed` where it says no split."""
    table = _Table(path)
    root = path.parent.resolve()
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise DataError(
            f"{path} has {size >> 20} MiB, and at most {MAX_BYTES >> 20} are read: put the images "
            "into a folder per class instead."
        )
    rows, unusable = [], []
    for row in _rows(table):
        reason = _missing(table, root, row.file)
        if reason:
            unusable.append(Unusable(row.file, f"{reason}, line {row.line}"))
        else:
            rows.append(row)
    if not rows and not unusable:
        raise DataError(f"{path} lists no photographs: write a line `file,label` for each.")
    if not rows:
        raise DataError(
            f"{path} lists no file that is there, the first {unusable[0].file!r} "
            f"({unusable[0].reason}): paths are relative to {root}."
        )
    return _source(table, root, rows, unusable, seed)


def _rows(table: _Table) -> Iterator[_Row]:
    """The lines of the file, checked one by one."""
    with table.path.open("rb") as binary:
        text = TextIOWrapper(binary, "utf-8-sig", newline="")
        lines = csv.reader(text, strict=True, skipinitialspace=True)
        header: list[str] = []
        try:
            for fields in lines:
                table.line = lines.line_num
                if not any(value.strip() for value in fields):
                    continue
                if header:
                    yield _row(table, header, fields)
                else:
                    header = _header(table, fields)
        except UnicodeDecodeError:
            table.line = _first_undecodable(table.path)
            table.wrong("not UTF-8", "save the file as CSV UTF-8")
        except csv.Error as problem:
            table.line = max(lines.line_num, 1)
            table.wrong(f"not readable as CSV ({problem})", 'put "quotes" around a whole value')
    if not header:
        raise DataError(f"{table.path} is empty: begin with a line `path,label`.")


def _first_undecodable(path: Path) -> int:
    """The line of a file that is not UTF-8; text is decoded some lines ahead of being parsed."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    return 1


def _header(table: _Table, fields: list[str]) -> list[str]:
    names = [field.strip() for field in fields]
    if sorted(names) not in (sorted(COLUMNS[:2]), sorted(COLUMNS)):
        table.wrong(
            f"the columns are {', '.join(map(repr, names[:5]))}",
            "name them `path,label` or `path,label,split`, with commas between, and no others",
        )
    return names


def _row(table: _Table, header: list[str], fields: list[str]) -> _Row:
    if len(fields) != len(header):
        table.wrong(
            f"{len(fields)} values for {len(header)} columns",
            'write one for each, with "quotes" around those that hold a comma',
        )
    told = dict(zip(header, fields, strict=True))
    label = told["label"].strip()
    if label and not label.isprintable():
        table.wrong(f"the label {label!r} has unprintable characters", "remove them")
    split = told.get("split", "").strip().lower()
    if "split" in told and split not in ("train", *TEST_NAMES):
        table.wrong(f"the split is {split!r}", "write train or test")
    return _Row(table.line, _file(table, told["path"]), label, split)


def _file(table: _Table, text: str) -> str:
    """A path as a store names it; an error where it is not one below the file's folder."""
    path = PurePosixPath(text)
    if path.is_absolute() or PureWindowsPath(text).drive:
        table.wrong(f"{text!r} is absolute", "give it relative to the CSV file's folder")
    if ".." in path.parts:
        table.wrong(f"{text!r} leads out of a folder", "put the file below the CSV file's folder")
    if not path.parts or "\0" in text:
        table.wrong(f"{text!r} is no path", "give each line a file")
    file = str(path)
    before = table.seen.setdefault(file, table.line)
    if before != table.line:
        table.wrong(f"{file!r} stands in line {before} already", "remove one of the two")
    return file


def _missing(table: _Table, root: Path, file: str) -> str:
    """Why a listed file is left out; empty where it is there. Only folders are read."""
    whole = os.path.join(root, file)
    folder = os.path.dirname(whole)
    if folder not in table.real:
        table.real[folder] = leaves(root, folder)
    try:
        found = os.lstat(whole)
    except OSError as problem:
        hint = "; between folders goes '/'" if "\\" in file else ""
        return f"{problem.strerror}{hint}"
    if table.real[folder] or (stat.S_ISLNK(found.st_mode) and leaves(root, whole)):
        return "a link out of the folder"
    return ""


def _source(
    table: _Table, root: Path, rows: list[_Row], unusable: list[Unusable], seed: int
) -> Source:
    names = _names(table, rows)
    label = {name: number for number, name in enumerate(names)}
    # As with folders, test goes before val, and only one of them is used.
    used = {row.split for row in rows}
    test_name = next((name for name in TEST_NAMES if name in used), "")
    train, test = (
        tuple(Item(row.file, label.get(row.label, -1)) for row in rows if row.split in wanted)
        for wanted in (("train", ""), (test_name,) if test_name else ())
    )
    for row in rows:
        if row.split not in ("train", "", test_name):
            why = f"its split {row.split} is not used beside {test_name}, line {row.line}"
            unusable.append(Unusable(row.file, why))
    notes: tuple[str, ...] = ()
    made = "" in used and bool(names)
    if made:
        train, test, notes = held_out(train, names, seed)
    return Source(
        description=f"photographs listed in {table.path.name}",
        root=root,
        class_names=names,
        train=train,
        test=test,
        split_seed=seed if made and test else None,
        unusable=tuple(sorted(unusable, key=lambda left: left.file)),
        notes=notes,
        own=True,
    )


def _names(table: _Table, rows: list[_Row]) -> tuple[str, ...]:
    """The classes; every test image must be of one that is trained on."""
    trained = [row.label for row in rows if row.split in ("train", "")]
    if not trained:
        raise DataError(f"{table.path} has no line of the split train: give some images to it.")
    names = {label for label in trained if label}
    for row in rows:
        if row.label and row.label not in names:
            table.wrong(
                f"no image to train on has the label {row.label!r}",
                "rename it or add such images",
                row.line,
            )
        if not row.label and row.split in TEST_NAMES:
            table.wrong("a test image without a label", "label it, or write train", row.line)
    return tuple(sorted(names))
