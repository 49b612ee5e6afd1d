"""Compiles kernels for GPUs that are not there and prints, as JSON, what each build uses.

    echo NAME [ARCHITECTURE ...] | python tests/compiled.py

A line is printed for each that is asked: half of what one takes is to import all this. A process
of its own without TRITON_INTERPRET, which is read when a kernel is defined. Needs no GPU and no
torch device: ptxas and cuobjdump come with Triton.
"""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastidmm.batch import Interpolation, ViewGroup
from fastidmm.kernels import (
    add_norm,
    add_norm_program,
    draws,
    draws_program,
    dropout,
    dropout_program,
    linear_dwconv_gelu,
    linear_dwconv_gelu_program,
    linear_gelu,
    linear_performer,
    linear_performer_program,
    linear_program,
    randaugment,
    randaugment_program,
    views,
    views_programs,
    words,
    words_program,
)
from fastidmm.kernels import instance_loss_rows as rows
from fastidmm.kernels import instance_loss_stream as stream
from fastidmm.kernels import instance_loss_tiles as tiles

ARCHITECTURES = (80, 86, 89, 90, 100)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Build(NamedTuple):
    """A kernel as launched: types of its arguments in order, constants, options."""

    kernel: Any
    # "*fp32" pointers and "i32:16" multiples of 16 are aligned, "*fp32:1" are not.
    arguments: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, Any]


TARGETS = {"ROWS": "*i64", "PARTNER": "*i64", "LAM": "*fp32", "SHARE": "*fp32"}


def row_builds(architecture: int) -> dict[str, Build]:
    """The row kernels as launched for N = 2040, 10000 and 100000."""
    found = {}
    for num in (2040, 10_000, 100_000):
        once, block, warps = rows.shape_of(rows.pitch_of(num))
        arguments = {
            "X": "*fp32", "G": "*bf16", "BIAS": "*fp32", **TARGETS,
            "LOSS": "*fp32", "LSE": "*fp32", "HIT": "*u8", "share": "fp32", "smoothing": "fp32",
            "num": "i32", "pitch": "i32:16", "g_pitch": "i32:16",
        }  # fmt: skip
        kernel = rows.row_kernel if once else rows.long_row_kernel
        constants = {"BLOCK": block, "WRITE": True}
        options = {"num_warps": warps, "num_stages": 1}
        found[f"rows N = {num}"] = Build(kernel, arguments, constants, options)
    return found


def forward_build(width: int, blocks: stream.Tiles) -> Build:
    """The forward kernel of path F."""
    arguments = {
        "Z": "*bf16", "W": "*bf16", "BIAS": "*fp32", "ROWS": "*i64", "OUT": "*fp32",
        "PART": "*fp32", "batch": "i32:16", "num": "i32", "per_split": "i32:16",
    }  # fmt: skip
    return Build(tiles.forward_kernel, arguments, *chosen(width, blocks))


def weight_build(width: int, blocks: stream.Tiles) -> Build:
    """The backward kernel of path F."""
    arguments = {
        "Z": "*bf16", "W": "*bf16", "BIAS": "*fp32", **TARGETS, "LSE": "*fp32",
        "GRADIENT": "*fp32", "DW": "*fp32", "DBIAS": "*fp32", "share": "fp32",
        "smoothing": "fp32", "batch": "i32:16", "num": "i32",
    }  # fmt: skip
    return Build(tiles.weight_kernel, arguments, *chosen(width, blocks))


def chosen(width: int, blocks: stream.Tiles) -> tuple[dict[str, Any], dict[str, Any]]:
    """Constants and options of a block."""
    sizes = {"BLOCK_B": blocks.rows, "BLOCK_N": blocks.classes}
    constants = {"D": width, "CHUNK": stream.CHUNKS[width], **sizes}
    return constants, {"num_warps": blocks.warps, "num_stages": blocks.stages}


