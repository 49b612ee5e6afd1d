"""Where people keep runs besides ./runs: TensorBoard, Weights & Biases."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from fastidmm.errors import UsageError
from fastidmm.folders import is_stage
from fastidmm.interrupt import unheard
from fastidmm.ranks import world
from fastidmm.record import Record

Tell = Callable[[int, dict[str, float]], None]  # a step, and numbers by name


def check(name: str) -> None:
    """Refuse a log whose library is not installed."""
    if name != "none" and find_spec(name) is None:
        raise UsageError(f"--log {name} needs its library: pip install 'fastidmm[logging]'.")


@contextmanager
def told(record: Record) -> Iterator[None]:
    """Metric lines that are written meanwhile are told where the recipe says, too."""
    name = record.recipe.run.log
    if name == "none" or not world().first:
        yield
        return
    check(name)
    tell, close = KINDS[name](record)

    def tell_lines(lines: list[dict[str, Any]]) -> None:
        for line in lines:
            drawn = {k: v for k, v in line.items() if k != "step" and isinstance(v, int | float)}
            tell(line["step"], drawn)

    record.tell = tell_lines
    try:
        yield
    finally:
        close()


def _tensorboard(record: Record) -> tuple[Tell, Callable[[], None]]:
    """In `RUN/tensorboard/`; what was told of steps that a kill has lost is taken back."""
    from torch.utils.tensorboard import SummaryWriter

    place = str(record.folder / "tensorboard")
    writer = SummaryWriter(place, purge_step=record.steps + 1)

    def tell(step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return tell, writer.close


def _wandb(record: Record) -> tuple[Tell, Callable[[], None]]:
    """As its own settings say: WANDB_MODE, WANDB_PROJECT; its files are in `RUN/wandb/`.

    A run that goes on goes on there, too: its name is kept beside them.
    """
    import wandb

    folder, stage = record.folder.resolve(), is_stage(record.folder)
    kept = folder / "wandb" / "id"
    with unheard():  # its process must not end before the run does
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "fastidmm"),
            name=f"{folder.parent.name}/{folder.name}" if stage else folder.name,
            id=kept.read_text() if kept.exists() else None,
            resume="allow",
            dir=str(folder),
            config=record.recipe.tables(),
            settings=wandb.Settings(console="off", silent=True),
        )
    kept.parent.mkdir(exist_ok=True)
    kept.write_text(run.id)
    return lambda step, values: run.log(values, step=step), run.finish


KINDS = {"tensorboard": _tensorboard, "wandb": _wandb}
