"""Tensors that say they are on a GPU: what is done to them, and what would be refused."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from recorded import FROM_HOST, WAITING, NotCapturable, Recorded
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

GPU, HOST = torch.device("cuda", 0), torch.device("cpu")


# Refused on a GPU by deterministic algorithms; some of them of numbers with a point alone.
CHANCY = {
    "aten::_adaptive_avg_pool2d_backward", "aten::adaptive_max_pool2d_backward",
    "aten::upsample_linear1d_backward", "aten::upsample_bilinear2d_backward",
    "aten::upsample_bicubic2d_backward", "aten::reflection_pad2d_backward",
    "aten::replication_pad2d_backward", "aten::grid_sampler_2d_backward", "aten::put_",
    "aten::histc", "aten::kthvalue", "aten::median", "aten::cumsum",
}  # fmt: skip


class Refused(RuntimeError):
    """As CUDA, cuBLAS or Triton would."""


class State:
    """What the device is at."""

    recording: Recorded | None = None  # the capture under way
    may_wait = True
    launches: ClassVar[set[str]] = set()  # kernels, and what a GPU's would be compiled for


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

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # Torch takes what begins amid a storage for a tensor that has one.
        if self.storage_offset():
            return self.clone()
        return super().__deepcopy__(memo)  # type: ignore[no-untyped-call]

    def tolist(self) -> Any:
        wait("tolist")
        return self.held.tolist()

    def record_stream(self, _: Any) -> None:
        pass

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
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
    chancy = name in CHANCY and (name != "aten::cumsum" or args[0].is_floating_point())
    if chancy and torch.are_deterministic_algorithms_enabled():
        raise Refused(f"{full} does not have a deterministic implementation")
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


def maker(name: str) -> Callable[..., Tensor]:
    """An operation that makes a tensor there."""
    packet, _, overload = name.partition(".")
    operation = getattr(getattr(torch.ops.aten, packet), overload or "default")

    def make(*args: Any, **options: Any) -> Tensor:
        options.pop("pin_memory", None)
        return Pretended(run(operation, args, options | {"device": HOST}))

    return make
