"""CutMix and Mixup as the paper's code draws them: boxes, weights, partners, parts, turns."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from fastidmm.batch import ViewGroup
from fastidmm.chance import Counters, Use, philox
from fastidmm.plan import GroupPlan, _partners, cutmix_box, draw, folded

WORDS = philox((torch.arange(100_000), 0, 0, 0), Counters(0).key(Use.MIX))


def group_of(size: int, count: int = 2, alpha: float = 0.5) -> ViewGroup:
    return ViewGroup(count=count, size=size, scale=(0.1, 1.0), mix="cutmix", alpha=alpha)


def mixed(num_rows: int, parts: int, *, count: int = 3, step: int = 0) -> GroupPlan:
    sizes = torch.full((num_rows,), 50)
    groups = [group_of(32, count=1), group_of(33, count=count)]
    plan = draw(
        (sizes, sizes), groups, Counters(2), step=step, batch_size=num_rows, cutmix_groups=parts
    )
    return plan.groups[1]


def part_of_crops(num_rows: int, parts: int, count: int = 3) -> Tensor:
    """Which part each crop is in, by torch's own tensor_split: (C,)."""
    pieces = torch.arange(num_rows).tensor_split(parts)
    part = torch.cat([torch.full((len(piece),), i) for i, piece in enumerate(pieces)])
    return part.repeat(count)


def test_effective_weights_have_the_published_statistics() -> None:
    _, weight = cutmix_box(WORDS, group_of(112))
    kept = weight.double().numpy()
    assert kept.mean() == pytest.approx(0.869, abs=0.002)
    quantiles = np.quantile(kept, [0.05, 0.25, 0.5, 0.75, 0.95])
    np.testing.assert_allclose(quantiles, [0.648, 0.792, 0.895, 0.968, 0.999], atol=0.003)
    assert (kept == 1).mean() == pytest.approx(0.023, abs=0.002)
    assert kept.min() > 0.5


