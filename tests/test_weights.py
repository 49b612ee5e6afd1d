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

from fastidmm import cli
from fastidmm.errors import UsageError
from fastidmm.preparing.weights import fetch_weights, weights_folder

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


def test_names_without_weights(home: Path) -> None:
    with pytest.raises(UsageError, match=r"no weights for 'test_vitt': did you mean 'test_vit"):
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
