"""A CUDA graph's stand-in on a CPU: operations recorded once, done again on the same memory.

What a graph would refuse is refused: to ask the device for a number, or to give it one from the
host's memory. What a graph would get wrong goes wrong here, too: a replay knows nothing but the
addresses, shapes and numbers of the time it was recorded at.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

# Operations that wait for the device, or whose result's shape it decides.
WAITING = {
    "aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::masked_select",
    "aten::is_nonzero", "aten::equal", "aten::repeat_interleave.Tensor", "aten::_unique2",
}  # fmt: skip
# Numbers of the host made into tensors: a copy from memory that is gone at the next replay.
FROM_HOST = {"aten::lift_fresh", "aten::lift", "aten::lift_fresh_copy"}


class NotCapturable(RuntimeError):
    """As CUDA refuses it."""


class Recorded(TorchDispatchMode):
    """A `capture.Recording`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.done: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}
        self.fresh: set[int] = set()  # storages that this recording made
        # Of another stream: done when it is joined, as late as a GPU may.
        self.beside: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []
        self.aside = False

    def record(self, work: Callable[[], Any]) -> Any:
        """What the work gives; nothing that was there before has changed."""
        with self:
            found = work()
        for tensor, value in self.before.values():
            tensor.detach().copy_(value)
        return found

    def replay(self) -> None:
        """Do it again."""
        with torch.no_grad():
            for operation, args, options, results in self.done:
                found = operation(*args, **options)
                if results:
                    for fixed, value in zip(results, filter(_is, tree_leaves(found)), strict=True):
                        fixed.copy_(value)

    def join(self) -> None:
        """What another stream was given is done from here on."""
        self.done += self.beside
        self.beside = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Do an operation, and remember it."""
        options, name = kwargs or {}, func._schema.name
        full = f"{name}.{func._overloadname}" if func._overloadname != "default" else name
        if {name, full} & WAITING:
            raise NotCapturable(f"{full} waits for the device")
        if {name, full} & FROM_HOST:
            raise NotCapturable(f"{full} takes a number from the host")
        if name.startswith("aten::index") and any(
            _is(t) and t.dtype == torch.bool for t in tree_leaves(args)
        ):
            raise NotCapturable(f"{full} by a mask has a shape that the device decides")
        returned = [r.alias_info for r in func._schema.returns]
        for place, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                given = args[place] if place < len(args) else options.get(argument.name)
                for tensor in filter(_is, tree_leaves(given)):
                    self._keep(tensor)
        found = func(*args, **options)
        if func._schema.is_mutable or not all(returned):
            # A replay writes to these results again; those that are views of others follow.
            results = [] if any(returned) else [t for t in tree_leaves(found) if _is(t)]
            self.fresh |= {t.untyped_storage().data_ptr() for t in results}
            held = tree_map_only(Tensor, Tensor.detach, (args, options, results))
            (self.beside if self.aside else self.done).append((func, *held))
        return found

    def _keep(self, tensor: Tensor) -> None:
        """Remember what stood in a tensor from before, which the work writes to."""
        place = tensor.untyped_storage().data_ptr()
        if place not in self.fresh and place not in self.before:
            whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
            self.before[place] = whole, whole.clone()


def _is(value: Any) -> bool:
    return isinstance(value, Tensor)
