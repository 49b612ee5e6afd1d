"""Triton's kernels over pretended tensors: interpreted, and recorded as a graph's operations."""

import json
from typing import Any

import numpy as np
import torch
from interpreted import quicken
from torch import Tensor
from torch.utils._pytree import tree_leaves

from pretended.tensors import Pretended, Refused, State, bare, run


def _launchable(values: Any) -> Any:
    """A kernel's arguments for the interpreter, or why a GPU could not read them."""
    for value in values:
        if isinstance(value, Tensor) and not isinstance(value, Pretended) and not value.is_pinned():
            raise Refused("Pointer argument cannot be accessed from Triton (cpu tensor?)")
    return [value.held.detach() if isinstance(value, Pretended) else value for value in values]


TYPES = {
    torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64",
    torch.uint8: "u8", torch.int32: "i32", torch.int64: "i64", torch.bool: "i1",
}  # fmt: skip


def launched(kernel: Any, args: Any, kwargs: Any) -> str:
    """What Triton compiles a kernel for, as `compiled.py` reads it: JSON."""

    def kind(value: Any) -> Any:
        if isinstance(value, Tensor):
            held = bare(value)
            return f"*{TYPES[held.dtype]}" + ("" if held.data_ptr() % 16 == 0 else ":1")
        if isinstance(value, int) and not isinstance(value, bool) and value != 1:
            bits = 32 if -(2**31) <= value < 2**31 else 64
            return f"i{bits}" + (":16" if value % 16 == 0 else "")
        return "fp32" if isinstance(value, float) else value

    given = dict(zip(kernel.arg_names, map(kind, args), strict=False))
    return json.dumps([kernel.fn.__module__, kernel.fn.__name__, given, kwargs], sort_keys=True)


def interpret() -> None:
    """Have Triton's interpreter take pretended tensors."""
    from triton.runtime import interpreter

    class Executor(interpreter.GridExecutor):  # type: ignore[misc]
        def _init_args_hst(self, args: Any, kwargs: Any) -> Any:
            return args, kwargs

        def _restore_args_dev(self, *_: Any) -> None:
            pass

    class Launch:
        """A launch as an operation that `Recorded` can hold."""

        class _schema:
            name, is_mutable = "triton::launch", True
            returns: tuple[Any, ...] = ()
            arguments: tuple[Any, ...] = ()

        _overloadname = "default"

        def __init__(self, executor: Executor, kernel: Any) -> None:
            self.executor, self.kernel = executor, kernel

        def __call__(self, *args: Any, **kwargs: Any) -> None:
            with np.errstate(all="ignore"):
                interpreter.GridExecutor.__call__(self.executor, *args, **kwargs)

    def launch(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        executor = Executor(self.rewrite(), self.arg_names, grid, self.pre_run_hooks)
        if State.recording is not None:
            for tensor in tree_leaves((args, kwargs)):
                if isinstance(tensor, Pretended):
                    State.recording._keep(tensor.held)
        State.launches.add(launched(self, args, kwargs))
        run(Launch(executor, self), _launchable(args), kwargs)

    interpreter.InterpretedFunction.run = launch
    quicken()
    round_as_a_gpu(interpreter)


def round_as_a_gpu(interpreter: Any) -> None:
    """Have the interpreter round to bf16, which it truncates to, and multiply what it holds."""
    import triton.language as tl

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    plain, dot = builder.cast_impl, builder.create_dot

    def wide(value: Any) -> Any:
        """fp32 of bf16, which the interpreter holds as 16 bits."""
        if value.dtype.scalar != tl.bfloat16:
            return value
        bits = np.ascontiguousarray(value.data).astype(np.uint32) << 16
        return handle(bits.view(np.float32), tl.float32)

    def cast(self: Any, source: Any, kind: Any, *_: Any) -> Any:
        if kind.scalar != tl.bfloat16:
            return plain(self, wide(source), kind)
        if source.dtype.scalar == tl.bfloat16:
            return source
        values = torch.from_numpy(np.ascontiguousarray(wide(source).data)).bfloat16()
        return handle(values.view(torch.uint16).numpy(), tl.bfloat16)

    def product(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, wide(a), wide(b), *rest)

    builder.cast_impl, builder.create_fp_to_fp, builder.create_dot = cast, cast, product
