"""What methods with a teacher share: the teacher, its schedule, and the chain of their views."""

import math
from copy import deepcopy

import torch
from torch import Tensor, nn

from fastidmm.batch import Interpolation, Method, Range, ViewGroup


class Teacher(nn.ModuleDict):
    """Copies of a student's modules that follow them as a moving average.

    They learn nothing and draw nothing. They are in evaluation mode, so that no crop's features
    depend on another's: BatchNorm needs no shuffling here.
    """

    def __init__(self, **students: nn.Module) -> None:
        super().__init__({name: deepcopy(module) for name, module in students.items()})
        self.requires_grad_(False)
        self._students = students  # a plain dict: they stay the method's
        self.train()

    def train(self, mode: bool = True) -> "Teacher":
        """Stay in evaluation mode."""
        super().train(False)
        return self

    def take_over(self) -> None:
        """Be what the students are."""
        for name, student in self._students.items():
            self[name].load_state_dict(student.state_dict())

    @torch.no_grad()
    def follow(self, rate: Tensor | float, skipped: Tensor) -> None:
        """Go the share `rate` of the way to the students; nowhere where `skipped` () is true."""
        pairs = [(self[name], student) for name, student in self._students.items()]
        mine: list[Tensor] = [p for own, _ in pairs for p in own.parameters()]
        theirs = [p for _, student in pairs for p in student.parameters()]
        # The student of a skipped step may not be finite, and zero times that is not zero.
        goals = [torch.where(skipped, p, q) for p, q in zip(mine, theirs, strict=True)]
        moves = list(torch._foreach_sub(goals, mine))
        torch._foreach_mul_(moves, rate.to(mine[0].dtype) if isinstance(rate, Tensor) else rate)
        torch._foreach_add_(mine, moves)
        for own, student in pairs:
            # Running statistics are averages already.
            for p, q in zip(own.buffers(), student.buffers(), strict=True):
                p.copy_(torch.where(skipped, p, q))


class Taught(Method):
    """A method with a teacher, which is its students' copy at first."""

    teacher: Teacher

    def begin(self) -> None:
        """As `Method`."""
        self.teacher.take_over()


def cosine(first: float, last: float, step: Tensor, num_steps: int) -> Tensor:
    """Half a cosine from `first` at step 0 to `last` at `num_steps`: () float64."""
    return last + (first - last) * 0.5 * (1 + torch.cos(math.pi * step.double() / num_steps))


def full(x: Tensor) -> Tensor:
    """In float32 at least, as losses are computed."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def view(
    size: int,
    scale: Range,
    *,
    blur: float,
    solarize: float = 0.0,
    saturation: float = 0.2,
    interpolation: Interpolation = "bilinear",
) -> ViewGroup:
    """One crop of each image by BYOL's chain of chances."""
    return ViewGroup(
        count=1,
        size=size,
        scale=scale,
        interpolation=interpolation,
        jitter=0.8,
        brightness=(0.6, 1.4),
        contrast=(0.6, 1.4),
        saturation=(1 - saturation, 1 + saturation),
        hue=(-0.1, 0.1),
        gray=0.2,
        blur=blur,
        solarize=solarize,
    )
