"""Runs of methods with a teacher: the same bits after a kill, other starts."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from synthetic import SMALL, assembled
from torch import Tensor
from toy_runs import Killed, kill_before_update

from fastidmm import assemble, checkpoint, stages
from fastidmm.assemble import build_method, initialise, training_rows
from fastidmm.backbones.build import BackboneOptions, backbone, build_encoder
from fastidmm.chance import Counters
from fastidmm.errors import UsageError
from fastidmm.methods.teacher import Taught
from fastidmm.recipe import Recipe
from fastidmm.record import Record, encoder_weights
from fastidmm.registry import METHODS, find

TAUGHT = [name for name in METHODS if issubclass(find("method", name), Taught)]
every_teacher = pytest.mark.parametrize("name", TAUGHT)
RUN = Path("runs/run")


def recipe(name: str, **run: Any) -> Recipe:
    """Twenty steps on 20 images: four epochs of 4, 4, 4, 4 and 4; other batches leave a tail."""
    run = {
        "dataset": "toy", "method": name, "backbone": "vit_micro", "epochs": 4, "batch_size": 4,
        "resolution": 16, "checkpoint_every": 1, **run,
    }  # fmt: skip
    tables = {"run": run, "backbone": {"drop_path": 0.3}, "method": SMALL.get(name, {})}
    return Recipe.of(tables)


def outcome(run: Path) -> tuple[list[float], dict[str, Tensor]]:
    """All losses, and the last checkpoint's tensors."""
    record = Record(run)
    (tensors,), _ = checkpoint.load(record.result, checkpoint.MODEL)
    return [line["loss"] for line in record.metrics()], tensors


