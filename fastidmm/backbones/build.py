"""Build a backbone whose chance comes from counters, and load one that was trained before."""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from fastidmm.backbones.drop import PathWords, draw_from_counters
from fastidmm.backbones.rounding import called
from fastidmm.batch import Options
from fastidmm.chance import Counters
from fastidmm.errors import UsageError
from fastidmm.registry import find


@dataclass(frozen=True, slots=True)
class Backbone:
    """How to build a backbone, and the settings the paper trains it with."""

    build: Callable[[int, float], nn.Module]  # resolution px, drop-path rate
    multiple_of: int  # what a resolution must be divisible by, px
    smallest: int = 8  # resolution it can work at, px
    lr: float = 5e-4
    lr_high: float = 5e-5  # of the stage that goes on at a higher resolution
    warmup_epochs: int = 2
    weights: str = ""  # timm's model with the published ones, of ImageNet's labels


def backbone(name: str) -> Backbone:
    """A registered backbone, or any other of timm's as `timm:NAME`."""
    if name.startswith("timm:"):
        found: Backbone = import_module("fastidmm.backbones.any_timm").any_timm(name[5:])
    else:
        found = find("backbone", name)
    return found


class BackboneOptions(Options):
    """The table `[backbone]` of a recipe."""

    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.1


class Encoder(nn.Module):
    """A backbone that knows which crops it sees: images (C, 3, S, S) to features (C, D)."""

    def __init__(self, model: nn.Module, counters: Counters) -> None:
        super().__init__()
        self.words = PathWords(counters)
        self._compiled: Callable[[Tensor], Tensor] | None = None
        from fastidmm.backbones.blocks import lighten

        self.model, self.counters = lighten(draw_from_counters(model, self.words)), counters
        # Where a head has hidden layers, what comes before the classifier is wider or narrower.
        width = getattr(model, "head_hidden_size", None) or model.num_features
        self.num_features = int(width)  # type: ignore[arg-type]

    def set_place(self, place: Tensor, *, step: int | None = None) -> None:
        """Say which crops of the global batch come next, (C,) int64 on their device; in which step.

        What is dropped in training mode is a function of both, and of the run's seed: a loop of
        one's own says so before every forward pass. Without `step` it stays the one before.
        """
        if step is not None:
            self.counters.step = step
        self.counters.place = place
        if self.training:
            self.words.draw()

    def _check_size(self, images: Tensor) -> None:
        """Refuse images of another size than a model's positions are for, where they are."""
        embed = getattr(self.model, "patch_embed", self.model)
        size = getattr(embed, "img_size", None)
        if not size or not getattr(embed, "strict_img_size", False):
            return
        if images.shape[2:] != tuple(size):
            wanted, given = (" x ".join(map(str, each)) for each in (size, images.shape[2:]))
            raise UsageError(
                f"this backbone was made for images of {wanted} px, not {given}: give it those, or "
                "have another made from Python by Run.backbone(resolution=...)."
            )

    def compile_training(self) -> None:
        """Train by a compiled model, which rounds otherwise; what is scored goes the plain way."""
        # Where a product is of float32 torch would recommend TF32, which no run allows.
        warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")
        self._compiled = torch.compile(self.model.forward, dynamic=False)

    def forward(self, images: Tensor) -> Tensor:
        """Features before any head: (C, D)."""
        self._check_size(images)
        compiled = self._compiled if self.training else None
        features: Tensor = called(self.model, images) if compiled is None else compiled(images)
        return features


def build_encoder(
    name: str, options: BackboneOptions, *, resolution: int, counters: Counters
) -> Encoder:
    """Build the backbone of that name on the CPU; its first weights are a function of the seed."""
    from fastidmm.backbones.torchvision_ops import make_torchvision_importable

    make_torchvision_importable()
    entry = backbone(name)
    check_resolution(name, resolution)
    with torch.random.fork_rng(devices=[]):
        # The CPU's alone: torch.manual_seed would also reseed every GPU, and leave it so.
        torch.default_generator.manual_seed(counters.seed)
        return Encoder(entry.build(resolution, options.drop_path), counters)


def check_resolution(name: str, resolution: int) -> None:
    """Refuse a resolution (px) that a backbone cannot work at, with one that it can."""
    entry = backbone(name)
    step = entry.multiple_of
    if resolution < entry.smallest or resolution % step:
        rule = f"a multiple of {step} px" if step > 1 else f"{entry.smallest} px or more"
        near = max(round(resolution / step), -(-entry.smallest // step)) * step
        raise UsageError(
            f"{name} needs a resolution that is {rule}, not {resolution}: try --resolution {near}."
        )


def load_weights(module: nn.Module, state: dict[str, Tensor], *, source: str) -> str:
    """Load every tensor of a trained backbone or method, position embeddings resized; say how many.

    `state` has the module's own names. An incomplete or foreign state is a UsageError.
    """
    own = module.state_dict()
    state = {name: _fit(name, tensor, own.get(name)) for name, tensor in state.items()}
    fits = [n for n, t in own.items() if n in state and state[n].shape == t.shape]
    if len(fits) != len(own) or len(state) != len(own):
        raise UsageError(
            f"{source} is of another backbone: {len(fits)} of the {len(own)} tensors needed fit "
            f"(it holds {len(state)}). Name the backbone it was trained with."
        )
    module.load_state_dict(state)
    return f"{len(fits)} of {len(own)} tensors"


def _fit(name: str, tensor: Tensor, own: Tensor | None) -> Tensor:
    """Resize a learned position embedding, class tokens kept, bicubic as the paper does."""
    if own is None or not name.endswith("pos_embed") or tensor.shape == own.shape:
        return tensor
    if tensor.ndim != 3 or tensor.shape[-1] != own.shape[-1]:
        return tensor
    # Class tokens come first, then a square of patches; with other tokens the shape will not fit.
    sides = [math.isqrt(t.shape[1]) for t in (tensor, own)]
    first = tensor.shape[1] - sides[0] ** 2
    grid = tensor[:, first:].transpose(1, 2).unflatten(2, (sides[0], sides[0]))
    grid = nn.functional.interpolate(grid, size=(sides[1], sides[1]), mode="bicubic")
    return torch.cat((tensor[:, :first], grid.flatten(2).transpose(1, 2)), dim=1)
