"""Everything outstanding that needs a GPU, in one go: correctness, steps, loaders, a real run.

    PYTHONPATH=. python3 bench/gpu_check.py OUT PHOTOS [PART ...]

Each part is a process of its own, since a GPU's fault ends all that its process does later. After
each, OUT/result.json has what it found, OUT/log.txt what it printed: a run cut short has lost
nothing. PHOTOS is a folder as `fastidmm prepare --dataset folder` takes it. First the part
`tests`, and with what that finds mended, the others: in the order of their worth, for as long as
there is time; what is left over goes by name another day. All of it ends within ten minutes.
"""

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from threading import Lock
from typing import IO, Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastidmm.bench import loader, loss, step, views
from fastidmm.bench.loader_child import STOCK
from fastidmm.bench.processes import tree
from fastidmm.bench.surroundings import surroundings
from fastidmm.kernels import add_norm, linear_gelu
from fastidmm.recipe import Recipe
from fastidmm.record import Record
from fastidmm.run import run_all

ROOT = Path(__file__).resolve().parents[1]
AHEAD, COMPILED = ["run.views_ahead=true"], ["run.compile=true"]
ALL, OF_A_FILE, SHORTEST, GRACE = 560.0, 300.0, 30.0, 15.0  # seconds
CACHE = 8000  # MB of decoded pictures, more than the photographs have


def versions() -> dict[str, Any]:
    """What is installed of what pyproject.toml asks for, by its words; missing packages, too."""
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    found: dict[str, str] = {}
    for requirement in wanted:
        asked = requirement.partition(";")[0]
        try:
            found[asked] = metadata.version(re.split(r"[<>=\[]", asked)[0])
        except metadata.PackageNotFoundError:
            found[asked] = "missing"
    return {"packages": found, "surroundings": surroundings()}


def gpu_tests(out: Path) -> dict[str, Any]:
    """`pytest -m gpu`, the files that have such tests: their statuses, each told as it ends.

    All at once, since most of their time is Python's and the compiler's. A fault, or a test that
    hangs, ends one file's.
    """
    folder = ROOT / "tests"
    files = [*sorted((folder / "gpu").glob("test_*.py")), folder / "test_loaders.py"]
    # Releases of other packages there may warn of what is no mistake here.
    words = [
        sys.executable, "-m", "pytest", "-v", "--tb=short", "-rfE", "-m", "gpu", "--durations=5",
        "-W", "default",
    ]  # fmt: skip
    environ = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "TRITON_INTERPRET": "0"}
    found, one_by_one = dict[str, Any](), Lock()

    def tested(file: Path) -> None:
        with tempfile.TemporaryFile("w+") as log:
            status = ended([*words, str(file)], log, OF_A_FILE, environ)
            log.seek(0)
            with one_by_one:
                print(log.read(), flush=True)
                found[file.name] = "has none for here" if status == 5 else status
                (out / "part.json").write_text(json.dumps(found))

    with ThreadPoolExecutor(len(files)) as pool:
        list(pool.map(tested, files))
    return found


def plain_loaders(photos: Path, device: torch.device) -> dict[str, Any]:
    """Loaders over the photographs, but DALI's, and the plain loop.

    That is torch's loader and steps in fp32, products by torch's defaults in full, one operation at
    a time. Who allows TF32 or autocast is nearer to the arm `torch`.
    """
    plain = loader.Arm("torch, fp32", "torch", run=(("precision", "fp32"), ("capture", False)))
    chosen = [*loader.arms(["resident", "ffcv", "torch"]), plain]
    return loader.measure(device, quick=True, chosen=chosen, photographs=photos)


def dali_loaders(photos: Path, device: torch.device) -> dict[str, Any]:
    """DALI and its own pipeline, with a cache and without, beside `resident`."""
    cached = [loader.Arm(f"{name}, cache", name, (("cache", CACHE),)) for name in ("dali", STOCK)]
    chosen = [*loader.arms(["resident", "dali", STOCK]), *cached]
    return loader.measure(device, quick=True, chosen=chosen, photographs=photos)


def apart(device: torch.device, **settings: Any) -> dict[str, Any]:
    """A step whose layers and what joins them are torch's, one by one."""
    vars(add_norm)["triton"] = vars(linear_gelu)["triton"] = None  # as if there were none
    return step.measure(device, quick=True, **settings)


def by_cudnn(device: torch.device) -> dict[str, Any]:
    """A step whose attention is cuDNN's, which runs do without; flash where cuDNN has none."""
    vars(torch.backends.cuda)["enable_cudnn_sdp"] = lambda enabled: None
    kinds = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(kinds, set_priority=True):
        return step.measure(device, quick=True)


def within_24_gb(device: torch.device) -> dict[str, Any]:
    """Fine-tuning DeiT-Base at 448 px by 128 images, in as many parts as 24 GB ask for."""
    whole = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(24e9 / whole)
    return step.measure(
        device, quick=True, method="supervised", backbone="deit_base", resolution=448,
        batch_size=128,
    )  # fmt: skip


