"""Listing photographs: layouts, order, splits and what users get wrong."""

import os
from collections import Counter
from pathlib import Path

import pytest

from fastidmm.datasets import Item, demo, stratified
from fastidmm.datasets.demo import Demo
from fastidmm.datasets.folder import Folder
from fastidmm.errors import DataError, FastidmmError, UsageError


def touch(root: Path, *files: str) -> Path:
    for file in files:
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def test_class_folders_are_split_one_in_five(tmp_path: Path) -> None:
    files = [f"{name}/{number}.jpg" for name in ("b", "a b", "a") for number in range(10)]
    source = Folder().open(from_=touch(tmp_path, *files), seed=0)
    assert source.class_names == ("a", "a b", "b") and source.split_seed == 0
    assert Counter(item.label for item in source.train) == {0: 8, 1: 8, 2: 8}
    assert Counter(item.label for item in source.test) == {0: 2, 1: 2, 2: 2}
    together = sorted([*source.train, *source.test], key=lambda item: (item.label, item.file))
    assert [item.file for item in together] == [
        f"{name}/{number}.jpg" for name in ("a", "a b", "b") for number in range(10)
    ]
    assert list(source.train) == [item for item in together if item in source.train]


def test_a_split_depends_on_the_seed_and_the_names_only() -> None:
    items = [Item(f"x/{number}.jpg", 0) for number in range(100)]
    held = stratified(items, seed=3, one_in=4)[1]
    assert len(held) == 25
    assert set(stratified(items[::-1], seed=3, one_in=4)[1]) == set(held)
    assert set(stratified([*items, Item("y", 1)], seed=3, one_in=4)[1]) == set(held)
    assert set(stratified(items, seed=4, one_in=4)[1]) != set(held)
    # Fixed for ever: a store prepared again must be the same store.
    assert [item.file for item in held[:4]] == ["x/6.jpg", "x/7.jpg", "x/15.jpg", "x/16.jpg"]


def test_small_classes_keep_a_training_image(tmp_path: Path) -> None:
    root = touch(tmp_path, "one/a.jpg", "two/a.jpg", "two/b.jpg")
    source = Folder().open(from_=root, seed=0)
    assert Counter(item.label for item in source.train) == {0: 1, 1: 1}
    assert Counter(item.label for item in source.test) == {1: 1}
    assert source.notes == ("one image only, so none for testing: one",)


@pytest.mark.parametrize(
    ("train", "name"),
    [
        ("train", "test"), ("train", "val"), ("train", "valid"), ("train", "validation"),
        ("training", "testing"), ("Train", "Test"), ("TRAINING", "Val"),
    ],
)  # fmt: skip
def test_a_given_split_is_taken(tmp_path: Path, train: str, name: str) -> None:
    root = touch(tmp_path, f"{train}/a/1.jpg", f"{train}/b/deep/2.PNG", f"{name}/b/3.webp")
    source = Folder().open(from_=root, seed=0)
    assert source.train == (Item(f"{train}/a/1.jpg", 0), Item(f"{train}/b/deep/2.PNG", 1))
    assert source.test == (Item(f"{name}/b/3.webp", 1),)
    assert source.split_seed is None and source.class_names == ("a", "b")
    assert source.description == f"photographs in {train}/ and {name}/"


def test_test_goes_before_val_and_the_rest_is_listed(tmp_path: Path) -> None:
    root = touch(tmp_path, "train/a/1.jpg", "test/a/2.jpg", "val/a/3.jpg", "train/4.jpg")
    (root / "train" / "empty").mkdir()
    source = Folder().open(from_=root, seed=0)
    assert [item.file for item in source.test] == ["test/a/2.jpg"]
    assert [(left.file, left.reason) for left in source.unusable] == [
        ("train/4.jpg", "outside the class folders"),
        ("val/a/3.jpg", "its folder val is not used beside test"),
    ]
    assert source.notes == ("no images in: empty",)


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    root = touch(tmp_path, "train/1.jpg", "train/red/2.jpg", "bus/1.jpg", "bus/green/2.jpg")
    assert Folder().open(from_=root, seed=0).class_names == ("bus", "train")


def test_a_split_by_another_name_is_not_taken_for_classes(tmp_path: Path) -> None:
    root = touch(tmp_path, "train/a/1.jpg", "train/b/2.jpg", "holdout/a/3.jpg", "more/4.jpg")
    with pytest.raises(UsageError, match=r"train/ and holdout/ with the same .* testing test/, or"):
        Folder().open(from_=root, seed=0)
    (root / "holdout").rename(root / "test")
    assert len(Folder().open(from_=root, seed=0).test) == 1


