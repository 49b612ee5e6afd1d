"""Write one split of a store as its pictures come, however many there are."""

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from fastidmm.datasets import Item
from fastidmm.places import shard_name, split_files
from fastidmm.preparing.decode import Facts, Picture
from fastidmm.preparing.journal import Noted

# The header states sizes that are known only at the end, so its room is kept free at the start;
# safetensors lets a header end in spaces.
HEADER_BYTES = 1024
ALIGNMENT = 256
DTYPES = {"|u1": "U8", "<i4": "I32", "<i8": "I64"}


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of a split."""

    num_images: int
    num_bytes: int  # of the whole file


@dataclass(slots=True)
class Packed:
    """What a split consists of, picture by picture."""

    files: list[str] = field(default_factory=list)
    heights: list[int] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)
    looks: list[int | None] = field(default_factory=list)
    shards: list[Shard] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        """Bytes of all its files."""
        return sum(shard.num_bytes for shard in self.shards)

    def fingerprint(self) -> str:
        """SHA-256 over the pixels, size and label of every picture, in order."""
        rows = zip(self.digests, self.heights, self.widths, self.labels, strict=True)
        return _fingerprint(rows)

    def add(self, item: Item, facts: Facts) -> None:
        """Append a row."""
        self.files.append(item.file)
        self.labels.append(item.label)
        self.heights.append(facts.height)
        self.widths.append(facts.width)
        self.digests.append(facts.digest)
        self.looks.append(facts.look)

    def columns(self, first: int) -> dict[str, NDArray[np.generic]]:
        """The arrays beside the pixels from row `first` on, under their names in a store."""
        high, wide = np.array(self.heights[first:], "<i4"), np.array(self.widths[first:], "<i4")
        sizes = high.astype("<i8") * wide * 3
        offset = np.cumsum(sizes, dtype="<i8") - sizes
        label = np.array(self.labels[first:], "<i8")
        return {"offset": offset, "label": label, "height": high, "width": wide}


class Packer:
    """Writes a split's files; at no time is more than a picture held.

    A file that would grow beyond `shard_bytes` of pixels is followed by another (0: never). Which
    picture goes where depends on their sizes alone, so that a packer which is told of pictures
    written before, in the same order, goes on behind them and ends in the same bytes.
    """

    def __init__(self, folder: Path, split: str, shard_bytes: int = 0) -> None:
        self.packed = Packed()
        self.unsynced = 0  # bytes written since `sync`
        self._folder, self._split, self._shard_bytes = folder, split, shard_bytes
        self._file: BinaryIO | None = None
        self._first, self._stop = 0, 0  # the shard's first row, and the end of its pixels
        whole = folder / shard_name(split)
        if whole.exists():
            whole.rename(self._path())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if self._file:
            self._file.close()

    def _path(self) -> Path:
        return self._folder / shard_name(self._split, len(self.packed.shards))

    def holds(self, noted: Noted) -> bool:
        """Whether what was noted as the next picture is in its place."""
        facts = noted.outcome
        if isinstance(facts, str):
            return True
        size = _size(facts)
        full = self._full(size)
        place = len(self.packed.shards) + full
        start = HEADER_BYTES + (0 if full else self._stop)
        try:
            with (self._folder / shard_name(self._split, place)).open("rb") as file:
                if noted.on_disk:
                    return os.fstat(file.fileno()).st_size >= start + size
                file.seek(start)
                return sha256(file.read(size)).hexdigest() == facts.digest
        except FileNotFoundError:
            return False

    def _full(self, size: int) -> bool:
        """Whether pixels of this size begin a new shard."""
        return 0 < self._shard_bytes < self._stop + size and self._stop > 0

    def add(self, item: Item, facts: Facts) -> None:
        """Append a picture, or pass over it where only its facts are given: it is in its place."""
        size = _size(facts)
        if self._full(size):
            self._end_shard()
        file = self._file or self._open()
        if isinstance(facts, Picture):
            file.seek(HEADER_BYTES + self._stop)
            file.write(facts.pixels)
            file.flush()
            self.unsynced += size
        self._stop += size
        self.packed.add(item, facts)

    def _open(self) -> BinaryIO:
        path = self._path()
        path.touch()
        self._file = path.open("r+b")
        return self._file

    def sync(self) -> None:
        """See everything added onto the disk."""
        if self._file:
            os.fsync(self._file.fileno())
        self.unsynced = 0

    def _end_shard(self) -> None:
        """Complete the open file: columns behind the pixels, header before them."""
        assert self._file
        self._file.truncate(HEADER_BYTES + self._stop)
        self._file.seek(0, os.SEEK_END)
        self._file.write(bytes(-self._file.tell() % ALIGNMENT))
        _finish(self._file, self.packed.columns(self._first))
        self._file.flush()
        self.sync()
        num_images = len(self.packed.files) - self._first
        num_bytes = os.fstat(self._file.fileno()).st_size
        self._file.close()
        self._file = None
        self.packed.shards.append(Shard(num_images, num_bytes))
        self._first, self._stop = len(self.packed.files), 0

    def finish(self) -> Packed:
        """Complete the split; without a picture there is no file."""
        if self._file:
            self._end_shard()
        if len(self.packed.shards) == 1:
            only = self._folder / shard_name(self._split, 0)
            only.rename(self._folder / shard_name(self._split))
        return self.packed


def fingerprint_of(folder: Path, split: str, told: dict[str, Any]) -> str:
    """The fingerprint of a split as it lies on the disk, every pixel read; "" for none."""
    try:
        shards = [_rows(folder / file) for file in split_files(split, told)]
        return _fingerprint(chain(*shards))
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _rows(path: Path) -> Iterator[tuple[str, int, int, int]]:
    """Digest, height, width and label of every picture in a file."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length != HEADER_BYTES - 8:
            raise ValueError("its header has another length")
        header = json.loads(file.read(length))
        columns = []
        for name in ("offset", "height", "width", "label"):
            told = header[name]
            first, last = told["data_offsets"]
            file.seek(HEADER_BYTES + first)
            kind = next(numpy for numpy, own in DTYPES.items() if own == told["dtype"])
            columns.append(np.frombuffer(file.read(last - first), kind).tolist())
        for start, high, wide, label in zip(*columns, strict=True):
            file.seek(HEADER_BYTES + start)
            yield sha256(file.read(high * wide * 3)).hexdigest(), high, wide, label


def _fingerprint(rows: Iterable[tuple[str, int, int, int]]) -> str:
    whole = sha256()
    for digest, high, wide, label in rows:
        whole.update(f"{digest} {high} {wide} {label}\n".encode())
    return whole.hexdigest()


def _size(facts: Facts) -> int:
    return facts.height * facts.width * 3


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
