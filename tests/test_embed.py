"""Features of photographs: the run's own, a row for each, in the order of the source."""

import os
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_runs import made_run
from PIL import Image
from test_cli import MakePhotos, Type, sentence
from test_cli import typed as typed

from fastidmm.errors import DataError, UsageError
from fastidmm.evaluate import outputs
from fastidmm.exporting import embed as embedding
from fastidmm.exporting import pictures
from fastidmm.store import folder_of, open_store

RUN, OUT = Path("runs/one"), Path("features.npz")
LISTED = {
    split: [f"{split}/class{label}/{number:03d}.png" for label in range(2) for number in range(num)]
    for split, num in (("train", 10), ("test", 4))
}


def embed(source: str, out: Path = OUT, *, run: Path = RUN, normalise: bool = False) -> Any:
    """What `embed` answers and writes."""
    told = embedding.embed(run, source, out, normalise=normalise, device=None, quiet=True)
    with np.load(out, allow_pickle=False) as file:
        return told, dict(file)


def everything(folder: Path) -> dict[str, bytes]:
    """All files below a folder."""
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_prepared_dataset_and_its_folder_give_the_same(toy: str, home: Path) -> None:
    """As evaluation sees them, in the order that preparing lists; nothing else is written."""
    learnt = made_run(RUN)
    before = everything(home), everything(Path("photos")), everything(RUN)
    told, table = embed("toy")
    _, beside = embed("photos", Path("other.npz"))
    assert (everything(home), everything(Path("photos")), everything(RUN)) == before
    assert sorted(os.listdir()) == ["features.npz", "home", "other.npz", "photos", "runs"]
    rows = [
        outputs(learnt.backbone, open_store(folder_of("toy"), split), resolution=32,
                dtype=torch.float32).numpy()
        for split in ("train", "test")
    ]  # fmt: skip
    np.testing.assert_allclose(table["features"], np.concatenate(rows), rtol=0, atol=1e-5)
    assert table["features"].dtype == np.float32 and told["num"] == 28 and told["width"] == 128
    assert table["path"].tolist() == LISTED["train"] + LISTED["test"]
    assert table["split"].tolist() == ["train"] * 20 + ["test"] * 8
    assert table["label"].tolist() == [0] * 10 + [1] * 10 + [0] * 4 + [1] * 4
    assert table["class_names"].tolist() == ["class0", "class1"]
    assert beside.keys() == table.keys()
    assert all(np.array_equal(beside[key], table[key]) for key in table)


def test_a_stage_gives_its_own_backbones_features(toy: str) -> None:
    made_run(RUN)
    stage = RUN / "finetune-48"
    learnt = made_run(stage, "vit_micro", 48, "supervised")
    _, table = embed("toy", run=stage)
    store = open_store(folder_of("toy"), "train")
    ours = outputs(learnt.backbone, store, resolution=48, dtype=torch.float32)
    np.testing.assert_allclose(table["features"][:20], ours.numpy(), rtol=0, atol=1e-5)


