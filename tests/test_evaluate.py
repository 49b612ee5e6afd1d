"""Evaluation against slow and certain ways to the same numbers."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import logsumexp
from synthetic import photograph, small_store, store_of
from torch import Tensor, nn
from torch.nn.functional import normalize, one_hot
from torch.utils._python_dispatch import TorchDispatchMode
from toy_runs import recipe

from fastidmm.assemble import assemble, training_rows
from fastidmm.augment import render_plain
from fastidmm.errors import NumericalError
from fastidmm.evaluate import (
    PLAIN,
    Score,
    evaluating,
    knn,
    linear_probe,
    measured,
    outputs,
    score,
)
from fastidmm.interrupt import Stop
from fastidmm.plan import central_crops
from fastidmm.record import Record
from fastidmm.store import Store
from fastidmm.train import features_seen


def clusters(num: int, dims: int, classes: int, seed: int, spread: float) -> tuple[Tensor, Tensor]:
    """Features around one centre per class, and the classes; overlapping when spread is wide."""
    random = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, dims, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(classes, (num,), generator=random)
    noise = torch.randn(num, dims, generator=random)
    return centres[labels] + spread * noise, labels


# --- kNN ----------------------------------------------------------------------------------------


def naive_knn(
    train: Tensor, labels: Tensor, test: Tensor, num_classes: int, *, own: bool = False
) -> list[int]:
    """Wu et al. one query at a time, in float64: 20 neighbours, exp(cosine / 0.07)."""
    bank, found = train.double().numpy(), []
    for i, query in enumerate(test.double().numpy()):
        scored = [
            (float(row @ query / np.linalg.norm(row) / np.linalg.norm(query)), int(label))
            for j, (row, label) in enumerate(zip(bank, labels, strict=True))
            if not (own and i == j)
        ]
        votes = [0.0] * num_classes
        for similarity, label in sorted(scored, reverse=True)[:20]:
            votes[label] += float(np.exp(similarity / 0.07))
        found.append(int(np.argmax(votes)))
    return found


@pytest.mark.parametrize("num", [2, 19, 20, 21, 60])
def test_knn_is_the_naive_one(num: int) -> None:
    train, labels = clusters(num, 6, 5, 1, 2.0)
    test, _ = clusters(40, 6, 5, 2, 2.0)
    assert knn(train, labels, test, 5).argmax(dim=1).tolist() == naive_knn(train, labels, test, 5)
    left_out = knn(train, labels, train, 5, own=True).argmax(dim=1)
    assert left_out.tolist() == naive_knn(train, labels, train, 5, own=True)


def test_the_memory_of_a_vote_does_not_grow_with_the_bank() -> None:
    """Votes are as by a table of every image's class, to the bit, and no such table is made."""
    train, labels = clusters(3000, 6, 50, 1, 2.0)
    test, _ = clusters(40, 6, 50, 2, 2.0)
    similar, rows = (normalize(test, dim=1) @ normalize(train, dim=1).T).topk(20, dim=1)
    weights = torch.exp((similar - 1) / 0.07)[..., None]
    expected = (one_hot(labels, 50).float()[rows] * weights).sum(dim=1)
    with Watched() as watched:
        assert torch.equal(knn(train, labels, test, 50), expected)
    assert watched.largest < 3000 * 50


def test_confusions_are_read_at_once() -> None:
    """A GPU would be waited for at each number."""
    logits, labels = torch.eye(30)[torch.arange(30).roll(1)], torch.arange(30)
    with Watched() as watched:
        assert len(measured(logits, labels)["confusion"]) == 30
    assert watched.asked < 10


