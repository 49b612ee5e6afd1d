"""What a run or a stage has learnt: backbone, classifier and the classes' names."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from fastidmm import checkpoint
from fastidmm.assemble import same_images
from fastidmm.backbones.build import Encoder, build_encoder, load_weights
from fastidmm.chance import Counters
from fastidmm.errors import UsageError
from fastidmm.evaluate import PLAIN, resized_side
from fastidmm.record import Record, encoder_weights
from fastidmm.store import folder_of, read_json


@dataclass(frozen=True, slots=True)
class Learnt:
    """Models on the CPU, in evaluation mode, with the weights that `evaluate` scores."""

    record: Record
    checkpoint: Path
    encoder: Encoder
    head: nn.Linear | None  # from features to scores of the classes
    class_names: tuple[str, ...]  # empty without a classifier

    @property
    def width(self) -> int:
        """Numbers that it gives for a photograph."""
        return self.encoder.num_features if self.head is None else self.head.out_features

    @property
    def gives(self) -> str:
        """What these numbers are."""
        return "features" if self.head is None else "logits"

    def model(self) -> nn.Module:
        """Images (C, 3, S, S) to features (C, D), or to logits of the classes."""
        inner = self.encoder.model
        return (inner if self.head is None else nn.Sequential(inner, self.head)).eval()

    def preprocessing(self) -> dict[str, Any]:
        """How `evaluate` looks at a photograph, in timm's words."""
        size = self.record.resolution
        # Rounded down, so that what timm computes of it is not a pixel short.
        share = math.floor(1e6 * size / resized_side(size)) / 1e6
        return {
            "input_size": [3, size, size],
            "interpolation": "bicubic",
            "crop_pct": share,
            "crop_mode": "center",
            "mean": list(PLAIN.mean),
            "std": list(PLAIN.std),
        }


def learnt(folder: Path) -> Learnt:
    """What lies in the folder of a run or a stage, by the checkpoint that counts."""
    record, encoder = encoder_of(folder)
    if record.recipe.run.method != "supervised":
        return Learnt(record, record.result, encoder, None, ())
    if not record.finished:
        raise UsageError(record.unfinished)
    return Learnt(record, record.result, encoder, head_of(record.result), _class_names(record))


def head_of(path: Path) -> nn.Linear:
    """The linear classifier in a checkpoint."""
    (tensors,), _ = checkpoint.load(path, checkpoint.MODEL)
    weight, bias = tensors["head.weight"], tensors["head.bias"]
    head = nn.Linear(weight.shape[1], weight.shape[0])
    head.load_state_dict({"weight": weight, "bias": bias})
    return head.requires_grad_(False)


def encoder_of(folder: Path) -> tuple[Record, Encoder]:
    """The backbone of a run or a stage, by the checkpoint that counts; needs no photographs."""
    record = Record(folder)
    record.check()
    recipe, run = record.recipe, record.recipe.run
    weights = encoder_weights(record.result)
    counters = Counters(run.seed)
    encoder = build_encoder(
        run.backbone, recipe.backbone, resolution=run.resolution, counters=counters
    )
    load_weights(encoder, weights, source=str(record.result))
    return record, encoder.eval().requires_grad_(False)


def _class_names(record: Record) -> tuple[str, ...]:
    """The classes' names, from the photographs that they were learnt from."""
    described = read_json(folder_of(record.recipe.run.dataset))
    same_images(record, described["splits"]["train"]["fingerprint"])  # its classes may be others
    return tuple(described["class_names"])