def real_run(out: Path, photos: Path, epochs: int, tuning: int) -> dict[str, Any]:
    """Prepare, pretrain, fine-tune at 224 with and without pretraining, evaluate."""
    from fastidmm.datasets.folder import Folder
    from fastidmm.preparing.prepare import prepare

    began = time.perf_counter()
    summary = prepare(Folder().open(from_=photos, seed=0), "photos", quiet=True)
    prepared = time.perf_counter() - began
    tables: dict[str, dict[str, Any]] = {
        "run": {"dataset": "photos", "backbone": "deit_tiny", "epochs": epochs},
        "finetune": {"epochs": tuning},
        "finetune_high": {"epochs": 3},
    }
    folder = Path(tempfile.mkdtemp()) / "run"
    found: dict[str, Any] = {}
    try:
        found = run_all(Recipe.of(tables), str(folder))
    finally:  # an evaluation that fails leaves what was learnt
        if (folder / "metrics.jsonl").exists():
            shutil.copy(folder / "metrics.jsonl", out / f"metrics_{epochs}.jsonl")
    metrics = Record(folder).metrics()
    return {
        "images": summary.num_train,
        "seconds_prepare": prepared,
        "images_per_second": [line["images_per_second"] for line in metrics][-20:],
        "scores": found["scores"],
        "seconds": time.perf_counter() - began,
    }


def parts(out: Path, photos: Path) -> dict[str, tuple[float, Callable[[], Any]]]:
    """Every part by its name, those of most worth first, with the seconds it may take."""
    device = torch.device("cuda")
    high: dict[str, Any] = {"method": "supervised", "quick": True}
    return {
        "versions": (60, versions),
        "tests": (480, lambda: gpu_tests(out)),
        "step": (120, lambda: step.measure(device, trace=out / "trace.json.gz")),
        "views": (
            120, lambda: [views.measure(device, quick=True, size=size) for size in (112, 224)]
        ),
        "run": (240, lambda: real_run(out, photos, 40, 20)),
        "step_224": (
            90, lambda: step.measure(device, resolution=224, batch_size=256, **high)
        ),
        "step_apart": (90, lambda: apart(device)),
        "step_ahead": (90, lambda: step.measure(device, quick=True, settings=AHEAD)),
        "step_cudnn": (90, lambda: by_cudnn(device)),
        "step_compiled": (200, lambda: step.measure(device, quick=True, settings=COMPILED)),
        "loss": (120, lambda: loss.measure(device, quick=True)),
        "step_base": (90, lambda: step.measure(device, quick=True, backbone="deit_base")),
        "step_base_apart": (90, lambda: apart(device, backbone="deit_base")),
        "step_pvtv2_b3": (90, lambda: step.measure(device, quick=True, backbone="pvtv2_b3")),
        "step_448": (
            90, lambda: step.measure(device, resolution=448, batch_size=128, **high)
        ),
        "step_simclr": (
            90,
            lambda: step.measure(
                device, quick=True, method="simclr", backbone="timm:vit_small_patch16_224",
                resolution=224, batch_size=256,
            ),
        ),
        "memory": (180, lambda: within_24_gb(device)),
        "loaders": (420, lambda: plain_loaders(photos, device)),
        "loaders_dali": (420, lambda: dali_loaders(photos, device)),
        "headline": (540, lambda: real_run(out, photos, 800, 200)),
    }  # fmt: skip


def one(out: Path, photos: Path, name: str) -> None:
    """One part in this process: what it found goes to OUT/part.json."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("it is late"))  # by way of every `finally`
    logging.basicConfig()
    logging.getLogger("fastidmm").setLevel(logging.DEBUG)  # why steps are not captured, in full
    found = parts(out, photos)[name][1]()
    (out / "part.json").write_text(json.dumps(found, default=str))


def ended(
    words: list[str], log: IO[str], seconds: float, environ: dict[str, str] | None = None
) -> int | str:
    """The status of a process; one that is late is asked to end, then all it began is ended."""
    print(f"\n=== {words[-1]}", file=log, flush=True)
    child = subprocess.Popen(
        words, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, cwd=ROOT, env=environ
    )
    try:
        return child.wait(seconds)
    except subprocess.TimeoutExpired:
        begun = tree(child.pid)  # loaders have sessions of their own
        child.terminate()
        with suppress(subprocess.TimeoutExpired):
            child.wait(GRACE)
        for pid in {*begun, *tree(child.pid)}:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        child.wait()
        return f"not done after {seconds:.0f} s"


def main() -> None:
    """Run every part, each written down as it ends; a part that fails says why in the log."""
    out, photos = Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve()
    if sys.argv[3:4] == ["--one"]:
        one(out, photos, sys.argv[4])
        sys.exit()
    out.mkdir(parents=True, exist_ok=True)
    known, told, part = parts(out, photos), out / "result.json", out / "part.json"
    result = json.loads(told.read_text()) if told.exists() else {}  # of parts that went before
    chosen = sys.argv[3:] or list(known)
    if strange := set(chosen) - set(known):
        sys.exit(f"no part is called {', '.join(sorted(strange))}: choose from {' '.join(known)}")
    whole = time.perf_counter()
    for name in chosen:
        began = time.perf_counter()
        limit = min(known[name][0], whole + ALL - began)
        if limit < SHORTEST:
            print(f"{name}: no time is left for it", flush=True)
            continue
        part.unlink(missing_ok=True)  # of a go that was cut short
        words = [sys.executable, __file__, str(out), str(photos), "--one", name]
        with (out / "log.txt").open("a") as log:
            status = ended(words, log, limit)
        result[name] = {
            "status": status,
            "seconds": round(time.perf_counter() - began, 1),
            "found": json.loads(part.read_text()) if part.exists() else None,
        }
        told.write_text(json.dumps(result, indent=2))
        print(name, json.dumps(result[name])[:1500], flush=True)


if __name__ == "__main__":
    main()
