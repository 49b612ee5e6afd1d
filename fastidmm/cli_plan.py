"""The command `fastidmm plan`: what a run will take, before it starts."""

from typing import Annotated

import typer

from fastidmm.options import (
    BackboneOption,
    DatasetOption,
    DeviceOption,
    ExactOption,
    FirstBatchOption,
    FirstEpochsOption,
    FirstResolutionOption,
    HoldoutOption,
    JsonOption,
    LoaderOption,
    MethodOption,
    OptimizerOption,
    PrecisionOption,
    RecipeOption,
    SeedOption,
    SetOption,
    answer,
    recipe_of,
    recipe_settings,
)

HOUR = 3600.0
SMALL = "--backbone vit_micro --resolution 32 --batch-size 32 --epochs 40"


def plan(
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
    price: Annotated[
        float | None,
        typer.Option(min=0, help="What an hour of this machine costs, in any currency."),
    ] = None,
    assignments: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Forecast a run from a few steps of each stage: time, memory, energy, cost.

    Example: fastidmm plan --dataset mine --price 2.50
    """
    from fastidmm.forecast import table, total
    from fastidmm.machine import device_of
    from fastidmm.trial import forecasts

    settings = recipe_settings(
        dataset=dataset, backbone=backbone, method=method, loader=loader, epochs=epochs,
        batch_size=batch_size, resolution=resolution, seed=seed, device=device,
        precision=precision, optimizer=optimizer, exact=exact, holdout=holdout,
    )  # fmt: skip
    asked = recipe_of(recipe, settings, assignments)
    found = forecasts(asked)
    lines = [
        f"{each.stage}: memory is short; --set run.micro_batches={each.micro_batches} cuts batches "
        "so from the start"
        for each in found
        if each.short
    ]
    # Who has no GPU may not know what is no run of weeks.
    if device_of(asked.run.device).type == "cpu" and total(found).seconds > HOUR:
        lines.append(f"a run of minutes on a CPU: {SMALL}")
    stages = [each.as_dict(price) for each in found]
    told = {
        "dataset": asked.run.dataset,
        "backbone": asked.run.backbone,
        "stages": stages,
        "total": total(found).as_dict(price),
    }
    answer(told, as_json, lambda: "\n".join([table(found, price), *lines]))
