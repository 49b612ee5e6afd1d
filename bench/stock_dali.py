"""IDMM's views as a DALI pipeline alone makes them: the way its documentation and solo-learn write.

One decode, then for each view its own resized crop, colour twist, gray, blur, mirror and normalise,
with DALI's random numbers. It has less to do than fastidmm, and does some of it differently: no
CutMix; hue is a rotation in YIQ, contrast turns about mid-gray, and the colours have one order; a
blur reads 3 sigma around.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastidmm.batch import ViewGroup


def stock(
    files: list[Path],
    groups: list[ViewGroup],
    batch_size: int,
    device: torch.device,
    threads: int,
    seed: int,
    *,
    cache: int = 0,
) -> Iterator[list[Tensor]]:
    """Batches without end, every file once an epoch: each view (B, 3, S, S), then indices (B,).

    Views are normalised, in view order, bfloat16 on a GPU and float32 on a CPU; indices are int64,
    places in `files`. `cache`: MB of decoded pictures that DALI keeps on the GPU.
    """
    from nvidia.dali import pipeline_def
    from nvidia.dali.plugin.base_iterator import LastBatchPolicy
    from nvidia.dali.plugin.pytorch import DALIGenericIterator

    gpu = device.type == "cuda"
    decoder: dict[str, Any] = {"device": "cpu"}
    if gpu:
        decoder = {"device": "mixed"}
        if cache:
            decoder |= {"cache_size": cache, "cache_type": "threshold"}
    pipeline = pipeline_def(_pipeline, enable_conditionals=True)(
        [str(file) for file in files],
        groups,
        decoder,
        batch_size=batch_size,
        num_threads=threads,
        device_id=torch.cuda.current_device() if gpu and device.index is None else device.index,
        seed=seed,
    )
    names = [f"view {i}" for i in range(sum(group.count for group in groups))]
    epochs = DALIGenericIterator(
        pipeline,
        [*names, "index"],
        reader_name="files",
        last_batch_policy=LastBatchPolicy.PARTIAL,
        auto_reset=True,
    )
    for (batch,) in itertools.chain.from_iterable(itertools.repeat(epochs)):
        views = [batch[name] for name in names]
        yield [*(v.bfloat16() if gpu else v for v in views), batch["index"].flatten().long()]


def _pipeline(
    files: list[str], groups: list[ViewGroup], decoder: dict[str, Any]
) -> tuple[Any, ...]:
    """The graph; DALI rewrites the `if`s of `_view`, which split a batch."""
    from nvidia.dali import fn, types

    encoded, index = fn.readers.file(
        files=files,
        labels=list(range(len(files))),
        shuffle_after_epoch=True,
        pad_last_batch=True,
        name="files",
    )
    images = fn.decoders.image(encoded, output_type=types.RGB, **decoder)
    gpu = decoder["device"] == "mixed"
    dtype = types.FLOAT16 if gpu else types.FLOAT
    views = [_view(images, group, dtype) for group in groups for _ in range(group.count)]
    return *views, index.gpu() if gpu else index


def _view(images: Any, group: ViewGroup, dtype: Any) -> Any:
    from nvidia.dali import fn, types

    x = fn.random_resized_crop(
        images,
        size=(group.size, group.size),
        random_area=group.scale,
        random_aspect_ratio=group.ratio,
        interp_type=types.INTERP_LINEAR,
    )
    if fn.random.coin_flip(probability=group.jitter, dtype=types.BOOL):
        x = fn.color_twist(
            x,
            brightness=fn.random.uniform(range=group.brightness),
            contrast=fn.random.uniform(range=group.contrast),
            saturation=fn.random.uniform(range=group.saturation),
            hue=fn.random.uniform(range=tuple(360 * turn for turn in group.hue)),
        )
    if fn.random.coin_flip(probability=group.gray, dtype=types.BOOL):
        gray = fn.color_space_conversion(x, image_type=types.RGB, output_type=types.GRAY)
        x = fn.cat(gray, gray, gray, axis=2)
    if fn.random.coin_flip(probability=group.blur, dtype=types.BOOL):
        x = fn.gaussian_blur(x, sigma=fn.random.uniform(range=group.sigma))
    return fn.crop_mirror_normalize(
        x,
        mirror=fn.random.coin_flip(probability=group.flip),
        dtype=dtype,
        output_layout="CHW",
        mean=[255 * value for value in group.mean],
        std=[255 * value for value in group.std],
    )
