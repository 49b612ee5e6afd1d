"""MoCo v2, MoCo v3 and DINO against the published formulas in float64; their teachers' promises."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from synthetic import SMALL, assembled
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax, normalize, softmax

from fastidmm.batch import Batch, Loss, Method, Views
from fastidmm.errors import UsageError
from fastidmm.methods.dino import DINO, DINOOptions
from fastidmm.methods.mocov2 import queue_size
from fastidmm.methods.teacher import Teacher, cosine
from fastidmm.recipe import Recipe
from fastidmm.registry import find

TEACHERS = ("dino", "mocov2", "mocov3")
NO, YES = torch.tensor(False), torch.tensor(True)
every_teacher = pytest.mark.parametrize("name", TEACHERS)


class Flat(nn.Module):
    """Pixels (C, 3, 2, 2) to 5 features, as smoothly as a gradient's check asks for."""

    num_features = 5

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 5)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.layer(images.flatten(1)).tanh()
        return features


def exact(name: str, *, num_rows: int = 7, batch_size: int = 4, **options: Any) -> Any:
    """A method over `Flat` in float64, its teacher another than its student."""
    torch.manual_seed(3)
    kind = find("method", name)
    options = {**SMALL.get(name, {}), **options}
    method = kind(
        Flat(), kind.Options(**options), resolution=2, num_rows=num_rows, batch_size=batch_size
    ).double()
    with torch.no_grad():
        for p in method.teacher.parameters():
            p += 0.1 * torch.randn_like(p)
    return method.train()


def batch_of(method: Method, num: int, step: int = 0) -> Batch:
    """Noise for views; rows 1, 2, ..."""
    groups, rows = [], torch.arange(1, num + 1)
    chance = torch.Generator().manual_seed(step)
    for _ in method.views:
        pixels = torch.randn(num, 3, 2, 2, generator=chance, dtype=torch.float64)
        ones = torch.ones(num)
        groups.append(Views(pixels, rows, rows, ones, rows, rows, rows, num))
    return Batch(tuple(groups), step, 0, (num,))


def following(loss: Loss) -> dict[str, Tensor]:
    """What `after_step` is given."""
    return loss.keep | loss.sums


def gradients(method: Method, loss: Tensor) -> list[Tensor]:
    trained = [p for p in method.parameters() if p.requires_grad]
    return [g for g in torch.autograd.grad(loss, trained, allow_unused=True) if g is not None]


def assert_same(method: Method, found: Loss, expected: Tensor) -> None:
    """Loss and gradients to the last digits of float64."""
    assert found.total.item() == pytest.approx(expected.item(), rel=1e-12)
    ours, theirs = gradients(method, found.total), gradients(method, expected)
    assert len(ours) == len(theirs) > 4 and max(float(g.abs().max()) for g in ours) > 1e-4
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


# --- losses -------------------------------------------------------------------------------------


@pytest.mark.parametrize("num", [4, 3, 1])
def test_mocov2_is_the_published_loss(num: int) -> None:
    method = exact("mocov2", num_rows=9)
    batch = batch_of(method, num)
    found = method(batch)
    q = normalize(method.head(method.backbone(batch.groups[0].pixels)))
    teacher = method.teacher
    k = normalize(teacher["head"](teacher["backbone"](batch.groups[1].pixels)))
    assert method.queue.shape == (8, 128)
    positive = torch.einsum("nc,nc->n", [q, k])[:, None]
    negative = torch.einsum("nc,ck->nk", [q, method.queue.T])
    logits = torch.cat([positive, negative], dim=1) / 0.2
    assert_same(method, found, cross_entropy(logits, torch.zeros(num, dtype=torch.long)))
    right = sum(bool(row[0] > row[1:].max()) for row in logits) / num
    assert float(found.parts["contrast_top1"]) == pytest.approx(right)
    torch.testing.assert_close(found.keep["keys"], k)


def published_norm(x: Tensor, layer: Any) -> Tensor:
    y = (x - x.mean(dim=0)) / (x.var(dim=0, unbiased=False) + 1e-5).sqrt()
    return y if layer.weight is None else y * layer.weight + layer.bias