def tile_builds(architecture: int) -> dict[str, Build]:
    """Both kernels of path F at every width served."""
    found = {}
    for width, (ahead, back) in stream.TILES[architecture].items():
        found[f"forward D = {width}"] = forward_build(width, ahead)
        found[f"weight D = {width}"] = weight_build(width, back)
    return found


def view_builds(architecture: int) -> dict[str, Build]:
    """The views' programs as launched for crops of 112, 224 and 448 px."""
    source = {
        "pixels": "*u8", "offset": "*i64", "width": "*i32", "rows": "*i64", "window": "*i64",
        "origin": "*fp64", "scale": "*fp64", "out": "*fp16", "size": "i32:16",
    }  # fmt: skip
    chain = {
        "resized": "*fp16", "part": "*fp32", "jitter": "*i1", "order": "*i64",
        "factors": "*fp32", "size": "i32:16",
    }  # fmt: skip
    found = {
        "means": Build(views_programs.means, chain, views.tint_constants(), {}),
        "tint": Build(views_programs.tint, chain | {"gray": "*i1"}, views.tint_constants(), {}),
    }
    kinds: tuple[Interpolation, ...] = ("bilinear", "bicubic")
    for kind in kinds:
        constants, options = views.resize_constants(kind), views.RESIZE_OPTIONS
        found[f"resize, {kind}"] = Build(views_programs.resize, source, constants, options)
    for size in (112, 224, 448):
        found[f"finish {size}, blurred"] = finish_build(size, True, "cutmix")
        found[f"finish {size}, mixed"] = finish_build(size, False, "mixup")
    return found


def finish_build(size: int, blur: bool, mix: str) -> Build:
    """The program that finishes crops of a size."""
    group = ViewGroup(count=1, size=size, scale=(0.1, 1.0), blur=float(blur), sigma=(0.1, 2.0))
    kinds = {
        "*fp16": "resized", "*bf16": "out", "*i1": "blur solarize flip", "*fp32": "sigma weight",
        "*i64": "partner goes_to box", "fp32": "mean_r mean_g mean_b per_r per_g per_b",
    }  # fmt: skip
    arguments = {name: kind for kind, names in kinds.items() for name in names.split()}
    constants = {
        **views.finish_constants(size, group),
        "CUTMIX": mix == "cutmix",
        "MIXUP": mix == "mixup",
    }
    arguments["size"] = "i32:16"
    options = {key: constants.pop(key) for key in ("num_warps", "maxnreg")}
    return Build(views_programs.finish, arguments, constants, options)


def norm_builds(architecture: int) -> dict[str, Build]:
    """Sums and norms of tokens as wide as backbones have them, fp32 with branches in bf16."""
    found = {}
    for width in (128, 192, 384, 768):
        sizes = {
            "*fp32": "X SCALE WEIGHT BIAS TOTAL MEAN RSTD D_TOTAL D_X SHARES",
            "*bf16": "BRANCH NORMED D_NORMED D_BRANCH",
            "i32": "num tokens",
            "fp32": "eps",
        }
        arguments = {name: kind for kind, names in sizes.items() for name in names.split()}
        for name in ("forward", "backward"):
            kernel = getattr(add_norm_program, f"{name}_kernel")
            own = {key: kind for key, kind in arguments.items() if key in kernel.arg_names}
            constants, options = add_norm.shape_of(width), {"num_warps": add_norm.WARPS}
            if name == "backward":
                constants["WITHIN"] = True
            found[f"{name} D = {width}"] = Build(kernel, own, constants, options)
    return found


