"""Drop-path and dropout that draw from counters instead of a global generator."""

import torch
from torch import Tensor, nn

from fastidmm.chance import Counters, Use, happens, philox
from fastidmm.errors import UsageError

# Modules of other kinds that draw in training: what a backbone may not hold after replacement.
DRAWING = ("drop", "noise", "stochastic")


class PathWords:
    """The words of all drop-paths of a model, drawn together before a forward pass.

    One by one they would be some two hundred small operations a block; and a compiled model finds
    them there, as numbers that it is given.
    """

    def __init__(self, counters: Counters) -> None:
        self.counters, self.num_blocks = counters, 0
        self.drawn = torch.zeros(0, 0)  # (C, blocks) int64

    def draw(self) -> None:
        """For the crops that come next, as the counters tell."""
        state = self.counters
        blocks = torch.arange(self.num_blocks, device=state.place.device)
        counter = (state.step, state.place[:, None], blocks, 0)
        self.drawn = philox(counter, state.key(Use.DROP))[..., 0]


class DropPath(nn.Module):
    """Skip a residual branch for some crops, and scale it up for the others.

    Source: Huang et al., "Deep Networks with Stochastic Depth", ECCV 2016.
    """

    def __init__(self, p: float, block: int, words: PathWords) -> None:
        super().__init__()
        self.p, self.block, self.words = p, block, words
        words.num_blocks = max(words.num_blocks, block + 1)

    def forward(self, x: Tensor) -> Tensor:
        """x (C, ...): zero for dropped crops, x / (1 - p) for the others, while training."""
        if not self.training or self.p == 0:
            return x
        words = self.words.drawn[:, self.block]
        assert len(words) == len(x), "say which crops come next: Encoder.set_place"
        keep = (~happens(words, self.p)).to(x.dtype) / (1 - self.p)
        return x * keep.view(-1, *[1] * (x.ndim - 1))


class Dropout(nn.Module):
    """Zero some elements of each crop, and scale up the others."""

    def __init__(self, p: float, block: int, counters: Counters) -> None:
        super().__init__()
        self.p, self.block, self.counters = p, block, counters

    def forward(self, x: Tensor) -> Tensor:
        """x (C, ...), element by element, while training."""
        if not self.training or self.p == 0:
            return x
        state, num = self.counters, x[0].numel()
        assert len(state.place) == len(x), "say which crops come next: Encoder.set_place"
        quads = torch.arange(-(-num // 4), device=x.device)
        counter = (state.step, state.place[:, None], self.block, quads)
        words = philox(counter, state.key(Use.DROP)).flatten(1)[:, :num]
        return x * ((~happens(words, self.p)).to(x.dtype) / (1 - self.p)).view_as(x)


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
