"""The loaders' benchmark: turns, arithmetic, processes of their own, what cannot be measured."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from test_bench import typed

from fastidmm.bench import loader as bench
from fastidmm.bench import processes
from fastidmm.bench.figures import text
from fastidmm.errors import UsageError
from fastidmm.registry import LOADERS
from fastidmm.store import open_store, prepared

CPU = torch.device("cpu")
FIGURES = {"images_per_second", "crops_per_second", "core_seconds", "memory_mb", "mapped_mb"}


class Told:
    """A process that answers with numbers made up."""

    def __init__(self, name: str, met: list[tuple[str, str]]) -> None:
        self.name, self.met = name, met
        self.core_seconds = iter([10.0, 20.0, 15.0] if name == "resident" else [30.0, 40.0, 60.0])

    def first(self) -> float:
        self.met.append((self.name, "first"))
        if self.name == "bad":
            raise bench.Unmeasured("failed: no decoder")
        return 2.5

    def turn(self, order: str) -> dict[str, Any]:
        self.met.append((self.name, order))
        if order == "train":
            return {"train_images_per_second": 10.0, "stall": 0.25}
        return {"images_per_second": 100.0, "core_seconds": next(self.core_seconds), "gpu_mb": None}


def test_loaders_take_turns(home: Path, toy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    met: list[tuple[str, str]] = []

    @contextmanager
    def started(arm: bench.Arm, settings: dict[str, Any], place: Path) -> Iterator[Told]:
        yield Told(arm.name, met)
        met.append((arm.name, "ended"))

    monkeypatch.setattr(bench, "started", started)
    monkeypatch.setattr(bench, "missing", lambda name, _: "buy it" if name == "ffcv" else None)
    monkeypatch.setattr(bench.Plan, "of", lambda *_, **__: bench.Plan(3, 1, 0.0))
    names = ("resident", "ffcv", "bad", "torch", "stock-dali")
    chosen = [bench.Arm(name, name) for name in names]
    found = bench.measure(CPU, chosen=chosen, dataset=toy)
    rows = found["tables"]["loaders"]
    assert list(rows) == list(names)
    assert rows["ffcv"] == {"status": "missing: buy it"}
    assert rows["bad"] == {"status": "failed: no decoder"}
    assert rows["resident"]["core_seconds"] == {
        "median": 15.0,
        "low": 10.0,
        "high": 20.0,
        "raw": [10.0, 20.0, 15.0],
    }
    assert rows["torch"]["stall"]["median"] == 0.25 and rows["torch"]["gpu_mb"] is None
    assert rows["torch"]["cold_seconds"] == 2.5
    # DALI's own pipeline trains nothing.
    assert "stall" not in rows["stock-dali"]
    able = ["resident", "torch", "stock-dali"]
    assert met[:4] == [(name, "first") for name in ("resident", "bad", "torch", "stock-dali")]
    turns = [(name, "load") for name in able] * 3 + [(name, "train") for name in able[:2]]
    assert met[4:15] == turns
    assert sorted(met[15:]) == [(name, "ended") for name in sorted([*able, "bad"])]
    # 30 / 10, 40 / 20 and 60 / 15: not the medians' ratio, 40 / 15.
    assert found["notes"] == ["per core-second, resident / torch: 3.0 (2.0 to 4.0)"]
    assert "missing: buy it" in text(found)
    assert found["dataset"]["fingerprint"] == open_store(home / "stores" / toy, "train").fingerprint


@pytest.mark.parametrize("turns", [{}, {"torch": [{"core_seconds": 3.0}]}])
def test_there_is_no_ratio_of_one(turns: dict[str, Any]) -> None:
    assert bench.gain(turns) is None
    assert bench.gain(turns | {"resident": [{"core_seconds": None}]}) is None


@pytest.mark.slow
def test_resident_and_torch_are_measured(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = bench.Arm("broken", "torch", (("workers", "many"),))
    arms, measure = bench.arms, bench.measure
    monkeypatch.setattr(bench, "arms", lambda names: [broken, *arms(names)])
    monkeypatch.setattr(bench, "measure", lambda *a, **k: measure(*a, **k, resolution=16))
    monkeypatch.setattr(bench.Plan, "of", lambda *_, **__: bench.Plan(1, 1, 0.0))
    words = ["--loader", "resident", "--loader", "torch", "--batch-size", "2", "--device", "cpu"]
    assert typed(monkeypatch, "bench", "loader", *words, "--json", "-") == 0
    found = json.loads(capsys.readouterr().out)
    rows = found["tables"]["loaders"]
    assert rows["broken"]["status"].startswith("failed: ValidationError: 1 validation error")
    for name in ("resident", "torch"):
        row = rows[name]
        assert row["status"] == "ok"
        for figure in FIGURES | {"train_images_per_second", "warm_seconds"}:
            assert row[figure]["median"] > 0, figure
        rates = [row[figure]["raw"][0] for figure in ("images_per_second", "crops_per_second")]
        assert rates[1] / rates[0] == pytest.approx(6, rel=1e-4)
        assert row["stall"]["median"] < 1
    assert found["notes"][0].startswith("per core-second, resident / torch: ")
    assert found["dataset"]["images"] == 8 and found["surroundings"]["gpu"] is None
    assert prepared() == [] and os.environ["FASTIDMM_HOME"] == str(home)


@pytest.fixture
def python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A script in the place of the interpreter that is to run a loader."""
    script = tmp_path / "python"
    script.touch(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    return script


def test_a_process_that_dies_says_why(python: Path, tmp_path: Path) -> None:
    python.write_text("#!/bin/sh\necho out of luck >&2\necho >&2\nexit 7\n")
    arm, place = bench.Arm("a", "resident"), tmp_path / "place"
    with bench.started(arm, {"device": "cpu"}, place) as child:
        with pytest.raises(bench.Unmeasured, match="failed: ended with status 7: out of luck"):
            child.first()
        with pytest.raises(bench.Unmeasured, match="failed: ended"):
            child.turn("load")


def test_a_process_that_hangs_is_ended_with_its_workers(
    python: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "PATIENCE", 0.5)
    monkeypatch.setattr(bench, "GRACE", 0.1)
    python.write_text(f"#!/bin/sh\nsleep 600 &\necho $! > {tmp_path}/worker\nsleep 600\n")
    with bench.started(bench.Arm("a", "resident"), {"device": "cpu"}, tmp_path / "p") as child:
        with pytest.raises(bench.Unmeasured, match="failed: no answer in"):
            child.first()
        worker = int((tmp_path / "worker").read_text())
        assert worker in processes.tree(child.process.pid)
    for _ in range(100):  # whoever takes in orphans has to see its end
        state = processes._stat(worker)[:1]
        if state in ([], ["Z"]):
            break
        time.sleep(0.05)
    assert state in ([], ["Z"])


def test_a_store_without_its_files_is_missing_them(home: Path, toy: str, tmp_path: Path) -> None:
    store = open_store(home / "stores" / toy, "train")
    assert bench.missing("torch", store) is None
    next((tmp_path / "photos" / "train").glob("*/*.png")).unlink()
    problem = bench.missing("torch", store)
    assert problem is not None and "is not there any more: choose --loader resident" in problem


def test_wrong_words(home: Path) -> None:
    with pytest.raises(UsageError, match="unknown loader 'residend': did you mean 'resident'"):
        bench.arms(["residend"])
    names = [arm.name for arm in bench.arms()]
    assert names[0] == "resident" and names[-1] == "stock-dali" and len(names) == len(LOADERS) + 1
    with pytest.raises(UsageError, match="no dataset 'none' is prepared"):
        bench.measure(CPU, dataset="none")
    with pytest.raises(UsageError, match=r"there is no folder .*none: check what follows --from"):
        bench.measure(CPU, photographs=home / "none")


BUSY = """
import mmap, os, time
kept = bytearray(b"k") * (40 << 20)              # 42 MB of its own
shared = mmap.mmap(-1, 30 << 20)                 # 31 MB for both
pages = slice(None, None, mmap.PAGESIZE)
shared[pages] = b"x" * len(shared[pages])
def work(seconds):
    while time.process_time() < seconds: pass
if not os.fork():
    work(0.3)
    os._exit(0)
work(0.2)
if not os.fork():
    assert set(shared[pages]) == set(b"x")       # both have touched it
    print("ready", flush=True)
    time.sleep(600)
os.wait()
time.sleep(600)
"""


def test_a_tree_counts_whole_and_shared_memory_once() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", BUSY], stdout=subprocess.PIPE, start_new_session=True
    ) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == b"ready\n"
            for _ in range(200):  # the first child ends, and is waited for
                if len(processes.tree(process.pid)) == 2:
                    break
                time.sleep(0.05)
            spent = processes.cpu_seconds(process.pid)
            held = processes.memory(process.pid)
        finally:
            os.killpg(process.pid, 9)
    # The first child began where its parent was, and gets 0.3 s of its own; others a few ms.
    assert spent is not None and 0.45 < spent < 1.5
    assert held is not None and 70e6 < held[0] < 100e6
    assert 2e6 < held[1] < 60e6


def test_time_shorter_than_a_tick_counts() -> None:
    spent = [processes.cpu_seconds(os.getpid()) for _ in range(20)]
    assert all(a is not None and b is not None and a < b for a, b in pairwise(spent))


def test_where_the_system_counts_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(processes, "PROC", tmp_path / "none")
    assert processes.cpu_seconds(1) is None and processes.memory(1) is None
