"""The commands under `fastidmm bench`: what this machine does in a second."""

from pathlib import Path
from typing import Annotated

import typer

from fastidmm.options import DeviceOption, JsonOption, answer

bench = typer.Typer(help="Measure this machine.", no_args_is_help=True, rich_markup_mode=None)


@bench.command("prepare")
def bench_prepare(
    source: Annotated[
        Path | None, typer.Option("--from", help="Photographs. [default: made-up ones]")
    ] = None,
    num_images: Annotated[int, typer.Option("--images", min=2, help="How many made-up.")] = 400,
    repeats: Annotated[int, typer.Option(min=1, help="Measurements of each.")] = 5,
    cores: Annotated[
        list[int] | None, typer.Option("--cores", help="Repeatable. [default: 1, 2, 4, ..., all]")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Images per second that are prepared, by cores.

    Example: fastidmm bench prepare --from ~/photos
    """
    from fastidmm.bench.prepare import measure, text

    found = measure(source, num_images=num_images, repeats=repeats, cores=cores)
    answer(found, as_json, lambda: text(found))


@bench.command("views")
def bench_views(
    size: Annotated[int, typer.Option(min=8, help="Side of a crop, px.")] = 112,
    num_images: Annotated[
        int | None, typer.Option("--images", min=4, help="[default: 256 on a GPU, 8 on a CPU]")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Measurements of each.")] = 10,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Milliseconds to make a batch's views, beside other libraries.

    Example: fastidmm bench views --size 224
    """
    from fastidmm.bench.views import measure, text
    from fastidmm.machine import device_of

    place = device_of(device or "auto")
    images = num_images or (256 if place.type == "cuda" else 8)
    found = measure(place, size=size, num_images=images, repeats=repeats)
    answer(found, as_json, lambda: text(found))


@bench.command("loss")
def bench_loss(
    rounds: Annotated[int, typer.Option(min=1, help="Measurements of each.")] = 50,
    as_json: JsonOption = False,
) -> None:
    """Time, memory and error of the instance loss, beside other libraries.

    Example: fastidmm bench loss --json
    """
    from fastidmm.bench.loss import run, table

    found = run(rounds=rounds)
    answer(found, as_json, lambda: table(found))
