"""A recipe: everything a run depends on, as TOML with one level of tables.

Each table is declared by the class that reads it. Unknown keys are errors that name the nearest
known one. Every run writes its recipe back with the defaults filled in.
"""

import json
import os
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, SerializeAsAny, ValidationError

import fastidmm
from fastidmm.backbones.build import BackboneOptions, backbone
from fastidmm.batch import Method, Options
from fastidmm.errors import UsageError, did_you_mean
from fastidmm.optim import OptimOptions
from fastidmm.registry import TABLES, find

Count = Annotated[int, Field(ge=1)]
Auto = Annotated[int, Field(ge=0)]  # 0 means: chosen when the run starts
Tables = dict[str, dict[str, Any]]


class RunOptions(Options):
    """The table `[run]`: what is trained on what, for how long."""

    dataset: str
    method: str = "idmm"
    backbone: str = "deit_tiny"
    loader: str = "auto"  # chosen by size, hardware and what is installed when a run begins
    epochs: Count = 800
    batch_size: Count = 256
    resolution: Count = 112
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    device: str = "auto"
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    optimizer: Literal["adamw", "fused_adam", "fused_lamb"] = "adamw"  # the last two are apex's
    exact: bool = False
    capture: bool = True  # on a GPU, whole steps as CUDA graphs
    views_ahead: bool = False  # in a captured step, the next one's views beside this one's rest
    compile: bool = False  # the backbone by torch.compile: it takes a minute, long runs win it back
    num_images: Auto = 0  # of the training split, chosen by seed and class; 0: all
    # A checkpoint's folder, relative to the run's; "timm": the published ones; "": random weights.
    init: str = ""
    init_head: bool = False  # take its classifier too
    holdout: Annotated[float, Field(ge=0, lt=1)] = 0.0  # share of the training split kept out of it
    patience: Auto = 0  # epochs without a better held-out score that end a stage; 0: never
    micro_batches: Auto = 0
    log: Literal["none", "tensorboard", "wandb"] = "none"  # where metric lines go, too
    log_every: Auto = 0  # steps
    knn_every: Auto = 0  # epochs
    score_every: Count = 20  # epochs between scores on held-out or else on test images
    checkpoint_every: Auto = 0  # epochs


class FinetuneOptions(Options):
    """The table `[finetune]`: what `fastidmm finetune` takes over unless told otherwise."""

    epochs: Count = 200
    batch_size: Count = 256
    resolution: Count = 224
    # Unset: the pretraining's, or the backbone's after a method that has its own.
    lr: Annotated[float, Field(gt=0)] | None = None


class FinetuneHighOptions(Options):
    """The table `[finetune_high]`: the stage that goes on from a fine-tuned one, enlarged."""

    epochs: Auto = 100  # 0: `fastidmm run` has no such stage
    batch_size: Count = 128
    resolution: Auto = 0  # 0: twice that of [finetune]
    lr: Annotated[float, Field(gt=0)] | None = None  # unset: the backbone's own for this stage