def linear_builds(architecture: int) -> dict[str, Build]:
    """Gradients of layers and their biases, in bf16; a width is known when they are launched."""
    arguments = {
        "gelu": {"D_OUT": "*bf16", "X": "*bf16", "D_X": "*bf16"},
        "heads": {"D_Q": "*bf16", "D_K": "*bf16", "D_V": "*bf16", "D_X": "*bf16"},
    }
    sizes = {"D_BIAS": "*fp32", "num": "i32", "width": "i32:16"}
    forward = Build(
        linear_program.forward_kernel,
        {"X": "*bf16", "OUT": "*bf16", "num": "i32:16"},
        {"BLOCK": linear_gelu.ELEMENTS},
        {"num_warps": linear_gelu.WARPS},
    )
    return {"forward": forward} | {
        f"{name} of {width}": Build(
            getattr(linear_program, f"{name}_kernel"),
            own | sizes,
            linear_gelu.shares_of(76_800, width)[1],
            {"num_warps": linear_gelu.WARPS},
        )
        for name, own in arguments.items()
        for width in (192, 768)
    }


def performer_builds(architecture: int) -> dict[str, Build]:
    """Linear attention as token blocks have it, and the dropout after it, in bf16."""
    kinds = {
        "*bf16": "KQV OUT D_OUT D_V D_KQV",
        "*fp32": "W SUMS TOTALS D_SUMS D_TOTALS SHARES",
        "i32": "tokens",
    }
    arguments = {name: kind for kind, names in kinds.items() for name in names.split()}
    found = {}
    for name in ("gather", "spread", "query", "pair"):
        kernel = getattr(linear_performer_program, f"{name}_kernel")
        own = {key: kind for key, kind in arguments.items() if key in kernel.arg_names}
        constants = linear_performer.shape_of(64, 32) | {"SPAN": linear_performer.SPAN}
        found[name] = Build(kernel, own, constants, linear_performer.OPTIONS)
    drops = {
        "X": "*bf16", "OUT": "*bf16", "PLACE": "*i64", "STEP": "*i64", "layer": "i32",
        "limit": "i64", "key": "i64", "factor": "fp32", "num": "i32:16",
    }  # fmt: skip
    counted = Build(dropout_program.dropout, drops, {"COUNTED": True, "QUADS": dropout.QUADS}, {})
    # Of a step's number a 1 is a constant to Triton.
    told = {name: kind for name, kind in drops.items() if name not in ("STEP", "layer")}
    first = counted._replace(
        arguments=told, constants={"COUNTED": False, "STEP": 1, "layer": 1, "QUADS": dropout.QUADS}
    )
    return found | {"dropout": counted, "dropout of step 1": first}


def dwconv_builds(architecture: int) -> dict[str, Build]:
    """Convolutions of maps as wide as PVTv2 has them from 112 to 448 px, bf16."""
    kinds = {
        "*bf16": "X W BIAS OUT D_OUT D_SUM D_X",
        "*fp32": "D_W D_BIAS",
        "i32": "maps height width",
        "i32:16": "hidden",
    }
    arguments = {name: kind for kind, names in kinds.items() for name in names.split()}
    found = {}
    for width in (4, 7, 14, 28, 56, 112):
        options = linear_dwconv_gelu.shape_of(width)
        shape = {key: options.pop(key) for key in ("PAIRS", "CHANNELS")}
        for name in ("forward", "sums", "gradient"):
            own, constants = dict(arguments), dict[str, Any](shape)
            kernel = linear_dwconv_gelu_program.conv_kernel
            if name == "forward":
                constants |= dict.fromkeys(("D_OUT", "D_BIAS"))
            if name == "gradient":
                kernel = linear_dwconv_gelu_program.gradient_kernel
            own = {k: v for k, v in own.items() if k in kernel.arg_names and k not in constants}
            found[f"{name} of {width}"] = Build(kernel, own, constants, options)
    return found


