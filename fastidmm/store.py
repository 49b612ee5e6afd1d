"""A prepared dataset: every image decoded once, at its own size, in a fixed order.

A store is a folder: `train.safetensors` and, when there is one, `test.safetensors`, each with

    pixels  uint8  (bytes,)  the images one after the other, each (height, width, 3) row by row
    offset  int64  (N,)      where in `pixels` an image starts
    height  int32  (N,)
    width   int32  (N,)
    label   int64  (N,)      the class, or -1 where an image has none

`store.json`: class names, source files, fingerprint, split seed, the reader's version; and
`prepare.json`: what `checks.py` found. A split of more than `--shard-size` lies in several such
files, `train-00000.safetensors` and so on, each complete in itself.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastidmm.chance import Counters, Use, permutation, philox
from fastidmm.errors import DataError
from fastidmm.mapped import side_by_side, tensor_in

# Also known by these names, for whoever has loaded torch anyway.
from fastidmm.places import READER_VERSION as READER_VERSION
from fastidmm.places import check_name as check_name
from fastidmm.places import current as current
from fastidmm.places import folder_of as folder_of
from fastidmm.places import has_split as has_split
from fastidmm.places import home as home
from fastidmm.places import prepared as prepared
from fastidmm.places import read_json as read_json
from fastidmm.places import split_files

KINDS = {
    "pixels": torch.uint8,
    "offset": torch.int64,
    "height": torch.int32,
    "width": torch.int32,
    "label": torch.int64,
}
TABLES = ("offset", "height", "width", "label", "row")  # tensors of one entry per image


@dataclass(frozen=True, slots=True)
class Store:
    """One split of a prepared dataset; N images."""

    pixels: Tensor  # (bytes,) uint8
    offset: Tensor  # (N,) int64
    height: Tensor  # (N,) int32
    width: Tensor  # (N,) int32
    label: Tensor  # (N,) int64, -1 where unknown
    class_names: tuple[str, ...]
    fingerprint: str  # SHA-256 over every pixel, size and label of the whole split
    folder: Path | None = None  # where it was opened, as what split
    split: str = "train"
    row: Tensor | None = None  # (N,) int64: each row's place in the whole split; None: the same
    # Known to the host, so that a GPU need not be asked; -1: not yet.
    max_height: int = -1
    max_width: int = -1

    def __post_init__(self) -> None:
        for name in ("height", "width"):
            if getattr(self, f"max_{name}") < 0:
                found = int(getattr(self, name).max()) if len(self) else 0
                object.__setattr__(self, f"max_{name}", found)

    def __len__(self) -> int:
        return self.offset.numel()

    @property
    def device(self) -> torch.device:
        """Where it is used: of its tables; pixels may lie in pinned host memory all the same."""
        return self.offset.device

    @property
    def num_bytes(self) -> int:
        """Of the pixels of its rows; more lie in `pixels` where rows were selected."""
        return int((self.height.long() * self.width).sum()) * 3

    @property
    def readable(self) -> bool:
        """Whether kernels on its device can read the pixels where they lie."""
        return self.pixels.device == self.device or self.pixels.is_pinned()

    @property
    def num_labelled(self) -> int:
        """How many images have a class."""
        return int((self.label >= 0).sum())

    @property
    def labelled(self) -> bool:
        """Whether any image has a class."""
        return self.num_labelled > 0

    @property
    def num_classes(self) -> int:
        """How many classes the labels distinguish."""
        return len(self.class_names)

    @property
    def learnable(self) -> bool:
        """Whether there are classes to tell apart, and images of them: one alone has no other."""
        return self.num_labelled > 1 and self.num_classes > 1

    def image(self, row: int) -> Tensor:
        """One image as it lies in the store: (height, width, 3) uint8."""
        start, high, wide = int(self.offset[row]), int(self.height[row]), int(self.width[row])
        return self.pixels[start : start + high * wide * 3].view(high, wide, 3)

    def to(self, device: torch.device) -> "Store":
        """The same split with its pixels on another device."""
        return replace(self.tables_to(device), pixels=self.pixels.to(device))

    def tables_to(self, device: torch.device) -> "Store":
        """The same split used from another device, its pixels where they are."""
        tables: dict[str, Any] = {name: getattr(self, name) for name in TABLES}
        there = {name: table.to(device) for name, table in tables.items() if table is not None}
        return replace(self, **there)

    def select(self, rows: Tensor) -> "Store":
        """The split cut down to `rows` (int64), in that order; pixels are shared, not copied."""
        row = torch.arange(len(self), device=rows.device) if self.row is None else self.row
        chosen = {n: getattr(self, n)[rows] for n in TABLES if n != "row"}
        return replace(self, **chosen, row=row[rows], max_height=-1, max_width=-1)

    def with_labels(self) -> "Store":
        """The images that have a class: the split itself where all have."""
        known = self.label >= 0
        return self if bool(known.all()) else self.select(known.nonzero()[:, 0])

    def gathered(self, rows: Tensor) -> "Store":
        """`rows` (int64), copied from the host's pixels into a small store on the same device."""
        part = self.select(rows).tables_to(self.pixels.device)
        pixels = [part.image(row).flatten() for row in range(len(part))]
        sizes = torch.tensor([len(image) for image in pixels], dtype=torch.int64)
        copied = replace(part, pixels=torch.cat(pixels), offset=sizes.cumsum(0) - sizes)
        return copied.to(self.device)


