"""SimCLR and SupCon: the loss and its gradients by its formula, and what they see."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from synthetic import assembled, small_store
from torch import Tensor
from torch.nn.functional import cross_entropy

from fastidmm import stages
from fastidmm.assemble import training_rows
from fastidmm.batch import Batch, Loss, forward_groups
from fastidmm.bench.training import assembled as assembled_parts
from fastidmm.datasets.folder import Folder
from fastidmm.errors import DataError, UsageError
from fastidmm.loaders.planned import Planned
from fastidmm.methods.contrast import Contrast, contrastive
from fastidmm.methods.simclr import SimCLR
from fastidmm.preparing.prepare import prepare
from fastidmm.recipe import Recipe
from fastidmm.record import Record
from fastidmm.registry import METHODS, find
from fastidmm.reporting import report
from fastidmm.step import backward

MakePhotos = Callable[..., Path]
Example = tuple[Tensor, Tensor, float]


def truth(z: Tensor, kinds: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Khosla et al., equation 2, crop by crop; and whether the nearest other is alike."""
    u = z / z.norm(dim=1, keepdim=True)
    losses, hits = [], []
    for i in range(len(u)):
        others = [a for a in range(len(u)) if a != i]
        s = torch.stack([u[i] @ u[a] / temperature for a in others])
        logs = s - s.max() - (s - s.max()).exp().sum().log()
        likes = [k for k, a in enumerate(others) if kinds[a] == kinds[i]]
        losses.append(-logs[likes].mean())
        hits.append(bool(kinds[others[int(s.argmax())]] == kinds[i]))
    return torch.stack(losses), torch.tensor(hits)


def crops(num: int, width: int = 5, *, seed: int = 0, length: float = 1.0) -> Tensor:
    """Projections of `num` images, two crops of each: (2 num, width) float64."""
    chance = torch.Generator().manual_seed(seed)
    return length * torch.randn(2 * num, width, generator=chance, dtype=torch.float64)


def pairs(num: int) -> Tensor:
    return torch.arange(num).repeat(2)


EXAMPLES: dict[str, Example] = {
    "one image": (crops(1), pairs(1), 0.5),
    "one dimension": (crops(4, 1), pairs(4), 0.5),
    "odd": (crops(7), pairs(7), 0.5),
    "classes": (crops(9), torch.tensor([3, 0, 3, 3, 1, 0, 3, 1, 7]).repeat(2), 0.5),
    "one class": (crops(5), torch.zeros(10, dtype=torch.int64), 0.5),
    "large logits": (crops(6), pairs(6), 1e-4),
    "long": (crops(6, length=1e8), pairs(6), 0.5),
    "short": (crops(6, length=1e-6), pairs(6), 0.5),
    "nearly equal": (1 + crops(6, length=1e-3), pairs(6), 0.1),
}