def published_boxes(words: Tensor, size: int) -> Tensor:
    """The paper's code in float64, one draw at a time; Beta(1/2, 1/2) in closed form: (P, 4)."""
    found = []
    for lam_word, y_word, x_word, _ in words.tolist():
        lam = math.sin(math.pi / 2 * ((lam_word >> 16) + 0.5) / 2**16) ** 2
        side = int(size * math.sqrt(1 - max(lam, 1 - lam)))
        box = []
        for centre in (y_word * size >> 32, x_word * size >> 32):
            box.append((max(centre - side // 2, 0), min(centre + side // 2, size)))
        found.append([box[0][0], box[1][0], box[0][1], box[1][1]])
    return torch.tensor(found)


@pytest.mark.parametrize("size", [112, 37, 224, 1])
def test_boxes_are_the_published_codes(size: int) -> None:
    words = WORDS[:3000]
    box, weight = cutmix_box(words, group_of(size))
    expected = published_boxes(words, size)
    # A square root that lies on a whole number may fall either way; none did.
    assert torch.equal(box, expected)
    assert weight.dtype == torch.float32


def test_the_drawn_weight_is_folded_before_the_box_is_cut() -> None:
    """E[max(lambda, 1 - lambda)] = 1/2 + 1/pi, from boxes too large to be clipped at all."""
    size = 1_000_001
    words = WORDS.clone()
    words[:, 1:3] = 1 << 31  # the centre of the image
    box, weight = cutmix_box(words, group_of(size))
    assert float(weight.double().mean()) == pytest.approx(0.5 + 1 / math.pi, abs=0.002)
    assert torch.equal(box[:, 2] - box[:, 0], box[:, 3] - box[:, 1])


@pytest.mark.parametrize("size", [1, 7, 37, 112])
def test_weights_are_the_share_of_pixels_kept(size: int) -> None:
    box, weight = cutmix_box(WORDS[:400], group_of(size))
    place = torch.arange(size)
    for (top, left, bottom, right), kept in zip(box.tolist(), weight, strict=True):
        down, across = (place >= top) & (place < bottom), (place >= left) & (place < right)
        pasted = int((down[:, None] & across).sum())
        assert kept == torch.tensor((size * size - pasted) / (size * size)).float()


@pytest.mark.parametrize(
    ("num_rows", "parts"), [(10, 1), (10, 4), (64, 4), (13, 5), (3, 7), (1, 4), (16, 16)]
)
def test_parts_cut_the_batch_as_tensor_split(num_rows: int, parts: int) -> None:
    plan, part = mixed(num_rows, parts), part_of_crops(num_rows, parts)
    drawn = set()
    for which in part.unique().tolist():
        crops = (part == which).nonzero()[:, 0]
        # Partners are the part's own crops, all views of it, each once.
        assert plan.partner[crops].sort().values.equal(crops)
        shared = plan.box[crops].unique(dim=0)
        assert len(shared) == 1 and len(plan.weight[crops].unique()) == 1
        drawn.add(tuple(shared[0].tolist()))
    assert len(drawn) >= len(part.unique()) - 1  # each part draws its own; two may be empty


def test_partners_come_from_every_view_of_the_part() -> None:
    partners = torch.stack([mixed(4, 2, step=step).partner for step in range(50)])
    reached = [set(column.tolist()) for column in partners.T]
    first = {0, 1, 4, 5, 8, 9}
    assert reached == [first if crop in first else set(range(12)) - first for crop in range(12)]


def test_partners_are_uniform_permutations() -> None:
    words = philox((torch.arange(4800)[:, None], torch.arange(4), 0, 0), (1, 2))
    part = torch.zeros(4, dtype=torch.int64)
    counts: dict[tuple[int, ...], int] = {}
    for four in words:
        order = tuple(_partners(part, four).tolist())
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 24
    assert stats.chisquare(list(counts.values())).pvalue > 1e-4


def test_groups_and_steps_mix_each_in_their_own_way() -> None:
    """Two steps of one epoch, and one of the next."""
    sizes = torch.full((40,), 50)
    alike = [group_of(32), group_of(32)]
    plans = [
        draw((sizes, sizes), alike, Counters(0), step=step, batch_size=20, cutmix_groups=5)
        for step in range(3)
    ]
    ways = [group for plan in plans for group in plan.groups]
    for i, one in enumerate(ways):
        for other in ways[:i]:
            assert not torch.equal(one.partner, other.partner)
            assert not torch.equal(one.weight, other.weight)


def test_without_mixing_every_crop_is_its_own() -> None:
    sizes = torch.full((5,), 50)
    plain = ViewGroup(count=2, size=32, scale=(0.1, 1.0))
    (plan,) = draw((sizes, sizes), [plain], Counters(0), step=0, batch_size=5).groups
    assert plan.partner.tolist() == list(range(10))
    assert not plan.box.any() and bool((plan.weight == 1).all())


# --- Mixup --------------------------------------------------------------------------------------


def test_mixup_weights_are_folded_quantiles_of_the_beta_distribution() -> None:
    """Beta(1/2, 1/2) has a closed form; a weight is that of the crop's part, its box empty."""
    weight = folded(WORDS, group_of(8)).numpy()
    lam = np.sin(np.pi / 2 * ((WORDS[:, 0].numpy() >> 16) + 0.5) / 2**16) ** 2
    np.testing.assert_allclose(weight, np.maximum(lam, 1 - lam), atol=1e-12)
    assert weight.mean() == pytest.approx(0.5 + 1 / math.pi, abs=0.002)
    sizes = torch.full((13,), 50)
    group = replace(group_of(32, count=1), mix="mixup")
    plan = draw((sizes, sizes), [group], Counters(2), step=0, batch_size=13, cutmix_groups=5)
    (mixed_up,) = plan.groups
    part = part_of_crops(13, 5, count=1)
    words = philox((0, 0, 0, torch.arange(5)), Counters(2).key(Use.MIX))
    assert torch.equal(mixed_up.weight, folded(words, group).float()[part])
    assert torch.equal(part[mixed_up.partner], part)
    assert not mixed_up.box.any() and not torch.equal(mixed_up.partner, torch.arange(13))


def test_mixup_and_cutmix_take_turns_by_epoch() -> None:
    """Even epochs, counted from 0, blend; odd ones paste: three steps an epoch here."""
    sizes = torch.full((13,), 50)
    group = replace(group_of(32, count=1), mix="alternate")
    ways = [
        draw((sizes, sizes), [group], Counters(2), step=step, batch_size=5).groups[0].mix
        for step in range(9)
    ]
    assert ways == ["mixup"] * 3 + ["cutmix"] * 3 + ["mixup"] * 3
