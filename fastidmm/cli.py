"""The command line: each command reads its arguments, makes one call and prints.

torch is imported inside commands only, so that `--help` is instant.
"""

import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from fastidmm.cli_bench import bench
from fastidmm.cli_export import embed, export, predict
from fastidmm.cli_paper import compare, reproduce
from fastidmm.cli_plan import plan
from fastidmm.cli_prepare import prepare
from fastidmm.cli_report import report
from fastidmm.cli_runs import app as runs
from fastidmm.errors import UsageError, as_told
from fastidmm.options import (
    BackboneOption,
    BatchOption,
    DatasetOption,
    DeviceOption,
    EpochsOption,
    ExactOption,
    FirstBatchOption,
    FirstEpochsOption,
    FirstResolutionOption,
    GpusOption,
    HoldoutOption,
    InitOption,
    JsonOption,
    LoaderOption,
    LogOption,
    MethodOption,
    OptimizerOption,
    PrecisionOption,
    RecipeOption,
    ResolutionOption,
    RunArgument,
    RunOption,
    SeedOption,
    SetOption,
    answer,
    by_ranks,
    chosen_run,
    messages,
    recipe_of,
    recipe_settings,
)
from fastidmm.terminal import line, show

HARDLY = 0.1  # of the crops: a run that recognises so few has only begun
HELP = "Train vision transformers when all you have is a few thousand images."

app = typer.Typer(
    name="fastidmm",
    help=HELP,
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: importing rich for its boxes doubles the time to it
)

app.callback(help=HELP)(messages)
app.add_typer(bench, name="bench")
app.add_typer(runs, name="runs")


app.command()(prepare)
app.command()(plan)


@app.command()
@by_ranks
def pretrain(
    dataset: DatasetOption = None,
    backbone: BackboneOption = None,
    method: MethodOption = None,
    recipe: RecipeOption = None,
    loader: LoaderOption = None,
    epochs: EpochsOption = None,
    batch_size: BatchOption = None,
    resolution: ResolutionOption = None,
    seed: SeedOption = None,
    device: DeviceOption = None,
    precision: PrecisionOption = None,
    optimizer: OptimizerOption = None,
    exact: ExactOption = None,
    holdout: HoldoutOption = None,
    log: LogOption = None,
    init: InitOption = None,
    run: RunOption = None,
    assignments: SetOption = None,
    gpus: GpusOption = 1,
    as_json: JsonOption = False,
) -> None:
    """Learn from the images alone.

    Example: fastidmm pretrain --backbone pvtv2_b3
    """
    from fastidmm import stages

    settings = recipe_settings(
        dataset=dataset, backbone=backbone, method=method, loader=loader, epochs=epochs,
        batch_size=batch_size, resolution=resolution, seed=seed, device=device,
        precision=precision, optimizer=optimizer, exact=exact, holdout=holdout, init=init,
        log=log,
    )  # fmt: skip
    found = stages.pretrain(recipe_of(recipe, settings, assignments), run)
    answer(found, as_json, lambda: _finished(found, *stages.following(Path(found["run"]))))


@app.command()
@by_ranks
def finetune(
    named: RunArgument = None,
    run: RunOption = None,
    dataset: Annotated[
        str | None, typer.Option(help="Another than the run's: makes a run of its own.")
    ] = None,
    resolution: ResolutionOption = None,
    epochs: EpochsOption = None,
    batch_size: BatchOption = None,
    backbone: BackboneOption = None,
    loader: LoaderOption = None,
    seed: SeedOption = None,
    device: DeviceOption = None,
    precision: PrecisionOption = None,
    optimizer: OptimizerOption = None,
    exact: ExactOption = None,
    holdout: HoldoutOption = None,
    log: LogOption = None,
    scratch: Annotated[
        bool, typer.Option("--scratch", help="From random weights, to compare with.")
    ] = False,
    assignments: SetOption = None,
    gpus: GpusOption = 1,
    as_json: JsonOption = False,
) -> None:
    """Learn the classes from a pretrained backbone.

    Example: fastidmm finetune --resolution 224
    """
    from fastidmm import stages

    settings = recipe_settings(
        dataset=dataset, resolution=resolution, epochs=epochs, batch_size=batch_size,
        backbone=backbone, loader=loader, seed=seed, device=device, precision=precision,
        optimizer=optimizer, exact=exact, holdout=holdout, log=log,
    )  # fmt: skip
    folder = chosen_run(named, run)
    if dataset is None:
        found = stages.finetune(folder, settings, assignments or [], pretrained=not scratch)
    elif scratch:
        raise UsageError("--scratch takes nothing from a run: leave it or --dataset out.")
    else:
        found = stages.transfer(folder, settings, assignments or [])
        folder = Path(found["run"])
    answer(found, as_json, lambda: _finished(found, stages.after_finetuning(folder)))


