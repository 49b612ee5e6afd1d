"""A GPU's stand-in for whole programs: tensors that say they are on one, and compute on the CPU.

    python -m pytest -p pretended -m gpu tests/gpu

Loaded before torch. What runs then takes every branch that a GPU takes, and what a GPU would refuse
is refused: operands on two devices, a kernel given memory it cannot reach, waiting for the device
where that was forbidden, anything that a capture cannot hold. Kernels are interpreted, graphs are
`recorded.Recorded`. What it cannot show: speed, rounding, races, a kernel's resources.
"""

import ctypes
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"


def _load() -> None:
    """Compile `pretended.cpp` and load it: torch asks once, when it is imported."""
    spec = find_spec("torch")
    assert spec is not None and spec.origin is not None
    torch_ = Path(spec.origin).parent
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "pretended.so"
        subprocess.run(
            ["g++", "-std=c++20", "-shared", "-fPIC", "-O0", f"-I{torch_}/include",
             str(Path(__file__).with_suffix(".cpp")), "-o", str(library)], check=True,
        )  # fmt: skip
        for name in ("c10", "torch_cpu"):
            ctypes.CDLL(str(torch_ / "lib" / f"lib{name}.so"), mode=ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(library))


_load()

import numpy as np
import torch
from recorded import FROM_HOST, WAITING, NotCapturable, Recorded
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

GPU, HOST = torch.device("cuda", 0), torch.device("cpu")
MULTIPROCESSORS, MEMORY = 132, 140 << 30


class Refused(RuntimeError):
    """As CUDA, cuBLAS or Triton would."""


class State:
    """What the device is at."""

    recording: Recorded | None = None  # the capture under way
    may_wait = True
    launches: set[str] = set()  # as JSON: kernels with what they would be compiled for


class Pretended(Tensor):
    """A tensor on the pretended GPU; `held` is what it computes with."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "Pretended":
        found = Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(),
            dtype=held.dtype, layout=held.layout, device=GPU,
        )  # fmt: skip
        found.held = held
        return found

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"pretended {self.held!r}"

    def tolist(self) -> Any:
        wait("tolist")
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return on_device(func, args, kwargs or {})


def bare(value: Any) -> Any:
    """The same with tensors of the host in place of pretended ones."""
    return tree_map_only(Pretended, lambda tensor: tensor.held, value)


def run(func: Any, args: Any, kwargs: Any) -> Any:
    """Compute, and remember it while a graph is captured."""
    if State.recording is None:
        return func(*args, **kwargs)
    return State.recording.__torch_dispatch__(func, (), args, kwargs)


def wait(what: str) -> None:
    """Refuse to wait where that is forbidden."""
    if State.recording is not None:
        raise NotCapturable(f"{what} is not permitted when stream is capturing")
    if not State.may_wait:
        raise Refused(f"called a synchronizing CUDA operation: {what}")


def on_device(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Do an operation that has a pretended operand, or refuse it."""
    name = func._schema.name
    if func.namespace == "fastidmm":
        definition = torch._library.custom_ops.OPDEFS[name]
        return definition._backend_fns[None](*args, **kwargs)
    if name == "aten::copy_":
        return copied(func, args, kwargs)
    full = f"{name}.{func._overloadname}" if func._overloadname != "default" else name
    masks = name.startswith("aten::index") and any(
        isinstance(t, Tensor) and t.dtype == torch.bool for t in tree_leaves(args[1:2])
    )
    if {name, full} & WAITING or masks:
        wait(full)
    for tensor in tree_leaves((args, kwargs)):
        if isinstance(tensor, Tensor) and not isinstance(tensor, Pretended) and tensor.dim():
            if name in ("aten::index", "aten::index_put_", "aten::_index_put_impl_"):
                wait(f"{full} by a tensor of the host")
                continue
            raise Refused(
                "Expected all tensors to be on the same device, but found at least two devices, "
                f"cuda:0 and cpu, in {full}"
            )
    if {name, full} & FROM_HOST and State.recording is not None:
        raise NotCapturable(f"{full} takes a number from the host")
    options = dict(kwargs)
    there = torch.device(options.get("device") or GPU)
    if "device" in options:
        options["device"] = HOST
    if there.type == "cpu" and not options.pop("non_blocking", False):
        wait(full)
    work = REPLACED.get(func, func)
    found = run(work, bare(args), bare(options))
    if there.type == "cpu":
        return found
    found = tree_map_only(Tensor, Pretended, found)
    return return_and_correct_aliasing(func, args, kwargs, found)


