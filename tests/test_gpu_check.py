"""What `bench/gpu_check.py` would ask of a GPU: every part's words are understood, none is lost."""

import inspect
import json
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import pytest
import torch

from fastidmm.bench import gpu_check, loader, loss, processes, step, views
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


SLEEPER = """
import signal, subprocess, sys, time
child = subprocess.Popen(["sleep", "600"], start_new_session=True)
print(child.pid, flush=True)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(7) if sys.argv[1] == "polite" else None)
try:
    time.sleep(600)
    time.sleep(600)
finally:
    print("left in order", flush=True)
"""


@pytest.mark.parametrize("manner", ["polite", "deaf"])
def test_a_late_part_saves_what_it_has_and_leaves_nothing_behind(
    manner: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check, "GRACE", 5.0 if manner == "polite" else 0.5)
    with (tmp_path / "log").open("w+") as log:
        status = gpu_check.ended([sys.executable, "-c", SLEEPER, manner], log, 3.0)
        log.seek(0)
        said = log.read().split("\n")
    assert status == "not done after 3 s"
    assert ("left in order" in said) == (manner == "polite")
    child, until = int(said[2]), time.monotonic() + 60
    while processes._stat(child)[:1] not in ([], ["Z"]):  # the system has yet to end it
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.parametrize("left", [700.0, 45.0, 20.0])
def test_all_parts_end_within_a_command(
    left: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A part has what is left, where that is worth beginning."""
    limits: list[float] = []

    def end(words: list[str], log: IO[str], seconds: float) -> int:
        limits.append(seconds)
        return 0

    monkeypatch.setattr(gpu_check, "ALL", left)
    monkeypatch.setattr(gpu_check, "ended", end)
    words = ["gpu_check.py", str(tmp_path / "out"), str(tmp_path), "versions", "step"]
    monkeypatch.setattr(sys, "argv", words)
    gpu_check.main()
    wanted = {700.0: [60, 120], 45.0: [45, 45], 20.0: []}[left]
    assert limits == pytest.approx(wanted, abs=2)
    assert ("step: no time is left for it" in capsys.readouterr().out) == (not wanted)


def test_files_of_tests_are_told_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each with its own words in the log; a file whose tests all need what is not there has 5."""

    def end(words: list[str], log: IO[str], seconds: float, environ: dict[str, str]) -> int | str:
        file = Path(words[-1])
        assert file.exists() and environ["TRITON_INTERPRET"] == "0"
        print(f"log of {file.name}", file=log)
        late = "not done after 300 s" if file.name == "test_loss_on_device.py" else 0
        return 5 if file.name == "test_dali_on_device.py" else late

    monkeypatch.setattr(gpu_check, "ended", end)
    found = gpu_check.gpu_tests(tmp_path)
    assert json.loads((tmp_path / "part.json").read_text()) == found
    there = {file.name for file in Path(__file__).parent.joinpath("gpu").glob("test_*.py")}
    assert found.keys() == there | {"test_loaders.py"}
    assert found["test_dali_on_device.py"] == "has none for here"
    assert found["test_loss_on_device.py"] == "not done after 300 s"
    assert found["test_loaders.py"] == 0
    assert capsys.readouterr().out.count("log of test_") == len(found)


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
