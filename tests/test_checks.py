"""What is found in a dataset, each against pictures made for it."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance
from synthetic import photograph

from fastidmm import store
from fastidmm.datasets import Item
from fastidmm.datasets.folder import Folder
from fastidmm.preparing import checks
from fastidmm.preparing.checks import check
from fastidmm.preparing.decode import Facts
from fastidmm.preparing.pack import Packed
from fastidmm.preparing.prepare import prepare
from fastidmm.preparing.summary import Summary


def packed(*rows: tuple[str, int, str, int | None]) -> Packed:
    """A split of these: file, label, digest, look."""
    split = Packed()
    for file, label, digest, look in rows:
        split.add(Item(file, label), Facts(40, 40, digest, look, ()))
    return split


def photo(path: Path, seed: int) -> Image.Image:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(photograph(100, 120, seed))
    image.save(path)
    return image


@pytest.fixture
def told(home: Path, tmp_path: Path) -> Summary:
    """Photographs with everything that can be found."""
    train, test = tmp_path / "photos" / "train", tmp_path / "photos" / "test"
    for seed in range(6):
        photo(train / "a" / f"{seed}.png", seed)
    photo(train / "b" / "0.png", 6)
    photo(train / "b" / "copy.png", 1)
    image = photo(test / "a" / "new.png", 7)
    ImageEnhance.Brightness(Image.open(train / "a" / "2.png")).enhance(0.8).save(
        train / "b" / "dark.jpg", quality=80
    )
    Image.open(train / "a" / "3.png").resize((60, 50)).save(test / "a" / "small.webp")
    (test / "a" / "again.png").write_bytes((train / "a" / "4.png").read_bytes())
    image.resize((9, 40)).save(test / "a" / "tiny.png")
    (train / "b" / "text.jpg").write_text("none")
    return prepare(Folder().open(from_=tmp_path / "photos", seed=0), "mine")


def test_everything_is_found_and_told(told: Summary) -> None:
    found = json.loads((store.folder_of("mine") / "prepare.json").read_text())
    assert found == told.checks
    cases = {name: kept["cases"] for name, kept in found.items() if name != "warnings"}
    other = {"label": "b", "like_label": "a"}
    same = {"file": "train/b/copy.png", "like": "train/a/1.png", **other}
    bits = cases["alike_in_train"][0]["bits"]
    alike = {"file": "train/b/dark.jpg", "like": "train/a/2.png", "bits": bits, **other}
    assert cases["same_in_train"] == [same] and cases["alike_in_train"] == [alike]
    assert cases["same_in_test"] == [{"file": "test/a/again.png", "like": "train/a/4.png"}]
    (small,) = cases["alike_in_test"]
    assert (small["file"], small["like"]) == ("test/a/small.webp", "train/a/3.png")
    assert cases["labels_differ"] == [same, alike] and found["labels_differ"]["count"] == 2
    assert cases["small_classes"] == [{"class": "b", "num_train": 3}]
    assert cases["tiny"] == [{"file": "test/a/tiny.png", "height": 40, "width": 9}]
    assert cases["unusable"] == [{"file": "train/b/text.jpg", "reason": "not an image"}]
    lines = told.lines()
    assert lines[2:-1] == [
        "1 training image repeats another: train/b/copy.png (b) = train/a/1.png (a)",
        "1 test image is a training image too: test/a/again.png = train/a/4.png",
        "1 training image looks like another: train/b/dark.jpg (b) ~ train/a/2.png (a)",
        "1 test image looks like a training image: test/a/small.webp ~ train/a/3.png",
        "2 images have another label than the one they repeat or look like: "
        "train/b/copy.png (b) = train/a/1.png (a), train/b/dark.jpg (b) ~ train/a/2.png (a)",
        "1 class with fewer than 5 training images: b (3)",
        "1 image with a side of less than 32 px: test/a/tiny.png (40 x 9)",
    ]


def test_what_was_prepared_before_tells_the_same(told: Summary, tmp_path: Path) -> None:
    again = prepare(Folder().open(from_=tmp_path / "photos", seed=0), "mine")
    assert not again.fresh and again.lines()[1:] == told.lines()[1:]
    path = store.folder_of("mine") / "prepare.json"
    for damaged in (path.read_text().replace('"tiny"', '"tinz"'), "[]"):
        path.write_text(damaged)
        again = prepare(Folder().open(from_=tmp_path / "photos", seed=0), "mine")
        assert again.fresh and again.lines() == told.lines()
    path.unlink()
    assert prepare(Folder().open(from_=tmp_path / "photos", seed=0), "mine").fresh


def test_a_repeated_picture_is_not_told_as_alike_too() -> None:
    train = packed(("a", 0, "x", 5), ("b", 0, "x", 5), ("c", 0, "y", 5), ("d", 0, "z", None))
    test = packed(("e", 0, "z", None), ("f", 0, "w", None), ("g", 0, "v", 7), ("h", 0, "v", 7))
    found = check(train, test, ["k"], [])
    counts = {name: kept["count"] for name, kept in found.items() if name != "warnings"}
    assert counts == {
        "unusable": 0,
        "same_in_train": 1,
        "same_in_test": 1,
        "alike_in_train": 1,
        "alike_in_test": 2,
        "labels_differ": 0,
        "small_classes": 1,
        "tiny": 0,
    }
    assert found["alike_in_test"]["cases"][1] == {"file": "h", "like": "a", "bits": 1}


def test_a_copy_without_a_label_hides_no_label_that_differs() -> None:
    train = packed(("0.png", -1, "x", 1), ("1.png", 0, "x", 1), ("2.png", 1, "x", 1))
    found = check(train, packed(("3.png", 1, "x", 1)), ("a", "b"), ())
    other = {"like": "1.png", "label": "b", "like_label": "a"}
    bare = {"file": "0.png", "like": "1.png"}
    assert found["same_in_train"] == {"count": 2, "cases": [bare, {"file": "2.png", **other}]}
    assert found["same_in_test"] == {"count": 1, "cases": [{"file": "3.png", **other}]}
    assert [case["file"] for case in found["labels_differ"]["cases"]] == ["2.png", "3.png"]
    assert not found["alike_in_train"]["count"] and not found["alike_in_test"]["count"]


def test_five_images_are_enough_and_32_px_not_tiny() -> None:
    """Four of one class and five of the other; a side of 31 px is."""
    train = packed(*((str(n), n % 2, str(n), None) for n in range(5)))
    for high, wide, label in ((31, 40, 0), (40, 31, 0), (32, 40, 1), (40, 32, 1)):
        file = f"{high} x {wide}"
        train.add(Item(file, label), Facts(high, wide, file, None, ()))
    found = check(train, Packed(), ["five", "four"], [])
    assert found["small_classes"]["cases"] == [{"class": "four", "num_train": 4}]
    assert [case["file"] for case in found["tiny"]["cases"]] == ["31 x 40", "40 x 31"]


def test_lists_are_bounded_and_counts_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "LISTED", 2)
    train = packed(*((f"{n}\n", n % 2, "x", None) for n in range(50)))
    found = check(train, Packed(), ["a", "b"], [])
    assert found["same_in_train"]["count"] == 49 and found["labels_differ"]["count"] == 25
    assert [case["file"] for case in found["same_in_train"]["cases"]] == ["1\n", "2\n"]


def test_without_labels_no_label_differs() -> None:
    found = check(packed(("a", -1, "x", 0), ("b", -1, "x", 0)), Packed(), [], [])
    assert found["labels_differ"]["count"] == found["small_classes"]["count"] == 0
    assert found["same_in_train"]["cases"] == [{"file": "b", "like": "a"}]


@pytest.mark.parametrize(("num", "words"), [(6552, "Kaggle"), (6149, "exchanged"), (2040, None)])
def test_wrong_splits_of_flowers_are_recognised(num: int, words: str | None) -> None:
    train = packed(*((str(n), n % 102, str(n), None) for n in range(num)))
    (found,) = check(train, Packed(), [str(n) for n in range(102)], [])["warnings"] or [None]
    assert found is None if words is None else words in found


def test_noise_is_not_alike(home: Path, tmp_path: Path) -> None:
    for seed in range(8):
        pixels = np.random.default_rng(seed).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        (tmp_path / "noise").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "noise" / f"{seed}.png")
    summary = prepare(Folder().open(from_=tmp_path / "noise", seed=0), "noise")
    assert len(summary.lines()) == 2
