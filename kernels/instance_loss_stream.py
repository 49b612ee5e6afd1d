"""Path F of the instance loss: the logits are never in memory, for a great many instances.

Forward streams the weight once past every block of rows and leaves the loss and dz; backward
streams all rows once past every block of classes. Registered as `fastidmm::instance_loss_stream`.
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from fastidmm.kernels.instance_loss_logits import TARGETS, share_of
from fastidmm.kernels.instance_loss_tiles import combine_kernel, forward_kernel, weight_kernel

FORWARD = (
    "(Tensor z, Tensor weight, Tensor? bias, Tensor left, Tensor right, "
    f"{TARGETS}) -> (Tensor, Tensor, Tensor, Tensor)"
)
BACKWARD = (
    "(Tensor gradient, Tensor lse, Tensor left, Tensor right, Tensor? bias, "
    f"{TARGETS}) -> (Tensor, Tensor)"
)
WAVES = 4  # programs of the forward pass for each multiprocessor: the last wave is then short
OUT_BYTES = 128 << 20  # what the splits of the classes may leave for the combination


class Tiles(NamedTuple):
    """Rows and classes of a block, warps, stages of the pipeline."""

    rows: int
    classes: int
    warps: int
    stages: int


def pair(*numbers: tuple[int, int, int, int]) -> tuple[Tiles, Tiles]:
    """The blocks of the forward and of the weight kernel."""
    ahead, back = (Tiles(*n) for n in numbers)
    return ahead, back


# Width to the power of two it is cut into.
CHUNKS = {192: 64, 256: 128, 384: 128, 512: 128, 768: 256}
# By compute capability and width, the largest blocks found, by compiling, that spill nothing and
# keep to the architecture's shared memory, with Triton 3.7.1 and 3.6 (which spills 48 bytes at
# sm_80's first forward). Others take path M.
SMALL_MEMORY = {  # 99 KiB a block
    192: pair((128, 32, 8, 2), (32, 64, 8, 2)),
    256: pair((64, 64, 8, 2), (64, 64, 8, 2)),
    384: pair((32, 64, 8, 2), (32, 64, 8, 2)),
    512: pair((32, 32, 8, 2), (32, 32, 8, 2)),
    768: pair((16, 16, 4, 2), (16, 32, 8, 2)),
}
TILES: dict[int, dict[int, tuple[Tiles, Tiles]]] = {
    80: {
        192: pair((128, 64, 8, 2), (64, 128, 8, 2)),
        256: pair((64, 64, 8, 2), (64, 64, 8, 2)),
        384: pair((32, 64, 8, 2), (32, 64, 8, 2)),
        512: pair((32, 64, 8, 2), (64, 32, 8, 2)),
        768: pair((32, 32, 8, 2), (32, 32, 8, 2)),
    },
    86: SMALL_MEMORY,
    89: SMALL_MEMORY,
    90: {
        192: pair((128, 64, 8, 2), (64, 128, 8, 2)),
        256: pair((128, 32, 8, 2), (64, 128, 8, 2)),
        384: pair((128, 32, 8, 2), (64, 64, 8, 2)),
        512: pair((64, 32, 8, 2), (32, 64, 8, 2)),
        768: pair((64, 16, 8, 2), (64, 32, 8, 2)),
    },
    100: {
        192: pair((128, 32, 8, 2), (64, 128, 8, 2)),
        256: pair((128, 32, 8, 2), (64, 128, 8, 2)),
        384: pair((128, 32, 8, 2), (32, 128, 8, 2)),
        512: pair((32, 32, 8, 2), (32, 32, 8, 2)),
        768: pair((32, 32, 8, 2), (32, 32, 8, 2)),
    },
}


def tiles_of(device: torch.device, width: int) -> tuple[Tiles, Tiles] | None:
    """The blocks for this device and width, `None` where path F does not serve them."""
    key = 0  # the interpreter's, which tests fill in
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        key = 10 * major + minor
    return TILES.get(key, {}).get(width)


def splits_of(left: Tensor, right: Tensor, tiles: Tiles) -> tuple[int, int]:
    """How many programs share the classes, and the classes of each: a multiple of the block."""
    (batch, width), num = left.shape, right.shape[0]
    programs = 2
    if left.is_cuda:  # the same on every call, so that two runs are equal to the bit
        programs = WAVES * torch.cuda.get_device_properties(left.device).multi_processor_count
    blocks = triton.cdiv(num, tiles.classes)
    splits = min(triton.cdiv(programs, triton.cdiv(batch, tiles.rows)), blocks)
    splits = max(1, min(splits, OUT_BYTES // (4 * batch * width)))
    per_split = triton.cdiv(blocks, splits) * tiles.classes
    return triton.cdiv(num, per_split), per_split


@torch.library.custom_op("fastidmm::instance_loss_stream", mutates_args=(), schema=FORWARD)
def forward(
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    left: Tensor,
    right: Tensor,
    rows: Tensor,
    partner: Tensor | None,
    lam: Tensor | None,
    share: Tensor | None,
    smoothing: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss (), hits (B,), lse (B,), and its gradient for z (B, D) in fp32.

    z, weight, bias are what backward answers for; left (B, D) and right (N, D) are z and weight
    in bf16; lam and share (B,) are fp32. Rows outside [0, N) make the loss NaN.
    """
    batch, num, width = left.shape[0], weight.shape[0], left.shape[1]
    d_z = left.new_empty(batch, width, dtype=torch.float32)
    losses, lse = d_z.new_empty(batch), d_z.new_empty(batch)
    hits = d_z.new_empty(batch, dtype=torch.uint8)
    if batch:
        tiles, _ = served(left)
        splits, per_split = splits_of(left, right, tiles)
        out = d_z.new_empty(splits, batch, width)
        part = d_z.new_empty(splits, 5, batch)
        extra = None if bias is None else bias.float().contiguous()
        total = right.sum(0, dtype=torch.float32)
        with torch.cuda.device_of(left):
            forward_kernel[(triton.cdiv(batch, tiles.rows), splits)](
                left, right, extra, rows, out, part, batch, num, per_split,
                D=width, CHUNK=CHUNKS[width], BLOCK_B=tiles.rows, BLOCK_N=tiles.classes,
                num_warps=tiles.warps, num_stages=tiles.stages,
            )  # fmt: skip
            combine_kernel[(batch,)](
                left, right, extra, rows, partner, lam, share, out, part, total,
                losses, lse, hits, d_z, 1 / batch, smoothing, batch, num, per_split, splits,
                D=width, WIDTH=triton.next_power_of_2(width), num_warps=4,
            )  # fmt: skip
    return share_of(share, losses), hits.view(torch.bool), lse, d_z