def copied(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A copy on the device, or between it and the host."""
    to, source, *rest = args
    here = [isinstance(t, Pretended) for t in (to, source)]
    non_blocking = rest[0] if rest else kwargs.get("non_blocking", False)
    if here == [True, False]:
        if State.recording is not None and not source.is_pinned():
            raise NotCapturable("a copy from pageable memory")
        if not non_blocking:
            wait("a copy from the host")
    if here == [False, True]:
        if State.recording is not None and not to.is_pinned():
            raise NotCapturable("a copy to pageable memory")
        if not non_blocking:
            wait("a copy to the host")
    run(func, bare(args), bare(kwargs))
    return to


class Replaced:
    """An operation of a GPU by what a CPU has instead, with the operation's own schema."""

    def __init__(self, operation: Any, work: Callable[..., Any]) -> None:
        self._schema, self._overloadname = operation._schema, operation._overloadname
        self.work = work

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.work(*args, **kwargs)


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """`mm` with another type of result."""
    if a.dtype != b.dtype or not a.dtype.itemsize == 2 or dtype != torch.float32:
        raise Refused(f"mm of {a.dtype} and {b.dtype} to {dtype}")
    return a.float() @ b.float()


aten = torch.ops.aten
REPLACED: dict[Any, Replaced] = {
    operation: Replaced(operation, work)
    for operation, work in (
        (aten.mm.dtype, _product),
        (aten._fused_sdp_choice.default, lambda *_, **__: 0),  # attention by plain products
    )
}

# Makers of tensors that have no operand to tell the device by; others are made of the first two.
MAKERS = (
    "empty.memory_format", "empty_strided", "arange", "arange.start", "arange.start_step", "eye",
    "eye.m", "linspace", "randperm", "randperm.generator",
)  # fmt: skip


def _maker(name: str) -> Callable[..., Tensor]:
    """An operation that makes a tensor there."""
    packet, _, overload = name.partition(".")
    operation = getattr(getattr(torch.ops.aten, packet), overload or "default")

    def make(*args: Any, **options: Any) -> Tensor:
        options.pop("pin_memory", None)
        return Pretended(run(operation, args, options | {"device": HOST}))

    return make


# --- kernels ------------------------------------------------------------------------------------


def _launchable(values: Any) -> Any:
    """A kernel's arguments for the interpreter, or why a GPU could not read them."""
    for value in values:
        if isinstance(value, Tensor) and not isinstance(value, Pretended) and not value.is_pinned():
            raise Refused("Pointer argument cannot be accessed from Triton (cpu tensor?)")
    return [value.held.detach() if isinstance(value, Pretended) else value for value in values]


def launched(kernel: Any, args: Any, kwargs: Any) -> str:
    """What Triton compiles a kernel for: types, alignments and constants, as it tells them apart."""

    def kind(value: Any) -> Any:
        if isinstance(value, Tensor):
            held = bare(value)
            return ["*", str(held.dtype).removeprefix("torch."), held.data_ptr() % 16 == 0]
        if isinstance(value, int) and not isinstance(value, bool) and value != 1:
            return ["i32" if -(2**31) <= value < 2**31 else "i64", value % 16 == 0]
        return ["fp32"] if isinstance(value, float) else value

    given = {**dict(zip(kernel.arg_names, map(kind, args), strict=False))}
    return json.dumps([kernel.fn.__module__, kernel.fn.__name__, given, kwargs], sort_keys=True)


def _interpret() -> None:
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
    _round_as_a_gpu(interpreter)


def _round_as_a_gpu(interpreter: Any) -> None:
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


# --- torch.cuda ---------------------------------------------------------------------------------


class Event:
    """A moment; it has passed."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.at = 0.0

    def record(self, *_: Any) -> None:
        self.at = time.perf_counter()

    def wait(self, *_: Any) -> None:
        pass

    synchronize = wait

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: "Event") -> float:
        return max(other.at - self.at, 1e-9) * 1000


class Stream:
    """The only one there is, whatever it is called."""

    cuda_stream, device = 0, GPU

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record()
        return event

    def synchronize(self) -> None:
        wait("Stream.synchronize")

    def wait_stream(self, _: Any) -> None:
        pass

    wait_event = wait_stream

    def query(self) -> bool:
        return True


class CUDAGraph:
    """A `Recorded`; those of one pool write over one another's memory."""

    pools: dict[Any, list["CUDAGraph"]] = {}

    def __init__(self) -> None:
        self.recorded: Recorded | None = None
        self.pool: Any = None

    def replay(self) -> None:
        assert self.recorded is not None, "replayed before it was captured"
        for other in self.pools[self.pool]:
            if other is not self and other.recorded is not None:
                for *_, results in other.recorded.done:
                    for tensor in results:
                        spoil(tensor)
        self.recorded.replay()


def spoil(tensor: Tensor) -> None:
    """What others have written there."""
    if tensor.is_floating_point():
        tensor.fill_(float("nan"))
    else:
        tensor.fill_(1)


@contextmanager
def graph(made: CUDAGraph, pool: Any = None, **_: Any) -> Iterator[None]:
    """`torch.cuda.graph`."""
    assert State.recording is None, "one capture at a time"
    made.recorded = State.recording = Recorded()
    made.pool = pool
    CUDAGraph.pools.setdefault(pool, []).append(made)
    try:
        yield
    finally:
        State.recording = None
        for tensor, value in made.recorded.before.values():
            tensor.detach().copy_(value)


class Generator(torch.Generator):
    """Of chances, on any device."""

    def __new__(cls, device: Any = "cpu") -> "Generator":
        return super().__new__(cls, "cpu")


def _waiting(mode: str | int) -> None:
    State.may_wait = mode in ("default", "warn", 0, 1)


def install() -> None:
    """Have torch say that there is a GPU."""
    properties = SimpleNamespace(
        name="pretended", total_memory=MEMORY, multi_processor_count=MULTIPROCESSORS, major=9,
        minor=0, uuid="0", shared_memory_per_block_optin=232_448,
    )  # fmt: skip
    answers: dict[str, Any] = {
        "is_available": True, "is_initialized": True, "device_count": 1, "current_device": 0,
        "get_device_name": "pretended", "get_device_capability": (9, 0),
        "get_device_properties": properties, "mem_get_info": (MEMORY, MEMORY),
        "memory_allocated": 0, "max_memory_allocated": 0, "max_memory_reserved": 0,
        "memory_reserved": 0, "power_draw": 100_000, "is_bf16_supported": True,
        "get_arch_list": ["sm_90"], "graph_pool_handle": None, "current_stream": Stream(),
        "default_stream": Stream(), "_lazy_init": None, "_is_in_bad_fork": False,
    }  # fmt: skip
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    for name in (
        "set_device", "empty_cache", "reset_peak_memory_stats", "manual_seed_all", "manual_seed",
        "set_stream", "_sleep", "init", "set_per_process_memory_fraction",
    ):  # fmt: skip
        setattr(torch.cuda, name, lambda *_, **__: None)
    for name in ("device_of", "stream", "device"):
        setattr(torch.cuda, name, lambda *_: nullcontext())
    handles = iter(range(10**9))
    torch.cuda.graph_pool_handle = lambda: next(handles)  # type: ignore[assignment,return-value]
    torch.cuda.synchronize = lambda *_: wait("synchronize")
    torch.cuda.is_current_stream_capturing = lambda: State.recording is not None
    torch.cuda.set_sync_debug_mode = _waiting
    torch.cuda.Event, torch.cuda.Stream = Event, Stream  # type: ignore[misc,assignment]
    torch.cuda.CUDAGraph, torch.cuda.graph = CUDAGraph, graph  # type: ignore[misc,assignment]
    torch.Generator = Generator  # type: ignore[misc]
    torch.__future__.set_swap_module_params_on_conversion(True)  # else a copy loses `held`
    torch.inference_mode = torch.no_grad  # type: ignore[misc]  # whose tensors no wrapper can hold
    torch._C._set_only_lift_cpu_tensors(True)
    library = torch.library.Library("aten", "IMPL")
    for name in MAKERS:
        library.impl(name, _maker(name), "CUDA")
    State.library = library  # type: ignore[attr-defined]  # which ends with what holds it
    _interpret()


install()


# Sizes of the GPU's tests that an interpreter gets through.
SMALLER = {"test_capture_on_device": {"NUM": 7, "BATCH": 3, "STEPS": 12}}


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """As pytest calls it."""
    for item in items:
        for name, value in SMALLER.get(item.module.__name__.split(".")[-1], {}).items():
            setattr(item.module, name, value)
