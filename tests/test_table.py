"""Listing photographs from a CSV file: what is taken, and every way to get it wrong."""

from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from fastidmm import store
from fastidmm.datasets import Item, Source, stratified
from fastidmm.datasets.folder import Folder
from fastidmm.errors import DataError, UsageError
from fastidmm.preparing import table
from fastidmm.preparing.prepare import prepare


def listed(folder: Path, text: str | bytes, *files: str, seed: int = 0) -> Source:
    """What a CSV file of this text gives where these files are."""
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).touch()
    path = folder / "photos.csv"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return Folder().open(from_=path, seed=seed)


def test_a_given_split_is_taken_in_its_order(tmp_path: Path) -> None:
    text = "path,label,split\nb/2.jpg,dog,train\na/1.jpg,cat,TRAIN\na/3.txt,dog,test\n"
    source = listed(tmp_path, text, "a/1.jpg", "b/2.jpg", "a/3.txt", "not listed.jpg")
    assert source == Source(
        own=True,
        description="photographs listed in photos.csv",
        root=tmp_path,
        class_names=("cat", "dog"),
        train=(Item("b/2.jpg", 1), Item("a/1.jpg", 0)),
        test=(Item("a/3.txt", 1),),
    )


@pytest.mark.parametrize("seed", [0, 1])
def test_without_a_split_one_in_five_is_held_out_by_the_seed(tmp_path: Path, seed: int) -> None:
    files = [f"{number}.jpg" for number in range(30)]
    lines = [f"{file},{'10' if number % 3 else '9'}" for number, file in enumerate(files)]
    source = listed(tmp_path, "\n".join(["path,label", *lines]), *files, seed=seed)
    items = [Item(file, 0 if number % 3 else 1) for number, file in enumerate(files)]
    assert source.class_names == ("10", "9") and source.split_seed == seed
    assert (source.train, source.test) == stratified(items, seed=seed, one_in=5)
    assert source.test != stratified(items, seed=1 - seed, one_in=5)[1]
    assert Counter(item.label for item in source.test) == {0: 4, 1: 2}


@pytest.mark.parametrize(
    "text",
    [
        "path,label\na.jpg,x\nb c.jpg,y\n",
        b"\xef\xbb\xbfpath,label\r\na.jpg,x\r\n\r\n  ,\r\nb c.jpg,y",
        'label,path\n"x","a.jpg"\n"y","b c.jpg"\n',
        "\n\npath, label\na.jpg, x \n./b c.jpg,\ty\n\n",
        "path,label\ra.jpg,x\rb c.jpg,y\r",
    ],
    ids=["plain", "windows", "quoted", "blanks", "old mac"],
)
def test_ways_to_write_the_same(tmp_path: Path, text: str | bytes) -> None:
    source = listed(tmp_path, text, "a.jpg", "b c.jpg")
    assert source.train == (Item("a.jpg", 0), Item("b c.jpg", 1))
    assert source.class_names == ("x", "y") and not source.unusable


def test_quotes_keep_commas_and_quotes(tmp_path: Path) -> None:
    text = 'path,label\n"a,b.jpg","x ""1"", ü"\nc.jpg,y\n'
    source = listed(tmp_path, text, "a,b.jpg", "c.jpg")
    assert source.train[0] == Item("a,b.jpg", 0) and source.class_names == ('x "1", ü', "y")


@pytest.mark.parametrize("split", ["val", "valid", "test"])
def test_val_serves_as_test(tmp_path: Path, split: str) -> None:
    source = listed(tmp_path, f"path,label,split\na,x,train\nb,x,{split}\n", "a", "b")
    assert source.test == (Item("b", 0),)


def test_test_goes_before_val(tmp_path: Path) -> None:
    text = "path,label,split\na,x,train\nb,x,val\nc,x,test\n"
    source = listed(tmp_path, text, "a", "b", "c")
    assert source.test == (Item("c", 0),)
    assert [(left.file, left.reason) for left in source.unusable] == [
        ("b", "its split val is not used beside test, line 3")
    ]


def test_no_labels_at_all(tmp_path: Path) -> None:
    source = listed(tmp_path, "path,label\nb,\na,\n", "a", "b")
    assert source.train == (Item("b", -1), Item("a", -1)) and source.class_names == ()
    assert source.split_seed is None and not source.test


@pytest.mark.parametrize("seed", [0, 1])
def test_images_without_labels_are_never_held_out(tmp_path: Path, seed: int) -> None:
    files = [f"{number}.jpg" for number in range(30)]
    lines = [
        f"{file},{'' if number % 3 else 'x' * (1 + number % 2)}"
        for number, file in enumerate(files)
    ]
    source = listed(tmp_path, "\n".join(["path,label", *lines]), *files, seed=seed)
    assert source.class_names == ("x", "xx")
    assert Counter(item.label for item in source.test) == {0: 1, 1: 1}
    assert Counter(item.label for item in source.train) == {-1: 20, 0: 4, 1: 4}
    known = [Item(f"{number}.jpg", number % 2) for number in range(0, 30, 3)]
    assert source.test == stratified(known, seed=seed, one_in=5)[1]


def test_with_a_split_training_images_may_have_no_label(tmp_path: Path) -> None:
    text = "path,label,split\na,x,train\nb,,train\nc,x,test\nd,y,train\n"
    source = listed(tmp_path, text, *"abcd")
    assert source.train == (Item("a", 0), Item("b", -1), Item("d", 1))
    assert source.test == (Item("c", 0),) and source.class_names == ("x", "y")


