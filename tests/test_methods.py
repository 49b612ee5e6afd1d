"""Every registered method: its loss from first principles, and the promises of the seam."""

import math
from dataclasses import replace

import pytest
import torch
from synthetic import assembled
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fastidmm.backbones.build import BackboneOptions, build_encoder
from fastidmm.batch import Batch, Loss, Method, Views, forward_groups
from fastidmm.chance import Counters
from fastidmm.methods.mocov3 import freeze_patches
from fastidmm.registry import METHODS

every_method = pytest.mark.parametrize("name", list(METHODS))
# Of 14 crops at temperature 1/2, likes at one place and all others opposite: no loss is below.
LEAST = {
    "simclr": math.log(1 + 12 * math.exp(-4)),
    "supcon": (6 * math.log(5 + 8 * math.exp(-4)) + 8 * math.log(3 + 10 * math.exp(-4))) / 14,
}


def gradients(method: Method, losses: list[Tensor]) -> Tensor:
    """The gradient of all parameters in one vector, left by some backward passes."""
    method.zero_grad(set_to_none=True)
    for loss in losses:
        loss.backward()
    return torch.cat([p.grad.flatten() for p in method.parameters() if p.grad is not None])


# --- all methods --------------------------------------------------------------------------------


@every_method
def test_forward_changes_nothing(name: str) -> None:
    method, loader = assembled(name)
    batch = loader.batch(0)
    before = {key: value.clone() for key, value in method.state_dict().items()}
    first, second = method(batch), method(batch)
    assert torch.equal(first.total, second.total)
    assert first.parts.keys() == second.parts.keys()
    assert all(torch.equal(method.state_dict()[key], before[key]) for key in before)


@every_method
def test_the_loss_is_a_scalar_and_its_parts_are_detached(name: str) -> None:
    method, loader = assembled(name)
    loss = method(loader.batch(0))
    assert loss.total.shape == () and loss.total.requires_grad
    for value in (*loss.parts.values(), *loss.keep.values()):
        assert isinstance(value, Tensor) and not value.requires_grad


@every_method
@pytest.mark.parametrize("num", [1, 2, 3, 7, 40])
def test_micro_batches_sum_to_the_batch(name: str, num: int) -> None:
    """Drop-path on: a crop is dropped by its place in the batch, not in its part."""
    method, loader = assembled(name, num=5, batch_size=5)
    if not method.rows_independent:
        pytest.skip("its rows see each other")
    batch = loader.batch(0)
    whole = method(batch)
    expected = gradients(method, [whole.total])
    cut = [method(micro) for micro in batch.micro(num) if micro.num_crops]
    found = gradients(method, [loss.total for loss in cut])
    assert len(cut) == min(num, max(views.total for views in batch.groups))
    assert float((found - expected).norm() / expected.norm()) < 1e-5
    torch.testing.assert_close(sum(loss.total for loss in cut), whole.total, rtol=1e-5, atol=1e-6)
    for key, value in whole.parts.items():
        torch.testing.assert_close(sum(loss.parts[key] for loss in cut), value)


@every_method
def test_a_batch_can_be_learnt(name: str) -> None:
    method, loader = assembled(name, drop_path=0.0)
    batch = loader.batch(0)
    optimizer = torch.optim.AdamW(method.param_groups(), lr=1e-3)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = method(batch)
        loss.total.backward()
        optimizer.step()
        # Less than the teacher's own entropy no student can have.
        losses.append(float(loss.total.detach() - loss.parts.get("teacher_entropy", 0)))
    # CutMix leaves IDMM the entropy of its mixed targets, at least; most of it must go.
    least = LEAST.get(name, 0.0)
    assert losses[-1] - least < 0.6 * (losses[0] - least), losses


@every_method
def test_parameters_are_all_trained_once(name: str) -> None:
    """But for teachers; and decayed alike, but for DINO's."""
    method, _ = assembled(name)
    groups = method.param_groups()
    held = [id(p) for group in groups for p in group["params"]]
    assert len(held) == len(set(held))
    assert set(held) == {id(p) for p in method.parameters() if p.requires_grad}
    assert name == "dino" or [group.keys() for group in groups] == [{"params"}]
    own = [n for n, p in method.named_parameters() if not p.requires_grad]
    frozen = {"backbone.model.patch_embed.proj.weight", "backbone.model.patch_embed.proj.bias"}
    assert {n for n in own if not n.startswith("teacher.")} == (
        frozen if name == "mocov3" else set()
    )
    assert method.backbone_for_export() is method.backbone


def test_a_skipped_step_leaves_dinos_centre() -> None:
    """Whatever was seen in it."""
    method, _ = assembled("dino")
    before = method.get_buffer("centre").normal_().clone()
    seen = {"centre": torch.full_like(before, math.nan)}
    method.after_step(seen, torch.tensor(3), torch.tensor(True))
    assert torch.equal(method.get_buffer("centre"), before)
    seen = {"centre": torch.ones_like(before)}
    method.after_step(seen, torch.tensor(3), torch.tensor(False))
    torch.testing.assert_close(method.get_buffer("centre"), 0.9 * before + 0.1)


@pytest.mark.parametrize("name", ["pvtv2_b0", "t2t_vit_7"])
def test_no_other_stem_is_frozen(name: str) -> None:
    counters = Counters(0)
    encoder = build_encoder(name, BackboneOptions(), resolution=32, counters=counters)
    before = [p.requires_grad for p in encoder.parameters()]
    freeze_patches(encoder)
    assert [p.requires_grad for p in encoder.parameters()] == before