def open_store(folder: Path, split: str) -> Store:
    """Open one split by memory map, in one file or several; nothing is read but what is touched."""
    shards = open_shards(folder, split)
    if len(shards) == 1:
        return shards[0]
    paths = [folder / file for file in split_files(split, read_json(folder)["splits"][split])]
    pixels, starts = side_by_side([tensor_in(path, "pixels") for path in paths])
    tables: dict[str, Any] = {
        name: torch.cat([getattr(shard, name) for shard in shards])
        for name in ("height", "width", "label")
    }
    offset = [shard.offset + start for shard, start in zip(shards, starts, strict=True)]
    larger: dict[str, Any] = {"max_height": -1, "max_width": -1}
    return replace(shards[0], pixels=pixels, offset=torch.cat(offset), **tables, **larger)


def open_shards(folder: Path, split: str) -> list[Store]:
    """Open the files of one split by memory map, in the order of their rows."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    described = read_json(folder)
    if split not in described["splits"]:
        raise DataError(
            f"{folder.name!r} has no {split} split: prepare a folder with train/ and test/."
        )
    told = described["splits"][split]
    shards = []
    for file in split_files(split, told):
        path = folder / file
        try:
            tensors: dict[str, Any] = load_file(path)
            _check_tables(tensors, len(described["class_names"]))
        except (OSError, ValueError, SafetensorError) as problem:
            raise DataError(
                f"{path} cannot be read ({problem}); prepare the dataset again."
            ) from None
        shards.append(
            Store(
                **tensors,
                class_names=tuple(described["class_names"]),
                fingerprint=told["fingerprint"],
                folder=folder,
                split=split,
            )
        )
    return shards


def _check_tables(tensors: dict[str, Tensor], num_classes: int) -> None:
    """A ValueError where tables would have anything read but images within the pixels."""
    if {name: tensor.dtype for name, tensor in tensors.items()} != KINDS:
        raise ValueError("its tensors are not those of a store")
    pixels, offset, label = (tensors[name] for name in ("pixels", "offset", "label"))
    if pixels.ndim != 1 or any(tensors[n].shape != (len(offset),) for n in KINDS if n != "pixels"):
        raise ValueError("its tensors have other shapes than a store's")
    sides = torch.stack((tensors["height"].long(), tensors["width"].long()))
    # In threes, since three times a product could be more than int64 holds.
    room = (pixels.numel() - offset).div(3, rounding_mode="floor")
    within = (sides > 0).all(0) & (offset >= 0) & (sides.prod(0) <= room)
    if not bool((within & (label >= -1) & (label < num_classes)).all()):
        raise ValueError("its tables do not fit its pixels or classes")


def stratified(
    labels: Tensor, num: int, seed: int, use: Use = Use.SUBSET, *, spare: int = 0
) -> Tensor:
    """`num` rows chosen by the seed, every class in its share, in the store's order: (num,) int64.

    Shares are rounded down; the largest remainders get what is left. `spare` rows of each class are
    never taken, so that there may be fewer than `num`.
    """
    shuffled = permutation(philox((0, torch.arange(len(labels)), 0, 0), Counters(seed).key(use)))
    classes, counts = labels.unique(return_counts=True)
    exact = counts.double() * num / len(labels)
    quota = exact.floor().long()
    # Equal remainders, as classes of one size have, are a matter of chance and not of names.
    rank = permutation(philox((1, torch.arange(len(classes)), 0, 0), Counters(seed).key(use)))
    rank = rank[torch.argsort((quota - exact)[rank], stable=True)]
    quota[rank[: num - int(quota.sum())]] += 1
    quota = torch.minimum(quota, (counts - spare).clamp(min=0))
    chosen = [
        shuffled[labels[shuffled] == which][:share]
        for which, share in zip(classes.tolist(), quota.tolist(), strict=True)
    ]
    return torch.cat(chosen).sort().values