def published_mlp(layers: Any, x: Tensor) -> Tensor:
    for layer in layers:
        x = published_norm(x, layer) if isinstance(layer, nn.BatchNorm1d) else layer(x)
    return x


@pytest.mark.parametrize("num", [4, 3])
def test_mocov3_is_the_published_loss(num: int) -> None:
    """Statistics by view, symmetric, times twice the temperature."""
    method = exact("mocov3")
    for layer in method.modules():
        if isinstance(layer, nn.BatchNorm1d) and layer.affine:
            nn.init.normal_(layer.weight)
            nn.init.normal_(layer.bias)
    batch = batch_of(method, num)
    found = method(batch)
    x1, x2 = (views.pixels for views in batch.groups)
    shapes = [tuple(m.weight.shape) for m in method.projector if isinstance(m, nn.Linear)]
    assert shapes == [(64, 5), (64, 64), (256, 64)]

    def loss(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        q = published_mlp(method.projector, method.backbone(one))
        q = normalize(published_mlp(method.predictor, q))
        k = published_mlp(method.teacher["projector"], method.teacher["backbone"](other))
        logits = torch.einsum("nc,mc->nm", [q, normalize(k)]) / 0.2
        hits = (logits.argmax(dim=1) == torch.arange(num)).double().mean()
        return cross_entropy(logits, torch.arange(num)) * (2 * 0.2), hits

    (l1, hits1), (l2, hits2) = loss(x1, x2), loss(x2, x1)
    assert_same(method, found, l1 + l2)
    assert float(found.parts["contrast_top1"]) == pytest.approx(float(hits1 + hits2) / 2)


def test_mocov3_learns_nothing_from_a_lone_image() -> None:
    """As an epoch may leave one for its last batch: there is nothing to tell it from."""
    method = exact("mocov3")
    loss = method(batch_of(method, 1)).total
    assert float(loss.detach()) == 0
    assert all(float(g.abs().max()) == 0 for g in gradients(method, loss))


@pytest.mark.parametrize(("num", "num_local"), [(4, 2), (3, 0), (1, 3)])
def test_dino_is_the_published_loss(num: int, num_local: int) -> None:
    method = exact("dino", num_local=num_local, teacher_temperature=0.07)
    method.centre.normal_()
    batch = batch_of(method, num)
    found = method(batch)
    student = [method.head(method.backbone(views.pixels)) / 0.1 for views in batch.groups]
    teacher = method.teacher
    said = [teacher["head"](teacher["backbone"](v.pixels)) for v in batch.groups[:2]]
    goals = [softmax((z - method.centre) / 0.07, dim=-1) for z in said]
    losses = [
        (-goal * log_softmax(student[v], dim=-1)).sum(dim=-1).mean()
        for i, goal in enumerate(goals)
        for v in range(2 + num_local)
        if v != i
    ]
    assert len(losses) == 2 * (1 + num_local)
    assert_same(method, found, sum(losses, torch.zeros(())) / len(losses))
    entropy = [-(g * g.clamp(min=1e-300).log()).sum(dim=-1).mean() for g in goals]
    assert float(found.parts["teacher_entropy"]) == pytest.approx(float(sum(entropy)) / 2)
    torch.testing.assert_close(found.sums["centre"], torch.cat(said).mean(dim=0))


def test_dinos_classes_are_directions() -> None:
    """Weight normalisation with a fixed norm of one, after a bottleneck of length one."""
    head = exact("dino").head
    x = torch.randn(6, 5, dtype=torch.float64)
    bottleneck, weight = head.mlp(x), head.directions
    expected = (bottleneck @ weight.T) / bottleneck.norm(dim=1)[:, None] / weight.norm(dim=1)
    torch.testing.assert_close(head(x), expected)
    assert weight.shape == (48, 256)
    assert DINOOptions().out_dim == 65536 and DINOOptions().hidden == 2048


# --- what follows the student -------------------------------------------------------------------


def snapshot(method: Method) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in method.state_dict().items()}