# --- IDMM ---------------------------------------------------------------------------------------


def idmm() -> tuple[Method, Batch]:
    method, loader = assembled("idmm", drop_path=0.0)
    return method, loader.batch(0)


def head_of(method: Method) -> nn.Linear:
    assert isinstance(method.head, nn.Linear)
    return method.head


def test_idmm_is_the_mean_over_large_plus_the_mean_over_small() -> None:
    method, batch = idmm()
    head = head_of(method)
    nn.init.normal_(head.weight)
    nn.init.normal_(head.bias)
    expected = torch.zeros((), dtype=torch.float64)
    assert [views.rows.numel() for views in batch.groups] == [2 * 7, 4 * 7]
    for views in batch.groups:
        assert bool((views.weights < 1).any()) and bool((views.rows != views.partners).any())
        z = method.backbone(views.pixels).double()
        logits = z @ head.weight.double().T + head.bias.double()
        own, pasted = (
            cross_entropy(logits, rows, label_smoothing=0.1, reduction="none")
            for rows in (views.rows, views.partners)
        )
        lam = views.weights.double()
        expected += (lam * own + (1 - lam) * pasted).mean()
    loss = method(batch)
    assert loss.total.item() == pytest.approx(expected.item(), rel=1e-5)
    large = batch.groups[0]
    top = head(method.backbone(large.pixels)).argmax(dim=1)
    assert float(loss.parts["instance_top1"]) == pytest.approx(
        float((top == large.rows).float().mean())
    )


def test_an_idmm_head_of_zeros_loses_two_ln_n() -> None:
    method, batch = idmm()
    at_first = method(batch).total.item()
    assert at_first == pytest.approx(2 * math.log(7), rel=0.15)
    nn.init.zeros_(head_of(method).weight)
    assert method(batch).total.item() == pytest.approx(2 * math.log(7), rel=1e-6)


def test_an_idmm_head_begins_as_published() -> None:
    method, _ = assembled("idmm", num=600)
    head = head_of(method)
    assert head.weight.shape == (600, 128)
    assert head.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert not head.bias.any()


def test_a_large_crop_weighs_twice_an_equal_small_one() -> None:
    method, batch = idmm()
    large, small = batch.groups
    same = {n: getattr(small, n).clone() for n in ("pixels", "rows", "partners", "weights")}
    for field, values in same.items():
        values[3] = getattr(large, field)[5]
    small = replace(small, **same)
    for views in (large, small):
        views.pixels.requires_grad_()
    method(Batch((large, small), 0, 0, (7,))).total.backward()
    assert large.pixels.grad is not None and small.pixels.grad is not None
    ours, theirs = large.pixels.grad[5], 2 * small.pixels.grad[3]
    assert float(ours.abs().max()) > 0
    assert float((ours - theirs).norm() / ours.norm()) < 1e-5


# --- supervised ---------------------------------------------------------------------------------


def test_supervised_is_smoothed_cross_entropy_of_mixed_labels() -> None:
    method, loader = assembled("supervised", num=20, batch_size=20, drop_path=0.0)
    batch = loader.batch(0)
    (views,) = batch.groups
    assert views.labels.tolist() == [row % 3 for row in views.rows.tolist()]
    assert bool((views.labels != views.partner_labels).any()) and bool((views.weights < 1).all())
    nn.init.normal_(head_of(method).weight)
    logits = head_of(method)(method.backbone(views.pixels)).double()
    own, mixed_in = (
        cross_entropy(logits, labels, label_smoothing=0.1, reduction="none")
        for labels in (views.labels, views.partner_labels)
    )
    lam = views.weights.double()
    expected = (lam * own + (1 - lam) * mixed_in).mean()
    loss: Loss = method(batch)
    assert loss.total.item() == pytest.approx(expected.item(), rel=1e-5)
    classifier = method.classifier()
    assert classifier is not None
    torch.testing.assert_close(classifier(views.pixels).double(), logits)
    right = (logits.argmax(dim=1) == views.labels).float().mean()
    assert float(loss.parts["train_top1"]) == pytest.approx(float(right))


# --- groups -------------------------------------------------------------------------------------


class Watched(nn.Module):
    """Features are (mean, side) of each crop; remembers what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[list[int]] = []
        self.shapes: list[tuple[int, int]] = []

    def set_place(self, place: Tensor) -> None:
        self.places.append(place.tolist())

    def forward(self, images: Tensor) -> Tensor:
        self.shapes.append((images.shape[0], images.shape[-1]))
        side = torch.full((len(images),), float(images.shape[-1]))
        return torch.stack((images.mean(dim=(1, 2, 3)), side), dim=1)


def views_of(num: int, size: int, first: int) -> Views:
    place = torch.arange(first, first + num)
    pixels = place.float().view(-1, 1, 1, 1).expand(-1, 3, size, size)
    ones = torch.ones(num)
    return Views(pixels, place, place, ones, place, place, place, num)


def test_groups_of_one_size_share_a_pass_and_others_do_not() -> None:
    watched = Watched()
    groups = (views_of(2, 8, 0), views_of(3, 4, 2), views_of(4, 8, 5))
    features = forward_groups(watched, groups)
    assert watched.shapes == [(6, 8), (3, 4)]
    assert watched.places == [[0, 1, 5, 6, 7, 8], [2, 3, 4]]
    for views, z in zip(groups, features, strict=True):
        assert z[:, 0].tolist() == views.place.tolist()
        assert set(z[:, 1].tolist()) == {float(views.pixels.shape[-1])}
