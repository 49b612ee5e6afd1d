"""The commands `export`, `embed` and `predict`: what a run has learnt, put to use."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from fastidmm.options import DeviceOption, JsonOption, RunOption, answer, chosen_run


class Form(StrEnum):
    """What `export` writes."""

    TIMM = "timm"
    ONNX = "onnx"
    PT2 = "pt2"


StageArgument = Annotated[
    str | None, typer.Argument(metavar="RUN", help="The same as --run; or a stage's folder.")
]


def export(
    out: Annotated[Path, typer.Option(help="A folder that is not there yet, or empty.")],
    named: StageArgument = None,
    run: RunOption = None,
    to: Annotated[
        Form, typer.Option(help="timm: for timm and transformers; pt2: torch.export's.")
    ] = Form.TIMM,
    as_json: JsonOption = False,
) -> None:
    """Write a run's backbone, or a stage's classifier, for other programs.

    Example: fastidmm export runs/demo/finetune-48 --to onnx --out demo-onnx
    """
    from fastidmm.exporting import export as exporting

    found = exporting.export(chosen_run(named, run), str(to), out)
    answer(found, as_json, lambda: exporting.as_text(found))


SourceOption = Annotated[
    str, typer.Option("--from", help="A folder, a .csv, a photograph, or a prepared dataset.")
]


def embed(
    source: SourceOption,
    out: Annotated[Path, typer.Option(help="A file that is not there yet: .npz or .parquet.")],
    named: StageArgument = None,
    run: RunOption = None,
    normalise: Annotated[
        bool, typer.Option("--normalise", help="Each photograph's features to length 1.")
    ] = False,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write the features of photographs, a row for each.

    Example: fastidmm embed demo --from ~/photos --out features.npz
    """
    from fastidmm.exporting import embed as embedding

    folder = chosen_run(named, run)
    found = embedding.embed(folder, source, out, normalise=normalise, device=device, quiet=as_json)
    answer(found, as_json, lambda: embedding.as_text(found))


def predict(
    source: SourceOption,
    out: Annotated[
        Path | None, typer.Option(help="A .csv that is not there yet, instead of the terminal.")
    ] = None,
    named: StageArgument = None,
    run: RunOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Tell the class of each photograph, by a run's last fine-tuning.

    Example: fastidmm predict demo --from ~/new --out classes.csv
    """
    from fastidmm.exporting import predict as predicting

    folder = chosen_run(named, run)
    found = predicting.predict(folder, source, out, device=device, quiet=as_json)
    answer(found, as_json, lambda: predicting.as_text(found))
