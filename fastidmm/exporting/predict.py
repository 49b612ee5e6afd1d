"""`fastidmm predict`: the class of each photograph, by what a run has learnt with labels."""

import csv
import io
import os
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from fastidmm.datasets import Unusable
from fastidmm.errors import UsageError
from fastidmm.exporting.learnt import learnt
from fastidmm.exporting.pictures import as_utf8, looked_through, pictures
from fastidmm.preparing.files import new_file
from fastidmm.preparing.summary import counted, shown
from fastidmm.scoring import classifiers
from fastidmm.terminal import line

COLUMNS = "path", "class", "probability", "split"
SHOWN = 10  # classes, those of most photographs, where all of them are in a file


def predict(
    run: Path, source: str, out: Path | None, *, device: str | None, quiet: bool
) -> dict[str, Any]:
    """The likeliest class of a source's photographs, written to the file `out` if there is one.

    By the stage given, or the last of the run's that counts. A probability is what softmax makes
    of the logits: smoothed and mixed labels keep it below how often it is right. Where a source
    has several splits, each row names its own.
    """
    if out is not None:
        if out.suffix.lower() != ".csv":
            raise UsageError(f"--out {out}: choose a file that ends in .csv.")
        if os.path.lexists(out := out.expanduser()):
            raise UsageError(f"{out} exists: give --out another name.")
    known = learnt(classifier_of(run))
    assert known.head is not None
    model = nn.Sequential(known.encoder, known.head)
    told, rows, names = pictures(source), [], [as_utf8(name) for name in known.class_names]
    seen = looked_through(told, model, known.record, device, "Classifying", quiet=quiet)
    # Where it cannot be, it is refused before hours of work, not after.
    with nullcontext() if out is None else new_file(out) as file:
        for found, named in seen:
            best = found.softmax(1).max(1)
            told_of = zip(named, best.indices.tolist(), best.values.tolist(), strict=True)
            rows += [
                (as_utf8(row.file), names[label], share, row.split) for row, label, share in told_of
            ]
        several = len({split for *_, split in rows}) > 1
        columns = COLUMNS if several else COLUMNS[:-1]
        if file is not None:
            file.write(_as_csv(columns, rows))
    return {
        "run": str(known.record.folder),
        "checkpoint": str(known.checkpoint),
        "source": told.title,
        "file": None if out is None else str(out),
        "num": len(rows),
        "left_out": [asdict(left) for left in told.left_out],
        "rows": [dict(zip(columns, row, strict=False)) for row in rows],
    }


def classifier_of(run: Path) -> Path:
    """What of a run tells classes: itself, if by labels, or its last stage but from scratch."""
    every = [stage for stage in classifiers(run) if stage.pretrained or stage.folder == run]
    if not every:
        raise UsageError(f"{run} has learnt no classes yet: begin with `fastidmm finetune {run}`.")
    done = [stage for stage in every if stage.finished]
    if not done:
        raise UsageError(every[-1].unfinished)
    return done[-1].folder


def _as_csv(columns: Sequence[str], rows: list[tuple[str, str, float, str]]) -> bytes:
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(columns)
    for path, name, probability, split in rows:
        table.writerow((path, name, f"{probability:.4f}", split)[: len(columns)])
    return text.getvalue().encode()


def as_text(found: dict[str, Any]) -> str:
    """What a person reads: a line a photograph, or how many of each class are in the file."""
    left = [Unusable(**file) for file in found["left_out"]]
    lines = [f"{counted(len(left), 'file')} left out: {shown(left, at='--json')}"] if left else []
    rows = found["rows"]
    if found["file"] is None:
        wide = max(len(line(row["path"])) for row in rows)
        for row in rows:
            sure = f"{100 * row['probability']:.1f} %"
            lines.append(f"{line(row['path']).ljust(wide)}  {line(row['class'])}  {sure}")
    else:
        counts = Counter(row["class"] for row in rows).most_common()
        named = ", ".join(f"{line(name)} {num}" for name, num in counts[:SHOWN])
        if rest := counts[SHOWN:]:
            named += f" and {sum(num for _, num in rest)} of {counted(len(rest), 'other')}"
        lines.append(f"{found['file']}: {counted(found['num'], 'photograph')}: {named}")
    return "\n".join([*lines, f"by {found['checkpoint']}"])