def test_few_pictures_are_held_at_a_time(toy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By their number and by their bytes; the features are the same."""
    made_run(RUN)
    _, whole = embed("photos")
    for name, limit, most in (("CROPS_AT_ONCE", 3, 3), ("MOST_BYTES", 5000, 2)):
        held: list[int] = []

        def counting(model: Any, store: Any, held: list[int] = held, **how: Any) -> torch.Tensor:
            held.append(len(store))
            return outputs(model, store, **how)

        with monkeypatch.context() as patch:
            patch.setattr(pictures, name, limit)
            patch.setattr(pictures, "outputs", counting)
            _, table = embed("photos", Path(f"{name}.npz"))
        assert max(held) == most and sum(held) == 28
        np.testing.assert_allclose(table["features"], whole["features"], rtol=0, atol=1e-5)


def test_lengths_are_one_where_asked(toy: str) -> None:
    made_run(RUN)
    _, plain = embed("toy")
    told, unit = embed("toy", Path("unit.npz"), normalise=True)
    lengths = np.linalg.norm(plain["features"], axis=1, keepdims=True)
    assert told["normalised"] and (abs(lengths - 1) > 0.1).all()
    np.testing.assert_allclose(unit["features"], plain["features"] / lengths, rtol=1e-5, atol=1e-6)


def test_files_that_cannot_be_read_are_named_and_left_out(toy: str) -> None:
    made_run(RUN)
    _, whole = embed("photos")
    Path("photos/train/class0/0003.jpg").write_text("no photograph")
    Path("photos/notes.txt").write_text("nothing to see")
    photograph = Path("photos/train/class1/005.png")
    photograph.write_bytes(photograph.read_bytes()[:500])
    told, table = embed("photos", Path("other.npz"))
    reasons = {left["file"]: left["reason"] for left in told["left_out"]}
    assert sorted(reasons) == ["notes.txt", "train/class0/0003.jpg", "train/class1/005.png"]
    assert reasons["train/class0/0003.jpg"] == "not an image"
    kept = [row for row, path in enumerate(whole["path"]) if path != "train/class1/005.png"]
    assert table["path"].tolist() == whole["path"][kept].tolist()
    np.testing.assert_allclose(table["features"], whole["features"][kept], rtol=0, atol=1e-5)
    assert "3 files left out: " in embedding.as_text(told)


def test_a_folder_of_nothing_usable_is_an_error(toy: str) -> None:
    made_run(RUN)
    Path("broken").mkdir()
    Path("broken/a.jpg").write_text("no photograph")
    with pytest.raises(DataError, match=r"no usable photograph: a\.jpg \(not an image\)"):
        embed("broken")
    assert not OUT.exists() and not list(Path().glob(".features*"))


def test_folders_without_a_split_are_in_the_order_of_their_names(
    toy: str, photos: MakePhotos
) -> None:
    made_run(RUN)
    photos(Path("plain"), per_class=5, classes=3)
    _, table = embed("plain")
    paths = [f"class{label}/{number:03d}.png" for label in range(3) for number in range(5)]
    assert table["path"].tolist() == paths and "split" not in table
    assert table["label"].tolist() == [int(path[5]) for path in paths]


def test_photographs_without_labels_and_turned_ones(toy: str) -> None:
    """The camera's turn is undone, as in preparing."""
    made_run(RUN)
    Path("flat").mkdir()
    image = Image.open("photos/test/class0/001.png")
    image.save("flat/a.png")
    turned = image.transpose(Image.Transpose.ROTATE_90)
    exif = turned.getexif()
    exif[0x0112] = 6  # shown a quarter turn clockwise
    turned.save("flat/b.png", exif=exif)
    turned.save("flat/c.png")
    _, table = embed("flat")
    assert table.keys() == {"features", "path"}
    a, b, c = table["features"]
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
    assert abs(a - c).max() > 1e-3


def test_a_list_of_photographs_is_a_source_too(toy: str) -> None:
    made_run(RUN)
    lines = ["path,label,split", "test/class1/001.png,dog,test", "train/class0/002.png,dog,train"]
    Path("photos/list.csv").write_text("\n".join([*lines, "train/class0/000.png,cat,train"]))
    _, table = embed("photos/list.csv")
    assert table["path"].tolist() == [
        "train/class0/002.png", "train/class0/000.png", "test/class1/001.png"
    ]  # fmt: skip
    assert table["class_names"][table["label"]].tolist() == ["dog", "cat", "dog"]


def test_wrong_uses_cost_nothing(toy: str, typed: Type, monkeypatch: pytest.MonkeyPatch) -> None:
    made_run(RUN)
    Path("taken.npz").write_text("mine")
    monkeypatch.setattr(embedding, "find_spec", lambda n: None if n == "pyarrow" else find_spec(n))
    for source, out, remedy in (
        ("toy", "features.csv", "ends in .npz or .parquet"),
        ("toy", "taken.npz", "give --out another name"),
        ("toy", "features.parquet", "pip install 'fastidmm[parquet]'"),
        ("toi", "features.npz", "did you mean 'toy'"),
    ):
        status, _, err = typed("embed", "one", "--from", source, "--out", out)
        assert status == 2 and remedy in sentence(err), err
    assert Path("taken.npz").read_text() == "mine"
    assert sorted(os.listdir()) == ["home", "photos", "runs", "taken.npz"]


def test_a_parquet_file_holds_the_same(toy: str) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    made_run(RUN)
    _, table = embed("toy")
    out = Path("deep/features.parquet")
    embedding.embed(RUN, "toy", out, normalise=False, device=None, quiet=True)
    found = parquet.read_table(out).to_pydict()
    assert found["path"] == table["path"].tolist() and found["split"] == table["split"].tolist()
    assert found["class"] == table["class_names"][table["label"]].tolist()
    np.testing.assert_array_equal(np.array(found["features"], np.float32), table["features"])


def test_it_needs_no_photographs_of_the_run(toy: str, home: Path) -> None:
    """Only the folder that is asked about."""
    made_run(RUN)
    shutil.rmtree(home)
    told, _ = embed("photos")
    assert told["num"] == 28 and not home.exists()


def test_features_of_a_refused_file_are_no_half_a_file(
    toy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_run(RUN)

    def full(*given: Any, **named: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match=r"features\.npz"):
        embed("toy")
    assert not list(Path().glob("*features*")) and not list(Path().glob(".features*"))
    with pytest.raises(UsageError, match="a file is in the way"):
        embed("toy", Path("photos/test/class0/000.png/features.npz"))
