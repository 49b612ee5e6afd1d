"""Bytes that a step moves, and the operations it launches, counted on the pretended GPU.

    PYTHONPATH=tests python -m pretended.traffic BACKBONE [IMAGES [RESOLUTION]]

Of IDMM's step: forward, loss, backward and update, without the views. Each operation counts its
operands and its results once, a kernel of ours the tensors that it is given, attention as fused:
what a GPU must move that keeps nothing in its caches. Steps of one image and of two tell what
grows with the batch; IMAGES (256) are worked out from them.
"""

import pretended  # noqa: I001  (before torch)

import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastidmm.bench.made import noise
from fastidmm.bench.training import assembled
from fastidmm.kernels import (
    add_norm_program,
    dropout_program,
    linear_dwconv_gelu_program,
    linear_performer_program,
    linear_program,
)
from fastidmm.step import step

# Nothing is moved by these.
VIEWS = {
    "view", "_unsafe_view", "reshape", "permute", "transpose", "t", "expand", "slice", "select",
    "unbind", "split", "unsqueeze", "squeeze", "alias", "detach", "as_strided", "unfold", "narrow",
    "split_with_sizes", "lift_fresh", "empty", "empty_like", "empty_strided", "new_empty",
    "new_empty_strided", "promote_types", "is_pinned", "record_stream",
}  # fmt: skip


def size(*values: Any) -> int:
    """Bytes of all tensors among them, each counted once, what is repeated not at all."""
    found = {id(t): t for t in tree_leaves(values) if isinstance(t, Tensor)}
    return sum(
        t.element_size()
        * torch.Size(n for n, s in zip(t.shape, t.stride(), strict=True) if s).numel()
        for t in found.values()
    )


class Traffic(TorchDispatchMode):
    """Bytes and launches by operation."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.moved: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        self.within = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name not in VIEWS and not self.within:
            self.add(name, args, kwargs, found)
        return found

    def add(self, name: str, *tensors: Any) -> None:
        """One launch."""
        self.moved[name][0] += 1
        self.moved[name][1] += size(tensors)

    @contextmanager
    def one(self, name: str, *tensors: Any) -> Iterator[None]:
        """What is done within is a single launch that moves these."""
        self.within += 1
        yield
        self.within -= 1
        self.add(name, *tensors)


def attention(traffic: Traffic) -> Callable[..., Tensor]:
    """Attention that moves what a fused one would; its values are nobody's."""

    class Fused(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            ctx.save_for_backward(q, k, v)
            with traffic.one("attention", q, k, v):
                out = q.transpose(1, 2).contiguous().transpose(1, 2).clone()
            traffic.moved["attention"][1] += size(out)
            return out

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Any:
            saved = ctx.saved_tensors
            with traffic.one("attention backward", *saved, gradient):
                found = [t.transpose(1, 2).contiguous().transpose(1, 2) * 0 for t in saved]
            traffic.moved["attention backward"][1] += size(*found, gradient)
            return tuple(found)

    def attend(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
        kind = torch.get_autocast_dtype("cuda")
        made: Tensor = Fused.apply(q.to(kind), k.to(kind), v.to(kind))  # type: ignore[no-untyped-call]
        return made

    return attend


class Watched:
    """A kernel whose launches are counted."""

    def __init__(self, traffic: Traffic, kernel: Any, name: str) -> None:
        self.traffic, self.kernel, self.name = traffic, kernel, name

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **options: Any) -> None:
            with self.traffic.one(self.name, *args):
                self.kernel[grid](*args, **options)

        return launch


def watched(traffic: Traffic, module: Any, kernel: str, name: str) -> Any:
    """While it lasts, a kernel's launches are counted under that name."""
    return patch.object(module, kernel, Watched(traffic, getattr(module, kernel), name))


def counted(backbone: str, images: int, resolution: int) -> dict[str, list[int]]:
    """Launches and bytes of a step of so many images, by operation."""
    run = {
        "dataset": "noise", "backbone": backbone, "resolution": resolution, "batch_size": images,
        "loader": "resident", "device": "cuda",
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        parts = assembled({"run": run}, noise(2040, 64), Path(folder))
        numbers = count()
        batch: Any = getattr(parts.loader, "batch")  # noqa: B009
        step(parts, batch(next(numbers)))  # tables are made, the optimizer has its moments
        traffic, coming = Traffic(), batch(next(numbers))
        pretended.larger()
        with (
            patch.object(functional, "scaled_dot_product_attention", attention(traffic)),
            watched(traffic, add_norm_program, "forward_kernel", "add_norm forward"),
            watched(traffic, add_norm_program, "backward_kernel", "add_norm backward"),
            watched(traffic, linear_program, "forward_kernel", "linear_gelu forward"),
            watched(traffic, linear_program, "gelu_kernel", "linear_gelu backward"),
            watched(traffic, linear_program, "heads_kernel", "linear_heads backward"),
            watched(traffic, linear_performer_program, "gather_kernel", "linear_performer sums"),
            watched(traffic, linear_performer_program, "spread_kernel", "linear_performer"),
            watched(traffic, linear_performer_program, "query_kernel", "linear_performer queries"),
            watched(traffic, linear_performer_program, "pair_kernel", "linear_performer pairs"),
            watched(traffic, dropout_program, "dropout", "dropout"),
            watched(traffic, linear_dwconv_gelu_program, "conv_kernel", "linear_dwconv_gelu"),
            watched(
                traffic,
                linear_dwconv_gelu_program,
                "gradient_kernel",
                "linear_dwconv_gelu gradients",
            ),
            traffic,
        ):
            step(parts, coming)
    # Here one for each gradient; on a GPU a single launch for all.
    traffic.moved["linalg_vector_norm"][0] = 1
    return dict(traffic.moved)


def main() -> None:
    """Print the operations that move most."""
    backbone, *rest = sys.argv[1:]
    images, resolution = (*map(int, rest), *(256, 112)[len(rest) :])
    one, two = (counted(backbone, num, resolution) for num in (1, 2))
    found: dict[str, tuple[int, float]] = {}
    for name, (launches, moved) in two.items():
        more = moved - one.get(name, [0, 0])[1]
        found[name] = launches, float(moved + more * (images - 2))
    launched = sum(launches for launches, _ in found.values())
    total = sum(each for _, each in found.values()) / 1e9
    print(f"{backbone}, {images} images: {launched} launches, {total:.1f} GB")
    for name, (launched, each) in sorted(found.items(), key=lambda row: -row[1][1])[:16]:
        print(f"{name:32} {launched:5} {each / 1e9:8.2f} GB")
    pretended.leave()


if __name__ == "__main__":
    main()
