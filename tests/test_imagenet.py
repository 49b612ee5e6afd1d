"""ImageNet and what is drawn from it; and what can be prepared, as a list."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from miniature import Miniature

from fastidmm.datasets import About, Source
from fastidmm.errors import DataError, UsageError
from fastidmm.preparing.prepare import prepare
from fastidmm.registry import DATASETS, find
from fastidmm.store import folder_of, open_store, read_json


def opened(name: str, from_: Path | None = None, seed: int = 0) -> Source:
    found: Source = find("dataset", name)().open(from_=from_, seed=seed)
    return found


IMAGENET = ["n01440764", "n01443537", "n02084071"]


@pytest.fixture
def imagenet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three classes, twelve to fourteen images each to train and one to test."""
    made = Miniature()
    for split, num in (("train", 12), ("val", 1)):
        for label, name in enumerate(IMAGENET):
            for number in range(num + label if split == "train" else num):
                made.photo("x", f"{split}/{name}/{name}_{number * 37 % 101}.JPEG", None)
    for name, num_test in (("imagenet", 3), ("sin10k", 0)):
        monkeypatch.setattr(find("dataset", name), "about", About(3, 39, num_test, False))
    return made.unpack(tmp_path / "imagenet")


def test_imagenet_is_its_two_folders(home: Path, imagenet: Path) -> None:
    source = opened("imagenet", imagenet)
    files = sorted(imagenet.glob("train/*/*"))
    assert [source.root / item.file for item in source.train] == files
    assert [item.label for item in source.train] == [0] * 12 + [1] * 13 + [2] * 14
    assert [item.file.split("/")[:2] for item in source.test] == [["val", n] for n in IMAGENET]
    assert source.class_names == tuple(IMAGENET) and source.split_seed is None
    prepare(source, "imagenet", quiet=True)
    assert len(open_store(folder_of("imagenet"), "train")) == 39
    nested = imagenet.with_name("kaggle") / "ILSVRC" / "Data" / "CLS-LOC"
    nested.parent.mkdir(parents=True)
    imagenet.rename(nested)
    assert opened("imagenet", imagenet.with_name("kaggle")).train == source.train


def test_imagenets_training_folder_may_have_any_name(home: Path, imagenet: Path) -> None:
    """Where it is what `--from` names, val/ is beside it."""
    source = opened("imagenet", imagenet)
    (imagenet / "train").rename(imagenet / "ILSVRC2012_img_train")
    found = opened("imagenet", imagenet / "ILSVRC2012_img_train")
    assert found.root == imagenet and found.test == source.test
    assert [item.label for item in found.train] == [item.label for item in source.train]
    assert all((imagenet / item.file).is_file() for item in found.train)
    (imagenet / "val").rename(imagenet / "away")
    with pytest.raises(UsageError, match="val has no folder per class"):
        opened("imagenet", imagenet / "ILSVRC2012_img_train")


def test_what_imagenet_may_not_be(home: Path, imagenet: Path, tmp_path: Path) -> None:
    for name in ("imagenet", "sin10k"):
        with pytest.raises(UsageError, match=f"image-net.org.*--dataset {name} --from FOLDER"):
            opened(name)
        with pytest.raises(UsageError, match=r"there is no folder .*gone"):
            opened(name, tmp_path / "gone")
    one = next((imagenet / "train").glob("*/*"))
    one.rename(tmp_path / one.name)
    with pytest.raises(DataError, match="has 38 training and 3 test images, and ImageNet has 39"):
        opened("imagenet", imagenet)
    one.symlink_to(tmp_path / one.name)
    for name in ("imagenet", "sin10k"):
        with pytest.raises(DataError, match=rf"{one.name} leads out of .*put a copy in its place"):
            opened(name, imagenet)
    shutil.move(imagenet / "val", imagenet / "flat")
    (imagenet / "val").mkdir()
    with pytest.raises(UsageError, match="val has no folder per class: sort the 50,000 images"):
        opened("imagenet", imagenet)
    shutil.rmtree(imagenet / "train" / IMAGENET[0])
    with pytest.raises(UsageError, match="has no train/ with 3 folders such as n01440764"):
        opened("sin10k", imagenet)


def test_sin10k_is_drawn_by_the_seed_and_the_names_alone(
    home: Path, imagenet: Path, tmp_path: Path
) -> None:
    source = opened("sin10k", imagenet, 5)
    drawn = [item.file for item in source.train]
    expected = []
    for name in IMAGENET:
        files = [f"{name}/{path.name}" for path in (imagenet / "train" / name).iterdir()]
        ranked = sorted(files, key=lambda file: hashlib.sha256(f"5/{file}".encode()).digest())
        expected += sorted(ranked[:10])
    assert (
        drawn == expected
        and [item.label for item in source.train] == [0] * 10 + [1] * 10 + [2] * 10
    )
    assert opened("sin10k", imagenet / "train", 5).train == source.train
    assert [i.file for i in opened("sin10k", imagenet).train] != drawn
    prepare(source, "sin10k", quiet=True)
    told = read_json(folder_of("sin10k"))
    assert told["splits"]["train"]["files"] == drawn and told["split_seed"] == 5
    assert "drawn by seed 5; store.json lists them" in told["notes"][0]
    for path in sorted((imagenet / "train" / IMAGENET[0]).iterdir())[:3]:
        path.unlink()
    with pytest.raises(DataError, match="a class with 9 images, and 10 of each are drawn"):
        opened("sin10k", imagenet)


def test_torch_stays_out_of_preparing(home: Path, tmp_path: Path) -> None:
    made = Miniature()
    for number in range(6):
        made.photo("x", f"{'ab'[number % 2]}/{number}.png", None)
    photos = made.unpack(tmp_path / "photos")
    code = (
        "import sys; from fastidmm import cli; from fastidmm.preparing.catalogue import catalogue;"
        "catalogue(); from fastidmm.preparing import fetch, official, unpack;"
        f"sys.argv = ['fastidmm', 'prepare', '--dataset', 'folder', '--from', {str(photos)!r}]\n"
        "try: cli.main()\nexcept SystemExit: pass\n"
        "sys.exit('torch' in sys.modules or 'httpx' in sys.modules)"
    )
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert "prepared before" in done.stdout


def test_the_list_of_datasets(
    home: Path, imagenet: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fastidmm import cli

    def typed(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["fastidmm", "prepare", *words])
        with pytest.raises(SystemExit):
            cli.main()
        return capsys.readouterr().out

    prepare(opened("imagenet", imagenet), "imagenet", quiet=True)
    rows = {line.split()[0]: line.split()[1:] for line in typed("--list").splitlines()[1:]}
    assert sorted(rows) == sorted(DATASETS)
    assert rows["flowers"] == ["102", "2,040", "6,149"]
    assert rows["cars"] == ["196", "8,144", "8,041", "needs", "--from"]
    assert rows["imagenet"] == ["3", "39", "3", "prepared"]
    assert rows["folder"] == ["needs", "--from"]
    found = {row["name"]: row for row in json.loads(typed("--list", "--json"))}
    assert found["pets"] == {
        "name": "pets",
        "num_classes": 37,
        "num_train": 3680,
        "num_test": 3669,
        "needs_from": False,
        "prepared": False,
    }
