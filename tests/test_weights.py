"""Weights of timm's models, fetched for a machine without a network."""

import errno
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch

from fastidmm import checkpoint, cli, stages
from fastidmm.errors import DataError, UsageError
from fastidmm.preparing.weights import cached_weights, fetch_weights, weights_folder
from fastidmm.recipe import Recipe
from fastidmm.record import Record

NAME = "test_vit"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Weights from a hub that is made up; what was asked of it."""
    asked: list[str] = []

    def download(repo_id: str, filename: str, cache_dir: Path, **_: Any) -> str:
        asked.append(f"{repo_id}/{filename}")
        path = cache_dir / "models--made-up" / "model.safetensors"
        if not path.exists():
            path.parent.mkdir(parents=True)
            state = {
                n: torch.full_like(t, 0.5) for n, t in timm.create_model(NAME).state_dict().items()
            }
            safetensors.torch.save_file(state, path)
        return str(path)

    monkeypatch.setattr(timm.models._hub, "hf_hub_download", download)
    return asked


@pytest.mark.parametrize("name", [NAME, f"timm:{NAME}"])
def test_weights_are_kept_and_found_again(home: Path, hub: list[str], name: str) -> None:
    folder = fetch_weights(name)
    assert folder == weights_folder() == home / "weights"
    assert hub[0].startswith("timm/test_vit") and hub[0].endswith(".safetensors")
    assert [path.name for path in folder.rglob("*.safetensors")] == ["model.safetensors"]
    model = timm.create_model(NAME, pretrained=True, cache_dir=folder)
    assert all((tensor == 0.5).all() for tensor in model.parameters())


def test_the_command_says_where(
    home: Path, hub: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["fastidmm", "prepare", "--weights", NAME])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code and capsys.readouterr().out == f"{NAME}: in {home / 'weights'}\n"


@pytest.mark.parametrize(
    ("name", "model"),
    [("deit_tiny", "deit_tiny_patch16_224"), ("pvtv2_b3", "pvt_v2_b3"), (f"timm:{NAME}", NAME)],
)
def test_a_backbone_stands_for_its_model(
    home: Path, monkeypatch: pytest.MonkeyPatch, name: str, model: str
) -> None:
    made: list[tuple[str, Any]] = []
    monkeypatch.setattr(timm, "create_model", lambda name, **told: made.append((name, told)))
    assert fetch_weights(name) == weights_folder()
    assert made == [(model, {"pretrained": True, "cache_dir": weights_folder()})]


def test_names_without_weights(home: Path) -> None:
    with pytest.raises(UsageError, match="no weights for 'vit_micro'"):
        fetch_weights("vit_micro")
    with pytest.raises(UsageError, match=r"no weights for 'test_vitt': the nearest are test_vit"):
        fetch_weights("test_vitt")
    assert not home.exists()


def test_a_hub_that_cannot_be_reached(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any, **__: Any) -> None:
        raise FileNotFoundError("cannot find the files in the local cache.\nmore words")

    monkeypatch.setattr(timm.models._hub, "hf_hub_download", failing)
    with pytest.raises(UsageError, match=r"could not be fetched \(cannot find .* cache\): check"):
        fetch_weights(NAME)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(timm.models._hub, "hf_hub_download", full)
    with pytest.raises(OSError, match="No space left"):
        fetch_weights(NAME)


def in_the_cache(name: str, model: str = NAME) -> Path:
    """Weights of ones, where the hub's own client looks for what it has fetched."""
    revision = weights_folder() / f"models--{name.replace('/', '--')}"
    (revision / "refs").mkdir(parents=True)
    (revision / "refs" / "main").write_text("0" * 40)
    path = revision / "snapshots" / ("0" * 40) / "model.safetensors"
    path.parent.mkdir(parents=True)
    state = timm.create_model(model).state_dict()
    safetensors.torch.save_file({n: torch.ones_like(t) for n, t in state.items()}, path)
    return path


def test_a_run_begins_from_published_weights(toy: str) -> None:
    """All but the classifier, at another resolution, before the first step."""
    run = {"dataset": toy, "backbone": f"timm:{NAME}", "method": "supervised", "init": "timm"}
    short = {"epochs": 1, "batch_size": 8, "resolution": 32, "checkpoint_every": 1}
    wanted = Recipe.of({"run": {**run, **short}})
    with pytest.raises(UsageError, match=r"not on this machine: `fastidmm prepare --weights test_"):
        stages.pretrain(wanted, "none")
    assert not Path("runs/none").exists()
    path = in_the_cache("timm/test_vit.r160_in1k")
    assert {n.partition(".")[0] for n in cached_weights(NAME)} >= {"blocks", "patch_embed"}
    stages.pretrain(wanted, "mine")
    record = Record(Path("runs/mine"))
    (first,), _ = checkpoint.load(record.checkpoints / "step_000000000", checkpoint.MODEL)
    assert all((first[n] == 1).all() for n in first if n.startswith("backbone."))
    assert not (first["head.weight"] == 1).any()
    assert record.pretrained and record.init is None
    path.write_bytes(b"0" * 100)
    with pytest.raises(DataError, match=r"cannot be read .*: delete it"):
        stages.pretrain(wanted, "damaged")


def test_no_classifier_is_taken_where_there_are_two(home: Path) -> None:
    name = "deit_tiny_distilled_patch16_224"
    in_the_cache(f"timm/{name}.fb_in1k", name)
    heads = {"head.weight", "head.bias", "head_dist.weight", "head_dist.bias"}
    assert cached_weights(name).keys() == timm.create_model(name).state_dict().keys() - heads


def test_a_backbone_without_published_weights(toy: str) -> None:
    run = {"dataset": toy, "backbone": "vit_micro", "method": "supervised", "init": "timm"}
    with pytest.raises(UsageError, match="timm has no weights of vit_micro"):
        stages.pretrain(Recipe.of({"run": {**run, "resolution": 16}}), "none")


def test_the_papers_backbones_name_weights_that_timm_has() -> None:
    from fastidmm.backbones.build import backbone

    for name in ("deit_tiny", "deit_base", "pvtv2_b0", "pvtv2_b3"):
        told = timm.get_pretrained_cfg(backbone(name).weights)
        assert told.hf_hub_id.startswith("timm/") and "in1k" in told.tag and "in22k" not in told.tag
        assert not {"dist", "21k"} & set(told.tag.split("_"))
