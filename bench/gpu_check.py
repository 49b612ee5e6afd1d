"""Everything outstanding that needs a GPU, in one go: correctness, steps, loaders, a real run.

    PYTHONPATH=. python3 bench/gpu_check.py OUT PHOTOS [PART ...]

OUT/result.json is written after every part, so that a run cut short has lost nothing; PHOTOS is a
folder as `fastidmm prepare --dataset folder` takes it. Meant for two goes of under nine minutes on
one H200: first the part `tests`, and with what that finds mended, the others.
"""

import json
import re
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fastidmm.bench import loader, loss, step, views
from fastidmm.bench.loader_child import STOCK
from fastidmm.bench.surroundings import surroundings
from fastidmm.recipe import Recipe
from fastidmm.record import Record
from fastidmm.run import run_all

ROOT = Path(__file__).parents[1]
CACHE = 8000  # MB of decoded pictures, more than the photographs have


def versions() -> dict[str, Any]:
    """What is installed against what pyproject.toml asks for; missing packages are listed."""
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    found: dict[str, str] = {}
    for requirement in wanted:
        name = re.split(r"[ ;<>=\[]", requirement)[0]
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "missing"
    return {"packages": found, "surroundings": surroundings()}


def gpu_tests() -> dict[str, Any]:
    """`pytest -m gpu`: its status and the end of what it printed."""
    words = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--durations=15", "tests"]
    try:
        done = subprocess.run(
            words, cwd=ROOT, capture_output=True, text=True, check=False, timeout=480
        )
    except subprocess.TimeoutExpired as late:
        said = late.stdout or b""
        text = said.decode() if isinstance(said, bytes) else said
        return {"failed": "eight minutes were not enough", "tail": text.splitlines()[-60:]}
    return {"status": done.returncode, "tail": done.stdout.splitlines()[-60:]}


def loader_time(photos: Path, device: torch.device) -> dict[str, Any]:
    """Every loader over the photographs; DALI and its own pipeline with and without a cache."""
    cached = [loader.Arm(f"{name}, cache", name, (("cache", CACHE),)) for name in ("dali", STOCK)]
    chosen = [*loader.arms(), *cached]
    return loader.measure(device, quick=True, chosen=chosen, photographs=photos)


def real_run(out: Path, photos: Path) -> dict[str, Any]:
    """Prepare, pretrain, fine-tune at 224 with and without pretraining, evaluate."""
    from fastidmm.datasets.folder import Folder
    from fastidmm.preparing.prepare import prepare

    began = time.perf_counter()
    summary = prepare(Folder().open(from_=photos, seed=0), "photos", quiet=True)
    prepared = time.perf_counter() - began
    tables: dict[str, dict[str, Any]] = {
        "run": {"dataset": "photos", "backbone": "deit_tiny", "epochs": 40},
        "finetune": {"epochs": 20},
        "finetune_high": {"epochs": 3},
    }
    found = run_all(Recipe.of(tables), str(out / "run"))
    metrics = Record(out / "run").metrics()
    return {
        "images": summary.num_train,
        "seconds_prepare": prepared,
        "images_per_second": [line["images_per_second"] for line in metrics][-20:],
        "scores": found["scores"],
        "seconds": time.perf_counter() - began,
    }


def main() -> None:
    """Run every part, each written down as it ends; a part that fails says why."""
    out = Path(sys.argv[1]).resolve()
    out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda")
    high: dict[str, Any] = {"method": "supervised", "quick": True}
    parts: dict[str, Callable[[], Any]] = {
        "versions": versions,
        "tests": gpu_tests,
        "views": lambda: [views.measure(device, quick=True, size=size) for size in (112, 224)],
        "loss": lambda: loss.measure(device),
        "step": lambda: step.measure(device, trace=out / "trace.json.gz"),
        "run": lambda: real_run(out, photos),
        "loaders": lambda: loader_time(photos, device),
        "step_224": lambda: step.measure(device, resolution=224, batch_size=256, **high),
        "step_448": lambda: step.measure(device, resolution=448, batch_size=128, **high),
        "step_base": lambda: step.measure(device, quick=True, backbone="deit_base"),
        "step_pvtv2_b3": lambda: step.measure(device, quick=True, backbone="pvtv2_b3"),
        "step_compiled": lambda: step.measure(device, quick=True, compiled=True),
    }
    photos, chosen = Path(sys.argv[2]), sys.argv[3:] or list(parts)
    result: dict[str, Any] = {}
    for name in chosen:
        try:
            result[name] = parts[name]()
        except Exception as problem:  # the other parts are worth having
            result[name] = {"failed": repr(problem)}
        (out / "result.json").write_text(json.dumps(result, indent=2))
        print(name, json.dumps(result[name])[:2000], flush=True)


if __name__ == "__main__":
    main()
