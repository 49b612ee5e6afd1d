"""What a dataset may list: of every registered one, and of any that is added."""

import socket
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from PIL import Image

from fastidmm.datasets import Item, Source
from fastidmm.errors import DataError, FastidmmError
from fastidmm.preparing import fetch, lists
from fastidmm.preparing.fetch import Patience
from fastidmm.preparing.prepare import prepare
from fastidmm.preparing.sources import check_source
from fastidmm.registry import DATASETS, find
from fastidmm.store import folder_of, open_store


@pytest.fixture
def offline(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No server answers, and nobody waits for one."""

    def unreachable(*_: object, **__: object) -> NoReturn:
        raise socket.gaierror(socket.EAI_NONAME, "no address")

    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    monkeypatch.setattr(socket.socket, "connect", unreachable)
    monkeypatch.setattr(fetch, "PATIENCE", Patience(attempts=1, sleep=lambda _: None))


@pytest.mark.parametrize("name", list(DATASETS))
def test_every_dataset_opens_or_says_what_it_needs(name: str, offline: None) -> None:
    """Without `--from`: whole where a package or a former fetch has brought it."""
    try:
        source = find("dataset", name)().open(from_=None, seed=0)
    except FastidmmError as problem:
        assert ": " in str(problem)  # the remedy
    else:
        check_source(source, name)
        assert source.train and source.description and source.root.is_dir()


@pytest.mark.parametrize("given", ["missing", "empty"])
@pytest.mark.parametrize("name", list(DATASETS))
def test_a_folder_that_is_not_a_dataset_is_refused(
    name: str, given: str, offline: None, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(FastidmmError, match=given):
        find("dataset", name)().open(from_=tmp_path / given, seed=0)


@pytest.mark.parametrize("read", [lists.lines, lists.mat])
def test_a_list_that_is_not_there_is_bad_data(read: Any, tmp_path: Path) -> None:
    for path in (tmp_path / "gone.txt", tmp_path):
        with pytest.raises(DataError, match=f"there is no list {path}: get it"):
            read(path)


# --- what prepare takes --------------------------------------------------------------------------


@pytest.fixture
def source(home: Path, tmp_path: Path) -> Source:
    """Three classes, an image each to train, and one of the first to test."""
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    train = tuple(Item(f"{number}.png", number) for number in range(3))
    return Source("made up", tmp_path, ("a", "b", "c"), train, (Item("3.png", 0),))


def test_what_is_in_order_is_prepared(source: Source) -> None:
    """Files may have any spelling that stays below the root."""
    odd = (Item("./0.png", 2), *source.train[1:])
    assert prepare(replace(source, train=odd), "mine", quiet=True).num_train == 3
    assert open_store(folder_of("mine"), "train").label.tolist() == [2, 1, 2]
    bare = tuple(Item(item.file, -1) for item in source.train)
    assert prepare(replace(source, class_names=(), train=bare, test=()), "bare", quiet=True).fresh


WRONG: dict[str, tuple[dict[str, tuple[Item, ...]], str]] = {
    "too large": ({"train": (Item("0.png", 3),)}, "'0.png' the label 3, and its 3 classes are 0 "),
    "below none": ({"train": (Item("0.png", -2),)}, "'0.png' the label -2, and its 3 classes"),
    "unknown": ({"test": (Item("3.png", -1),)}, "'3.png' the label -1, and its 3 classes"),
    "NumPy's": ({"train": (Item("0.png", np.int64(1)),)}, r"the label .*1\)?, .* a plain int"),  # type: ignore[arg-type]
    "absolute": ({"train": (Item("/0.png", 0),)}, "'/0.png', which does not name a file below"),
    "outside": ({"test": (Item("../3.png", 0),)}, "'../3.png', which does not name a file below"),
    "by the way": ({"test": (Item("a/../../3.png", 0),)}, "which does not name a file below"),
    "a folder": ({"train": (Item("", 0),)}, "'', which does not name a file below"),
    "no name": ({"train": (Item("0\0.png", 0),)}, "which does not name a file below"),
    "a path": ({"train": (Item(Path("0.png"), 0),)}, "which does not name .* as text"),  # type: ignore[arg-type]
    "again": ({"train": (Item("0.png", 0), Item("0.png", 1))}, "'0.png' more than once"),
    "in both": ({"test": (Item("0.png", 0),)}, "'0.png' more than once: list every file once"),
    "respelt": ({"test": (Item("a/..//0.png", 0),)}, "'a/..//0.png' more than once"),
}


@pytest.mark.parametrize("kind", list(WRONG))
def test_a_source_that_no_store_can_hold_is_refused(kind: str, source: Source, home: Path) -> None:
    changes, words = WRONG[kind]
    with pytest.raises(DataError, match=f"the dataset 'mine' .*{words}"):
        prepare(replace(source, **changes), "mine", quiet=True)  # type: ignore[arg-type]
    assert not (home / "stores").exists()


def test_labels_need_classes(source: Source) -> None:
    with pytest.raises(DataError, match=r"'0\.png' the label 0, and it has no classes, only -1"):
        prepare(replace(source, class_names=()), "mine", quiet=True)