def draw_builds(architecture: int) -> dict[str, Build]:
    """The draws of pretraining and of fine-tuning."""
    kinds = {
        "*i64": "rows views epochs orders chances window order operation level spot",
        "*i32": "heights widths",
        "*fp64": "ratio_table ranges origin scale",
        "*fp32": "factors sigma",
        "*i1": "flip jitter gray blur solarize negative",
        "i64": "key operation_key",
        "i32": "num size",
    }
    arguments = {name: kind for kind, names in kinds.items() for name in names.split()}
    counter = {"a": "i32", "b": "*i64", "c": "i32", "d": "*i64"}
    told = {name.upper(): kind != "i32" for name, kind in counter.items()}
    words_build = Build(
        words_program.words,
        {**counter, "out": "*i64", "key": "i64", "num": "i32"},
        {**told, "COUNTERS": words.COUNTERS},
        {},
    )
    return {"words": words_build} | {
        f"draws with {turns} operations": Build(
            draws_program.draws,
            arguments,
            {"TURNS": turns, "CROPS": draws.CROPS},
            {"enable_fp_fusion": False},
        )
        for turns in (0, 2)
    }


def randaugment_builds(architecture: int) -> dict[str, Build]:
    """The operations of fine-tuning, of crops in fp16."""
    kinds = {
        "*fp16": "x out", "*i32": "table", "*fp32": "gray", "*i1": "negative",
        "*i64": "operation level spot posterize solarize cutout steps", "i32": "turn turns",
        "i32:16": "size",
    }  # fmt: skip
    arguments = {name: kind for kind, names in kinds.items() for name in names.split()}
    found = {}
    blocks = {"measure": randaugment.MEASURED, "operate": randaugment.OPERATED}
    for name, block in blocks.items():
        kernel = getattr(randaugment_program, name)
        own = {key: arguments[key] for key in kernel.arg_names if key in arguments}
        found[name] = Build(kernel, own, {"BLOCK": block}, randaugment.OPTIONS)
    return found


def launch_builds(architecture: int) -> dict[str, Build]:
    """What a program launched on the pretended GPU, from the file that LAUNCHES names."""
    found: dict[str, Build] = {}
    for line in json.loads(Path(os.environ["LAUNCHES"]).read_text()):
        module, name, given, keywords = json.loads(line)
        kernel = getattr(importlib.import_module(module), name)
        options = {k: v for k, v in keywords.items() if k not in kernel.arg_names}
        given |= {k: v for k, v in keywords.items() if k in kernel.arg_names}
        arguments = {}
        for parameter in kernel.params:
            if isinstance(given[parameter.name], str) and not parameter.is_constexpr:
                kind = given.pop(parameter.name)
                told = parameter.annotation_type or kind.split(":")[0]
                arguments[parameter.name] = ":".join((told, *kind.split(":")[1:]))
        found[f"{name} {len(found)}"] = Build(kernel, arguments, given, options)
    return found


def built(build: Build, architecture: int) -> dict[str, int]:
    """Registers, bytes of stack and of shared memory, and the instructions that matter."""
    names = build.kernel.arg_names
    signature = {n: build.arguments.get(n, "constexpr").split(":")[0] for n in names}
    aligned = [
        name
        for name, kind in build.arguments.items()
        if kind.endswith(":16") or (kind[0] == "*" and not kind.endswith(":1"))
    ]
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
        "fused_doubles": len(re.findall(r"fma\.rn\.f64", text)),
        "warpgroup": len(re.findall(r"wgmma\.mma_async|tcgen05\.mma", text)),
    }


KINDS = {
    "rows": row_builds, "tiles": tile_builds, "views": view_builds, "draws": draw_builds,
    "norms": norm_builds, "linear": linear_builds, "performer": performer_builds,
    "dwconv": dwconv_builds, "randaugment": randaugment_builds, "launches": launch_builds,
}  # fmt: skip


def answer(line: str) -> dict[str, Any]:
    """{architecture: {build: what it uses}}, or why there is none."""
    name, *asked = line.split()
    try:
        return {
            str(architecture): {
                title: built(build, architecture)
                for title, build in KINDS[name](architecture).items()
            }
            for architecture in map(int, asked or ARCHITECTURES)
        }
    except Exception:
        return {"failed": traceback.format_exc()}


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(answer(line)), flush=True)