@app.command()
def evaluate(
    named: RunArgument = None,
    run: RunOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Score a run on the test split, beside random weights.

    Example: fastidmm evaluate
    """
    from fastidmm import scoring

    found = scoring.evaluate(chosen_run(named, run), device)
    answer(found, as_json, lambda: scoring.evaluation_text(found))


app.command()(report)


@app.command("run")
@by_ranks
def run_all(
    dataset: DatasetOption = None,
    backbone: BackboneOption = None,
    method: MethodOption = None,
    recipe: RecipeOption = None,
    loader: LoaderOption = None,
    epochs: FirstEpochsOption = None,
    batch_size: FirstBatchOption = None,
    resolution: FirstResolutionOption = None,
    seed: SeedOption = None,
    device: DeviceOption = None,
    precision: PrecisionOption = None,
    optimizer: OptimizerOption = None,
    exact: ExactOption = None,
    holdout: HoldoutOption = None,
    log: LogOption = None,
    run: RunOption = None,
    assignments: SetOption = None,
    gpus: GpusOption = 1,
    as_json: JsonOption = False,
) -> None:
    """Pretrain, fine-tune, compare with no pretraining, report.

    The same command with --run NAME goes on where that run was stopped.
    Example: fastidmm run --dataset mine
    """
    from fastidmm import scoring
    from fastidmm.run import run_all as run_all_stages

    settings = recipe_settings(
        dataset=dataset, backbone=backbone, method=method, loader=loader, epochs=epochs,
        batch_size=batch_size, resolution=resolution, seed=seed, device=device,
        precision=precision, optimizer=optimizer, exact=exact, holdout=holdout, log=log,
    )  # fmt: skip
    found = run_all_stages(recipe_of(recipe, settings, assignments), run)
    following = f"next: open {found['report']} in a browser"
    answer(found, as_json, lambda: f"{scoring.evaluation_text(found)}\n\n{following}")


@app.command()
@by_ranks
def resume(
    named: RunArgument = None,
    run: RunOption = None,
    gpus: GpusOption = 1,
    as_json: JsonOption = False,
) -> None:
    """Go on where a run was stopped, to the same bits.

    Example: fastidmm resume demo
    """
    from fastidmm import stages
    from fastidmm.reporting.report import remaining

    folder = chosen_run(named, run)
    found = stages.resume(folder)
    lines = [_finished(stage) for stage in found]
    lines += [f"next: {command}" for command in remaining(folder)]
    answer(found, as_json, "\n".join(lines))


@app.command()
def verify(
    named: RunArgument = None,
    run: RunOption = None,
    steps: Annotated[int, typer.Option(min=1, help="To make again, of each stage.")] = 20,
    as_json: JsonOption = False,
) -> None:
    """Replay steps of a run: every bit as recorded, or where not.

    Example: fastidmm verify demo
    """
    from fastidmm import verify as verifying

    found = verifying.verify(chosen_run(named, run), steps)
    answer([each.as_dict() for each in found], as_json, "\n".join(map(str, found)))
    verifying.settle(found)


app.command()(export)
app.command()(embed)
app.command()(predict)
app.command()(reproduce)
app.command()(compare)


@app.command("list")
def list_parts(as_json: JsonOption = False) -> None:
    """Print every dataset, method, backbone and loader there is.

    Example: fastidmm list
    """
    from fastidmm.registry import TABLES

    kinds = ("dataset", "method", "backbone", "loader")
    found = {f"{kind}s": sorted(TABLES[kind]) for kind in kinds}
    found["backbones"].append("timm:NAME")
    lines = [
        line for kind, names in found.items() for line in (f"{kind}:", *(f"  {n}" for n in names))
    ]
    answer(found, as_json, "\n".join(lines))


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Say what this machine has, and the command for what it lacks.

    Example: fastidmm doctor
    """
    from fastidmm.doctor import as_dicts, lines, table
    from fastidmm.facts import look

    found = lines(look())
    answer(as_dicts(found), as_json, lambda: table(found))
    if any(line.state == "mend" for line in found):
        raise typer.Exit(UsageError.status)


def _finished(found: dict[str, Any], *following: str) -> str:
    """What came of a stage, what may do better, and what to type next."""
    from fastidmm.evaluate import Score
    from fastidmm.progress import spoken

    numbers = spoken(found)
    for split in ("holdout", "test"):
        if last := found.get(f"{split}_top1"):
            numbers.append(f"{split} top1 {Score(last['correct'], last['num'])}")
            if (best := found[f"best_{split}_top1"])["of"] > 1:
                share = f"{100 * best['value']:.1f} % in epoch {best['epoch']}"
                numbers.append(f"best {share}, selected on {split} images")
    first = f"{found['run']}: {found['epochs']} epochs in {found['seconds']:.0f} s"
    lines = [", ".join([first, *numbers])]
    if rises := found.get("knn_top1_rises"):
        longer = f"--epochs {2 * found['epochs']} may do better"
        lines.append(f"knn top1 still rises {100 * rises:.1f} points per 100 epochs: {longer}")
    if (known := found.get("told_apart", 1.0)) < HARDLY:
        lines.append(
            f"only {100 * known:.1f} % of the last crops logged were recognised as their own "
            f"image: more steps, by --epochs {2 * found['epochs']} or a smaller --batch-size, "
            "may do better"
        )
    return "\n".join([*lines, *(f"next: {command}" for command in following)])


def main() -> None:
    """The entry point: errors a user can mend become one sentence and an exit status."""
    try:
        app()
    except Exception as problem:
        told = as_told(problem)
        if told is None:
            raise
        _stop(str(told), told.status)


def _stop(message: str, status: int) -> NoReturn:
    show(line(f"fastidmm: {message}"), sys.stderr)
    sys.exit(status)
