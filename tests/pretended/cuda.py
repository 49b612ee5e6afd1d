"""What `torch.cuda` answers on the pretended GPU: one device, its streams in turn, graphs."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from recorded import NotCapturable, Recorded
from torch import Tensor

from pretended.kernels import interpret
from pretended.tensors import GPU, MAKERS, State, maker, wait

MULTIPROCESSORS, MEMORY = 132, 140 << 30


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
    """Work in the order it was given; in a capture, another's waits until it is joined."""

    cuda_stream, device = 0, GPU

    def __init__(self, *_: Any, **__: Any) -> None:
        self.forked: Recorded | None = None  # the capture that it belongs to

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record()
        return event

    def synchronize(self) -> None:
        pass

    def wait_stream(self, other: "Stream") -> None:
        capture = State.recording
        if self is MAIN and capture is not None and other.forked is capture:
            capture.join()
        elif other is MAIN:
            self.forked = capture

    def wait_event(self, _: Event) -> None:
        pass

    def query(self) -> bool:
        return True


MAIN = Stream()


@contextmanager
def stream(chosen: Stream | None) -> Iterator[None]:
    """`torch.cuda.stream`."""
    capture = State.recording
    if chosen is None or chosen is MAIN or capture is None:
        yield
        return
    if chosen.forked is not capture:
        raise NotCapturable("work on a stream that does not take part in the capture")
    capture.aside = True
    try:
        yield
    finally:
        capture.aside = False


class CUDAGraph:
    """A `Recorded`; those of one pool write over one another's memory."""

    pools: ClassVar[dict[Any, list["CUDAGraph"]]] = {}

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
        if made.recorded.beside:
            raise NotCapturable("a stream that was forked from the capture was not joined")
    finally:
        State.recording = None
        for tensor, value in made.recorded.before.values():
            tensor.detach().copy_(value)


class Generator(torch.Generator):
    """Of chances, on any device."""

    def __new__(cls, device: Any = "cpu") -> "Generator":
        return super().__new__(cls, "cpu")  # type: ignore[call-arg]


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
        "get_arch_list": ["sm_90"], "current_stream": MAIN,
        "default_stream": MAIN, "_lazy_init": None, "_is_in_bad_fork": False,
    }  # fmt: skip
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    for name in (
        "set_device", "empty_cache", "reset_peak_memory_stats", "manual_seed_all", "manual_seed",
        "set_stream", "_sleep", "init", "set_per_process_memory_fraction",
    ):  # fmt: skip
        setattr(torch.cuda, name, lambda *_, **__: None)
    for name in ("device_of", "device"):
        setattr(torch.cuda, name, lambda *_: nullcontext())
    handles = iter(range(10**9))
    torch.cuda.graph_pool_handle = lambda: next(handles)  # type: ignore[assignment,return-value]
    torch.cuda.synchronize = lambda *_: wait("synchronize")
    torch.cuda.is_current_stream_capturing = lambda: State.recording is not None
    torch.cuda.set_sync_debug_mode = _waiting  # type: ignore[assignment]
    torch.cuda.Event, torch.cuda.Stream = Event, Stream  # type: ignore[misc,assignment]
    torch.cuda.stream = stream  # type: ignore[assignment]
    torch.cuda.CUDAGraph, torch.cuda.graph = CUDAGraph, graph  # type: ignore[misc,assignment]
    torch.Generator = Generator  # type: ignore[misc]
    torch.__future__.set_swap_module_params_on_conversion(True)  # else a copy loses `held`
    torch.inference_mode = torch.no_grad  # type: ignore[misc,assignment]  # whose tensors no wrapper can hold
    torch._C._set_only_lift_cpu_tensors(True)
    library = torch.library.Library("aten", "IMPL")
    for name in MAKERS:
        library.impl(name, maker(name), "CUDA")
    State.library = library  # type: ignore[attr-defined]  # which ends with what holds it
    interpret()
