"""Every branch that only a GPU takes, taken on one that is pretended: see pretended/.

Each test is a process of its own, since torch asks once whether there is a GPU.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from shutil import which

import pytest
from test_compiled_kernels import compiling

from fastidmm.datasets.folder import Folder
from fastidmm.preparing.prepare import prepare
from fastidmm.record import Record

TESTS = Path(__file__).parent
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        sys.platform != "linux" or which("g++") is None, reason="needs Linux and a C++ compiler"
    ),
]


@pytest.fixture(scope="module", autouse=True)
def built_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Processes after the first load what it has compiled of the GPU's C++."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PRETENDED", str(tmp_path_factory.mktemp("pretended") / "pretended.so"))
        yield


def printed(*words: str, seconds: float = 900) -> str:
    """What a process prints that says all is well."""
    environ = {**os.environ, "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"}
    environ.pop("PYTEST_ADDOPTS", None)
    done = subprocess.run(
        [sys.executable, *words], env=environ, capture_output=True, text=True, timeout=seconds,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout + done.stderr


REFUSALS = """
import pretended, pytest, torch, triton
from triton import language as tl

@triton.jit
def double(x, out, N: tl.constexpr):
    place = tl.arange(0, N)
    tl.store(out + place, tl.load(x + place) * 2)

here = torch.arange(4.0)
there = here.cuda()
assert there.is_cuda and there.tolist() == (there + 0).cpu().tolist() == here.tolist()
with pytest.raises(RuntimeError, match="same device"):
    there + here
with pytest.raises((TypeError, RuntimeError)):
    there.numpy()
out = torch.empty_like(there)
double[(1,)](there, out, N=4)
double[(1,)](here.pin_memory(), out, N=4)
assert out.tolist() == [0, 2, 4, 6]
with pytest.raises(RuntimeError, match="cpu tensor"):
    double[(1,)](here, out, N=4)

WAITS = {
    "item": lambda: there.sum().item(),
    "nonzero": lambda: there.nonzero(),
    "mask": lambda: there[there > 1],
    "to the host": lambda: there.cpu(),
    "from the host": lambda: here.cuda(),
    "a number": lambda: torch.tensor(1.0, device="cuda"),
    "indices of the host": lambda: there[torch.tensor([0, 1])],
}
torch.cuda.set_sync_debug_mode("error")
for name, work in WAITS.items():
    with pytest.raises(RuntimeError):
        work()
        pytest.fail(name)
there.to("cuda").add_(0)
torch.use_deterministic_algorithms(True)
there.long().cumsum(0)
with pytest.raises(RuntimeError, match="deterministic"):
    there.cumsum(0)
torch.use_deterministic_algorithms(False)
torch.cuda.set_sync_debug_mode("default")
pool = torch.cuda.graph_pool_handle()
for name, work in {**WAITS, "pageable": lambda: there.copy_(here, non_blocking=True)}.items():
    with pytest.raises(RuntimeError), torch.cuda.graph(torch.cuda.CUDAGraph(), pool=pool):
        work()
        pytest.fail(name)

def captured():
    graph, found = torch.cuda.CUDAGraph(), torch.empty_like(there)
    with torch.cuda.graph(graph, pool=pool):
        double[(1,)](there, found, N=4)
        sums = found.sum() + 1
    return graph, sums

(one, first), (other, second) = captured(), captured()
one.replay()
assert first.tolist() == 13
there.add_(1)
one.replay()
assert first.tolist() == 21
other.replay()
assert second.tolist() == 21 and first.isnan().tolist()  # the pool's memory is the other's now

side, main = torch.cuda.Stream(), torch.cuda.current_stream()

def beside(fork=True, join=True):
    graph, total = torch.cuda.CUDAGraph(), torch.zeros_like(there)
    with torch.cuda.graph(graph, pool=pool):
        if fork:
            side.wait_stream(main)
        with torch.cuda.stream(side):
            found = there * 2
        early = found + 0
        if join:
            main.wait_stream(side)
        total.copy_(found)
    return graph, early, total

graph, early, total = beside()
before = (there * 2).tolist()
there.add_(1)
graph.replay()  # what reads before it waits reads what was there
assert total.tolist() == (there * 2).tolist() and early.tolist() == before
for missing in ({"fork": False}, {"join": False}):
    with pytest.raises(RuntimeError, match="stream"):
        beside(**missing)
weight = torch.nn.Linear(4, 3).to("cuda").weight
with torch.autocast("cuda", torch.bfloat16):
    made = torch.nn.functional.linear(there, weight)
