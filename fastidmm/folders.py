"""The folders of runs and stages: which one a name means, which are there, which names are free.

A folder that holds a recipe is a run; one inside a run is a stage of it.
"""

import os
from collections.abc import Iterator
from itertools import count
from pathlib import Path

from fastidmm.errors import UsageError, did_you_mean
from fastidmm.places import check_name, readable

RECIPE = "recipe.toml"
PUBLISHED = "timm"  # the weights that `fastidmm prepare --weights` fetched, as `run.init`
SCRATCH = "scratch-"  # how the names of stages begin that go back to random weights


def run_folder(name: str) -> Path:
    """The folder of a run: `./runs/NAME`, or the path itself where it holds a slash."""
    if os.sep in name:
        return readable(Path(name), "the run's folder")
    return Path("runs") / check_name(name, "run")


def is_stage(folder: Path) -> bool:
    """Whether a run's folder lies inside another's."""
    return (folder.parent / RECIPE).exists()


def start_of(folder: Path, init: str) -> Path | None:
    """The checkpoint that `run.init` means in a stage's folder, which may not be there yet."""
    return Path(os.path.normpath(folder / init)) if init not in ("", PUBLISHED) else None


def numbered(folder: Path) -> Iterator[Path]:
    """The folder itself, then the same with numbers."""
    yield folder
    yield from (folder.with_name(f"{folder.name}-{number}") for number in count(2))


def free_folder(folder: Path) -> Path:
    """The folder itself where that is not taken yet, the same with a number otherwise."""
    return next(path for path in numbered(folder) if not path.exists())


def existing_run(name: str | None) -> Path:
    """The folder of a run or stage that was named, or of the newest run; else an error."""
    if name is not None:
        folder = run_folder(name + os.sep if name in (os.curdir, os.pardir) else name)
        # A stage's path may begin with the name of a run in ./runs.
        for place in (folder,) if name.startswith(".") else (Path("runs", name), folder):
            if (place / RECIPE).exists():
                # "./" tells neither its name nor the folder around it.
                return place if place.name.strip(".") else Path(os.path.abspath(place))
        known = [path.name for path in all_runs()]
        hint = did_you_mean(name, known) if known else "There are none in ./runs."
        raise UsageError(f"no run at {folder}. {hint}")
    runs = all_runs()
    if not runs:
        raise UsageError("no runs in ./runs yet: begin with `fastidmm pretrain`.")
    return runs[-1]


def all_runs() -> list[Path]:
    """The runs in ./runs, the one started last at the end."""
    return stages(Path("runs"))


def stages(folder: Path) -> list[Path]:
    """The stages inside a run, or the runs in any other folder, oldest first."""
    recipes = folder.glob(f"[!.]*/{RECIPE}")
    return [p.parent for p in sorted(recipes, key=lambda p: p.stat().st_mtime)]
