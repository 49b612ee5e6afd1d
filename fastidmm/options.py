"""Flags that several commands share, and how a command answers."""

import json
import os
import sys
from collections.abc import Callable
from contextlib import redirect_stderr
from enum import StrEnum
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastidmm import __version__
from fastidmm.errors import UsageError
from fastidmm.registry import LOADERS
from fastidmm.terminal import line, show

if TYPE_CHECKING:
    from fastidmm.recipe import Recipe


class Format(StrEnum):
    """What `prepare` writes."""

    STORE = "store"
    BETON = "beton"


DatasetOption = Annotated[
    str | None, typer.Option("--dataset", help="A prepared dataset. [default: the last prepared]")
]
BackboneOption = Annotated[str | None, typer.Option(help="deit_tiny, pvtv2_b3, ..., timm:NAME.")]
MethodOption = Annotated[
    str | None,
    typer.Option(
        help="How to pretrain: idmm, simclr, mocov3, ...; `fastidmm list`. [default: idmm]"
    ),
]
RecipeOption = Annotated[
    str | None, typer.Option("--recipe", help="A recipe's name, or the path of a .toml file.")
]
LoaderOption = Annotated[str | None, typer.Option(help=f"auto, or one of {', '.join(LOADERS)}.")]
EpochsOption = Annotated[int | None, typer.Option(min=1, help="Passes over the images.")]
BatchOption = Annotated[int | None, typer.Option("--batch-size", min=1, help="Images per step.")]
ResolutionOption = Annotated[int | None, typer.Option(min=8, help="Side of a crop, px.")]
# Of the commands that make all stages.
FirstEpochsOption = Annotated[
    int | None,
    typer.Option(
        "--epochs", min=1, help="Of pretraining; of fine-tuning by --set finetune.epochs=N."
    ),
]
FirstBatchOption = Annotated[
    int | None,
    typer.Option(
        "--batch-size", min=1, help="Images per step of pretraining; --set finetune.batch_size=N."
    ),
]
FirstResolutionOption = Annotated[
    int | None,
    typer.Option(
        "--resolution", min=8, help="Side of pretraining's crop, px; --set finetune.resolution=N."
    ),
]
SeedOption = Annotated[int | None, typer.Option(min=0, help="What all chance depends on.")]
DeviceOption = Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.")]
PrecisionOption = Annotated[str | None, typer.Option(help="auto, bf16, fp16 or fp32.")]
OptimizerOption = Annotated[
    str | None, typer.Option(help="adamw, or apex's fused_adam or fused_lamb.")
]
InitOption = Annotated[
    str | None,
    typer.Option(
        "--init",
        help="First weights: timm (ImageNet's, got by `fastidmm prepare --weights NAME`), or "
        "a checkpoint's folder as seen from the run's. [default: random]",
    ),
]
LogOption = Annotated[str | None, typer.Option(help="tensorboard or wandb: curves there, too.")]
HoldoutOption = Annotated[
    float | None,
    typer.Option(min=0, max=0.9, help="Share of the training images kept out, to choose by."),
]
ExactOption = Annotated[
    bool | None, typer.Option("--exact/--no-exact", help="The same bits every time, slower.")
]
RunOption = Annotated[
    str | None, typer.Option("--run", help="A name in ./runs, or a path with a slash.")
]
RunArgument = Annotated[str | None, typer.Argument(metavar="RUN", help="The same as --run.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="TABLE.KEY=VALUE",
        help="Any other key of the recipe, such as optim.lr=1e-3; repeatable. A run's recipe.toml "
        "lists them all.",
    ),
]
GpusOption = Annotated[
    int,
    typer.Option(
        "--gpus",
        min=1,
        help="GPUs of this machine that share every batch; with --device cpu, processes.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Answer in JSON.")]


def by_ranks(command: Callable[..., None]) -> Callable[..., None]:
    """A command that `--gpus` or a launcher of its own has several processes do together."""

    @wraps(command)
    def done(*, gpus: int = 1, **flags: Any) -> None:
        from fastidmm.ranks import asked, joined

        if gpus > 1 and asked() == 1:
            from fastidmm.launch import launch

            raise typer.Exit(launch(gpus, sys.argv[1:]))
        with joined():
            command(gpus=gpus, **flags)

    return done


def answer(found: Any, as_json: bool, text: str | Callable[[], str]) -> None:
    """Print to stdout what was asked for."""
    shown = json.dumps(found, indent=2) if as_json else text if isinstance(text, str) else text()
    show(shown)


def recipe_settings(**flags: Any) -> dict[str, Any]:
    """Flags as keys of the recipe's table `[run]`."""
    return {f"run.{name}": value for name, value in flags.items()}


def recipe_of(
    recipe: str | None, settings: dict[str, Any], assignments: list[str] | None
) -> "Recipe":
    """The recipe that flags and `--set` ask for; without a dataset, of the last prepared."""
    from fastidmm.recipe import Recipe, read_tables, with_settings
    from fastidmm.store import current

    tables = with_settings(read_tables(recipe) if recipe else {}, settings, assignments or [])
    if "dataset" not in tables.setdefault("run", {}):
        tables["run"]["dataset"] = current()
        note(f"dataset {tables['run']['dataset']!r}, the one prepared last")
    return Recipe.of(tables)


def chosen_run(named: str | None, run: str | None) -> Path:
    """The run named by an argument or by --run, or the newest, said so."""
    from fastidmm.folders import existing_run

    if named and run and named != run:
        raise UsageError(f"RUN and --run mean the same, and name {named} and {run}: give one.")
    name = named or run
    folder = existing_run(name)
    if name is None:
        note(f"run {folder}, the newest")
    return folder


def _version(asked: bool) -> None:
    """Answer `--version` before a command is asked for."""
    if asked:
        show(f"fastidmm {__version__}")
        raise typer.Exit


def messages(
    ctx: typer.Context,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Answers and errors only, no progress.")
    ] = False,
    log_file: Annotated[
        Path | None, typer.Option("--log-file", help="Add progress and remarks to this file.")
    ] = None,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print it, and no more."),
    ] = False,
) -> None:
    """Send what is neither an answer nor an error elsewhere: before the command's name."""
    if not quiet and log_file is None:
        return
    if log_file is not None and not log_file.resolve().parent.is_dir():
        raise UsageError(f"--log-file {log_file}: there is no such folder; make it first.")
    if log_file is not None and log_file.is_dir():
        raise UsageError(f"--log-file {log_file} is a folder: name a file in it.")
    place = ctx.with_resource((log_file or Path(os.devnull)).open("a", buffering=1))
    ctx.with_resource(redirect_stderr(place))


def note(message: str) -> None:
    """A line that is no answer, to stderr."""
    show(line(message), sys.stderr)
