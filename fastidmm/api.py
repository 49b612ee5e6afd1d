"""What the commands do, for Python: the same names, the same runs in ./runs.

import fastidmm

fastidmm.prepare("folder", from_="~/photos", name="mine")
run = fastidmm.pretrain(dataset="mine", backbone="deit_tiny", epochs=200)
stage = run.finetune(resolution=224)
print(run.evaluate()["scores"], run.report())
"""

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypedDict, Unpack

from PIL.Image import Image
from torch import Tensor, nn

from fastidmm import scoring, stages
from fastidmm.backbones.build import Encoder, build_encoder, load_weights
from fastidmm.chance import Counters
from fastidmm.errors import UsageError
from fastidmm.exporting.learnt import head_of
from fastidmm.exporting.pictures import looked_at
from fastidmm.folders import existing_run
from fastidmm.folders import stages as stages_of
from fastidmm.options import recipe_of, recipe_settings
from fastidmm.preparing.prepare import prepare as prepare_source
from fastidmm.preparing.summary import Summary
from fastidmm.record import Record, encoder_weights
from fastidmm.registry import find
from fastidmm.reporting.report import write


class StageFlags(TypedDict, total=False):
    """The flags of `fastidmm finetune`."""

    resolution: int  # side of a crop, px
    epochs: int
    batch_size: int  # images per step
    loader: str
    seed: int
    device: str
    precision: str
    optimizer: str
    exact: bool
    holdout: float  # share of the training images
    log: str  # tensorboard or wandb


class Flags(StageFlags, total=False):
    """The flags of `fastidmm pretrain`; any key of a recipe's table `[run]` goes as well."""

    dataset: str  # prepared; by default the last that was
    backbone: str
    method: str
    init: str
    num_images: int


class Run:
    """A run, or a stage of one, by its name in ./runs or its folder."""

    def __init__(self, name: str | Path) -> None:
        """Raises UsageError where there is none."""
        path = os.fspath(name)
        self.folder = existing_run(path if isinstance(name, str) else os.path.join(".", path))

    def __repr__(self) -> str:
        """As it can be made again."""
        return f"Run({str(self.folder)!r})"

    @property
    def finished(self) -> bool:
        """Whether every epoch of its recipe was made."""
        return Record(self.folder).finished

    @property
    def stages(self) -> list["Run"]:
        """The fine-tuning stages in it, oldest first."""
        return [Run(folder) for folder in stages_of(self.folder)]

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, a dictionary each."""
        return Record(self.folder).metrics()

    def summary(self) -> dict[str, Any]:
        """What `pretrain` and `finetune` answer with `--json`."""
        return stages.summary(Record(self.folder))

    def finetune(
        self,
        *,
        scratch: bool = False,
        settings: Mapping[str, Any] | None = None,
        **flags: Unpack[StageFlags],
    ) -> "Run":
        """Fine-tune its backbone, or with `scratch` the same one from random weights."""
        asked = recipe_settings(**flags) | dict(settings or {})
        found = stages.finetune(self.folder, asked, [], pretrained=not scratch)
        return Run(Path(found["run"]))

    def resume(self) -> "Run":
        """Go on with what of it is not finished, to the same bits."""
        stages.resume(self.folder)
        return self

    def evaluate(self, *, device: str | None = None) -> dict[str, Any]:
        """Score it and its stages on the test split, beside random weights; kept in its folder."""
        return scoring.evaluate(self.folder, device)

    def report(self) -> Path:
        """Write report.html; where it is."""
        return write(self.folder)

    def backbone(self, *, resolution: int | None = None) -> Encoder:
        """The trained backbone on the CPU, in evaluation mode: images (C, 3, S, S) to (C, D).

        Images as `transform` gives them: resized to 256 / 224 of S, the central S x S px cut out,
        less ImageNet's mean, by its deviation. S is the run's resolution, or the one given, to
        which position embeddings are resized as stages do it. To train it in a loop of your own,
        call `train()`, and before every forward pass
        `set_place(torch.arange(len(images), device=images.device), step=STEP)`: which paths are
        dropped is drawn from the step and each image's place in the batch.
        """
        record = Record(self.folder)
        recipe = record.recipe
        encoder = build_encoder(
            recipe.run.backbone,
            recipe.backbone,
            resolution=resolution or recipe.run.resolution,
            counters=Counters(recipe.run.seed),
        )
        load_weights(encoder, encoder_weights(record.result), source=str(self.folder))
        return encoder.eval()

    def classifier(self) -> nn.Module:
        """Backbone and classifier, as `backbone`: images (C, 3, S, S) to logits (C, classes).

        Of a stage, or a run by labels, and by the weights that `evaluate` scores; classes are in
        the order of its `class_names`.
        """
        record = Record(self.folder)
        if (method := record.recipe.run.method) != "supervised":
            raise UsageError(
                f"{self.folder} learnt no classes, by {method}: take a stage, such as "
                "run.finetune() or one of run.stages."
            )
        head = head_of(record.result).requires_grad_()
        return nn.Sequential(self.backbone(), head).eval()

    def transform(self, *, resolution: int | None = None) -> Callable[[Image], Tensor]:
        """What makes of a PIL image the pixels that `evaluate` sees, (3, S, S) float32.

        To the bit on a CPU, of a photograph prepared with the default `max_side`.
        """
        return partial(looked_at, resolution=resolution or Record(self.folder).resolution)


def prepare(
    dataset: str,
    *,
    from_: str | Path | None = None,
    name: str | None = None,
    seed: int = 0,
    **more: Any,
) -> Summary:
    """Decode a dataset once, as `fastidmm prepare`; `more` is what `preparing.prepare` takes.

    dataset: a name of the registry, such as "flowers", or "folder" with `from_`, its path.
    """
    place = None if from_ is None else Path(from_)
    opened = find("dataset", dataset)().open(from_=place, seed=seed)
    return prepare_source(opened, name or dataset, **more)


def pretrain(
    *,
    recipe: str | None = None,
    run: str | None = None,
    settings: Mapping[str, Any] | None = None,
    **flags: Unpack[Flags],
) -> Run:
    """Learn from the images alone, as `fastidmm pretrain`; the finished run.

    recipe: a recipe's name or file. run: what to call it. settings: any key of the recipe by table,
    such as {"optim.lr": 1e-3}. Raises the errors of `fastidmm.errors`: a sentence with the remedy.
    """
    keys = dict(settings or {})
    if wrong := [key for key in keys if "." not in key]:
        raise UsageError(f"settings are TABLE.KEY, such as optim.lr, not {wrong[0]!r}.")
    asked = recipe_of(recipe, recipe_settings(**flags) | keys, None)
    return Run(Path(stages.pretrain(asked, run)["run"]))
