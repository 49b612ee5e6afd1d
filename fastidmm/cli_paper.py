"""The commands `reproduce` and `compare`: the paper's tables, and runs side by side."""

from typing import Annotated

import typer

from fastidmm.options import BackboneOption, JsonOption, answer, note


def reproduce(
    table: Annotated[str, typer.Argument(metavar="TABLE", help="T1, T2, T3, T4 or T5.")],
    dataset: Annotated[
        str | None, typer.Option(help="One column, or any prepared dataset. [default: all]")
    ] = None,
    backbone: BackboneOption = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each cell.")] = 3,
    budget: Annotated[
        str | None, typer.Option(help="Cut all arms alike to this time: 90s, 30m, 2h.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the cells only.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Make a table of the paper again, beside its numbers.

    Example: fastidmm reproduce T1 --dataset flowers
    """
    from fastidmm.paper.reproduce import reproduce as bring

    sheet, status = bring(
        table, dataset=dataset, backbone=backbone, seeds=seeds, budget=budget, dry_run=dry_run
    )
    answer(sheet.as_dict(), as_json, sheet.markdown)
    if not dry_run:
        note(f"in runs/{sheet.name}.md and .json")
    if status:
        raise typer.Exit(status)


def compare(
    runs: Annotated[list[str], typer.Argument(metavar="RUN RUN...", help="The first is the base.")],
    as_json: JsonOption = False,
) -> None:
    """Set runs side by side: scores, what can be claimed, where budgets differ.

    Example: fastidmm compare one other
    """
    from fastidmm import compare as comparing
    from fastidmm.folders import existing_run

    found = comparing.compare([existing_run(name) for name in runs])
    answer(found, as_json, lambda: comparing.as_text(found))
