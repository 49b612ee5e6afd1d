"""What `bench/gpu_check.py` would ask of a GPU: every part's words are understood, none is lost."""

import inspect
import json
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from fastidmm.bench import gpu_check, loader, loss, step, views
from fastidmm.kernels import add_norm, linear_gelu
from fastidmm.recipe import Recipe, with_settings

PARTS = list(gpu_check.parts(Path("out"), Path("photos")))


class Asked(dict[str, Any]):
    """What each subject was asked for, all of it arguments that it has."""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    found = Asked()
    for module in (loader, loss, step, views):
        name, real = module.__name__.split(".")[-1], module.measure

        def measure(*given: Any, name: str = name, real: Any = real, **options: Any) -> None:
            found[name] = inspect.signature(real).bind(*given, **options).arguments

        monkeypatch.setattr(module, "measure", measure)
    # What parts change of the process that they are alone in.
    for module in (add_norm, linear_gelu):
        monkeypatch.setitem(vars(module), "triton", object())
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", lambda enabled: None)
    return found


@pytest.mark.parametrize("part", [p for p in PARTS if p.startswith("step")])
def test_a_step_is_asked_for_as_a_recipe_has_it(part: str, asked: Asked) -> None:
    gpu_check.parts(Path("out"), Path("photos"))[part][1]()
    given = asked["step"]
    run = {key: given[key] for key in ("backbone", "method", "resolution") if key in given}
    tables = {"run": {"dataset": "noise", **run}}
    settings = list(given.get("settings", ()))
    recipe = Recipe.of(with_settings(tables, {}, settings))
    assert all(getattr(recipe.run, key) == value for key, value in run.items())
    assert recipe.run.views_ahead == (part == "step_ahead")
    assert recipe.run.compile == (part == "step_compiled")
    for kernel in (add_norm, linear_gelu):
        assert (vars(kernel)["triton"] is None) == part.endswith("apart")


@pytest.mark.parametrize("part", ["views", "loss", "loaders", "loaders_dali"])
def test_other_subjects_are_asked_in_their_words(part: str, asked: Asked) -> None:
    gpu_check.parts(Path("out"), Path("photos"))[part][1]()
    (given,) = asked.values()
    assert given["quick"] and given["device"] == torch.device("cuda")
    if "chosen" in given:
        names = [arm.name for arm in given["chosen"]]
        told = {"loaders": "torch, fp32", "loaders_dali": "dali, cache"}[part]
        assert len(set(names)) == len(names) and {"resident", told} <= set(names)


def test_no_part_outlasts_a_command() -> None:
    """Which has ten minutes."""
    assert max(seconds for seconds, _ in gpu_check.parts(Path(), Path()).values()) < 600


def test_what_a_part_found_is_kept_whatever_the_next_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a part that ends well, of one that fails, and of a go before."""
    out = tmp_path / "out"
    for part in (["versions"], ["step"]):
        monkeypatch.setattr(sys, "argv", ["gpu_check.py", str(out), str(tmp_path), *part])
        gpu_check.main()
    found = json.loads((out / "result.json").read_text())
    assert list(found) == ["versions", "step"]
    packages = found["versions"]["found"]["packages"]
    assert (
        packages["torch>=2.8"] == metadata.version("torch") and "missing" not in packages.values()
    )
    if not torch.cuda.is_available():
        assert found["step"]["status"] == 1 and found["step"]["found"] is None
        assert "this machine has no such GPU" in (out / "log.txt").read_text()
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", str(out), str(tmp_path), "setp"])
    with pytest.raises(SystemExit, match="no part is called setp: choose from versions tests"):
        gpu_check.main()
