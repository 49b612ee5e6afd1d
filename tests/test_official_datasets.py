"""The published datasets in miniature: fetched, given as archives and given unpacked."""

import hashlib
import os
import shutil
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from miniature import BUILDERS, Miniature, cars_of_one_folder, mat
from webserver import Site

from fastidmm.datasets import About, Source
from fastidmm.errors import DataError, UsageError
from fastidmm.preparing import fetch, lists
from fastidmm.preparing.fetch import Patience, Remote
from fastidmm.preparing.official import Layout
from fastidmm.preparing.prepare import prepare
from fastidmm.registry import find
from fastidmm.store import folder_of, open_store, read_json

NAMES = sorted(BUILDERS)
QUICK = Patience(attempts=6, stall=0.15, connect=2, sleep=lambda _: None)
COUNTS = {
    "flowers": (102, 2040, 6149),
    "pets": (37, 3680, 3669),
    "dtd": (47, 3760, 1880),
    "indoor67": (67, 5360, 1340),
    "cub": (200, 5994, 5794),
    "aircraft": (100, 6667, 3333),
    "cars": (196, 8144, 8041),
    "sin10k": (1000, 10_000, 0),
    "imagenet": (1000, 1_281_167, 50_000),
}


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "PATIENCE", QUICK)


def shrink(
    monkeypatch: pytest.MonkeyPatch, name: str, made: Miniature, site: Site | None = None
) -> Any:
    """Give a dataset the miniature's counts, sums and, with a site, its sources."""
    kind, content = find("dataset", name), made.packed()

    def small(remote: Remote) -> Remote:
        if remote.file not in content:
            return remote
        sums = {k: hashlib.new(k, content[remote.file]).hexdigest() for k in remote.published}
        urls = (site.add(remote.file, content[remote.file]),) if site else ()
        return replace(remote, sources=urls, **sums)  # type: ignore[arg-type]

    def layout(one: Layout) -> Layout:
        archives, files = (tuple(map(small, remotes)) for remotes in (one.archives, one.files))
        return replace(one, archives=archives, files=files)

    monkeypatch.setattr(kind, "layouts", tuple(map(layout, kind.layouts)))
    about = About(len(made.class_names), len(made.train), len(made.test))
    monkeypatch.setattr(kind, "about", about)
    return kind


def opened(name: str, from_: Path | None = None) -> Source:
    found: Source = find("dataset", name)().open(from_=from_, seed=0)
    return found


def unverified(told: dict[str, Any]) -> bool:
    """Whether a store says that nobody compared the photographs' checksum."""
    return any("was not verified" in note for note in told["notes"])


def check_store(name: str, made: Miniature) -> None:
    """Image by image: pixels, label, order."""
    for split, expected in (("train", made.train), ("test", made.test)):
        store = open_store(folder_of(name), split)
        assert len(store) == len(expected) > 0
        for row, (pixels, label) in enumerate(expected):
            assert np.array_equal(store.image(row).numpy(), pixels), (split, row)
            assert int(store.label[row]) == label, (split, row)
        assert list(store.class_names) == made.class_names


@pytest.mark.parametrize("name", COUNTS)
def test_the_published_numbers_are_asked_for(name: str) -> None:
    about = find("dataset", name).about
    assert (about.num_classes, about.num_train, about.num_test) == COUNTS[name]
    assert about.fetched == all(
        layout.live for layout in getattr(find("dataset", name), "layouts", ())
    ) * hasattr(find("dataset", name), "layouts")