def served(left: Tensor) -> tuple[Tiles, Tiles]:
    """The blocks; whoever calls has asked `tiles_of` before."""
    tiles = tiles_of(left.device, left.shape[1])
    assert tiles is not None, "width and device are not path F's"
    return tiles


@torch.library.custom_op(
    "fastidmm::instance_loss_stream_backward", mutates_args=(), schema=BACKWARD
)
def backward(
    gradient: Tensor,
    lse: Tensor,
    left: Tensor,
    right: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    partner: Tensor | None,
    lam: Tensor | None,
    share: Tensor | None,
    smoothing: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of weight (N, D) and bias (N,), or (0,) without one, in fp32."""
    (batch, width), num = left.shape, right.shape[0]
    d_weight, d_bias = lse.new_empty(num, width), lse.new_empty(0 if bias is None else num)
    if batch == 0:
        d_weight.zero_()
        d_bias.zero_()
    else:
        _, tiles = served(left)
        extra = None if bias is None else bias.float().contiguous()
        with torch.cuda.device_of(left):
            weight_kernel[(triton.cdiv(num, tiles.classes),)](
                left, right, extra, rows, partner, lam, share, lse, gradient.float(),
                d_weight, None if bias is None else d_bias, 1 / batch, smoothing, batch, num,
                D=width, CHUNK=CHUNKS[width], BLOCK_N=tiles.classes, BLOCK_B=tiles.rows,
                num_warps=tiles.warps, num_stages=tiles.stages,
            )  # fmt: skip
    return d_weight, d_bias


@forward.register_fake
def _(z: Tensor, weight: Tensor, bias: Any, left: Tensor, right: Tensor, *_: Any) -> Any:
    lse = left.new_empty(left.shape[0], dtype=torch.float32)
    d_z = left.new_empty(left.shape, dtype=torch.float32)
    return lse.new_empty(()), lse.new_empty(left.shape[0], dtype=torch.bool), lse, d_z


@backward.register_fake
def _(gradient: Tensor, lse: Tensor, left: Tensor, right: Tensor, bias: Any, *_: Any) -> Any:
    return lse.new_empty(right.shape), lse.new_empty(0 if bias is None else right.shape[0])


def keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Saves dz, the operands, the targets and lse; nothing but the loss has a gradient."""
    z, weight, bias, left, right, rows, partner, lam, share, smoothing = inputs
    _, hits, lse, d_z = output
    ctx.save_for_backward(d_z, lse, left, right, bias, rows, partner, lam, share)
    ctx.mark_non_differentiable(hits, lse, d_z)
    ctx.set_materialize_grads(False)
    ctx.smoothing = smoothing
    ctx.kinds = z.dtype, weight.dtype, None if bias is None else bias.dtype


def differentiate(ctx: Any, gradient: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    """The gradients asked for, each in the type of what it belongs to."""
    d_z, *saved = ctx.saved_tensors
    for_z, for_weight, for_bias = ctx.needs_input_grad[:3]
    z_kind, weight_kind, bias_kind = ctx.kinds
    d_weight = d_bias = None
    if for_weight or for_bias:
        d_weight, d_bias = backward(gradient, *saved, ctx.smoothing)
        d_weight = d_weight.to(weight_kind) if for_weight else None
        d_bias = d_bias.to(bias_kind) if for_bias else None
    return (d_z * gradient).to(z_kind) if for_z else None, d_weight, d_bias, *[None] * 7


forward.register_autograd(differentiate, setup_context=keep_for_backward)