def test_missing_files_and_links_out_are_named_with_their_line(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "secret.jpg").touch()
    inside = tmp_path / "in"
    inside.mkdir()
    (inside / "far.jpg").symlink_to("../out/secret.jpg")
    (inside / "folder").symlink_to("../out")
    (inside / "near.jpg").symlink_to("a.jpg")
    names = ("a.jpg", "near.jpg", "far.jpg", "folder/secret.jpg", "gone.jpg", "b\\c.jpg")
    text = "path,label,split\n" + "".join(f"{name},x,train\n" for name in names)
    source = listed(inside, text, "a.jpg")
    assert [item.file for item in source.train] == ["a.jpg", "near.jpg"]
    assert [(left.file, left.reason) for left in source.unusable] == [
        ("b\\c.jpg", "No such file or directory; between folders goes '/', line 7"),
        ("far.jpg", "a link out of the folder, line 4"),
        ("folder/secret.jpg", "a link out of the folder, line 5"),
        ("gone.jpg", "No such file or directory, line 6"),
    ]


HEAD = "path,label\n"
SPLIT = "path,label,split\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty: begin with a line"),
        ("\n \n", "is empty: begin with a line"),
        (HEAD, "lists no photographs: write a line"),
        ("a,x\n", "line 1: the columns are 'a', 'x'; name them `path,label`"),
        ("path;label\na;x\n", "line 1: the columns are 'path;label'; name .* with commas"),
        ("path,label,spilt\n", "line 1: the columns are .* no others"),
        ("path,path,label\n", "line 1: the columns are"),
        (HEAD + "a,x\nb\n", "line 3: 1 values for 2 columns; write one for each"),
        (HEAD + "a,b,x\n", "line 2: 3 values for 2 columns"),
        (HEAD + 'a,"x\n', "line 2: not readable as CSV .*; put"),
        (HEAD + 'a,"x"y\n', "line 2: not readable as CSV"),
        (HEAD + f"a,{'x' * 200_000}\n", "line 2: not readable as CSV .field larger"),
        (HEAD.encode() + b"a,x\nb,\xff\n", "line 3: not UTF-8; save the file as"),
        ((HEAD + "a,x\n").encode("utf-16"), "line 1: not UTF-8; save the file as CSV UTF-8"),
        (HEAD + 'a,"x\ny"\n', "line 3: the label 'x.ny' has unprintable"),
        (HEAD + "a,\x1b[31m\n", "line 2: the label .* has unprintable"),
        (HEAD + "/etc/passwd,x\n", "line 2: '/etc/passwd' is absolute; give it relative"),
        (HEAD + "C:\\photos\\a.jpg,x\n", "line 2: .* is absolute"),
        (HEAD + "a,x\n../a,x\n", "line 3: '../a' leads out of a folder; put the file below"),
        (HEAD + "b/../a,x\n", "line 2: 'b/../a' leads out"),
        (HEAD + ".,x\n", "line 2: '.' is no path"),
        (HEAD + ",x\n", "line 2: '' is no path; give each line a file"),
        (HEAD + "a\0b,x\n", "line 2"),
        (HEAD + "a,x\nb,x\n./a,y\n", "line 4: 'a' stands in line 2 already; remove one"),
        (SPLIT + "a,x,train\nb,x,\n", "line 3: the split is ''; write train or test"),
        (SPLIT + "a,x,train\nb,x,dev\n", "line 3: the split is 'dev'; write"),
        (SPLIT + "a,x,train\nb,y,test\n", "line 3: no image to train on has the label 'y'"),
        (SPLIT + "a,,train\nb,y,test\n", "line 3: no image to train on has the label 'y'"),
        (SPLIT + "a,,train\nb,,test\n", "line 3: a test image without a label; label it, or"),
        (SPLIT + "a,x,train\nb,,val\n", "line 3: a test image without a label; label it, or"),
        (SPLIT + "a,x,test\n", "has no line of the split train: give some"),
        (HEAD + "gone,x\n", "lists no file that is there, the first 'gone' .*line 2.*relative to"),
    ],
)
def test_every_mistake_is_told_with_its_line(tmp_path: Path, text: str | bytes, words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        listed(tmp_path, text, "a", "b")
    assert str(tmp_path / "photos.csv") in str(caught.value)


def test_a_file_too_large_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "MAX_BYTES", 10)
    with pytest.raises(DataError, match="at most 0 are read: put the images into a folder"):
        listed(tmp_path, HEAD + "a,x\n", "a")


def test_what_is_no_csv_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "photos.tsv").touch()
    with pytest.raises(UsageError, match=r"takes a folder or a \.csv"):
        Folder().open(from_=tmp_path / "photos.tsv", seed=0)


def test_it_is_prepared_like_any_other(home: Path, tmp_path: Path) -> None:
    for name, colour in (("a.png", "red"), ("b.png", "blue"), ("c.png", "lime")):
        Image.new("RGB", (4, 4), colour).save(tmp_path / name)
    text = "path,label,split\nb.png,x,train\na.png,y,train\nc.png,y,test\n"
    prepare(listed(tmp_path, text), "mine")
    train = store.open_store(store.folder_of("mine"), "train")
    assert train.label.tolist() == [0, 1] and train.image(0)[0, 0].tolist() == [0, 0, 255]
    relabelled = text.replace("b.png,x", "b.png,y")
    assert prepare(listed(tmp_path, relabelled), "mine").fresh


def test_labels_that_were_exchanged_are_taken(home: Path, tmp_path: Path) -> None:
    """The files and the classes are those of before."""
    for name, colour in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (4, 4), colour).save(tmp_path / name)
    for first, second, labels in (("x", "y", [0, 1]), ("y", "x", [1, 0])):
        text = f"path,label,split\na.png,{first},train\nb.png,{second},train\n"
        assert prepare(listed(tmp_path, text), "mine").fresh
        assert store.open_store(store.folder_of("mine"), "train").label.tolist() == labels