class Recipe(BaseModel):
    """All tables, checked."""

    model_config = Options.model_config

    run: RunOptions
    optim: OptimOptions
    backbone: BackboneOptions
    method: SerializeAsAny[Options]
    loader: SerializeAsAny[Options]
    finetune: FinetuneOptions
    finetune_high: FinetuneHighOptions
    supervised: SerializeAsAny[Options]  # the table [method] of fine-tuning stages

    @classmethod
    def of(cls, tables: Tables) -> "Recipe":
        """Check tables, fill in defaults, and settle what depends on the backbone."""
        known = list(cls.model_fields)
        for name in tables:
            if name not in known:
                raise UsageError(f"unknown table [{name}] in the recipe: {_near(name, known)}")
        _check_tables(tables)
        method = find("method", _checked("run", RunOptions, tables).method)
        for name, table in method.settings.items():
            tables = {**tables, name: {**table, **tables.get(name, {})}}
        run = _checked("run", RunOptions, tables)
        loader = Options if run.loader == "auto" else _loader(run.loader).Options
        if run.loader == "auto" and tables.get("loader"):
            raise UsageError("[loader] holds settings of one loader: name it, too, by --loader.")
        if run.patience and not run.holdout:
            raise UsageError("run.patience needs images to judge by: give --holdout 0.1, too.")
        # Up to ten looks at the features and twenty checkpoints a run, unless told otherwise.
        cadence = {
            "knn_every": run.knn_every or max(2, -(-run.epochs // 10)),
            "checkpoint_every": run.checkpoint_every or -(-run.epochs // 20),
        }
        finetune = _checked("finetune", FinetuneOptions, tables)
        high = _checked("finetune_high", FinetuneHighOptions, tables)
        twice = {"resolution": high.resolution or 2 * finetune.resolution}
        if high.epochs and twice["resolution"] <= finetune.resolution:
            raise UsageError(
                f"finetune_high.resolution is {high.resolution}, not above the first's, "
                f"{finetune.resolution}: raise it, or set finetune_high.epochs=0 for no such stage."
            )
        return cls(
            run=run.model_copy(update=cadence),
            optim=_optim(run, method, tables),
            backbone=_checked("backbone", BackboneOptions, tables),
            method=_checked("method", method.Options, tables),
            loader=_checked("loader", loader, tables),
            finetune=finetune,
            finetune_high=high.model_copy(update=twice),
            supervised=_checked("supervised", find("method", "supervised").Options, tables),
        )

    def tables(self) -> Tables:
        """Plain tables, as `of` takes them; unset keys are left out."""
        return self.model_dump(mode="json", exclude_none=True)

    def toml(self) -> str:
        """The recipe as text that `load` reads back to the same recipe."""
        parts = []
        for name, table in self.tables().items():
            rows = [f"{key} = {_toml(value)}" for key, value in table.items()]
            parts.append("\n".join([f"[{name}]", *rows]))
        return "\n\n".join(parts) + "\n"


def _loader(name: str) -> Any:
    """The class of a loader; `auto`, which is none, is known as well."""
    known = [*TABLES["loader"], "auto"]
    if name not in known:
        raise UsageError(f"unknown loader {name!r}: {_near(name, known)}")
    return find("loader", name)


def _optim(run: RunOptions, method: type[Method], tables: Tables) -> OptimOptions:
    """The table [optim], its rate and warm-up those of the method, or else of the backbone.

    A method's rate is for the batch asked for: how many images there are, no recipe knows.
    """
    found: OptimOptions = _checked("optim", OptimOptions, tables)
    if found.warmup_epochs is not None and found.warmup_epochs > run.epochs:
        raise UsageError(
            f"optim.warmup_epochs is {found.warmup_epochs:g}, more than the {run.epochs} "
            "epochs of the run: lower it, as by --set optim.warmup_epochs=0, or leave it out."
        )
    if found.weight_decay and "weight_decay" in method.Options.model_fields:
        raise UsageError(
            f"optim.weight_decay is not read by {run.method}, whose decay changes as it learns: "
            "set method.weight_decay=[FIRST, LAST] instead."
        )
    entry = backbone(run.backbone)
    lr = entry.lr if method.lr_for_256 is None else method.lr_for_256 * run.batch_size / 256
    warmup = entry.warmup_epochs if method.warmup_epochs is None else method.warmup_epochs
    settled = {
        "lr": found.lr or lr,
        # A short run still spends most of itself beyond the warm-up.
        "warmup_epochs": min(warmup, run.epochs / 4)
        if found.warmup_epochs is None
        else found.warmup_epochs,
    }
    return found.model_copy(update=settled)


def _toml(value: Any) -> str:
    # JSON writes strings, numbers, booleans and lists as TOML reads them.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _near(name: str, known: Iterable[str]) -> str:
    return did_you_mean(name, list(known))


def _check_tables(tables: Tables) -> None:
    """Refuse a number or a list where a table must be."""
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise UsageError(f"[{name}] in the recipe must be a table, not {table!r}.")


def _checked(name: str, kind: type[Any], tables: Tables) -> Any:
    """One table as its typed model; the first problem as one sentence."""
    table = tables.get(name, {})
    try:
        return kind.model_validate(table)
    except ValidationError as problems:
        first = problems.errors()[0]
        key = str(first["loc"][0])
        field = kind.model_fields.get(key)
        if field and isinstance(field.default, tuple):
            _check_list(f"{name}.{key}", table[key], field.default)
        if first["type"] == "extra_forbidden":
            raise UsageError(f"unknown key {name}.{key}: {_near(key, kind.model_fields)}") from None
        if first["type"] == "missing":
            raise UsageError(f"the recipe lacks {name}.{key}: give it, or --{key}.") from None
        message = first["msg"].removeprefix("Value error, ")
        message = message[0].lower() + message[1:]
        raise UsageError(f"{name}.{key} = {first['input']!r}: {message}.") from None


def _check_list(path: str, given: Any, usual: tuple[Any, ...]) -> None:
    """Refuse what is no list of as many values as a key takes; its default is an example of one."""
    if not isinstance(given, list | tuple) or len(given) != len(usual):
        raise UsageError(
            f"{path} = {given!r}: it takes {len(usual)} values in brackets, such as "
            f"{path}={_toml(usual)}."
        )


def read_tables(name: str) -> Tables:
    """The tables of a recipe: a file's path, or the name of one that comes with fastidmm."""
    shipped = Path(fastidmm.__file__).parent / "configs"
    here = name.endswith(".toml")
    path = Path(name) if here else shipped / f"{name}.toml"
    if not here and (os.sep in name or not path.is_file()) and Path(f"{name}.toml").is_file():
        raise UsageError(f"no recipe {name!r}: did you mean {name}.toml?")
    try:
        tables: Tables = tomllib.loads(path.read_text())
    except OSError as problem:
        if here:
            raise UsageError(
                f"{path} cannot be read ({problem.strerror}): give the path of a recipe."
            ) from None
        known = [p.stem for p in shipped.glob("*.toml")]
        raise UsageError(f"no recipe {name!r}: {_near(name, known)}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as problem:
        raise UsageError(f"{path} is not TOML: {problem}.") from None
    return tables


def with_settings(tables: Tables, settings: dict[str, Any], assignments: list[str]) -> Tables:
    """Tables changed by flags (`run.epochs` -> value, None meaning not given) and by `--set`."""
    _check_tables(tables)
    changed = {name: dict(table) for name, table in tables.items()}
    for path, value in settings.items():
        if value is not None:
            _put(changed, path, value)
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        _, dot, key = path.strip().partition(".")
        if not (equals and dot and key):
            raise UsageError(
                f"--set takes TABLE.KEY=VALUE, such as optim.lr=1e-3, not {assignment!r}."
            )
        _put(changed, path.strip(), _value(text.strip()))
    return changed


def _put(tables: Tables, path: str, value: Any) -> None:
    name, _, key = path.partition(".")
    tables.setdefault(name, {})[key] = value


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