@pytest.mark.parametrize("below", ["", "train/"])
def test_flat_photographs_have_no_labels(tmp_path: Path, below: str) -> None:
    root = touch(tmp_path, f"{below}b.jpg", f"{below}a.jpg", f"{below}notes.txt")
    source = Folder().open(from_=root, seed=0)
    assert source.train == (Item(f"{below}a.jpg", -1), Item(f"{below}b.jpg", -1))
    assert source.class_names == () and source.test == ()
    assert [(left.file, left.reason) for left in source.unusable] == [
        (f"{below}notes.txt", ".txt is not read")
    ]


def test_one_class_is_all_for_training(tmp_path: Path) -> None:
    source = Folder().open(from_=touch(tmp_path, "a/1.jpg", "a/2.jpg"), seed=0)
    assert len(source.train) == 2 and not source.test and "one class only (a)" in source.notes[0]


def test_hidden_files_loops_and_odd_names(tmp_path: Path) -> None:
    odd = ["a/new\nline.jpg", "a/ü 花.jpg", os.fsdecode(b"b/latin\xe9.jpg"), "b/1.jpg"]
    root = touch(tmp_path, *odd, ".hidden/x.jpg", "a/.DS_Store", "a/._1.jpg")
    (root / "a" / "loop").symlink_to(root)
    source = Folder().open(from_=root, seed=0)
    assert sorted(item.file for item in (*source.train, *source.test)) == sorted(odd)
    assert [(left.file, left.reason) for left in source.unusable] == [
        ("a/loop", "a link to a folder")
    ]


def test_links_out_of_the_folder_are_named_and_left_out(tmp_path: Path) -> None:
    touch(tmp_path, "out/secret.jpg", "in2/near.jpg")
    root = touch(tmp_path / "in", "a/1.jpg", "b/2.jpg")
    links = {
        "a/far.jpg": "../../out/secret.jpg",
        "a/absolute.jpg": str(tmp_path / "out" / "secret.jpg"),
        "a/beside.jpg": "../../in2/near.jpg",
        "a/twice.jpg": "far.jpg",
        "a/gone.jpg": "../../nowhere.jpg",
        "a/folder": "../../out",
        "b/inside.jpg": "../a/1.jpg",
        "b/empty.jpg": "nothing.jpg",
        "b/loop.jpg": "loop.jpg",
        "b/up": "..",
    }
    for name, target in links.items():
        (root / name).symlink_to(target)
    source = Folder().open(from_=root, seed=0)
    out = ("absolute.jpg", "beside.jpg", "far.jpg", "folder", "gone.jpg", "twice.jpg")
    assert [(left.file, left.reason) for left in source.unusable] == [
        *((f"a/{name}", "a link out of the folder") for name in out),
        ("b/up", "a link to a folder"),
    ]
    taken = sorted(item.file for item in (*source.train, *source.test))
    assert taken == ["a/1.jpg", "b/2.jpg", "b/empty.jpg", "b/inside.jpg", "b/loop.jpg"]
    (tmp_path / "in3").symlink_to(root)
    assert Folder().open(from_=tmp_path / "in3", seed=0) == source


@pytest.mark.parametrize(
    ("files", "given", "error", "words"),
    [
        ([], None, UsageError, "--from PHOTOS"),
        ([], "gone", UsageError, "there is no folder"),
        (["a.jpg"], "a.jpg", UsageError, "is a file: --from takes a folder or a .csv"),
        ([], ".", DataError, "holds no images"),
        (["a.txt"], ".", DataError, r"holds no images but a.txt \(.txt is not read\): give"),
        (
            ["p/1.heic", "p/2.HEIC", "p/3.heic", "p/4.heic"],
            ".",
            DataError,
            r"images but p/1.heic \(.heic is not read\), p/2.HEIC .*, p/3.heic .*, \.\.\.: .* JPEG",
        ),
        (["train/a/1.jpg", "test/new/2.jpg"], ".", DataError, "train has not: new;"),
    ],
)
def test_wrong_folders(
    tmp_path: Path, files: list[str], given: str | None, error: type[FastidmmError], words: str
) -> None:
    touch(tmp_path, *files)
    with pytest.raises(error, match=words):
        Folder().open(from_=tmp_path / given if given else None, seed=0)


def test_the_demo_has_the_published_numbers() -> None:
    pytest.importorskip("elpv_dataset")
    source = Demo().open(from_=None, seed=0)
    assert (len(source.train), len(source.test)) == (1668, 555)
    assert Counter(item.label for item in source.test) == {0: 78, 1: 147, 2: 100, 3: 230}
    table = (source.root / "labels.csv").read_text().splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in table}
    for item in (*source.train, *source.test):
        probability, kind = rows[item.file]
        state = {"1.0": "defective", "0.0": "functional"}[probability]
        assert source.class_names[item.label] == f"{kind}-{state}"


def test_without_its_package_the_demo_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'fastidmm\[demo\]'"):
        Demo().open(from_=None, seed=0)
    with pytest.raises(UsageError, match="leave --from out"):
        Demo().open(from_=tmp_path, seed=0)
