"""The commands under `fastidmm bench`: what this machine does in a second."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastidmm.errors import UsageError
from fastidmm.options import (
    BackboneOption,
    BatchOption,
    DeviceOption,
    MethodOption,
    SetOption,
)
from fastidmm.terminal import show

if TYPE_CHECKING:
    import torch

bench = typer.Typer(
    help="Measure this machine: loaders, views, loss, preparing, training steps.",
    invoke_without_command=True,
    rich_markup_mode=None,
)

QuickOption = Annotated[bool, typer.Option("--quick", help="Fewer measurements.")]
JsonFile = Annotated[
    Path | None, typer.Option("--json", help="Write every number there; -: print them instead.")
]
HtmlFile = Annotated[Path | None, typer.Option("--html", help="Write a page there.")]


@bench.callback()
def bare(context: typer.Context, json: JsonFile = None, html: HtmlFile = None) -> None:
    """Measure this machine; without a command, `all --quick`."""
    if context.invoked_subcommand is None:
        bench_all(quick=True, json=json, html=html)
    elif json or html:
        raise UsageError(f"write --json and --html behind `bench {context.invoked_subcommand}`.")


@bench.command("all")
def bench_all(
    device: DeviceOption = None,
    quick: QuickOption = False,
    json: JsonFile = None,
    html: HtmlFile = None,
) -> None:
    """Everything below, one after the other; status 1 where something failed.

    Example: fastidmm bench all --html bench.html
    """
    from fastidmm.bench import everything

    place = _place(device)
    found = _told(lambda: everything.measure(place, quick=quick), json, html)
    if failed := everything.failed(found):
        show(f"fastidmm: could not be measured: {', '.join(failed)}.", sys.stderr)
        raise typer.Exit(1)


@bench.command("loader")
def bench_loader(
    dataset: Annotated[str | None, typer.Option(help="A prepared dataset.")] = None,
    source: Annotated[
        Path | None, typer.Option("--from", help="Photographs. [default: made-up ones]")
    ] = None,
    loaders: Annotated[
        list[str] | None, typer.Option("--loader", help="Repeatable. [default: all]")
    ] = None,
    batch_size: BatchOption = None,
    backbone: BackboneOption = None,
    device: DeviceOption = None,
    quick: QuickOption = False,
    json: JsonFile = None,
    html: HtmlFile = None,
) -> None:
    """Images per second of every loader, what they cost, how long training waits.

    Example: fastidmm bench loader --dataset demo
    """
    from fastidmm.bench.loader import arms, measure

    if dataset is not None and source is not None:
        raise UsageError("--dataset and --from: give one of them.")
    place, chosen = _place(device), arms(loaders)
    _told(
        lambda: measure(
            place, quick=quick, chosen=chosen, dataset=dataset, photographs=source,
            batch_size=batch_size, backbone=backbone,
        ),
        json, html,
    )  # fmt: skip


@bench.command("views")
def bench_views(
    size: Annotated[int, typer.Option(min=8, help="Side of a crop, px.")] = 112,
    num_images: Annotated[
        int | None, typer.Option("--images", min=4, help="[default: 256 on a GPU, 8 on a CPU]")
    ] = None,
    repeats: Annotated[
        int | None, typer.Option(min=1, help="Measurements of each. [default: 10, quick 4]")
    ] = None,
    device: DeviceOption = None,
    quick: QuickOption = False,
    json: JsonFile = None,
    html: HtmlFile = None,
) -> None:
    """Milliseconds to make a batch's views, beside other libraries.

    Example: fastidmm bench views --size 224
    """
    from fastidmm.bench.views import measure

    place = _place(device)
    _told(
        lambda: measure(place, quick=quick, size=size, num_images=num_images, repeats=repeats),
        json, html,
    )  # fmt: skip


@bench.command("loss")
def bench_loss(
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Measurements of each. [default: 50, quick 10]")
    ] = None,
    quick: QuickOption = False,
    json: JsonFile = None,
    html: HtmlFile = None,
) -> None:
    """Time, memory and error of the instance loss, beside other libraries.

    Example: fastidmm bench loss --json loss.json
    """
    from fastidmm.bench.loss import measure

    place = _place(None)
    _told(lambda: measure(place, quick=quick, rounds=rounds), json, html)


@bench.command("prepare")
def bench_prepare(
    source: Annotated[
        Path | None, typer.Option("--from", help="Photographs. [default: made-up ones]")
    ] = None,
    num_images: Annotated[
        int | None, typer.Option("--images", min=2, help="How many made-up. [default: 400]")
    ] = None,
    repeats: Annotated[
        int | None, typer.Option(min=1, help="Measurements of each. [default: 5, quick 3]")
    ] = None,
    cores: Annotated[
        list[int] | None, typer.Option("--cores", help="Repeatable. [default: 1, 2, 4, ..., all]")
    ] = None,
    quick: QuickOption = False,
    json: JsonFile = None,
    html: HtmlFile = None,
) -> None:
    """Images per second that are prepared, by cores.

    Example: fastidmm bench prepare --from ~/photos
    """
    from fastidmm.bench.prepare import measure

    _told(
        lambda: measure(
            source, quick=quick, num_images=num_images, repeats=repeats, cores=cores
        ),
        json, html,
    )  # fmt: skip


@bench.command("step")
def bench_step(
    backbone: BackboneOption = None,
    method: MethodOption = None,
    resolution: Annotated[int, typer.Option(min=8, help="Side of a crop, px.")] = 112,
    batch_size: BatchOption = None,
    device: DeviceOption = None,
    trace: Annotated[
        Path | None, typer.Option(help="Write three steps there, for chrome://tracing.")
    ] = None,
    assignments: SetOption = None,
    quick: QuickOption = False,
    json: JsonFile = None,
    html: HtmlFile = None,
) -> None:
    """Where a training step's time goes: views, forward, loss, backward, update.

    Example: fastidmm bench step --backbone deit_tiny --set run.compile=true
    """
    from fastidmm.bench.step import measure

    place = _place(device)
    _told(
        lambda: measure(
            place, quick=quick, backbone=backbone, method=method or "idmm",
            resolution=resolution, batch_size=batch_size, settings=assignments or (), trace=trace,
        ),
        json, html, trace=trace,
    )  # fmt: skip


def _place(device: str | None) -> "torch.device":
    """The device, with as many threads as training has there."""
    from fastidmm.machine import set_up

    return set_up(device or "auto", exact=False)


def _told(
    measure: Callable[[], dict[str, Any]], json: Path | None, html: Path | None, **more: Path | None
) -> dict[str, Any]:
    """Measure, once it is clear that the answer can be written, and tell it."""
    from fastidmm.bench.answers import check, tell

    check(json=json, html=html, **more)
    found = measure()
    tell(found, json_file=json, html_file=html)
    return found