class Watched(TorchDispatchMode):
    """The most numbers in one tensor that an operation makes, and single ones asked for."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.largest = self.asked = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor):
            self.largest = max(self.largest, made.numel())
        self.asked += func is torch.ops.aten._local_scalar_dense.default
        return made


def test_leaving_one_out_crosses_chunks() -> None:
    """Every row is a class of its own and has a twin, which is found unless it finds itself."""
    base = torch.randn(600, 8, generator=torch.Generator().manual_seed(0))
    train = torch.cat((base, base + 1e-4))  # 1200 rows, more than are compared at once
    labels = torch.arange(1200)
    found = knn(train, labels, train, 1200, own=True).argmax(dim=1)
    assert found.tolist() == [*range(600, 1200), *range(600)]


def test_the_knn_of_a_metric_line_leaves_each_image_out(toy: str) -> None:
    """Of ten pictures of a colour, five are of each class: nine others outvote every one."""
    asked = recipe(loader="resident")
    parts = assemble(Record.create(Path("runs/run"), asked, training_rows(asked)))
    parts.store = replace(parts.store, label=torch.arange(20) % 2)
    labels, encoder = parts.store.label, parts.method.backbone_for_export()
    features = outputs(encoder, parts.store, resolution=16, dtype=torch.float32)
    left_out, with_own = (
        sum(found == label for found, label in zip(votes, labels.tolist(), strict=True)) / 20
        for votes in (naive_knn(features, labels, features, 2, own=own) for own in (True, False))
    )
    assert features_seen(parts, Stop())["knn_top1"] == left_out < with_own


# --- linear probe -------------------------------------------------------------------------------


def best_probe(train: Tensor, labels: Tensor, num_classes: int) -> NDArray[np.float64]:
    """The minimum of the same objective by scipy in float64: (classes, D + 1), bias last."""
    x = train.double().numpy()
    x = (x - x.mean(axis=0)) / x.std(axis=0, ddof=1)
    targets = np.eye(num_classes)[labels.numpy()]

    def objective(flat: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        w = flat.reshape(num_classes, -1)
        logits = x @ w[:, :-1].T + w[:, -1]
        lse = logsumexp(logits, axis=1, keepdims=True)
        fit = float((lse[:, 0] - (logits * targets).sum(axis=1)).mean())
        wrong = (np.exp(logits - lse) - targets) / len(x)
        gradient = np.hstack((wrong.T @ x + 1e-2 * w[:, :-1], wrong.sum(axis=0)[:, None]))
        return fit + 0.5e-2 * float((w[:, :-1] ** 2).sum()), gradient.ravel()

    start = np.zeros(num_classes * (x.shape[1] + 1))
    options = {"maxiter": 2000, "gtol": 1e-9, "ftol": 1e-15}
    found = minimize(objective, start, jac=True, method="L-BFGS-B", options=options)
    best: NDArray[np.float64] = found.x.reshape(num_classes, -1)
    return best


def test_the_linear_probe_finds_the_minimum() -> None:
    train, labels = clusters(120, 7, 4, 1, 1.5)
    train = train * torch.logspace(-2, 2, 7) + 5  # features of very different scales
    test, _ = clusters(400, 7, 4, 2, 1.5)
    test = test * torch.logspace(-2, 2, 7) + 5
    with torch.inference_mode():  # as `outputs` gives them
        given = train.clone(), labels, test.clone()
    best = best_probe(train, labels, 4)
    mean, deviation = train.double().mean(dim=0), train.double().std(dim=0)
    logits = ((test.double() - mean) / deviation).numpy() @ best[:, :-1].T + best[:, -1]
    margin = np.sort(logits, axis=1)[:, -1] - np.sort(logits, axis=1)[:, -2]
    clear = margin > 0.02  # beside a boundary float32 may fall either way
    assert clear.mean() > 0.95
    before = torch.get_rng_state()
    found = linear_probe(*given, 4).argmax(dim=1).numpy()
    assert torch.equal(torch.get_rng_state(), before)
    assert (found == logits.argmax(axis=1))[clear].all()


def test_the_linear_probe_goes_on_until_it_is_there() -> None:
    """Features that nearly agree: twenty iterations leave the logits 0.2 off, fifty 0.002."""
    (train, labels), (test, _) = (clusters(200, 24, 4, seed, 1.5) for seed in (1, 2))
    train, test = (x + 20 * x.mean(dim=1, keepdim=True) for x in (train, test))
    best = best_probe(train, labels, 4)
    mean, deviation = train.double().mean(dim=0), train.double().std(dim=0)
    logits = ((test.double() - mean) / deviation).numpy() @ best[:, :-1].T + best[:, -1]
    found = linear_probe(train, labels, test, 4).double().numpy()
    np.testing.assert_allclose(found, logits, rtol=0, atol=0.01)


def test_the_linear_probe_survives_features_without_spread() -> None:
    train, labels = clusters(60, 4, 3, 1, 0.1)
    train[:, 2] = 7.0
    assert score(linear_probe(train, labels, train, 3), labels).value == 1


def test_a_class_without_a_vote_is_not_among_the_first_five() -> None:
    """Of seven classes one has a vote: the four beside it in a list are there by chance."""
    votes, labels = torch.zeros(7, 7), torch.arange(7)
    votes[:, 3] = 0.5
    found = measured(votes, labels, votes=True)
    assert found["correct"] == found["top5"]["correct"] == 1
    assert measured(votes, labels)["top5"]["correct"] == 5  # as logits may be 0


def test_what_is_not_finite_is_not_scored() -> None:
    train, labels = clusters(60, 4, 3, 1, 0.1)
    bad = train.clone()
    bad[7, 1] = torch.inf
    for given in ((bad, labels, train), (train, labels, bad)):
        with pytest.raises(NumericalError, match="is not finite, and cannot be scored: train anew"):
            linear_probe(*given, 3)
    with pytest.raises(NumericalError, match="is not finite"):
        measured(bad, labels)


# --- scores -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("correct", "num", "low", "high"),
    [
        (8, 10, 0.4902, 0.9433),
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (81, 263, 0.2553, 0.3662),  # Newcombe, Statistics in Medicine 1998, table I
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_intervals_are_wilsons(correct: int, num: int, low: float, high: float) -> None:
    assert Score(correct, num).interval == pytest.approx((low, high), abs=6e-5)


@pytest.mark.parametrize("num", [1, 8, 30, 1000])
def test_intervals_are_of_shares(num: int) -> None:
    none, every = Score(0, num), Score(num, num)
    assert str(none).startswith("0.0 % [0.0, ") and str(every).endswith(", 100.0]")
    assert none.interval[0] >= 0 and every.interval[1] <= 1


def test_scores_count_right_answers() -> None:
    found = score(torch.eye(4)[[1, 2, 3, 3]], torch.tensor([1, 2, 0, 3]))
    assert (found.correct, found.num, found.value) == (3, 4, 0.75)
    assert str(found) == "75.0 % [30.1, 95.4]"
    assert found.as_dict() == {
        "correct": 3,
        "num": 4,
        "value": 0.75,
        "interval": list(found.interval),
    }


def test_measures_against_counting_by_hand() -> None:
    """700 answers over 7 classes: top-1, top-5, classes and mistakes, one answer at a time."""
    random = np.random.default_rng(0)
    logits = torch.from_numpy(random.permuted(np.arange(4900.0).reshape(700, 7), axis=1))
    labels = torch.from_numpy(random.integers(0, 6, 700))  # no image of the last class
    found = measured(logits, labels)
    ranks = [
        sorted(range(7), key=lambda c: -values[c]).index(label)
        for values, label in zip(logits.tolist(), labels.tolist(), strict=True)
    ]
    assert found["correct"] == ranks.count(0) and found["num"] == 700
    assert found["top5"]["correct"] == sum(rank < 5 for rank in ranks)
    rows = list(zip(labels.tolist(), ranks, strict=True))
    by_class = [[rows.count((c, 0)), sum(label == c for label, _ in rows)] for c in range(7)]
    assert found["per_class"] == by_class and by_class[6] == [0, 0]
    taken = list(zip(labels.tolist(), logits.argmax(dim=1).tolist(), strict=True))
    wrong = Counter((true, other) for true, other in taken if true != other)
    assert {(true, other): n for true, other, n in found["confusion"]} == wrong
    counts = [n for _, _, n in found["confusion"]]
    assert counts == sorted(counts, reverse=True)
    assert measured(logits[:, :5], labels.clamp(max=4))["top5"] is None


# --- outputs ------------------------------------------------------------------------------------


class Means(nn.Module):
    """The mean of each channel; says whether it was asked to train or to keep gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, images: Tensor) -> Tensor:
        assert not self.training and torch.is_inference_mode_enabled()
        self.shapes.append(tuple(images.shape))
        return images.mean(dim=(2, 3))


