"""A written split, read back by safetensors and by the store."""

import gc
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from fastidmm import store
from fastidmm.datasets import Item
from fastidmm.errors import DataError, UsageError
from fastidmm.mapped import Part, side_by_side
from fastidmm.preparing.decode import Picture
from fastidmm.preparing.pack import Packed, Packer
from fastidmm.store import Store


def picture(height: int, width: int, first: int = 0, digest: str = "d") -> Picture:
    pixels = (np.arange(height * width * 3) + first).astype(np.uint8).tobytes()
    return Picture(height, width, digest, None, (), pixels)


def pack(folder: Path, rows: list[tuple[Item, Picture]], shard_bytes: int = 0) -> Packed:
    with Packer(folder, "train", shard_bytes) as packer:
        for item, decoded in rows:
            packer.add(item, decoded)
        return packer.finish()


def test_a_pack_is_a_safetensors_file(tmp_path: Path) -> None:
    rows = [(Item("a", 2), picture(3, 5)), (Item("b", -1), picture(1, 1, 7))]
    packed = pack(tmp_path, rows)
    path = tmp_path / "train.safetensors"
    tensors = load_file(path)
    assert tensors["pixels"].dtype == torch.uint8 and tensors["pixels"].numel() == 256
    assert tensors["pixels"][:48].tolist() == [*range(45), 7, 8, 9]
    assert not tensors["pixels"][48:].any()
    columns = {name: tensors[name].tolist() for name in ("offset", "height", "width", "label")}
    assert columns == {"offset": [0, 45], "height": [3, 1], "width": [5, 1], "label": [2, -1]}
    assert tensors["offset"].dtype == tensors["label"].dtype == torch.int64
    assert tensors["height"].dtype == tensors["width"].dtype == torch.int32
    assert packed.num_bytes == path.stat().st_size
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def opened(folder: Path, rows: list[tuple[Item, Picture]], shard_bytes: int) -> Packed:
    """A store folder of one split."""
    packed = pack(folder, rows, shard_bytes)
    told = {"fingerprint": packed.fingerprint(), "num_bytes": packed.num_bytes}
    if len(packed.shards) > 1:
        told["shards"] = [asdict(shard) for shard in packed.shards]
    described = {"reader_version": 1, "class_names": ["p", "q"], "splits": {"train": told}}
    (folder / "store.json").write_text(json.dumps(described))
    return packed


ROWS = [(Item(str(n), n % 2), picture(1 + n % 3, 2 + n, n, f"d{n}")) for n in range(9)]


@pytest.mark.parametrize(
    ("shard_bytes", "counts"),
    [(0, [9]), (10_000, [9]), (100, [4, 2, 2, 1]), (1, [1] * 9), (342, [9]), (341, [8, 1])],
)
def test_shards_hold_the_same_rows(tmp_path: Path, shard_bytes: int, counts: list[int]) -> None:
    packed = opened(tmp_path, ROWS, shard_bytes)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert [shard.num_images for shard in packed.shards] == counts
    if len(counts) == 1:
        assert files == ["train.safetensors"]
    else:
        assert files == [f"train-{place:05d}.safetensors" for place in range(len(counts))]
    shards = store.open_shards(tmp_path, "train")
    assert [len(shard) for shard in shards] == counts
    whole = store.open_store(tmp_path, "train")
    parts = [shard.image(row) for shard in shards for row in range(len(shard))]
    for row, (item, decoded) in enumerate(ROWS):
        for image in (whole.image(row), parts[row]):
            assert image.shape == (decoded.height, decoded.width, 3)
            assert image.numpy().tobytes() == decoded.pixels
        assert whole.label[row] == item.label
    assert whole.fingerprint == pack(tmp_path, ROWS).fingerprint()
    assert (whole.max_height, whole.max_width, len(whole)) == (3, 10, 9)


def test_shards_are_mapped_and_not_copied(tmp_path: Path) -> None:
    opened(tmp_path, ROWS, 100)

    def mapped() -> int:
        lines = Path("/proc/self/maps").read_text().splitlines()
        return sum("train-0000" in line for line in lines)

    whole = store.open_store(tmp_path, "train")
    assert mapped() == 4
    assert not (whole.offset % 3).any()  # pixels can be counted across the files
    last = whole.gathered(torch.tensor([8, 0]))
    assert last.image(0).numpy().tobytes() == ROWS[8][1].pixels
    assert last.image(1).numpy().tobytes() == ROWS[0][1].pixels
    assert last.row is not None and last.row.tolist() == [8, 0]
    part = whole.pixels[5:]
    del whole
    gc.collect()
    assert mapped() == 4 and len(part) > 4 * 4096 - 5
    del part
    gc.collect()
    assert mapped() == 0


