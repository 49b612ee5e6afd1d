"""RandAugment of crops that lie channels last, two launches an operation.

`fastidmm.randaugment.randaugment` is the definition: all five families on all crops, each chosen by
mask, some three hundred launches an operation. Here every crop does its own alone.

    measure  three programs per crop: its levels' table, or the gray that contrast turns about
    operate  a program per crop and block of it: what was drawn, from one buffer to another
"""

import torch
from torch import Tensor

from fastidmm import randaugment as definition

try:
    import triton

    from fastidmm.kernels import randaugment_program as program
except ImportError:  # elsewhere than on Linux
    triton = None

MEASURED, OPERATED = 1024, 512  # pixels of a program at a time: more do not fit the registers
# A fused multiply-add rounds once where the definition rounds twice, and the definition's float64
# says which side of an edge a pixel is on.
OPTIONS = {"enable_fp_fusion": False}


def randaugment(
    x: Tensor, operation: Tensor, level: Tensor, negative: Tensor, spot: Tensor
) -> Tensor:
    """Apply the operations drawn for each crop, one after the other; `x` may be written to.

    x (C, S, S, 3) float16 or float32 in [0, 1], contiguous; the rest as the definition has it.
    """
    if x.is_cuda and triton is not None:
        return fused(x, operation, level, negative, spot)
    return reference(x, operation, level, negative, spot)


def reference(
    x: Tensor, operation: Tensor, level: Tensor, negative: Tensor, spot: Tensor
) -> Tensor:
    """The definition, on any device."""
    pixels = x.permute(0, 3, 1, 2).float()
    found = definition.randaugment(pixels, operation, level, negative, spot)
    return found.permute(0, 2, 3, 1).to(x.dtype)


def fused(x: Tensor, operation: Tensor, level: Tensor, negative: Tensor, spot: Tensor) -> Tensor:
    """The same by kernels, without waiting for the device."""
    num, size, turns = *x.shape[:2], operation.shape[1]
    if not num:
        return x
    device = x.device
    table = torch.empty(num, 3, 256, dtype=torch.int32, device=device)
    gray = torch.empty(num, dtype=torch.float32, device=device)
    meanings = definition.meanings(size, device)
    drawn = tuple(part.contiguous() for part in (operation, level, negative, spot))
    other = torch.empty_like(x)
    for turn in range(turns):
        program.measure[(num, 3)](
            x, table, gray, drawn[0], turn, turns, size, BLOCK=MEASURED, **OPTIONS
        )
        program.operate[(num, triton.cdiv(size * size, OPERATED))](
            x, other, table, gray, *drawn, *meanings, turn, turns, size, BLOCK=OPERATED, **OPTIONS
        )
        x, other = other, x
    return x