@pytest.mark.parametrize("name", NAMES)
def test_fetched_given_and_unpacked_are_the_same_store(
    name: str, home: Path, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = BUILDERS[name]()
    shrink(monkeypatch, name, made, site)
    faults = ["cut", "503", "stall", "ignore range", "wrong content", "says more", "no length"]
    site.faults = faults[:2] if name == "indoor67" else faults[:4]
    prepare(opened(name), name, quiet=True)
    check_store(name, made)
    asked = len(site.asked)
    assert not prepare(opened(name), name, quiet=True).fresh and len(site.asked) == asked
    first = read_json(folder_of(name))
    assert "official split" in first["source"]["description"] and not unverified(first)
    archives = tmp_path / "archives"
    archives.mkdir()
    for file, content in made.packed().items():
        (archives / file).write_bytes(content)
    copy = made.unpack(tmp_path / "download" / "deeper")
    for number, from_ in enumerate((archives, copy, tmp_path / "download")):
        prepare(opened(name, from_), f"{name}{number}", quiet=True)
        again = read_json(folder_of(f"{name}{number}"))
        assert again["splits"] == first["splits"] and len(site.asked) == asked
        assert unverified(again) is (from_ != archives)


@pytest.mark.parametrize("name", NAMES)
def test_what_the_server_sends_is_compared(
    name: str, home: Path, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = BUILDERS[name]()
    kind = shrink(monkeypatch, name, made, site)
    archive = kind.layouts[0].archives[0].file
    site.files[archive] = site.files[archive][:-1] + b"!"
    with pytest.raises(DataError, match=rf"{archive} could not be fetched .*sent something else"):
        opened(name)
    assert not list((home / "downloads" / name).glob("unpacked"))


@pytest.mark.parametrize("name", NAMES)
def test_missing_files_are_named_with_what_to_do(
    name: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = BUILDERS[name]()
    shrink(monkeypatch, name, made)
    (tmp_path / "empty").mkdir()
    for from_ in (None, tmp_path / "empty"):
        with pytest.raises(UsageError) as caught:
            opened(name, from_)
        told = str(caught.value)
        assert all(file in told for file in made.packed())
        assert f"fastidmm prepare --dataset {name} --from FOLDER" in told and "\n" not in told
    with pytest.raises(UsageError, match=r"there is no .*gone: check what follows --from"):
        opened(name, tmp_path / "gone")


@pytest.mark.parametrize("name", NAMES)
def test_an_incomplete_copy_is_refused(
    name: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = BUILDERS[name]()
    kind = shrink(monkeypatch, name, made)
    images = made.archives[kind.layouts[0].archives[0].file]
    used = next(f for f in images if f.endswith(".jpg") and "unlisted" not in f)
    copy = made.unpack(tmp_path / "copy", but=used)
    with pytest.raises(DataError, match=r"lacks 1 of the \d+ images that its lists name") as caught:
        opened(name, copy)
    assert Path(used).name in str(caught.value)
    (copy / used).symlink_to(tmp_path / "elsewhere.jpg")
    (tmp_path / "elsewhere.jpg").write_bytes(images[used])
    with pytest.raises(DataError, match=r"leads out of .* by a link, to .*elsewhere.jpg: put a"):
        opened(name, copy)
    (copy / used).unlink()
    (copy / used).with_name("beside").write_bytes(images[used])
    (copy / used).symlink_to("beside")
    opened(name, copy)
    monkeypatch.setattr(kind, "about", replace(kind.about, num_test=len(made.test) + 1))
    with pytest.raises(DataError, match=r"results would not compare; get .* again"):
        opened(name, copy)


def test_an_archive_may_be_given_itself(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = BUILDERS["cub"]()
    shrink(monkeypatch, "cub", made)
    renamed = tmp_path / "CUB_200_2011 (1).tgz"
    renamed.write_bytes(made.packed()["CUB_200_2011.tgz"])
    prepare(opened("cub", renamed), "cub", quiet=True)
    check_store("cub", made)
    renamed.write_bytes(b"something else")
    with pytest.raises(UsageError, match="does not have all files of CUB"):
        opened("cub", renamed)
    (tmp_path / "CUB_200_2011.tgz").write_bytes(b"something else")
    with pytest.raises(DataError, match=r"CUB_200_2011.tgz is not the published file .MD5"):
        opened("cub", tmp_path)


def test_a_folder_of_archives_lacks_a_list_that_is_fetched(
    home: Path, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = BUILDERS["flowers"]()
    shrink(monkeypatch, "flowers", made, site)
    (tmp_path / "102flowers.tgz").write_bytes(made.packed()["102flowers.tgz"])
    prepare(opened("flowers", tmp_path / "102flowers.tgz"), "flowers", quiet=True)
    check_store("flowers", made)
    assert sorted(path for path, _ in site.asked) == ["/imagelabels.mat", "/setid.mat"]


def test_a_page_instead_of_a_list_is_met_once(
    home: Path, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is published that its lists hash to, so only their contents can tell."""
    made = BUILDERS["indoor67"]()
    shrink(monkeypatch, "indoor67", made, site)
    right = site.files["TestImages.txt"]
    site.files["TestImages.txt"] = b"<html>please log in</html>"
    with pytest.raises(DataError, match=r"lists in .* are not those of MIT Indoor67"):
        opened("indoor67")
    site.files["TestImages.txt"] = right
    prepare(opened("indoor67"), "indoor67", quiet=True)
    check_store("indoor67", made)


@pytest.mark.parametrize("unpacked", [False, True])
def test_cars_come_in_two_releases(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unpacked: bool
) -> None:
    made = cars_of_one_folder()
    shrink(monkeypatch, "cars", made)
    if unpacked:
        made.unpack(tmp_path / "given")
    else:
        (tmp_path / "given").mkdir()
        for file, content in made.packed().items():
            (tmp_path / "given" / file).write_bytes(content)
    prepare(opened("cars", tmp_path / "given"), "cars", quiet=True)
    check_store("cars", made)


def test_cars_in_folders_inside_folders(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = BUILDERS["cars"]()
    shrink(monkeypatch, "cars", made)
    copy = made.unpack(tmp_path / "stanford_cars")
    for split in ("cars_train", "cars_test"):
        (copy / split).rename(copy / "aside")
        (copy / split).mkdir()
        (copy / "aside").rename(copy / split / split)
    prepare(opened("cars", tmp_path), "cars", quiet=True)
    check_store("cars", made)


def test_other_splits_of_flowers_are_refused(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for split in ("train", "valid"):
        (tmp_path / "kaggle" / "dataset" / split / "102").mkdir(parents=True)
    with pytest.raises(DataError, match=r"is the Kaggle Flowers split .*will not compare; give"):
        opened("flowers", tmp_path / "kaggle")
    made = BUILDERS["flowers"]()
    shrink(monkeypatch, "flowers", made)
    copy = made.unpack(tmp_path / "copy")
    (copy / "setid.mat").write_bytes(mat(trnid=[1], valid=[2], tstid=[3]))
    with pytest.raises(DataError, match=r"setid.mat is not the published file .MD5"):
        opened("flowers", copy)


@pytest.mark.parametrize(
    ("name", "file", "content", "words"),
    [
        ("pets", "annotations/test.txt", b"Abyssinian_100 1 1\n", "are not those of Oxford-IIIT"),
        ("pets", "annotations/test.txt", b"Abyssinian_100 2 1 1\n", "is no american_bulldog"),
        ("dtd", "dtd/labels/test1.txt", b"../../x.jpg\n", "are not those of DTD"),
        (
            "cub",
            "CUB_200_2011/images.txt",
            b"1 x.jpg\n",
            "has 2, 5 and 2: results would not compare",
        ),
        ("aircraft", "fgvc-aircraft-2013b/data/images_variant_test.txt", b"1 MiG\n", "MiG"),
        ("cars", "devkit/cars_meta.mat", b"no such thing", "cars_meta.mat is no MATLAB file"),
        ("cars", "devkit/cars_meta.mat", mat(names=1), "are not those of Stanford Cars"),
        ("cars", "devkit/cars_meta.mat", None, "there is no .*cars_meta.mat"),
    ],
)
def test_broken_lists(
    name: str,
    file: str,
    content: bytes | None,
    words: str,
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = BUILDERS[name]()
    shrink(monkeypatch, name, made)
    copy = made.unpack(tmp_path / "copy")
    (copy / file).unlink()
    if content is not None:
        (copy / file).write_bytes(content)
    with pytest.raises(DataError, match=words):
        opened(name, copy)


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_damaged_photograph_is_not_passed_over(
    split: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left is not called the official split, and a note says what to do."""
    made = BUILDERS["dtd"]()
    shrink(monkeypatch, "dtd", made)
    copy = made.unpack(tmp_path / "copy")
    source = opened("dtd", copy)
    whole = prepare(source, "whole", quiet=True)
    path = source.root / getattr(source, split)[0].file
    path.write_bytes(path.read_bytes()[:-40])
    told = prepare(opened("dtd", copy), "cut", quiet=True)
    assert whole.num_train + whole.num_test == told.num_train + told.num_test + 1
    described = [read_json(folder_of(name))["source"]["description"] for name in ("whole", "cut")]
    assert described[1] == f"{described[0]}, less 1 unusable file"
    assert "the official split" in described[0]
    assert not [note for note in whole.notes if "not the whole" in note]
    assert told.notes[-1].startswith("not the whole official split: scores do not compare")


def test_lists_have_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lists, "MAX_UNPACKED_MAT", 500_000)
    bomb = zlib.compress(bytes(1_000_000))
    tag = (15).to_bytes(4, "little") + len(bomb).to_bytes(4, "little")
    (tmp_path / "bomb.mat").write_bytes(mat(a=1)[:128] + tag + bomb)
    with pytest.raises(DataError, match=r"bomb.mat is larger than any list of images"):
        lists.mat(tmp_path / "bomb.mat")
    monkeypatch.setattr(lists, "MAX_LIST", 10)
    for read in (lists.mat, lists.lines):
        with pytest.raises(DataError, match=r"bomb.mat"):
            read(tmp_path / "bomb.mat")


def test_a_list_may_not_name_what_lies_outside(tmp_path: Path) -> None:
    from fastidmm.datasets import Item

    for file in ("/etc/passwd", "../x.jpg", "a/../../x.jpg"):
        with pytest.raises(DataError, match="which lies outside"):
            lists.check_files(tmp_path, [Item(file, 0)])
    (tmp_path / "out").symlink_to("/etc")
    with pytest.raises(DataError, match=r"out leads out of .* by a link, to /etc: put a copy"):
        lists.check_files(tmp_path, [Item("out/passwd", 0)])


class Stop(BaseException):
    """An interruption."""


def test_stopped_anywhere_and_started_again_it_is_the_same_store(
    home: Path, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before everything that reaches the disk, without a chance to clean up."""
    made = BUILDERS["flowers"]()
    shrink(monkeypatch, "flowers", made, site)

    def run() -> dict[str, bytes]:
        prepare(opened("flowers"), "flowers", workers=1, quiet=True)
        return {path.name: path.read_bytes() for path in folder_of("flowers").iterdir()}

    real = {name: getattr(os, name) for name in ("fsync", "replace", "utime", "sync", "rename")}
    count, limit = [0], [0]

    def step(name: str, *values: Any) -> Any:
        count[0] += 1
        if count[0] == limit[0]:
            raise Stop
        return real[name](*values)

    for name in real:
        monkeypatch.setattr(os, name, lambda *values, name=name: step(name, *values))
    for name in ("fsync", "sync"):
        real[name] = lambda *_: None  # slow, and seen by nobody here
    whole = run()
    steps = count[0]
    assert steps > 20
    for stop in range(1, steps + 1):
        shutil.rmtree(home)
        count[0], limit[0] = 0, stop
        with monkeypatch.context() as patch, pytest.raises(Stop):
            patch.setattr(shutil, "rmtree", lambda *_, **__: None)
            run()
        limit[0] = 0
        assert run() == whole, stop
        names = {path.name for path in (home / "downloads" / "flowers").iterdir()}
        assert not [name for name in names if name.endswith((".part", ".old"))]
    check_store("flowers", made)