@every_teacher
@pytest.mark.parametrize("batch_size", [4, 19])
def test_a_killed_run_resumes_to_the_same_bits(
    toy: str, name: str, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Teacher, queue and centre, too; and an epoch may end in one image."""
    settings = recipe(name, batch_size=batch_size)
    stages.pretrain(settings, "whole")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_before_update(patch, 5)
        stages.pretrain(settings, "run")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_before_update(patch, 1)
        stages.resume(RUN)
    stages.resume(RUN)
    (losses, found), (expected, truth) = outcome(RUN), outcome(Path("runs/whole"))
    assert len(losses) == (20 if batch_size == 4 else 8) and losses == expected
    assert found.keys() == truth.keys()
    assert all(torch.equal(found[key], truth[key]) for key in truth)
    own = {"dino": "centre", "mocov2": "queue", "mocov3": "teacher.projector.0.weight"}
    assert {own.get(name), "teacher.backbone.model.norm.weight"} <= {None, *truth}
    assert len(encoder_weights(Record(RUN).result)) == 54


@every_teacher
def test_a_teacher_follows_its_student(name: str) -> None:
    """Each of its tensors, after one step, is between what it was and the student."""
    method, loader = assembled(name)
    assert isinstance(method, Taught)
    method.num_steps = 6
    loss = method(loader.batch(0))
    start = {key: p.clone() for key, p in method.teacher.named_parameters()}
    student = dict(method.named_parameters())
    assert start.keys() <= student.keys() and any("backbone." in key for key in start)
    with torch.no_grad():
        for key in start:
            student[key].add_(0.1)  # as an update would
        method.after_step(loss.keep | loss.sums, torch.tensor(0), torch.tensor(False))
        for key, now in method.teacher.named_parameters():
            share = (now - start[key]) / (student[key] - start[key])
            assert 0 < float(share.mean()) < 1, key
            assert float(share.min()) > -1e-3 and float(share.max()) < 1 + 1e-3, key  # rounded


@every_teacher
def test_a_teacher_takes_over_what_a_run_starts_from(toy: str, name: str) -> None:
    stages.pretrain(recipe("idmm", epochs=1), "first")
    start = Record(Path("runs/first")).result
    settings = recipe(name, init=str(Path("..") / "first" / start.relative_to("runs/first")))
    method = build_method(settings, training_rows(settings), Counters(0))
    before = method.get_parameter("teacher.backbone.model.cls_token").clone()
    initialise(method, RUN, settings)
    loaded = encoder_weights(start)
    assert not torch.equal(loaded["model.cls_token"], before)
    for key, tensor in loaded.items():
        assert torch.equal(method.state_dict()[f"teacher.backbone.{key}"], tensor), key


@every_teacher
def test_a_teacher_takes_over_published_weights(
    toy: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As MoCo and DINO begin: student and teacher are one model."""
    encoder = build_encoder("vit_micro", BackboneOptions(), resolution=16, counters=Counters(9))
    weights = {key: tensor + 1 for key, tensor in encoder.model.state_dict().items()}
    timms = replace(backbone("vit_micro"), weights="made_up")
    monkeypatch.setattr(assemble, "backbone", lambda _: timms)
    monkeypatch.setattr(assemble, "cached_weights", lambda _: weights)
    settings = recipe(name, init="timm")
    method: Any = build_method(settings, training_rows(settings), Counters(0))
    assert initialise(method, RUN, settings).endswith("head new: timm's")
    for module in (method.backbone, method.teacher["backbone"]):
        found = module.model.state_dict()
        assert found.keys() == weights.keys()
        assert all(torch.equal(found[key], weights[key]) for key in weights)


def test_the_frozen_stay_as_they_began(toy: str) -> None:
    """MoCo v3's projection of patches for ever, DINO's classes for an epoch of five steps."""
    stages.pretrain(recipe("mocov3"), "v3")
    settings = recipe("mocov3")
    first = build_method(settings, training_rows(settings), Counters(0)).state_dict()
    _, last = outcome(Path("runs/v3"))
    same = {key for key in first if torch.equal(first[key], last[key])}
    frozen = {f"backbone.model.patch_embed.proj.{part}" for part in ("weight", "bias")}
    assert frozen <= same and all("patch_embed" in key or "num_" in key for key in same), same
    one, two = recipe("dino", epochs=1), recipe("dino", epochs=2)
    stages.pretrain(one, "one")
    stages.pretrain(two, "two")
    first = build_method(one, training_rows(one), Counters(0)).state_dict()
    begun = first["head.directions"]
    assert torch.equal(outcome(Path("runs/one"))[1]["head.directions"], begun)
    assert not torch.equal(outcome(Path("runs/two"))[1]["head.directions"], begun)


@every_teacher
def test_all_are_fine_tuned_alike(toy: str, name: str) -> None:
    """A method's own rate, warm-up and decay end with it; what was asked for besides does not."""
    tables = recipe(name, epochs=1).tables()
    tables["optim"] = {"betas": [0.9, 0.95]}
    stages.pretrain(Recipe.of(tables), "run")
    stages.finetune(RUN, {"run.epochs": 1, "run.resolution": 16}, [])
    tuned = Record(RUN / "finetune-16").recipe.optim
    assert (tuned.lr, tuned.weight_decay, tuned.warmup_epochs) == (5e-4, 1e-3, 0.25)
    assert tuned.betas == (0.9, 0.95)


def test_micro_batches_are_refused_where_crops_see_each_other(toy: str) -> None:
    with pytest.raises(UsageError, match="with mocov3 on vit_micro a crop's loss depends"):
        stages.pretrain(recipe("mocov3", micro_batches=2), "run")
    for name in ("dino", "mocov2"):
        stages.pretrain(recipe(name, batch_size=10, micro_batches=1), f"{name}-1")
        stages.pretrain(recipe(name, batch_size=10, micro_batches=3), f"{name}-3")
        (one, whole), (three, cut) = (outcome(Path(f"runs/{name}-{num}")) for num in (1, 3))
        assert three == pytest.approx(one, rel=1e-4)
        kept = "centre" if name == "dino" else "queue"
        torch.testing.assert_close(cut[kept], whole[kept], rtol=1e-3, atol=1e-4)


def test_a_lone_image_is_too_few_for_batchnorm(toy: str) -> None:
    """In a pass of one view each; several views of it are enough."""
    lone = {"backbone": "timm:resnet10t", "resolution": 32, "num_images": 17, "epochs": 1}
    with pytest.raises(UsageError, match="last batch has 1 image, too few for the BatchNorm of"):
        stages.pretrain(recipe("mocov2", **lone), "run")
    assert not Path("runs/run").exists()
    found = stages.pretrain(recipe("idmm", **lone), "run")
    assert found["steps"] == 5
    settings = {"run.resolution": 32, "run.epochs": 1, "run.batch_size": 8}
    with pytest.raises(UsageError, match="choose a --batch-size other than 8"):
        stages.finetune(Path("runs/run"), settings, [])
    assert not Path("runs/run/finetune-32").exists()
    stages.finetune(Path("runs/run"), {**settings, "run.batch_size": 9}, [])