@pytest.mark.parametrize("num", [1, 7, 300])
def test_outputs_come_in_the_stores_order(num: int) -> None:
    """Row by row the central crop: shorter side to 256/224 of the resolution."""
    images = [photograph(16 + r % 5, 18 + r % 7, r) for r in range(num)]
    store, model = store_of(images), Means().train()
    found = outputs(model, store, resolution=28, dtype=torch.float32)
    assert found.shape == (num, 3) and found.dtype == torch.float32
    assert model.training
    assert sum(shape[0] for shape in model.shapes) == num
    assert {shape[1:] for shape in model.shapes} == {(3, 28, 28)}
    for row in {0, num // 2, num - 1}:
        one = torch.tensor([row])
        crop = central_crops(one, store.height[one], store.width[one], size=28, resize=32)
        expected = render_plain(store, crop, PLAIN).mean(dim=(2, 3))
        # A resize rounds to 8 bits on a CPU, which a mean over pixels hardly shows.
        torch.testing.assert_close(found[one], expected, rtol=0, atol=2e-3)
    assert num == 1 or not torch.allclose(found[0], found[-1], atol=1e-3)


def test_pixels_out_of_reach_are_brought_part_by_part() -> None:
    """As a GPU needs it of pixels that are not pinned; 300 images are more than a part."""

    class Far(Store):
        readable = False

    near = small_store(300)
    far = Far(**{name: getattr(near, name) for name in Store.__dataclass_fields__})
    asked: dict[str, Any] = {"resolution": 28, "dtype": torch.float32}
    assert torch.equal(outputs(Means(), far, **asked), outputs(Means(), near, **asked))


def test_outputs_follow_the_precision_asked_for() -> None:
    store = small_store(3)
    model = nn.Sequential(Means(), nn.Linear(3, 4))
    full = outputs(model, store, resolution=28, dtype=torch.float32)
    half = outputs(model, store, resolution=28, dtype=torch.bfloat16)
    assert half.dtype == torch.float32
    assert not torch.equal(full, half) and torch.allclose(full, half, atol=0.05)


def test_crops_are_rendered_in_full_precision_whatever_the_model_computes_in() -> None:
    seen = []

    class Seeing(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            seen.append(images)
            return images.mean(dim=(2, 3))

    store = small_store(3)
    for dtype in (torch.float32, torch.bfloat16):
        outputs(Seeing(), store, resolution=28, dtype=dtype)
    assert seen[1].dtype == torch.float32 and torch.equal(seen[0], seen[1])


def test_evaluating_restores_the_mode_it_found() -> None:
    for mode in (True, False):
        model = nn.Linear(1, 1).train(mode)
        with pytest.raises(RuntimeError, match="on purpose"), evaluating(model):
            assert not model.training
            raise RuntimeError("on purpose")
        assert model.training == mode
