"""Preparing, from photographs on disk to an open store."""

import errno
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from PIL import Image

from fastidmm import store
from fastidmm.datasets import Source
from fastidmm.datasets.folder import Folder
from fastidmm.errors import DataError, FastidmmError, UsageError
from fastidmm.preparing import decode, pack
from fastidmm.preparing import prepare as module
from fastidmm.preparing.prepare import prepare
from fastidmm.preparing.summary import Summary

Pixels = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]


def save(path: Path, seed: int, height: int = 6, width: int = 8) -> Pixels:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return pixels


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes: four images for training, one for testing."""
    for seed, file in enumerate(("a/1", "a/2", "b/1", "b/2")):
        save(tmp_path / "photos" / "train" / f"{file}.png", seed, height=6 + seed)
    save(tmp_path / "photos" / "test" / "b" / "3.png", 9)
    return tmp_path / "photos"


def listed(photos: Path) -> Source:
    return Folder().open(from_=photos, seed=0)


def prints(name: str = "mine") -> dict[str, str]:
    splits = store.read_json(store.folder_of(name))["splits"]
    return {split: told["fingerprint"] for split, told in splits.items()}


def stored(home: Path) -> list[str]:
    """Everything below stores/, hidden or not."""
    return sorted(path.name for path in (home / "stores").iterdir())


def test_a_store_holds_the_pixels_in_order(home: Path, photos: Path) -> None:
    summary = prepare(listed(photos), "mine")
    assert store.current() == "mine" and store.prepared() == ["mine"] == stored(home)
    opened = store.open_store(store.folder_of("mine"), "train")
    files = ("a/1.png", "a/2.png", "b/1.png", "b/2.png")
    for row, file in enumerate(files):
        with Image.open(photos / "train" / file) as image:
            assert np.array_equal(opened.image(row).numpy(), np.asarray(image))
    assert opened.label.tolist() == [0, 0, 1, 1] and opened.class_names == ("a", "b")
    test = store.open_store(store.folder_of("mine"), "test")
    assert len(test) == 1 and test.label.tolist() == [1]
    told = store.read_json(store.folder_of("mine"))
    assert told["splits"]["train"]["files"] == [f"train/{file}" for file in files]
    assert told["source"]["path"] == str(photos) and told["max_side"] == 1024
    assert (summary.num_train, summary.num_test, summary.fresh) == (4, 1, True)


def test_a_second_time_decodes_nothing(
    home: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare(listed(photos), "mine")
    save(photos / "train" / "a" / "1.png", 0)
    prepare(listed(photos), "other")
    monkeypatch.setattr(module, "decode_all", no_decoding)
    again = prepare(listed(photos), "other")
    assert not again.fresh and "prepared before" in again.lines()[0]
    assert store.current() == "other" and first.fresh
    with pytest.raises(AssertionError, match="decoded"):
        prepare(listed(photos), "mine")
    assert store.current() == "other"


def no_decoding(*_: object, **__: object) -> NoReturn:
    raise AssertionError("decoded")


def no_decoding_but_of(num: int) -> Callable[..., decode.Pictures]:
    """Decoding, of at most so many."""

    def few(paths: Iterable[Path], **options: Any) -> decode.Pictures:
        listed = list(paths)
        assert len(listed) <= num
        return decode.decode_all(listed, **options)

    return few


def test_the_dataset_prepared_last_is_current_though_nothing_was_done(
    home: Path, photos: Path
) -> None:
    for name in ("one", "two", "one"):
        prepare(listed(photos), name)
    assert store.current() == "one"


def test_fingerprints_follow_the_pixels_and_labels_only(home: Path, photos: Path) -> None:
    prepare(listed(photos), "mine", workers=1)
    first = prints()
    os.utime(photos / "train" / "a" / "1.png", ns=(1, 1))
    assert prepare(listed(photos), "mine", workers=3).fresh and prints() == first
    (photos / "train" / "a" / "2.png").rename(photos / "train" / "b" / "0.png")
    prepare(listed(photos), "mine")
    assert prints()["train"] != first["train"] and prints()["test"] == first["test"]
    relabelled = prints()
    save(photos / "train" / "b" / "0.png", 77, height=7)
    prepare(listed(photos), "mine")
    assert prints()["train"] != relabelled["train"]


def test_other_photographs_do_not_take_a_name(home: Path, photos: Path, tmp_path: Path) -> None:
    prepare(listed(photos), "mine")
    before = prints()
    for seed in range(3):
        save(tmp_path / "other" / f"{seed}.png", seed)
    demo = replace(listed(tmp_path / "other"), description="ELPV solar cells", own=False)
    for file in ("train/a/1", "train/b/1", "test/b/1"):
        save(tmp_path / "alike" / f"{file}.png", 5)
    alike = listed(tmp_path / "alike")
    assert alike.description == listed(photos).description  # which says nothing of whose they are
    for source in (listed(tmp_path / "other"), alike, demo):
        with pytest.raises(
            UsageError, match=r"other photographs .*another --name, or remove .*mine "
        ):
            prepare(source, "mine")
    assert prints() == before
    # A published dataset is known by its title, wherever it lies, as in another environment.
    prepare(demo, "demo")
    (tmp_path / "other").rename(tmp_path / "moved")
    assert not prepare(replace(demo, root=tmp_path / "moved"), "demo").changed


def test_pictures_that_were_added_are_said(home: Path, photos: Path) -> None:
    word = "other training images than before: runs begun on those cannot go on"
    assert word not in prepare(listed(photos), "mine").lines()
    save(photos / "test" / "b" / "4.png", 8)
    assert word not in prepare(listed(photos), "mine").lines()
    save(photos / "train" / "b" / "3.png", 8)
    assert word in prepare(listed(photos), "mine").lines()
    assert word not in prepare(listed(photos), "mine").lines()


def test_another_size_is_another_store_in_the_same_place(home: Path, photos: Path) -> None:
    prepare(listed(photos), "mine")
    before = store.open_store(store.folder_of("mine"), "train")
    prepare(listed(photos), "mine", max_side=4)
    after = store.open_store(store.folder_of("mine"), "train")
    assert (after.max_height, after.max_width) == (4, 4) and stored(home) == ["mine"]
    # Whoever had the old one open keeps it.
    assert (before.max_height, before.image(3).shape) == (9, (9, 8, 3))


def test_a_store_with_a_damaged_file_is_made_again(home: Path, photos: Path) -> None:
    prepare(listed(photos), "mine")
    path = store.folder_of("mine") / "train.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert prepare(listed(photos), "mine").fresh and path.read_bytes() == whole
    (store.folder_of("mine") / "store.json").write_text("{")
    assert prepare(listed(photos), "mine").fresh


def test_nothing_is_dropped_silently(home: Path, photos: Path) -> None:
    (photos / "train" / "a" / "text.jpg").write_text("no photograph")
    (photos / "train" / "a" / "new\nline.jpg").touch()
    (photos / "train" / "a" / "readme.txt").touch()
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(photos / "train" / "b" / "moving.webp", save_all=True, append_images=frames[1:])
    Image.new("L", (4, 4)).save(photos / "train" / "b" / "gray.png")
    (photos / "train" / "c").mkdir()
    (photos / "train" / "c" / "empty.jpg").touch()
    summary = prepare(listed(photos), "mine")
    assert {(left.file, left.reason) for left in summary.unusable} == {
        ("train/a/text.jpg", "not an image"),
        ("train/a/new\nline.jpg", "empty"),
        ("train/a/readme.txt", ".txt is not read"),
        ("train/c/empty.jpg", "empty"),
    }
    assert summary.converted == {"animated": 1, "gray": 1}
    assert summary.animated == ("train/b/moving.webp",)
    lines = summary.lines(limit=3)
    assert lines[0].startswith("mine: 6 training and 1 test image, 3 classes, ")
    assert lines[1].startswith("4 files unusable: train/a/readme.txt (.txt is not read), ")
    assert lines[1].count("), ") == 2 and lines[1].endswith(") and 1 more (see store.json)")
    assert lines[2:5] == [
        "converted: 1 animated, 1 gray",
        "first frame only: train/b/moving.webp",
        "3 classes with fewer than 5 training images: c (0), a (2), b (4)",
    ]
    assert all("\n" not in line for line in summary.lines())
    assert json.loads(json.dumps(summary.as_dict()))["unusable"][0]["file"] == "train/a/readme.txt"
    again = prepare(listed(photos), "mine")
    assert not again.fresh and again.unusable == summary.unusable


def test_files_left_out_since_the_last_time_are_told(home: Path, photos: Path) -> None:
    assert prepare(listed(photos), "mine").unusable == ()
    (photos / "train" / "a" / "notes.txt").touch()
    told = prepare(listed(photos), "mine")
    assert [(left.file, left.reason) for left in told.unusable] == [
        ("train/a/notes.txt", ".txt is not read")
    ]


def test_without_labels_and_without_a_test_split(home: Path, tmp_path: Path) -> None:
    odd = os.fsdecode(b"latin\xe9.png")
    for seed, file in enumerate(("b.png", odd, "a.png")):
        save(tmp_path / "flat" / file, seed)
    summary = prepare(listed(tmp_path / "flat"), "mine")
    opened = store.open_store(store.folder_of("mine"), "train")
    assert opened.label.tolist() == [-1, -1, -1] and not opened.labelled
    assert "3 training images and no test images, no labels" in summary.lines()[0]
    with pytest.raises(DataError, match="has no test split"):
        store.open_store(store.folder_of("mine"), "test")
    files = store.read_json(store.folder_of("mine"))["splits"]["train"]["files"]
    assert files == ["a.png", "b.png", odd]


@pytest.mark.parametrize(
    ("good", "words"),
    [(0, r"has no usable training image.*a/broken.png \(not an image\)"), (1, "at least 2 images")],
)
def test_too_few_images(home: Path, tmp_path: Path, good: int, words: str) -> None:
    for seed in range(good):
        save(tmp_path / "few" / "a" / f"{seed}.png", seed)
    (tmp_path / "few" / "a").mkdir(parents=True, exist_ok=True)
    (tmp_path / "few" / "a" / "broken.png").write_text("no photograph")
    with pytest.raises(DataError, match=words) as caught:
        prepare(listed(tmp_path / "few"), "mine")
    assert caught.value.status == 3 and stored(home) == [] and store.prepared() == []


def refuse(code: int) -> Callable[..., NoReturn]:
    def raising(*_: object) -> NoReturn:
        raise OSError(code, os.strerror(code))

    return raising


@pytest.mark.parametrize(
    ("code", "error", "words"),
    [
        (
            errno.ENOSPC,
            DataError,
            "no space left for .*mine: free some .* or lower --max-side, or set",
        ),
        (errno.EDQUOT, DataError, "set FASTIDMM_HOME to a folder on a larger disk"),
        (errno.EACCES, UsageError, "mine cannot be written .Permission denied.: set FASTIDMM"),
    ],
)
def test_a_disk_that_refuses(
    home: Path,
    photos: Path,
    monkeypatch: pytest.MonkeyPatch,
    code: int,
    error: type[FastidmmError],
    words: str,
) -> None:
    monkeypatch.setattr(pack, "_finish", refuse(code))
    with pytest.raises(error, match=words):
        prepare(listed(photos), "mine")
    assert stored(home) == [".mine.journal", ".mine.part"] and store.prepared() == []
    monkeypatch.undo()
    monkeypatch.setenv("FASTIDMM_HOME", str(home))
    monkeypatch.setattr(module, "decode_all", no_decoding_but_of(1))
    assert prepare(listed(photos), "mine").num_train == 4 and stored(home) == ["mine"]


def test_a_home_that_is_a_file(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FASTIDMM_HOME", str(tmp_path / "file"))
    with pytest.raises(UsageError, match="cannot be written"):
        prepare(listed(photos), "mine")


@pytest.mark.parametrize(
    ("name", "max_side", "words"), [("a/b", 1024, "cannot name a dataset"), ("a", -1, "max_side")]
)
def test_wrong_uses(home: Path, photos: Path, name: str, max_side: int, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        prepare(listed(photos), name, max_side=max_side)
    assert not home.exists()


def test_sizes_are_told_in_readable_units(tmp_path: Path) -> None:
    def line(num_bytes: int) -> str:
        classes = ("a", "b", "c", "d")
        told = ("demo", tmp_path, True, 1668, 555, num_bytes, classes, 0, 1024)
        return Summary(*told, (), {}, (), (), {}).heading()

    assert line(420_400_000) == "demo: 1,668 training and 555 test images, 4 classes, 420 MB"
    assert line(1_260_000_000).endswith("1.3 GB") and line(12_300).endswith("12 kB")
