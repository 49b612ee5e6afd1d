"""The command `fastidmm prepare`: photographs in, a store out."""

from pathlib import Path
from typing import Annotated

import typer

from fastidmm.errors import UsageError
from fastidmm.options import Format, JsonOption, answer


def prepare(
    dataset: Annotated[str | None, typer.Option(help="One of `fastidmm list`.")] = None,
    source: Annotated[
        Path | None, typer.Option("--from", help="A folder, archive or CSV already on disk.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="What to call it. [default: --dataset]")] = None,
    max_side: Annotated[int, typer.Option(min=0, help="Longest side kept, px; 0: any.")] = 1024,
    shard_size: Annotated[int, typer.Option(min=0, help="Pixels in a file, GB; 0: any.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="For splits that are drawn.")] = 0,
    kind: Annotated[
        Format, typer.Option("--format", help="beton: FFCV's file beside the store.")
    ] = Format.STORE,
    listing: Annotated[bool, typer.Option("--list", help="Show what can be prepared.")] = False,
    weights: Annotated[
        str | None,
        typer.Option(help="Fetch the weights of a backbone, or of one of timm's models."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Fetch and decode photographs once.

    Example: fastidmm prepare --dataset folder --from ~/photos --name mine
    """
    if sum((dataset is not None, listing, weights is not None)) != 1:
        if source is not None and not listing and weights is None:
            raise UsageError(
                f"say of what kind {source} is: add --dataset folder for your own photographs, or "
                "the name of a published dataset."
            )
        raise UsageError("say what to prepare: one of --dataset NAME, --list and --weights NAME.")
    if listing:
        from fastidmm.preparing.catalogue import as_dicts, as_lines, catalogue

        entries = catalogue()
        return answer(as_dicts(entries), as_json, lambda: "\n".join(as_lines(entries)))
    if weights is not None:
        from fastidmm.preparing.weights import fetch_weights

        place = str(fetch_weights(weights))
        return answer({"weights": weights, "folder": place}, as_json, f"{weights}: in {place}")
    from fastidmm.preparing.prepare import prepare as run
    from fastidmm.registry import find

    opened = find("dataset", str(dataset))().open(from_=source, seed=seed)
    summary = run(
        opened,
        name or str(dataset),
        max_side=max_side,
        shard_bytes=shard_size * 10**9,
        quiet=as_json,
        beton=kind is Format.BETON,
    )
    return answer(summary.as_dict(), as_json, lambda: "\n".join(summary.lines()))
