"""All views of a group from uint8 pixels: resize, colours, blur and mixing in four launches.

`fastidmm.augment.render` is the definition; on a CPU `views_cpu` does the work. What differs here:
sums run in another order, rows that were resized meet their columns' weights in fp16 with fp32
sums, and a bicubic resize is clamped after its second pass alone: below 1/255 on average, and
beside hard edges a few 1/255 where it is bicubic. RandAugment is `randaugment`'s, between `tint`
and `finish`. What the kernels do not know, a blur beside RandAugment or Mixup, is done to resized
crops by the plain renderer's own functions.

    resize   a program per crop and block of it: source rows by sums, columns by matrix products
    means    eight programs per crop: the gray that contrast turns about, at its place in the order
    tint     a program per crop and block of it: jitter and gray, in place
    finish   a program per crop and strip of it: blur, solarize, flip, Mixup, normalise, and each
             pixel stored where CutMix wants it, once
"""

import math
from typing import Any

import torch
from torch import Tensor

from fastidmm import augment, colour
from fastidmm.batch import Interpolation, ViewGroup
from fastidmm.kernels import randaugment, views_cpu
from fastidmm.plan import Crops, GroupPlan
from fastidmm.store import Store

try:
    import triton

    from fastidmm.kernels import views_programs as programs
except ImportError:  # elsewhere than on Linux
    triton = None

HAS_KERNELS = triton is not None

ROWS = 16  # finished at a time: the least that a matrix product takes
STRIP, COLUMNS = 64, 128  # rows and columns of a program that finishes, at most
RESIZED = {"bilinear": (32, 64), "bicubic": (16, 64)}  # output rows and columns of a program
PARTS, LANES = 2, 32  # source columns at a time: pixels of a thread, threads of a warp
# Of a thread at most: sixteen warps a multiprocessor, whose loads wait at once.
REGISTERS = {"maxnreg": 128}
RESIZE_OPTIONS = {"num_warps": 8, **REGISTERS}
MOST_RADIUS = 8  # px of a blur; wider tiles do not fit the registers
PIXELS, SPLITS = 1024, 8  # of a step of those that jitter; programs that sum up a crop


def views(store: Store, plan: GroupPlan, group: ViewGroup, dtype: torch.dtype) -> Tensor:
    """Every crop of a group, finished and mixed: (C, 3, S, S) of `dtype`, channels last."""
    if store.device.type == "cpu":
        return views_cpu.views(store, plan, group, dtype)
    if triton is None:
        return reference(store, plan, group, dtype)
    return fused(store, plan, group, dtype)


def finish(resized: Tensor, plan: GroupPlan, group: ViewGroup, dtype: torch.dtype) -> Tensor:
    """All but the resize, for crops that were resized elsewhere.

    resized (C, S, S, 3) uint8; returns as `views`.
    """
    if resized.device.type == "cpu":
        return views_cpu.finish(resized, plan, group, dtype)
    values = resized.float().mul_(1 / 255)
    if triton is None:
        return finish_reference(values, plan, group, dtype)
    return finish_fused(values, plan, group, dtype)


def plain_views(store: Store, crops: Crops, group: ViewGroup) -> Tensor:
    """Crops without chance, normalised, as evaluation sees them: (C, 3, S, S) float32."""
    if store.device.type == "cpu":
        return views_cpu.plain_views(store, crops, group)
    if triton is None:
        return augment.render_plain(store, crops, group)
    return colour.normalise(resize(store, crops, torch.float32).permute(0, 3, 1, 2), group)


def reference(store: Store, plan: GroupPlan, group: ViewGroup, dtype: torch.dtype) -> Tensor:
    """The definition: the plain renderer's views, in the type and layout asked for."""
    pixels = augment.render(store, plan, group)
    return pixels.to(dtype=dtype, memory_format=torch.channels_last)


def finish_reference(
    resized: Tensor, plan: GroupPlan, group: ViewGroup, dtype: torch.dtype
) -> Tensor:
    """The definition of `finish`, of crops in [0, 1]: the plain renderer's own functions.

    On a CPU they work in place where `resized` is float32.
    """
    pixels = augment.finished(resized.permute(0, 3, 1, 2).float(), plan, group)
    return augment.MIXES[plan.mix](pixels, plan).to(dtype, memory_format=torch.channels_last)


def fusible(plan: GroupPlan, group: ViewGroup) -> bool:
    """Whether the kernels know all that a plan asks for."""
    operated, blended = plan.operation.shape[1] > 0, plan.mix == "mixup"
    if group.blur:
        return not operated and not blended and _radius(group) <= MOST_RADIUS
    return not operated or not group.solarize