@pytest.mark.parametrize("name", list(EXAMPLES))
def test_losses_and_gradients_are_the_formulas(name: str) -> None:
    z, kinds, temperature = EXAMPLES[name]
    weight = torch.linspace(0.5, 2, len(z), dtype=torch.float64)
    ours, theirs = (z.clone().requires_grad_() for _ in range(2))
    losses, hits = contrastive(ours, kinds, temperature)
    expected, alike = truth(theirs, kinds, temperature)
    (losses * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(losses, expected, rtol=1e-10, atol=1e-10)
    assert torch.equal(hits, alike)
    assert ours.grad is not None and theirs.grad is not None
    # What rounding leaves where gradients cancel is in proportion to this.
    scale = float(1 / (temperature * z.norm(dim=1).min()))
    off = float((ours.grad - theirs.grad).norm())
    assert off <= 1e-9 * float(theirs.grad.norm()) + 1e-13 * scale
    rounded, _ = contrastive(z.float(), kinds, temperature)
    torch.testing.assert_close(rounded.double(), expected, rtol=1e-4, atol=1e-6 / temperature)


def test_gradients_in_float32_are_close() -> None:
    z, kinds, temperature = EXAMPLES["classes"]
    gradients = []
    for dtype in (torch.float32, torch.float64):
        own = z.to(dtype).requires_grad_()
        contrastive(own, kinds, temperature)[0].mean().backward()
        assert own.grad is not None
        gradients.append(own.grad.double())
    assert float((gradients[0] - gradients[1]).norm() / gradients[1].norm()) < 1e-5


@pytest.mark.parametrize("z", [torch.ones(6, 4), torch.zeros(6, 4)])
def test_equal_features_lose_the_logarithm_of_the_others(z: Tensor) -> None:
    z = z.clone().requires_grad_()
    losses, _ = contrastive(z, pairs(3), 0.5)
    torch.testing.assert_close(losses, torch.full((6,), 5.0).log())
    losses.mean().backward()
    assert z.grad is not None and bool(torch.isfinite(z.grad).all())


@pytest.mark.parametrize("num", [1, 2, 5, 16])
def test_it_is_ntxent_where_a_crop_has_one_like(num: int) -> None:
    """SimCLR's own form: cross-entropy of each crop over all others, its other view the target."""
    z = crops(num)
    u = z / z.norm(dim=1, keepdim=True)
    logits = u @ u.T / 0.5 - torch.diag(torch.full((2 * num,), 1e9, dtype=torch.float64))
    expected = cross_entropy(logits, torch.arange(2 * num).roll(num))
    assert float(contrastive(z, pairs(num), 0.5)[0].mean()) == pytest.approx(float(expected))


# --- the methods --------------------------------------------------------------------------------


def method_of(name: str) -> tuple[Contrast, Batch]:
    method, loader = assembled(name, drop_path=0.0)
    assert isinstance(method, Contrast)
    return method, loader.batch(0)


@pytest.mark.parametrize("name", ["simclr", "supcon"])
def test_methods_attract_images_or_classes(name: str) -> None:
    method, batch = method_of(name)
    (views,) = batch.groups
    assert len(views.rows) == 14 and len(set(views.rows.tolist())) == 7
    assert bool((views.weights == 1).all())
    z = method.projector(method.backbone(views.pixels)).detach().double()
    expected, hits = truth(z, views.rows if name == "simclr" else views.labels, 0.5)
    found = method(batch)
    assert found.total.item() == pytest.approx(expected.mean().item(), rel=1e-5)
    assert found.parts["contrast_top1"].item() == pytest.approx(hits.double().mean().item())


def test_supcon_of_classes_of_one_image_is_simclr() -> None:
    """To the bit, gradients too."""
    supcon, batch = method_of("supcon")
    simclr, _ = method_of("simclr")
    simclr.projector = supcon.projector
    assert float(supcon(batch).total.detach()) != float(simclr(batch).total.detach())
    batch.groups[0].labels.copy_(batch.groups[0].rows)
    losses, gradients = [], []
    for method in (supcon, simclr):
        method.zero_grad(set_to_none=True)
        loss = method(batch).total
        loss.backward()
        losses.append(loss.detach())
        gradients.append([p.grad for p in method.parameters()])
    assert torch.equal(*losses)
    for one, other in zip(*gradients, strict=True):
        assert one is not None and other is not None and torch.equal(one, other)


def test_projectors_are_as_wide_as_published() -> None:
    for name, dim in (("simclr", 128), ("supcon", 256)):
        shapes = [tuple(p.shape) for p in method_of(name)[0].projector.parameters()]
        assert shapes == [(128, 128), (128,), (dim, 128), (dim,)]


def test_the_loss_is_in_float32_under_autocast() -> None:
    method, batch = method_of("simclr")
    (views,) = batch.groups
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        loss = method(batch).total
        z = method.projector(method.backbone(views.pixels))
    assert z.dtype == torch.bfloat16 and loss.dtype == torch.float32
    expected, _ = truth(z.double(), views.rows, 0.5)
    assert loss.item() == pytest.approx(expected.mean().item(), rel=1e-5)


# --- runs ---------------------------------------------------------------------------------------


def recipe(name: str, **run: object) -> Recipe:
    told = {
        "dataset": "toy", "method": name, "backbone": "vit_micro", "epochs": 2, "resolution": 16,
        "device": "cpu", **run,
    }  # fmt: skip
    return Recipe.of({"run": told})


@pytest.mark.parametrize("name", ["simclr", "supcon"])
def test_settings_are_the_papers_unless_told_otherwise(name: str) -> None:
    found = recipe(name, backbone="pvtv2_b0")
    assert (found.run.batch_size, found.optim.lr, found.optim.weight_decay) == (512, 5e-4, 1e-3)
    assert found.optim.warmup_epochs == 0.5
    assert recipe(name, batch_size=8).run.batch_size == 8
    assert Recipe.of(found.tables()) == found


@pytest.mark.parametrize(("rates", "lr"), [({}, 1e-3), ({"lr": 2e-4}, 2e-4)])
def test_fine_tuning_is_the_same_after_every_method(
    rates: dict[str, float], lr: float, toy: str
) -> None:
    """At the backbone's own rate, not the method's; a rate that was given goes on."""
    tables = recipe("simclr", backbone="pvtv2_b0").tables()
    told = Recipe.of({**tables, "optim": {**tables["optim"], **rates}})
    record = Record.create(Path("runs/run"), told, training_rows(told))
    assert record.recipe.optim.lr == rates.get("lr", 5e-4)
    assert Recipe.of(stages.finetune_tables(record, pretrained=False)).optim.lr == lr


def test_supcon_learns_from_labels_and_is_not_judged_on_test_images(toy: str) -> None:
    """It needs labels and learns no classes: no test image is looked at."""
    found = stages.pretrain(recipe("supcon", score_every=1), "run")
    lines = Record(Path("runs/run")).metrics()
    assert len(lines) == 2 and not any("test_top1" in line for line in lines)
    assert 0 <= found["contrast_top1"] <= 1 and "test_top1" not in found


@pytest.mark.parametrize(("name", "learns"), [("simclr", False), ("supcon", True)])
def test_reports_have_the_curve_and_say_what_learnt_from_labels(
    name: str, learns: bool, toy: str
) -> None:
    stages.pretrain(recipe(name), "run")
    page = report.write(Path("runs/run")).read_text()
    assert "Contrast top-1" in page
    assert ("learnt from the labels" in page) == learns


def test_supcon_without_labels_is_refused(home: Path, photos: MakePhotos) -> None:
    place = photos(home.parent / "photos", per_class=4, classes=1) / "class0"
    prepare(Folder().open(from_=place, seed=0), "toy", workers=0, quiet=True)
    with pytest.raises(DataError, match="have no labels"):
        stages.pretrain(recipe("supcon"), "run")


class Twins(SimCLR):
    """A method whose crops see each other, of two groups and one view in each."""

    def __init__(self, *given: Any, **shape: Any) -> None:
        super().__init__(*given, **shape)
        group = replace(self.views[0], count=1)
        self.views = [group, replace(group, scale=(0.05, 0.3))]

    def features(self, batch: Batch) -> Tensor:
        """Group after group."""
        features: Tensor = self.projector(torch.cat(forward_groups(self.backbone, batch.groups)))
        return features

    def loss_of(self, features: Tensor, batch: Batch) -> Loss:
        """Each crop beside the other of its image: their order matters."""
        kinds = torch.cat([views.rows for views in batch.groups])
        losses, _ = contrastive(features.float(), kinds, self.temperature)
        return Loss((losses * torch.arange(1, len(losses) + 1)).sum() / len(losses))


APART = [name for name in METHODS if find("method", name).features_first]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", [*APART, "twins"])
@pytest.mark.parametrize("num", [2, 3, 5, 14, 40])
def test_micro_batches_have_the_gradient_of_the_batch(
    name: str, num: int, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drop-path on; parts that cut between views, of one crop, and empty ones."""
    monkeypatch.setitem(METHODS, "twins", f"{__name__}:Twins")
    run = {
        "dataset": "made", "method": name, "backbone": "vit_micro", "resolution": 16, "epochs": 1,
        "loader": "resident", "device": "cpu", "precision": precision,
    }  # fmt: skip
    made = assembled_parts({"run": run, "backbone": {"drop_path": 0.3}}, small_store(7), tmp_path)
    assert isinstance(made.loader, Planned) and made.state.micro_batches == 1
    batch = made.loader.batch(0)
    losses, gradients = [], []
    for cut in (1, num):
        made.state.micro_batches = cut
        losses.append(backward(made, batch))
        grads = [p.grad for p in made.method.parameters()]
        gradients.append(torch.cat([g.flatten() for g in grads if g is not None]))
        assert len(gradients[-1]) == sum(p.numel() for p in made.method.parameters())
        made.optimizer.zero_grad(set_to_none=True)
    whole, parts = losses
    close = 1e-5 if precision == "fp32" else 2e-2
    assert parts.total.item() == pytest.approx(whole.total.item(), rel=close)
    assert parts.parts.keys() == whole.parts.keys()
    off = float((gradients[1] - gradients[0]).norm() / gradients[0].norm())
    assert off < (1e-5 if precision == "fp32" else 5e-2), off


def test_micro_batches_over_batchnorm_are_refused(toy: str) -> None:
    told = recipe("simclr", backbone="timm:resnet10t", resolution=32, micro_batches=2)
    with pytest.raises(UsageError, match="a crop's loss depends on the others'"):
        stages.pretrain(told, "run")
    assert not Path("runs/run").exists()
