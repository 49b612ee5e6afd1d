"""`fastidmm export`: a run as a folder for other programs, written aside and tried before."""

import os
from pathlib import Path
from typing import Any

import torch

from fastidmm.errors import NumericalError, UsageError
from fastidmm.exporting.card import card
from fastidmm.exporting.formats import CONFIG, FORMS, check_installed, write
from fastidmm.exporting.learnt import Learnt, learnt
from fastidmm.places import readable
from fastidmm.preparing.files import make_room, naming, sync
from fastidmm.preparing.making import alone

CARD = "README.md"
TOLERANCE = 1e-4  # of the largest output: other programs sum in another order


def export(run: Path, to: str, out: Path) -> dict[str, Any]:
    """Write a run or a stage to the folder `out`, as what `to` says; what was written."""
    check_installed(to)
    out = readable(Path(os.path.abspath(out.expanduser())), "--out")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UsageError(f"{out} exists and is not an empty folder: give --out another name.")
    if out.is_mount():
        raise UsageError(f"{out} cannot be replaced by a whole folder: give --out one within it.")
    found = learnt(run)
    with naming(out):
        make_room(out)
        with alone(out) as making:
            try:
                making.clear()  # of an export that was killed
                making.part.mkdir()
                difference = _tried(found, to, making.part)
                (making.part / CARD).write_text(card(found, to, out.name))
                for path in (*making.part.iterdir(), making.part):
                    sync(path)
                making.put_in_place()
            finally:
                making.clear()
    files = [FORMS[to].file, CONFIG, CARD]
    return {
        "run": str(run),
        "checkpoint": str(found.checkpoint),
        "to": to,
        "folder": str(out),
        "files": files,
        "num_bytes": sum((out / file).stat().st_size for file in files),
        "gives": found.gives,
        "width": found.width,
        "resolution": found.record.resolution,
        "difference": difference,
    }


def _tried(found: Learnt, to: str, folder: Path) -> float | None:
    """Write the model, have it loaded again and compared; refused where another program cannot."""
    try:
        write(found, to, folder)
        return _compared(found, to, folder)
    except RuntimeError as problem:  # of torch's exporters, and of timm for another head
        name, why = found.record.recipe.run.backbone, str(problem).strip().splitlines()[0]
        raise UsageError(f"{name} cannot be had as {to} ({why}): choose another --to.") from None


def _compared(found: Learnt, to: str, folder: Path) -> float | None:
    """How far the outputs of what was written are from ours, by the largest; None: not run."""
    loaded = FORMS[to].load(folder)
    if loaded is None:
        return None
    size = found.preprocessing()["input_size"]
    # Another number of images than a program was traced with.
    images = torch.randn(3, *size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        ours = found.model()(images)
        theirs = loaded(images.clone())
    told = ours.shape == theirs.shape
    difference = float((ours - theirs).abs().max() / ours.abs().max()) if told else float("inf")
    if not difference <= TOLERANCE:
        name = found.record.recipe.run.backbone
        raise NumericalError(
            f"{name} gives other numbers when {to} has loaded it again (by {difference:.0e} of the "
            "largest), and nothing was written: choose another --to."
        )
    return difference


def as_text(found: dict[str, Any]) -> str:
    """What a person reads."""
    far = found["difference"]
    tried = "not tried: onnxruntime is not installed" if far is None else f"off by {far:.0e}"
    size = f"{found['num_bytes'] / 1e6:.1f} MB"
    gives = f"{found['width']} {found['gives']} of a photograph at {found['resolution']} px"
    return (
        f"{found['folder']}: {', '.join(found['files'])}, {size}\n"
        f"{gives}; loaded again: {tried}\nhow to load it: {found['folder']}/{CARD}"
    )
