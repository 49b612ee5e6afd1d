"""Drop-path and dropout that draw from counters instead of a global generator."""

import torch
from torch import Tensor, nn

from fastidmm.chance import Counters, Use, happens, philox
from fastidmm.errors import UsageError

# Modules of other kinds that draw in training: what a backbone may not hold after replacement.
DRAWING = ("drop", "noise", "stochastic")


class PathWords:
    """The words of all drop-paths of a model, drawn together: once a forward pass.

    One by one they would be some two hundred small operations a block.
    """

    def __init__(self, counters: Counters) -> None:
        self.counters, self.num_blocks = counters, 0
        self._drawn_for: tuple[object, ...] = ()
        self._words = torch.zeros(0)

    def of(self, block: int) -> Tensor:
        """A word for each crop of this pass: (C,) int64."""
        state = self.counters
        now = (state.place, state.step, state.attempt, state.seed, self.num_blocks)
        if not _same(now, self._drawn_for):
            blocks = torch.arange(self.num_blocks, device=state.place.device)
            counter = (state.step, state.place[:, None], blocks, 0)
            self._words = philox(counter, state.key(Use.DROP))[..., 0]
            self._drawn_for = now
        return self._words[:, block]


def _same(now: tuple[object, ...], before: tuple[object, ...]) -> bool:
    """Whether the same is asked for as before: of tensors the object, not what is in it.

    Every forward pass is told its places by a new tensor, and to compare would be to wait.
    """
    numbers = (int, float)
    return len(now) == len(before) and all(
        a is b or (isinstance(a, numbers) and isinstance(b, numbers) and a == b)
        for a, b in zip(now, before, strict=True)
    )


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
        words = self.words.of(self.block)
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


def draw_from_counters(model: nn.Module, counters: Counters) -> nn.Module:
    """Replace every drop-path and dropout of a model, numbered in the order of its modules."""
    block, words = 0, PathWords(counters)
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
                fresh = Dropout(child.p, block, counters)
            elif any(word in kind.lower() for word in DRAWING) and not isinstance(
                child, DropPath | Dropout
            ):
                raise UsageError(f"{path}: {kind} draws by itself, so a run could not resume.")
            else:
                continue
            setattr(parent, name, fresh)
            block += 1
    return model