@pytest.mark.parametrize(
    ("name", "momenta"),
    [
        ("mocov2", (0.999, 0.999, 0.999)),
        ("mocov3", (0.99, 0.995, 1.0)),
        ("dino", (0.996, 0.998, 1.0)),
    ],
)
def test_the_teacher_is_a_moving_average(name: str, momenta: tuple[float, ...]) -> None:
    """At the first and the middle step, and where the run is over."""
    method = exact(name)
    method.num_steps = 6
    for step, momentum in zip((0, 3, 6), momenta, strict=True):
        keep = following(method(batch_of(method, 4, step)))
        before = snapshot(method)
        method.after_step(keep, torch.tensor(step), NO)
        for key, t in method.teacher.state_dict().items():
            old, student = before[f"teacher.{key}"], before[key]
            torch.testing.assert_close(t, momentum * old + (1 - momentum) * student)
            assert momentum == 1 or not torch.equal(t, old), key
        assert all(torch.equal(method.state_dict()[key], before[key]) for key in students(method))


def students(method: Method) -> list[str]:
    own = ("teacher.", "queue", "oldest", "centre")
    return [key for key in method.state_dict() if not key.startswith(own)]


@every_teacher
def test_a_teacher_begins_as_its_student_and_learns_nothing(name: str) -> None:
    method, loader = assembled(name, drop_path=0.9)
    teacher = method.get_submodule("teacher")
    assert isinstance(teacher, Teacher)
    for key, t in teacher.state_dict().items():
        assert torch.equal(t, method.state_dict()[key]), key
    pointers = {p.data_ptr() for p in teacher.parameters()}
    assert pointers.isdisjoint(
        p.data_ptr() for k, p in method.named_parameters() if "teacher" not in k
    )
    method.train()
    assert not any(m.training for m in teacher.modules()) and method.backbone.training
    method(loader.batch(0)).total.backward()
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    batch = loader.batch(0)
    pixels = batch.groups[0].pixels
    encoder: Any = teacher["backbone"]
    encoder.set_place(batch.groups[0].place)
    assert torch.equal(encoder(pixels), encoder(pixels))
    method.eval()
    torch.testing.assert_close(encoder(pixels), method.backbone(pixels))


def test_a_teacher_takes_running_statistics_as_they_are() -> None:
    student = nn.BatchNorm1d(3)
    teacher = Teacher(norm=student)
    mean = teacher.get_buffer("norm.running_mean")
    student(torch.randn(8, 3))
    teacher.follow(0.25, YES)
    assert float(mean.abs().max()) == 0
    teacher.follow(0.25, NO)
    assert torch.equal(mean, student.get_buffer("running_mean"))
    assert int(teacher.get_buffer("norm.num_batches_tracked")) == 1