@pytest.mark.parametrize("lead", [0, 1, 5, 4095, 4096, 8191])
def test_parts_of_files_side_by_side(tmp_path: Path, lead: int) -> None:
    sizes = (1, 4096, 4097, 3)
    parts, contents = [], []
    for number, size in enumerate(sizes):
        noise = np.random.default_rng(number).integers(0, 256, lead + size + 7, dtype=np.uint8)
        path = tmp_path / str(number)
        path.write_bytes(noise.tobytes())
        parts.append(Part(path, lead, size))
        contents.append(torch.from_numpy(noise[lead : lead + size]))
    whole, starts = side_by_side(parts)
    for content, start, size in zip(contents, starts, sizes, strict=True):
        assert start % 3 == 0
        assert torch.equal(whole[start : start + size], content)
    assert int(whole.sum()) >= sum(int(content.sum()) for content in contents)  # all is readable


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_pixels_are_mapped_and_not_read(tmp_path: Path) -> None:
    path = tmp_path / "train.safetensors"
    pack(tmp_path, [(Item("a", 0), picture(3, 5))])
    tensors = load_file(path)
    assert str(path) in Path("/proc/self/maps").read_text()
    del tensors
    assert str(path) not in Path("/proc/self/maps").read_text()


def test_a_fingerprint_tells_pixels_sizes_labels_and_order_apart(tmp_path: Path) -> None:
    a, b = (Item("a", 0), picture(3, 5, digest="d")), (Item("b", 1), picture(3, 5, digest="e"))
    variants = [
        [a, b],
        [b, a],
        [a],
        [(Item("a", 1), a[1]), b],
        [(a[0], picture(5, 3, digest="d")), b],
        [(a[0], picture(3, 5, digest="f")), b],
    ]
    prints = [pack(tmp_path, rows).fingerprint() for rows in variants]
    assert len(set(prints)) == len(variants)
    assert pack(tmp_path, [(Item("renamed", 0), a[1]), b]).fingerprint() == prints[0]


def test_selecting_rows_shares_the_pixels(tmp_path: Path) -> None:
    pack(tmp_path, [(Item("a", 0), picture(3, 5)), (Item("b", 1), picture(2, 2, 100))])
    tensors: dict[str, Any] = load_file(tmp_path / "train.safetensors")
    whole = Store(**tensors, class_names=("p", "q"), fingerprint="")
    assert len(whole) == 2 and whole.labelled and (whole.max_height, whole.max_width) == (3, 5)
    part = whole.select(torch.tensor([1]))
    assert part.image(0).flatten().tolist() == list(range(100, 112))
    assert part.pixels.data_ptr() == whole.pixels.data_ptr() and part.max_width == 2


@pytest.mark.parametrize("name", ["", ".x", "-x", "a/b", "a b", "x" * 65, "ü", "a\n", ".."])
def test_names_that_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match="cannot name a dataset"):
        store.check_name(name, "dataset")


@pytest.mark.parametrize("name", ["a", "0", "My-set_1.0", "x" * 64])
def test_names_that_are_taken(name: str) -> None:
    assert store.check_name(name, "dataset") == name


def test_nothing_prepared(home: Path) -> None:
    assert store.prepared() == []
    with pytest.raises(UsageError, match="fastidmm prepare --dataset demo"):
        store.current()
    with pytest.raises(UsageError, match="Nothing is prepared yet"):
        store.folder_of("flowers")
    for name in ("one", "two"):
        (home / "stores" / name).mkdir(parents=True)
        (home / "stores" / name / "store.json").touch()
    (home / "current").write_text("mine")
    with pytest.raises(UsageError, match=r"is gone: name one by --dataset\. Known: one, two\.$"):
        store.current()


@pytest.mark.parametrize("text", ["", "{", "{}", '{"reader_version": 999}'])
def test_a_damaged_description(tmp_path: Path, text: str) -> None:
    (tmp_path / "store.json").write_text(text)
    with pytest.raises(DataError, match="prepare the dataset again"):
        store.open_store(tmp_path, "train")
