"""Drop-path and dropout that draw from counters instead of a global generator."""

import torch
from torch import Tensor, nn

from fastidmm.chance import Counters, Use, limit, philox
from fastidmm.errors import UsageError
from fastidmm.kernels.dropout import dropout

UNPLACED = (
    "in training mode a backbone drops paths by step and by crop: before every forward pass call "
    "backbone.set_place(torch.arange(len(images), device=images.device), step=STEP), or "
    "backbone.eval() to drop none."
)
# Modules of other kinds that draw in training: what a backbone may not hold after replacement.
DRAWING = ("drop", "noise", "stochastic")


class PathWords:
    """What drop-path makes of each crop in every block, drawn together before a forward pass.

    One by one they would be some two hundred small operations a block; and a compiled model finds
    them there, as numbers that it is given, so that blocks of one shape are one program.
    """

    def __init__(self, counters: Counters) -> None:
        self.counters, self.paths = counters, list[DropPath]()
        self._limits = self._stay = torch.zeros(0)

    def draw(self) -> None:
        """For the crops that come next, as the counters tell."""
        if not self.paths:
            return
        state = self.counters
        device = state.place.device
        num_blocks = 1 + max(path.block for path in self.paths)
        if len(self._limits) != num_blocks or self._limits.device != device:
            rates = [0.0] * num_blocks
            for path in self.paths:
                rates[path.block] = path.p
            self._limits = torch.tensor([limit(rate) for rate in rates], device=device)[:, None]
            self._stay = torch.tensor([1 - rate for rate in rates], device=device)[:, None]
        counter = (state.step, state.place, torch.arange(num_blocks, device=device)[:, None], 0)
        words = philox(counter, state.key(Use.DROP))[..., 0]
        scales = (words >= self._limits).float() / self._stay  # (blocks, C)
        for path in self.paths:
            path.scale = scales[path.block]


class DropPath(nn.Module):
    """Skip a residual branch for some crops, and scale it up for the others.

    Source: Huang et al., "Deep Networks with Stochastic Depth", ECCV 2016.
    """

    def __init__(self, p: float, block: int, words: PathWords) -> None:
        super().__init__()
        self.p, self.block, self.idle = p, block, p == 0
        self.scale = torch.zeros(0)  # of each crop that comes next: (C,) float32, 0 or 1 / (1 - p)
        words.paths.append(self)

    def forward(self, x: Tensor) -> Tensor:
        """x (C, ...): zero for dropped crops, x / (1 - p) for the others, while training."""
        scale = self.of(x)
        return x if scale is None else x * scale.to(x.dtype).view(-1, *[1] * (x.ndim - 1))

    def of(self, x: Tensor) -> Tensor | None:
        """What each crop of x (C, ...) is multiplied by: (C,) float32; None stands for 1."""
        if not self.training or self.idle:
            return None
        if len(self.scale) != len(x):
            raise UsageError(UNPLACED)
        return self.scale


class Dropout(nn.Module):
    """Zero some elements of each crop, and scale up the others."""

    def __init__(self, p: float, block: int, counters: Counters) -> None:
        super().__init__()
        self.p, self.block, self.counters = p, block, counters

    def forward(self, x: Tensor) -> Tensor:
        """x (C, ...), element by element, while training."""
        if not self.training or self.p == 0:
            return x
        state = self.counters
        if len(state.place) != len(x):
            raise UsageError(UNPLACED)
        return dropout(x, self.p, (state.step, state.place, self.block), state.key(Use.DROP))


def draw_from_counters(model: nn.Module, words: PathWords) -> nn.Module:
    """Replace every drop-path and dropout of a model, numbered in the order of its modules."""
    block = 0
    for parent_name, parent in list(model.named_modules()):
        for name, child in list(parent.named_children()):
            kind = type(child).__name__
            path = f"{parent_name}.{name}".lstrip(".")
            if kind == "DropPath":
                fresh: nn.Module = DropPath(float(child.drop_prob or 0), block, words)
            elif isinstance(child, nn.Dropout):
                # Fused attention takes p from this module and draws by itself.
                if name == "attn_drop" and child.p > 0:
                    raise UsageError(f"{path}: dropout inside attention cannot be repeated; set 0.")
                fresh = Dropout(child.p, block, words.counters)
            elif any(word in kind.lower() for word in DRAWING) and not isinstance(
                child, DropPath | Dropout
            ):
                raise UsageError(f"{path}: {kind} draws by itself, so a run could not resume.")
            else:
                continue
            setattr(parent, name, fresh)
            block += 1
    return model