def _radius(group: ViewGroup) -> int:
    """How far blurs read, px: four times the largest sigma; each crop's own is on the device."""
    return math.ceil(4 * group.sigma[1])


def fused(store: Store, plan: GroupPlan, group: ViewGroup, dtype: torch.dtype) -> Tensor:
    """The same views by kernels, without waiting for the device."""
    # Half precision keeps 11 bits of values in [0, 1]: finer than the 8 they come from.
    half = fusible(plan, group) and dtype != torch.float32
    resized = resize(store, plan.crops, torch.float16 if half else torch.float32)
    return finish_fused(resized, plan, group, dtype)


def finish_fused(resized: Tensor, plan: GroupPlan, group: ViewGroup, dtype: torch.dtype) -> Tensor:
    """The same by kernels, or by the plain renderer's functions where they do not know all.

    `resized` may be written to.
    """
    if not fusible(plan, group):
        return finish_reference(resized, plan, group, dtype)
    num, size = resized.shape[:2]
    found = torch.empty_like(resized, dtype=dtype)
    if num:
        if group.jitter or group.gray:
            _tint(resized, plan)
        if plan.operation.shape[1]:
            drawn = (plan.operation, plan.level, plan.negative, plan.spot)
            resized = randaugment.fused(resized, *drawn)
        constants = finish_constants(size, group)
        goes_to = torch.empty_like(plan.partner)
        goes_to[plan.partner] = torch.arange(num, device=resized.device)
        sides = (triton.cdiv(size, constants[name]) for name in ("STRIP", "COLUMNS"))
        programs.finish[(num, *sides)](
            resized, found, plan.blur, plan.sigma, plan.solarize, plan.flip, plan.partner,
            goes_to, plan.box, plan.weight, size, *group.mean, *(1 / std for std in group.std),
            **constants, CUTMIX=plan.mix == "cutmix", MIXUP=plan.mix == "mixup",
        )  # fmt: skip
    return found.permute(0, 3, 1, 2)


def _tint(resized: Tensor, plan: GroupPlan) -> None:
    """Jitter and gray as drawn, in place."""
    num, size = resized.shape[:2]
    part = torch.empty(num, SPLITS, dtype=torch.float32, device=resized.device)
    chain, constants = (plan.jitter, plan.order, plan.factors), tint_constants()
    programs.means[(num, SPLITS)](resized, part, *chain, size, **constants)
    programs.tint[(num, triton.cdiv(size * size, PIXELS))](
        resized, part, *chain, plan.gray, size, **constants
    )


def tint_constants() -> dict[str, int]:
    """Of the two programs that jitter."""
    return {"SPLITS": SPLITS, "BLOCK": PIXELS}


def resize_constants(interpolation: Interpolation) -> dict[str, Any]:
    """Of the program that resizes."""
    rows, columns = RESIZED[interpolation]
    shape = {"ROWS": rows, "COLUMNS": columns, "PARTS": PARTS, "LANES": LANES}
    return {**shape, "CUBIC": interpolation == "bicubic"}


def finish_constants(size: int, group: ViewGroup) -> dict[str, Any]:
    """Of the program that finishes crops of `size` px, with its options."""
    radius = _radius(group) if group.blur else 0
    columns, wide = _blocks(size, radius)
    tall = triton.next_power_of_2(ROWS + 2 * radius)
    shape = {"ROWS": ROWS, "TALL": tall, "COLUMNS": columns, "WIDE": wide, "STRIP": STRIP}
    # The wider, the more threads, so that a blurred tile fits their registers.
    options = {"num_warps": max(4, columns // 8), **REGISTERS}
    return {**shape, "RADIUS": radius, "BLUR": bool(group.blur), **options}


def _blocks(size: int, radius: int) -> tuple[int, int]:
    """Columns that a program finishes, and columns that their blur reads; powers of two."""
    columns = max(16, triton.next_power_of_2(size))
    if size + 2 * radius > COLUMNS:
        columns = COLUMNS // 2
    return columns, max(16, triton.next_power_of_2(min(size, columns) + 2 * radius))


def resize(store: Store, crops: Crops, dtype: torch.dtype) -> Tensor:
    """Crops cut out and resized, antialiased, in [0, 1]: (C, S, S, 3)."""
    num, size = crops.rows.numel(), crops.size
    found = torch.empty(num, size, size, 3, dtype=dtype, device=store.device)
    if num:
        constants = resize_constants(crops.interpolation)
        high, wide = (triton.cdiv(size, constants[side]) for side in ("ROWS", "COLUMNS"))
        programs.resize[(num, high, wide)](
            store.pixels, store.offset, store.width.contiguous(), crops.rows, crops.window,
            crops.origin, crops.scale, found, size,
            **constants, **RESIZE_OPTIONS,
        )  # fmt: skip
    return found
