"""Kernels as compiled for five GPUs: nothing spilled, loads in vectors, tensor cores in use."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
# Bytes of shared memory a block may have, by the CUDA programming guide's table.
SHARED = {"80": 163 << 10, "86": 99 << 10, "89": 99 << 10, "90": 227 << 10, "100": 227 << 10}


Compiled = Callable[..., list[tuple[str, str, dict[str, int]]]]


@contextmanager
def compiling() -> Iterator[Compiled]:
    """Gives (architecture, build, what it uses), from a process that does not interpret."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    with (
        tempfile.TemporaryFile() as said,
        subprocess.Popen(
            [sys.executable, ROOT / "tests" / "compiled.py"],
            env=environment | {"PYTHONPATH": str(ROOT)}, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said,
        ) as process,
    ):  # fmt: skip
        assert process.stdin is not None and process.stdout is not None
        asked, answers = process.stdin, process.stdout

        def compiled(name: str, *architectures: str) -> list[tuple[str, str, dict[str, int]]]:
            print(name, *architectures, file=asked, flush=True)
            line = answers.readline()
            said.seek(0)
            assert line, said.read().decode()[-2000:]
            found: dict[str, Any] = json.loads(line)
            assert set(found) == set(architectures), found.get("failed")
            return [(a, title, use) for a, builds in found.items() for title, use in builds.items()]

        yield compiled


@pytest.fixture(scope="module")
def compiled() -> Iterator[Compiled]:
    with compiling() as found:
        yield found


def test_row_kernels(compiled: Compiled) -> None:
    builds = compiled("rows", *SHARED)
    assert len(builds) == 5 * 3
    for architecture, title, use in builds:
        where = f"{title} for sm_{architecture}: {use}"
        assert use["stack"] == 0, where
        assert use["vector_loads"] > 0 and use["vector_stores"] > 0, where
        assert use["shared"] <= SHARED[architecture], where


def test_view_programs(compiled: Compiled) -> None:
    builds = compiled("views", *SHARED)
    assert len(builds) == 5 * (2 + 2 + 3 * 2)
    for architecture, title, use in builds:
        where = f"{title} for sm_{architecture}: {use}"
        assert use["stack"] == 0, where
        assert use["registers"] <= 128, where
        products = title.startswith("resize") or title.endswith("blurred")
        assert (use["tensor_core"] > 0) == products, where
        assert use["shared"] <= SHARED[architecture], where


def test_draws_fuse_no_doubles(compiled: Compiled) -> None:
    """A fused multiply-add rounds once where the definition rounds twice."""
    for architecture, title, use in compiled("draws", "80", "90", "100"):
        assert use["stack"] == 0 and use["fused_doubles"] == 0, f"{title} for sm_{architecture}"


def test_operations_of_randaugment(compiled: Compiled) -> None:
    """Nothing spilled, room for four programs, and float64 as the definition rounds it."""
    for architecture, title, use in compiled("randaugment", "80", "90", "100"):
        where = f"{title} for sm_{architecture}: {use}"
        assert use["stack"] == 0 and use["fused_doubles"] == 0 and use["registers"] <= 128, where


@pytest.mark.slow
@pytest.mark.parametrize("architecture", SHARED)
def test_tile_kernels(architecture: str, compiled: Compiled) -> None:
    builds = compiled("tiles", architecture)
    assert len(builds) == 2 * 5
    for _, title, use in builds:
        where = f"{title} for sm_{architecture}: {use}"
        assert use["stack"] == 0, where
        assert use["tensor_core"] > 0 and use["vector_loads"] > 0, where
        assert use["shared"] <= SHARED[architecture], where
        # Blocks of 64 rows and more are what the newer instructions take.
        newer = architecture in ("90", "100") and title in ("forward D = 192", "weight D = 192")
        assert use["warpgroup"] > 0 or not newer, where


def test_sums_and_norms(compiled: Compiled) -> None:
    builds = compiled("norms", *SHARED)
    assert len(builds) == 5 * 2 * 4
    for architecture, title, use in builds:
        where = f"{title} for sm_{architecture}: {use}"
        assert use["stack"] == 0 and use["registers"] <= 96, where
        assert use["vector_loads"] >= 3 and use["vector_stores"] >= 3, where


def test_gradients_of_layers(compiled: Compiled) -> None:
    builds = compiled("linear", *SHARED)
    assert len(builds) == 5 * (1 + 2 * 2)
    for architecture, title, use in builds:
        where = f"{title} for sm_{architecture}: {use}"
        # Four programs of 128 threads share a multiprocessor's 65,536 registers.
        assert use["stack"] == 0 and use["registers"] <= 128, where
        num = {"forward": 1, "gelu": 2, "heads": 3}[title.split()[0]]
        assert use["vector_loads"] >= num and use["vector_stores"] >= num - 1, where


def test_linear_attention_and_dropout(compiled: Compiled) -> None:
    builds = compiled("performer", *SHARED)
    assert len(builds) == 5 * (4 + 2)
    for architecture, title, use in builds:
        where = f"{title} for sm_{architecture}: {use}"
        assert use["stack"] == 0 and use["shared"] <= SHARED[architecture], where
        if "dropout" in title:
            assert use["registers"] <= 32 and use["vector_stores"] > 0, where
        else:
            # Of a multiprocessor's 65,536 registers, for two programs of 128 threads, or three.
            assert use["registers"] <= (255 if title in ("query", "pair") else 168), where
            assert use["tensor_core"] > 0 and use["vector_loads"] >= 8, where


def test_convolutions(compiled: Compiled) -> None:
    builds = compiled("dwconv", *SHARED)
    assert len(builds) == 5 * 3 * 6
    for architecture, title, use in builds:
        where = f"{title} for sm_{architecture}: {use}"
        # Four programs of 128 threads share a multiprocessor, three gradients, or one of 256.
        most = 255 if title == "gradient of 112" else 168 if "gradient" in title else 128
        assert use["stack"] == 0 and use["registers"] <= most, where
