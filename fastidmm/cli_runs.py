"""The commands `runs list`, `show`, `best` and `diff`."""

from typing import Annotated

import typer

from fastidmm.options import JsonOption, answer
from fastidmm.terminal import line

app = typer.Typer(help="What lies in ./runs.", no_args_is_help=True)


@app.command("list")
def list_runs(
    dataset: Annotated[str | None, typer.Option(help="Runs of this one only.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Print every run: how far it is, what it scored.

    Example: fastidmm runs list
    """
    from fastidmm import runs

    found = runs.listed(dataset)
    answer(found, as_json, lambda: runs.as_table(found))


@app.command()
def show(
    name: Annotated[str | None, typer.Argument(metavar="RUN", help="[default: newest]")] = None,
    as_json: JsonOption = False,
) -> None:
    """Print what a run and its stages say of themselves.

    Example: fastidmm runs show mine
    """
    from fastidmm import runs
    from fastidmm.folders import existing_run

    found = runs.shown(existing_run(name))
    lines = [line(f"{key}: {value}") for told in found for key, value in (*told.items(), ("", ""))]
    answer(found, as_json, lambda: "\n".join(lines).replace("\n: ", "\n").rstrip())


@app.command()
def best(
    dataset: Annotated[str, typer.Argument(metavar="DATASET", help="Whose runs.")],
    as_json: JsonOption = False,
) -> None:
    """Order a dataset's runs by fine-tuned accuracy on its test images.

    Example: fastidmm runs best flowers
    """
    from fastidmm import runs

    found = runs.best(dataset)
    answer(found, as_json, lambda: runs.as_table(found))


@app.command()
def diff(
    one: Annotated[str, typer.Argument(metavar="RUN")],
    other: Annotated[str, typer.Argument(metavar="OTHER")],
    as_json: JsonOption = False,
) -> None:
    """Print in what recipe and environment two runs differ; `compare` has their scores.

    Example: fastidmm runs diff one other
    """
    from fastidmm import runs
    from fastidmm.folders import existing_run

    found = runs.apart(existing_run(one), existing_run(other))
    answer(found, as_json, lambda: runs.as_lines(found))
