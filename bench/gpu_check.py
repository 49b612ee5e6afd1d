"""Everything outstanding that needs a GPU, in one go: correctness, step time, a real run.

    PYTHONPATH=. python3 bench/gpu_check.py OUT [PHOTOS]

OUT/result.json is written after every part, so that a run cut short has lost nothing; PHOTOS is a
folder as `fastidmm prepare --dataset folder` takes it. Under nine minutes on one H200.
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

from fastidmm import assemble
from fastidmm import train as training
from fastidmm.batch import Batch
from fastidmm.optim import update
from fastidmm.recipe import Recipe
from fastidmm.record import Record
from fastidmm.run import run_all
from fastidmm.store import Store

ROOT = Path(__file__).parents[1]
PEAK = 989e12  # dense bf16 FLOP/s of an H100 or H200 SXM, by the datasheet
# Forward and backward of one 112 px crop through DeiT-Tiny with a 2,040-way head.
FLOP_PER_CROP = 1.705e9
# The same at 224 and 448 px with 102 classes: 6 FLOP a multiply-add of the forward pass.
FLOP_224, FLOP_448 = 6 * 1.254e9, 6 * 7.122e9


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
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    return {"packages": found, "gpu": torch.cuda.get_device_name(), "commit": commit}


def gpu_tests() -> dict[str, Any]:
    """`pytest -m gpu`: its status and the end of what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests"],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=180,
    )  # fmt: skip
    return {"status": done.returncode, "tail": done.stdout.splitlines()[-15:]}


def photographs(num: int = 2040) -> Store:
    """Noise of the Flowers' sizes: 500 px short side, 667 long."""
    chance = torch.Generator().manual_seed(0)
    height = torch.full((num,), 500, dtype=torch.int32)
    width = torch.randint(500, 750, (num,), generator=chance).int()
    length = height.long() * width.long() * 3
    offset = length.cumsum(0) - length
    pixels = torch.randint(0, 256, (int(length.sum()),), generator=chance, dtype=torch.uint8)
    label = torch.arange(num) % 102
    return Store(pixels, offset, height, width, label, tuple(map(str, range(102))), "noise")


def loss_time() -> dict[str, Any]:
    """The loss at three sizes beside its peers and the three products alone."""
    from fastidmm.bench.loss import measure

    return measure(torch.device("cuda"))


def views_time() -> list[dict[str, Any]]:
    """The views' kernels beside the plain renderer and other libraries."""
    from fastidmm.bench.views import measure

    device = torch.device("cuda")
    return [measure(device, size=size, num_images=256, repeats=10) for size in (112, 224)]


def step_parts(out: Path, **run: Any) -> assemble.Parts:
    """DeiT-Tiny as the paper trains it, on noise, ready to step."""
    store = photographs()
    recipe = Recipe.of({"run": {"dataset": "noise", "backbone": "deit_tiny", **run}})
    record = Record.create(out / f"noise-{recipe.run.resolution}", recipe, store)
    return assemble.assemble(record, store)


def one_step(parts: assemble.Parts, batch: Batch) -> None:
    """Forward, backward and update."""
    parts.counters.step = batch.step
    loss = training.backward(parts, batch)
    lr = parts.schedule(torch.full((), batch.step, device="cuda"))
    update(parts.optimizer, parts.method, loss.total, lr)


def seconds_per(work: Any, *, warm: int = 5, num: int = 20, repeats: int = 5) -> list[float]:
    """Wall seconds of one call, `repeats` times over `num` calls, after warming up."""
    for number in range(warm):
        work(number)
    found = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for number in range(num):
            work(number)
        torch.cuda.synchronize()
        found.append((time.perf_counter() - began) / num)
    return sorted(found)


def step_time(out: Path, flop: float, **run: Any) -> dict[str, Any]:
    """Seconds of views alone, of the update alone (oracle), and of whole steps of `flop` FLOP."""
    parts = step_parts(out, **run)
    torch.cuda.reset_peak_memory_stats()
    loader: Any = parts.loader
    still = loader.batch(0)
    views = seconds_per(lambda n: loader.batch(n % 7))
    oracle = seconds_per(lambda n: one_step(parts, still))
    whole = seconds_per(lambda n: one_step(parts, loader.batch(n % 7)))
    middle = whole[len(whole) // 2]
    return {
        "seconds_views": views,
        "seconds_oracle": oracle,
        "seconds_step": whole,
        "images_per_second": parts.recipe.run.batch_size / middle,
        "mfu": flop / middle / PEAK,
        "stall": 1 - oracle[len(oracle) // 2] / middle,
        "peak_bytes": torch.cuda.max_memory_allocated(),
    }


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
    parts: dict[str, Callable[[], Any]] = {
        "versions": versions,
        "tests": gpu_tests,
        "views": views_time,
        "loss": loss_time,
        "step": lambda: step_time(out, 1536 * FLOP_PER_CROP),
        "step_224": lambda: step_time(
            out, 256 * FLOP_224, resolution=224, method="supervised", batch_size=256
        ),
        "step_448": lambda: step_time(
            out, 128 * FLOP_448, resolution=448, method="supervised", batch_size=128
        ),
    }
    if len(sys.argv) > 2:
        parts["run"] = lambda: real_run(out, Path(sys.argv[2]))
    result: dict[str, Any] = {}
    for name, part in parts.items():
        try:
            result[name] = part()
        except Exception as problem:  # the other parts are worth having
            result[name] = {"failed": repr(problem)}
        (out / "result.json").write_text(json.dumps(result, indent=2))
        print(name, json.dumps(result[name])[:2000], flush=True)


if __name__ == "__main__":
    main()
