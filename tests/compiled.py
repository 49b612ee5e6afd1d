"""Compiles kernels for GPUs that are not there and prints, as JSON, what each build uses.

    python tests/compiled.py NAME [ARCHITECTURE ...]

Run as a process of its own without TRITON_INTERPRET, which is read when a kernel is defined. Needs
no GPU and no torch device: ptxas and cuobjdump come with Triton.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastidmm.kernels import instance_loss_rows as rows

ARCHITECTURES = (80, 86, 89, 90, 100)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Build(NamedTuple):
    """A kernel as launched: types of its arguments in order, constants, options."""

    kernel: Any
    arguments: dict[str, str]  # "*fp32" pointers and "i32:16" multiples of 16 are aligned
    constants: dict[str, Any]
    options: dict[str, Any]


def row_builds(architecture: int) -> dict[str, Build]:
    """The row kernels as launched for N = 2040, 10000 and 100000."""
    targets = {"ROWS": "*i64", "PARTNER": "*i64", "LAM": "*fp32", "SHARE": "*fp32"}
    found = {}
    for num in (2040, 10_000, 100_000):
        once, block, warps = rows.shape_of(rows.pitch_of(num))
        arguments = {
            "X": "*fp32", "G": "*bf16", "BIAS": "*fp32", **targets,
            "LOSS": "*fp32", "LSE": "*fp32", "HIT": "*u8", "share": "fp32", "smoothing": "fp32",
            "num": "i32", "pitch": "i32:16", "g_pitch": "i32:16",
        }  # fmt: skip
        kernel = rows.row_kernel if once else rows.long_row_kernel
        constants = {"BLOCK": block, "WRITE": True}
        options = {"num_warps": warps, "num_stages": 1}
        found[f"rows N = {num}"] = Build(kernel, arguments, constants, options)
    return found


def built(build: Build, architecture: int) -> dict[str, int]:
    """Registers, bytes of stack and of shared memory, and the instructions that matter."""
    names = build.kernel.arg_names
    signature = {n: build.arguments.get(n, "constexpr").split(":")[0] for n in names}
    aligned = [n for n, kind in build.arguments.items() if kind[0] == "*" or kind.endswith(":16")]
    source = ASTSource(
        fn=build.kernel,
        signature=signature,
        constexprs=build.constants,
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
    )
    target = GPUTarget("cuda", architecture, 32)
    made = triton.compile(source, target=target, options=build.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        command = [str(TOOLS / "cuobjdump"), "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    numbers = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    text = made.asm["ptx"]
    return {
        "registers": numbers["REG"],
        "stack": numbers["STACK"] + numbers["LOCAL"],
        "shared": made.metadata.shared,
        "vector_loads": len(re.findall(r"ld\.global[\w.]*\.v4\.", text)),
        "vector_stores": len(re.findall(r"st\.global[\w.]*\.v[24]\.", text)),
        "tensor_core": len(re.findall(r"wgmma\.mma_async|mma\.sync|tcgen05\.mma", text)),
        "warpgroup": len(re.findall(r"wgmma\.mma_async|tcgen05\.mma", text)),
    }


KINDS = {"rows": row_builds}


def main() -> None:
    """Print {architecture: {build: what it uses}}."""
    name, *chosen = sys.argv[1:]
    found = {
        architecture: {
            title: built(build, architecture) for title, build in KINDS[name](architecture).items()
        }
        for architecture in map(int, chosen or ARCHITECTURES)
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
