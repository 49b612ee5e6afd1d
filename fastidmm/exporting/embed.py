"""`fastidmm embed`: what a run's backbone makes of photographs, as a table in one file."""

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from fastidmm.datasets import Unusable
from fastidmm.errors import UsageError
from fastidmm.exporting.learnt import encoder_of
from fastidmm.exporting.pictures import Named, as_utf8, looked_through, pictures
from fastidmm.preparing.files import new_file
from fastidmm.preparing.summary import counted, shown


@dataclass(slots=True)
class Table:
    """A row for each photograph."""

    features: NDArray[np.float32]  # (N, D)
    rows: list[Named]
    class_names: tuple[str, ...]

    @property
    def labelled(self) -> bool:
        """Whether any photograph has a class: else no column says of which it is."""
        return any(row.label >= 0 for row in self.rows)

    @property
    def split(self) -> bool:
        """Whether there are several splits: else no column says of which a photograph is."""
        return len({row.split for row in self.rows}) > 1

    @property
    def paths(self) -> list[str]:
        """Files below the source, with '/'; bytes that are no UTF-8 replaced."""
        return [as_utf8(row.file) for row in self.rows]

    @property
    def classes(self) -> list[str]:
        """The names of all classes, as the paths are."""
        return [as_utf8(name) for name in self.class_names]


def _write_npz(table: Table, file: BinaryIO) -> None:
    columns = {"features": table.features, "path": np.array(table.paths, dtype=str)}
    if table.labelled:
        columns["label"] = np.array([row.label for row in table.rows], dtype=np.int64)
        columns["class_names"] = np.array(table.classes, dtype=str)
    if table.split:
        columns["split"] = np.array([row.split for row in table.rows], dtype=str)
    np.savez(file, allow_pickle=False, **columns)


def _write_parquet(table: Table, file: BinaryIO) -> None:
    import pyarrow
    from pyarrow import parquet

    columns = {"path": pyarrow.array(table.paths, pyarrow.string())}
    if table.labelled:
        names = table.classes
        classes = [names[row.label] if row.label >= 0 else None for row in table.rows]
        columns["class"] = pyarrow.array(classes, pyarrow.string())
    if table.split:
        columns["split"] = pyarrow.array([row.split for row in table.rows], pyarrow.string())
    columns["features"] = pyarrow.FixedSizeListArray.from_arrays(
        table.features.ravel(), table.features.shape[1]
    )
    parquet.write_table(pyarrow.table(columns), file)


def _writer(out: Path) -> Callable[[Table, BinaryIO], None]:
    """What writes a file of that name; refused before any photograph is read."""
    writers = {".npz": _write_npz, ".parquet": _write_parquet}
    write = writers.get(out.suffix.lower())
    if write is None:
        raise UsageError(f"--out {out}: choose a file that ends in .npz or .parquet.")
    if os.path.lexists(out.expanduser()):
        raise UsageError(f"{out} exists: give --out another name.")
    if write is _write_parquet and find_spec("pyarrow") is None:
        raise UsageError(
            f"--out {out} needs pyarrow: `pip install 'fastidmm[parquet]'`, or end it in .npz."
        )
    return write


def embed(
    run: Path, source: str, out: Path, *, normalise: bool, device: str | None, quiet: bool
) -> dict[str, Any]:
    """Write the features of a source's photographs to the file `out`; what was written.

    Memory is bounded but for the features themselves.
    """
    write, out = _writer(out), out.expanduser()
    record, encoder = encoder_of(run)
    told = pictures(source)
    features, rows = [], []
    with new_file(out) as file:  # refused before hours of work, not after
        for found, named in looked_through(told, encoder, record, device, "Embedding", quiet=quiet):
            features.append(functional.normalize(found) if normalise else found)
            rows += named
        write(Table(torch.cat(features).numpy(), rows, told.class_names), file)
    return {
        "run": str(run),
        "checkpoint": str(record.result),
        "source": told.title,
        "file": str(out),
        "num": len(rows),
        "width": encoder.num_features,
        "normalised": normalise,
        "left_out": [asdict(left) for left in told.left_out],
    }


def as_text(found: dict[str, Any]) -> str:
    """What a person reads."""
    left = [Unusable(**file) for file in found["left_out"]]
    lines = [f"{counted(len(left), 'file')} left out: {shown(left, at='--json')}"] if left else []
    length = ", of length 1" if found["normalised"] else ""
    rows = counted(found["num"], "photograph")
    lines.append(f"{found['file']}: {rows}, {found['width']} features of each{length}")
    return "\n".join(lines)
