"""Every crop's own chances of a step in one launch: box, flip, colours, blur, RandAugment.

`fastidmm.plan.own_draws` is the definition, some two hundred small operations; this gives the same
numbers: every integer to the bit, since words are Philox's own and boxes are float64, one rounding
an operation (compiled without fusing multiply-adds).
"""

from functools import cache
from itertools import permutations
from typing import Any

import torch
from torch import Tensor

from fastidmm.batch import ViewGroup
from fastidmm.chance import Counters, Use, limit, ratio_table
from fastidmm.kernels.words import signed

try:
    import triton

    from fastidmm.kernels import draws_program as program
except ImportError:  # elsewhere than on Linux
    triton = None

CROPS = 128  # of a program


def draws(
    group: ViewGroup, rows: Tensor, views: Tensor, sizes: tuple[Tensor, Tensor],
    counters: Counters, epoch: Tensor | int,
) -> dict[str, Any]:  # fmt: skip
    """Fields of a `GroupPlan`, and the three tensors of its crops, by name.

    rows, views (C,) int64: the image and the number of each crop's view; sizes: all heights and
    widths of the store, (N,) each; epoch: a number, or () int64 where the rows are.
    """
    if triton is None or not rows.is_cuda:
        return reference(group, rows, views, sizes, counters, epoch)
    return fused(group, rows, views, sizes, counters, epoch)


def reference(
    group: ViewGroup, rows: Tensor, views: Tensor, sizes: tuple[Tensor, Tensor],
    counters: Counters, epoch: Tensor | int,
) -> dict[str, Any]:  # fmt: skip
    """The definition, on any device."""
    from fastidmm.plan import own_draws

    return own_draws(group, rows, views, sizes, counters, epoch)


def fused(
    group: ViewGroup, rows: Tensor, views: Tensor, sizes: tuple[Tensor, Tensor],
    counters: Counters, epoch: Tensor | int,
) -> dict[str, Any]:  # fmt: skip
    """The same numbers by one kernel."""
    num, turns, device = rows.numel(), group.randaugment, rows.device

    def new(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(num, *shape, dtype=dtype, device=device)

    found = {
        "origin": new(2, dtype=torch.float64),
        "scale": new(2, dtype=torch.float64),
        "window": new(4),
        **{name: new(dtype=torch.bool) for name in ("flip", "jitter", "gray", "blur", "solarize")},
        "order": new(4),
        "factors": new(4, dtype=torch.float32),
        "sigma": new(dtype=torch.float32),
        "operation": new(turns),
        "level": new(turns),
        "negative": new(turns, dtype=torch.bool),
        "spot": new(turns, 2),
    }
    if num:
        chances, ranges, orders = _constants(group, device)
        # By address: a capture goes on with other epochs, and numbers are compiled in at times.
        if not isinstance(epoch, Tensor):
            epoch = torch.full((), epoch, device=device)
        keys = [low | high << 32 for low, high in map(counters.key, (Use.CROP, Use.OPERATION))]
        program.draws[(triton.cdiv(num, CROPS),)](
            rows, views, sizes[0].contiguous(), sizes[1].contiguous(),
            ratio_table(*group.ratio, device), orders, chances, ranges, *found.values(),
            signed(keys[0], 64), signed(keys[1], 64), epoch, num, group.size,
            TURNS=turns, CROPS=CROPS, enable_fp_fusion=False,
        )  # fmt: skip
    return found


@cache
def _constants(group: ViewGroup, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Chances as words, ranges as low and span in float64, orders; on the device once."""
    probabilities = (group.flip, group.jitter, group.gray, group.blur, group.solarize, 0.5)
    chances = torch.tensor([limit(p) for p in probabilities])
    colours = (group.brightness, group.contrast, group.saturation, group.hue)
    spans = [(low, high - low) for low, high in (group.scale, *colours, group.sigma)]
    ranges = [value for span in spans for value in span] + [min(group.ratio), max(group.ratio)]
    orders = torch.tensor(list(permutations(range(4))))
    return (
        chances.to(device),
        torch.tensor(ranges, dtype=torch.float64).to(device),
        orders.to(device),
    )