made.float().sum().backward()
assert made.dtype == torch.bfloat16 and weight.grad.is_cuda
pretended.leave()
"""


def test_what_a_gpu_refuses_is_refused(tmp_path: Path) -> None:
    (tmp_path / "refusals.py").write_text(REFUSALS)  # Triton reads a kernel's source
    printed(str(tmp_path / "refusals.py"))


@pytest.mark.parametrize(
    ("file", "chosen"),
    [
        ("test_capture_on_device.py", "ordinary and not (idmm or mocov2 or simclr)"),
        ("test_capture_on_device.py", "ahead and supervised"),
        (
            "test_on_device.py",
            "not (million or 112 or 224 or never or randaugment or kernels_give and pretraining)",
        ),
        ("test_dropout_on_device.py", "dropout"),
        ("test_norms_on_device.py", "bits or bit or 48 or 65 or 128"),
        (
            "test_linear_on_device.py",
            "every_stage and not wide or not (dwconv or every_stage or wide)",
        ),
        ("test_loss_on_device.py", "shape0 or d_logits or eager_gives and stored or waits or fp32"),
    ],
    ids=["captured", "ahead", "views", "dropout", "norms", "linear", "loss"],
)
def test_the_gpus_own_tests_hold(file: str, chosen: str) -> None:
    words = ("-m", "pytest", "-p", "pretended", "-p", "no:xdist", "-q", "-m", "gpu", "-k", chosen)
    assert " passed" in printed(*words, str(TESTS / "gpu" / file))


BENCH = """
import pretended, torch
from fastidmm.bench import step
from synthetic import small_store
pretended.larger()
whole = step.times_of
step.times_of = lambda parts, repeats, steps, captured: whole(parts, 1, 2, captured)
step.noise = lambda num, pictures: small_store(3)
found = step.measure(
    torch.device("cuda"), backbone="vit_micro", resolution=16, batch_size=2, quick=True
)
assert found["settings"]["captured_kinds"] == 3, found["settings"]
assert set(found["tables"]["step"]) >= {"step", "one batch", "views", "backward", "update"}
pretended.leave()
"""


def test_a_step_is_measured() -> None:
    """IDMM's, captured and not."""
    printed("-c", BENCH)


TRAFFIC = """
import pretended
from pretended.traffic import counted
launches, moved = counted("vit_micro", 2, 32)["add_norm forward"]
# One before the first block, two a block but for the last, whose second is of the class token.
tokens = 2 * 6 * 17 * 128
whole = 4 + 2 + 6 * (4 + 2 + 4 + 2)  # bytes of a number: x, branch, sum and norm
assert launches == 8 and 0 <= moved - tokens * (whole + 12 / 17) < 0.05 * moved, (launches, moved)
pretended.leave()
"""


def test_what_a_step_moves_is_counted() -> None:
    printed("-c", TRAFFIC)


RUN = """
import json, pathlib, weakref
import pretended
import torch
from pretended.tensors import State
from fastidmm.__main__ import main

made, begin = weakref.WeakSet(), torch.optim.AdamW.__init__

def beginning(self, *given, **options):
    assert not len(made), "an earlier stage's moments are still there"
    begin(self, *given, **options)
    made.add(self)

torch.optim.AdamW.__init__ = beginning
try:
    main()
except SystemExit as end:
    pathlib.Path("launches.json").write_text(json.dumps(sorted(State.launches)))
    pretended.leave(end.code or 0)
pretended.leave(1)
"""


def test_a_run_from_the_store_to_the_report(
    home: Path, photos: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pretraining, both stages of fine-tuning, evaluation and report, by captured steps.

    Whatever kernel it launched compiles for a GPU with the arguments it was launched with.
    """
    for split, num in {"train": 4, "test": 1}.items():  # an interpreter has minutes for each
        photos(tmp_path / "photos" / split, per_class=num)
    prepare(Folder().open(from_=tmp_path / "photos", seed=0), "few", workers=0, quiet=True)
    table = ["finetune.resolution=16", "finetune.epochs=2", "finetune_high.resolution=24"]
    options = [w for each in (*table, "finetune_high.epochs=1") for w in ("--set", each)]
    told = printed(
        "-c", RUN, "run", "--dataset", "few", "--backbone", "vit_micro", "--resolution", "16",
        "--batch-size", "4", "--epochs", "2", "--device", "cuda",
        "--run", "made", *options,
    )  # fmt: skip
    assert "loader resident" in told and "GPU's memory" in told
    assert "captured" not in told, "steps of a kind could not be captured"
    line = Record(tmp_path / "runs" / "made").metrics()[-1]
    assert line["step"] == 4 and "knn_top1" in line
    assert (tmp_path / "runs" / "made" / "report.html").exists()
    monkeypatch.setenv("LAUNCHES", str(tmp_path / "launches.json"))
    with compiling() as compiled:
        builds = compiled("launches", "90")
    kernels = {title.split()[0] for _, title, _ in builds}
    layers = {"forward_kernel", "backward_kernel", "gelu_kernel", "heads_kernel"}
    views = {"draws", "words", "resize", "means", "tint", "measure", "operate", "finish"}
    assert kernels == {*views, "row_kernel"} | layers
    assert all(use["stack"] == 0 for *_, use in builds), builds
