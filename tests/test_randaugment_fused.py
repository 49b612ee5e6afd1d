"""RandAugment's two kernels in Triton's interpreter, against the definition."""

import itertools

import pytest
import torch
from synthetic import photograph
from torch import Tensor

pytest.importorskip("triton", reason="Triton has wheels for Linux alone")

from fastidmm.kernels import randaugment as kernel
from fastidmm.randaugment import LEVELS, NONE, OPERATIONS

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU, tests/gpu/ runs them compiled"),
    # The interpreter computes lanes that are masked, whatever they hold.
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
]


def crops(num: int, size: int) -> Tensor:
    """Photographs; of every four one is dark with a narrow range, and one of a single colour."""
    pictures = torch.stack([torch.from_numpy(photograph(size, size, i)) for i in range(num)])
    pictures[2::4] = pictures[2::4] // 5 + 40
    pictures[3::4] = torch.tensor([7, 200, 255], dtype=torch.uint8)
    return pictures.float() / 255


def everything(size: int) -> tuple[Tensor, ...]:
    """Every operation and sign, some levels, one crop each, in one turn."""
    drawn = list(itertools.product(range(NONE + 1), (1, 4, LEVELS), (False, True)))
    operation, level, negative = (torch.tensor(part)[:, None] for part in zip(*drawn, strict=True))
    spot = torch.arange(2 * len(drawn)).view(-1, 1, 2) * 7 % size
    return operation, level, negative, spot


# One pixel; no room for a filter; several blocks of each program, the last of them short.
@pytest.mark.parametrize("size", [1, 2, 17, 37])
def test_operations_are_the_definitions(size: int) -> None:
    drawn = everything(size)
    # Neighbours in the batch are of one operation: each gets every kind of picture.
    x = crops(len(drawn[0]), size)
    ours, theirs = kernel.fused(x.clone(), *drawn), kernel.reference(x.clone(), *drawn)
    apart = (ours - theirs).abs().flatten(1).amax(1) * 255
    for i, name in enumerate((*OPERATIONS, "none")):
        assert float(apart[drawn[0][:, 0] == i].max()) < 1e-3, name
    assert torch.equal(ours[drawn[0][:, 0] == NONE], x[drawn[0][:, 0] == NONE])


def test_operations_come_in_their_order() -> None:
    """Two by two; what lies between levels after the first is rounded as defined."""
    # Each with every fourth, so that every operation is first and second; not contiguous.
    pairs = torch.cartesian_prod(torch.arange(len(OPERATIONS)), torch.arange(len(OPERATIONS)))[::4]
    num, size = len(pairs), 19
    level = 1 + torch.arange(2 * num).view(-1, 2) % LEVELS
    negative, spot = level % 2 == 0, torch.full((num, 2, 2), 11)
    x = crops(num, size)
    ours = kernel.fused(x.clone(), pairs, level, negative, spot)
    theirs = kernel.reference(x.clone(), pairs, level, negative, spot)
    apart = (ours - theirs).abs() * 255
    # What is at a half level may be a level apart, which posterize may make sixteen.
    assert float(apart.mean()) < 0.01 and float((apart > 0.01).float().mean()) < 0.001
    assert float(apart.max()) < 17
    assert torch.equal(kernel.fused(x[:0], pairs[:0], level[:0], negative[:0], spot[:0]), x[:0])


def test_half_precision_is_near() -> None:
    """Levels are told from one another by 11 bits; a blend is rounded to them."""
    drawn = everything(17)
    x = crops(len(drawn[0]), 17)
    ours, theirs = kernel.fused(x.half(), *drawn), kernel.reference(x.clone(), *drawn)
    assert ours.dtype == torch.float16
    assert float((ours.float() - theirs).abs().max()) * 255 < 0.25


def test_a_cpu_has_the_definition() -> None:
    drawn = everything(17)
    x = crops(len(drawn[0]), 17)
    assert torch.equal(kernel.randaugment(x.clone(), *drawn), kernel.reference(x.clone(), *drawn))
