"""Write one split of a store as its pictures come, however many there are."""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from fastidmm.datasets import Item
from fastidmm.decode import Picture

# The header states sizes that are known only at the end, so its room is kept free at the start;
# safetensors lets a header end in spaces.
HEADER_BYTES = 1024
ALIGNMENT = 256
DTYPES = {"|u1": "U8", "<i4": "I32", "<i8": "I64"}


@dataclass(slots=True)
class Packed:
    """What a split consists of, picture by picture."""

    files: list[str] = field(default_factory=list)
    heights: list[int] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)
    num_bytes: int = 0  # of the whole file

    def fingerprint(self) -> str:
        """SHA-256 over the pixels, size and label of every picture, in order."""
        rows = zip(self.digests, self.heights, self.widths, self.labels, strict=True)
        return sha256("".join(f"{d} {h} {w} {c}\n" for d, h, w, c in rows).encode()).hexdigest()

    def columns(self) -> dict[str, NDArray[np.generic]]:
        """The arrays beside the pixels, under their names in a store."""
        high, wide = np.array(self.heights, "<i4"), np.array(self.widths, "<i4")
        sizes = high.astype("<i8") * wide * 3
        offset = np.cumsum(sizes, dtype="<i8") - sizes
        label = np.array(self.labels, "<i8")
        return {"offset": offset, "label": label, "height": high, "width": wide}


def pack(path: Path, pictures: Iterable[tuple[Item, Picture]]) -> Packed:
    """Write a split's file and see it onto the disk; at no time is more than a picture held."""
    packed = Packed()
    with path.open("wb") as file:
        file.seek(HEADER_BYTES)
        for item, picture in pictures:
            file.write(picture.pixels)
            packed.files.append(item.file)
            packed.labels.append(item.label)
            packed.heights.append(picture.height)
            packed.widths.append(picture.width)
            packed.digests.append(picture.digest)
        file.write(bytes(-file.tell() % ALIGNMENT))
        _finish(file, packed.columns())
        file.flush()
        os.fsync(file.fileno())
    packed.num_bytes = path.stat().st_size
    return packed


def _finish(file: BinaryIO, columns: dict[str, NDArray[np.generic]]) -> None:
    """Append the columns, then fill in the header for them and the pixels before them."""
    start, stop = 0, file.tell() - HEADER_BYTES
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    header["pixels"] = {"dtype": "U8", "shape": [stop], "data_offsets": [start, stop]}
    for name, values in columns.items():
        file.write(values.tobytes())
        start, stop = stop, stop + values.nbytes
        kind = DTYPES[values.dtype.str]
        header[name] = {"dtype": kind, "shape": [values.size], "data_offsets": [start, stop]}
    text = json.dumps(header, separators=(",", ":")).encode().ljust(HEADER_BYTES - 8)
    file.seek(0)
    file.write(len(text).to_bytes(8, "little") + text)
