"""Label-free measures against plain loops and closed forms, and when a run still rises."""

import math
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from synthetic import assembled, small_store
from test_cli import Type
from test_cli import typed as typed
from torch import Tensor

from fastidmm import augment, quality
from fastidmm.chance import Counters
from fastidmm.plan import draw
from fastidmm.quality import (
    alignment,
    rankme,
    retrieval,
    rising,
    spread,
    two_crops,
    uniformity,
)
from fastidmm.record import Record
from fastidmm.store import Store


def features(num: int, dims: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(1, 2, (num, dims))).float()


def unit(z: Tensor) -> NDArray[np.float64]:
    rows: NDArray[np.float64] = z.double().numpy()
    scaled: NDArray[np.float64] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return scaled


def test_spread_is_distance_from_the_mean_over_length() -> None:
    assert spread(torch.tensor([[3.0, 4.0], [3.0, -4.0]])) == pytest.approx(4 / 5)
    assert spread(torch.full((7, 3), 2.5)) == 0 and spread(torch.zeros(4, 2)) == 0
    assert spread(torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]])) == 1


@pytest.mark.parametrize(("num", "dims"), [(40, 7), (7, 40), (13, 13), (1, 5)])
def test_rankme_is_the_entropy_of_singular_values(num: int, dims: int) -> None:
    z = features(num, dims)
    values = np.linalg.svd(z.double().numpy(), compute_uv=False)
    shares = values / values.sum()
    assert rankme(z) == pytest.approx(math.exp(-(shares * np.log(shares)).sum()), rel=1e-6)


def test_rankme_of_what_is_known() -> None:
    assert rankme(3 * torch.eye(6)) == pytest.approx(6)
    assert rankme(torch.ones(9, 1) @ torch.arange(1.0, 5)[None]) == pytest.approx(1, abs=1e-5)
    assert rankme(torch.zeros(4, 3)) == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_of_features_that_are_not_finite_no_measure_is_an_error(bad: float) -> None:
    z = features(9, 5)
    z[3, 2] = bad
    found = [rankme(z), spread(z), uniformity(z), alignment(z, features(9, 5))]
    assert all(math.isnan(each) for each in found) and 0 <= retrieval(z, z) <= 1


@pytest.mark.parametrize("num", [2, 5, 33])
def test_uniformity_is_over_all_pairs(num: int) -> None:
    z = features(num, 6)
    potentials = [
        math.exp(-2 * ((one - other) ** 2).sum()) for one, other in combinations(unit(z), 2)
    ]
    assert uniformity(z) == pytest.approx(math.log(np.mean(potentials)), rel=1e-6)
    assert uniformity(torch.full((num, 4), 0.5)) == pytest.approx(0, abs=1e-9)


def test_uniformity_of_many_is_of_some(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "MOST_PAIRS", 8)
    z = features(20, 6)
    assert uniformity(z) == uniformity(z[::3]) != uniformity(z[:8])


def test_alignment_and_retrieval_of_two_crops() -> None:
    one, other = features(9, 5), features(9, 5, seed=1)
    a, b = unit(one), unit(other)
    assert alignment(one, other) == pytest.approx(((a - b) ** 2).sum(axis=1).mean(), rel=1e-6)
    found = [int(np.argmax(b @ row)) == number for number, row in enumerate(a)]
    assert retrieval(one, other) == pytest.approx(np.mean(found))
    assert retrieval(one, 5 * one) == 1 and alignment(one, 5 * one) == pytest.approx(0, abs=1e-6)
    swapped = one[[1, 0, *range(2, 9)]]
    assert retrieval(one, swapped) == pytest.approx(7 / 9)


class Pixels(torch.nn.Module):
    """A backbone that gives back what it sees."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)


@pytest.mark.parametrize("most", [256, 3])
def test_two_crops_are_training_s_unmixed(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan's own crops, of an epoch that no training has, of images at even distances."""
    monkeypatch.setattr(quality, "MOST_PAIRED", most)
    monkeypatch.setattr(quality, "NO_EPOCH", 0)
    monkeypatch.setattr(quality, "views", augment_render)
    method, loader = assembled("idmm", num=7)
    store, group = loader.store, replace(method.views[0], mix="none")
    found = two_crops(Pixels(), store, method.views[0], 1, torch.float32)
    plan = draw((store.height, store.width), [group], Counters(1), step=0, batch_size=7)
    pixels = augment.render(store, plan.groups[0], group).flatten(1)
    rows = list(range(7)) if most > 7 else [0, 3, 6]
    place = [plan.rows.tolist().index(row) for row in rows]
    for view, ours in enumerate(found):
        torch.testing.assert_close(ours, pixels[7 * view :][place], rtol=0, atol=1e-5)


def augment_render(store: Store, plan: object, group: object, _: torch.dtype) -> Tensor:
    return augment.render(store, plan, group)  # type: ignore[arg-type]


def test_no_training_meets_the_crops_that_are_measured() -> None:
    """Nor one of a thousand million epochs."""
    assert 10**9 <= quality.NO_EPOCH < 2**32


def test_two_crops_of_pixels_out_of_reach() -> None:
    """Those that the device cannot read are brought to it: the same crops, drawn by their rows."""

    class Far(Store):
        readable = False

    near = small_store(7)
    far = Far(**{name: getattr(near, name) for name in Store.__dataclass_fields__})
    method, _ = assembled("idmm", num=7)
    pairs = [two_crops(Pixels(), s, method.views[0], 3, torch.float32) for s in (near, far)]
    for one, other in zip(*pairs, strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(*pairs[0])


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([0.1] * 6 + [0.2, 0.21, 0.22, 0.23, 0.24, 0.25], 0.5),
        ([0.1] * 4 + [0.2, 0.21, 0.22, 0.23], 0.5),
        ([0.1, 0.2, 0.3, 0.31, 0.32, 0.33], None),  # three in the later half
        ([0.3] * 12, None),
        ([0.3] * 6 + [0.30, 0.36, 0.29, 0.35, 0.28, 0.36], None),  # up and down
        # 2.2 standard errors of a slope, whose four points leave two to tell them by.
        ([0.1] * 4 + [0.20, 0.27, 0.24, 0.32], None),
        ([0.5] * 6 + [0.4, 0.39, 0.38, 0.37, 0.36, 0.35], None),
        ([0.1] * 6 + [0.2, 0.20001, 0.20002, 0.20003, 0.20004, 0.20005], None),  # too little
        ([], None),
    ],
)
def test_what_still_rises(scores: list[float], expected: float | None) -> None:
    found = rising([(2.0 * number, score) for number, score in enumerate(scores)])
    assert found == (expected if expected is None else pytest.approx(expected))


def test_a_run_says_what_it_measured_and_that_it_rises(
    typed: Type, toy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastidmm.stages.rising", lambda points: len(points) / 1000)
    words = f"pretrain --dataset {toy} --backbone vit_micro --run run --resolution 16 --epochs 3"
    status, out, _ = typed(*words.split(), "--set", "run.knn_every=1")
    assert status == 0
    assert "knn top1 still rises 0.3 points per 100 epochs: --epochs 6 may do better" in out
    lines = [line for line in Record(Path("runs/run")).metrics() if "spread" in line]
    for line in lines:
        assert 1 <= line["rankme"] <= 20 and -4.1 < line["uniformity"] <= 0
        assert 0 <= line["alignment"] <= 4 and 0 <= line["retrieval_top1"] <= 1