def test_the_centre_is_a_moving_average_of_what_the_teacher_says() -> None:
    method = exact("dino")
    expected = np.zeros(48)
    for step, num in enumerate((4, 3, 4)):
        batch = batch_of(method, num, step)
        teacher = method.teacher
        said = [teacher["head"](teacher["backbone"](v.pixels)) for v in batch.groups[:2]]
        expected = 0.9 * expected + 0.1 * torch.cat(said).mean(dim=0).detach().numpy()
        method.after_step(following(method(batch)), torch.tensor(step), NO)
        np.testing.assert_allclose(method.centre.numpy(), expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(
    ("most", "num_rows", "batch_size", "size"),
    [(4096, 2040, 256, 1792), (4096, 8000, 256, 4096), (4096, 2048, 256, 2048), (4096, 20, 256, 20),
     (4096, 300, 256, 256), (8, 300, 256, 256), (4096, 9, 4, 8), (5, 9, 4, 5)],
)  # fmt: skip
def test_a_queue_has_no_more_keys_than_images(
    most: int, num_rows: int, batch_size: int, size: int
) -> None:
    assert queue_size(most, num_rows, batch_size) == size


@pytest.mark.parametrize("most", [4096, 5, 4])
def test_the_queue_holds_the_newest_keys(most: int) -> None:
    """Epochs of 4, 4 and 1 keys around a ring of 8, 5 or 4; a skipped step leaves it as it was."""
    method = exact("mocov2", num_rows=9, queue=most)
    size = min(8, most)
    ring, place = method.queue.clone(), 0
    for step in range(13):
        num = (4, 4, 1)[step % 3]
        keep, skipped = following(method(batch_of(method, num, step))), step in (2, 6)
        if skipped:
            keep = {"keys": keep["keys"] * math.nan}
        method.after_step(keep, torch.tensor(step), YES if skipped else NO)
        for key in () if skipped else keep["keys"]:
            ring[place], place = key, (place + 1) % size
        assert torch.equal(method.queue, ring) and int(method.oldest) == place
    assert torch.allclose(method.queue.norm(dim=1), torch.ones(size, dtype=torch.float64))


# --- schedules and settings ---------------------------------------------------------------------


def test_schedules_end_where_they_should() -> None:
    for step, value in (
        (0, 0.04),
        (25, 0.04 + 0.36 * (1 - math.sqrt(0.5)) / 2),
        (50, 0.22),
        (100, 0.4),
    ):
        found = float(cosine(0.04, 0.4, torch.tensor(step), 100))
        assert found == pytest.approx(value, rel=1e-9), step


def test_dinos_teacher_warms_up_by_epochs() -> None:
    """As numpy's linspace has it, in the published code."""
    method = exact("dino", first_temperature=0.04, teacher_temperature=0.07, temperature_epochs=4)
    method.steps_per_epoch = 3
    expected = np.concatenate([np.linspace(0.04, 0.07, 4), np.full(3, 0.07)])
    for step in range(21):
        for given in (step, torch.tensor(step)):
            assert float(method.temperature(given)) == pytest.approx(expected[step // 3])
    constant = exact("dino")
    assert float(constant.temperature(5)) == pytest.approx(0.04)


def test_dinos_groups_decay_by_schedule_and_biases_do_not() -> None:
    method = exact("dino")
    method.num_steps = 8
    decayed, plain = method.param_groups()
    assert {p.ndim for p in decayed["params"]} == {2} and {p.ndim for p in plain["params"]} == {1}
    assert plain["weight_decay"] == 0
    found = [float(decayed["decay"](torch.tensor(step))) for step in (0, 4, 8)]
    assert found == pytest.approx([0.04, 0.22, 0.4])
    assert method.frozen(0) == [method.head.directions] and method.frozen(1) == []
    assert DINO.clip == 3.0


def test_a_decay_that_dino_would_not_read_is_refused() -> None:
    """It would be fine-tuning's, unasked."""
    run = {"dataset": "d", "method": "dino"}
    with pytest.raises(UsageError, match=r"not read by dino, .* set method\.weight_decay=\[FIRST"):
        Recipe.of({"run": run, "optim": {"weight_decay": 0.05}})
    found = Recipe.of(
        {"run": run, "optim": {"weight_decay": 0}, "method": {"weight_decay": [0, 1]}}
    )
    assert found.tables()["method"]["weight_decay"] == [0, 1]


@pytest.mark.parametrize(
    ("name", "batch", "lr", "warmup", "decay"),
    [("mocov2", 256, 5e-4, 2, 1e-3), ("mocov3", 512, 3e-4, 40, 0.1), ("dino", 256, 5e-4, 10, 0.0)],
)
def test_recipes_have_the_published_settings(
    name: str, batch: int, lr: float, warmup: int, decay: float
) -> None:
    recipe = Recipe.of({"run": {"dataset": "d", "method": name}})
    assert (recipe.run.batch_size, recipe.optim.weight_decay) == (batch, decay)
    assert recipe.optim.lr == pytest.approx(lr) and recipe.optim.warmup_epochs == warmup
    assert Recipe.of(recipe.tables()) == recipe
    half = Recipe.of(
        {"run": {"dataset": "d", "method": name, "batch_size": batch // 2, "epochs": 2}}
    )
    assert half.optim.lr == pytest.approx(lr if name == "mocov2" else lr / 2)
    assert half.optim.warmup_epochs == 0.5
    asked = Recipe.of({"run": {"dataset": "d", "method": name}, "optim": {"lr": 0.125}})
    assert asked.optim.lr == 0.125
