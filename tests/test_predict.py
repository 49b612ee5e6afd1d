"""The class of each photograph: what the stage that counts says, in the order of the source."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from made_runs import made_run
from PIL import Image
from test_cli import MakePhotos, Type, sentence
from test_cli import typed as typed
from torch import Tensor

from fastidmm.batch import Method
from fastidmm.evaluate import outputs
from fastidmm.exporting.predict import as_text, predict
from fastidmm.store import folder_of, open_store

RUN, STAGE = Path("runs/one"), Path("runs/one/finetune-48")


def told(source: str, run: Path = RUN) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = predict(run, source, None, device=None, quiet=True)["rows"]
    return rows


def stage(name: str, resolution: int) -> Method:
    """A finished stage of the run, begun from what it pretrained."""
    first = next(RUN.glob("checkpoints/*"))
    return made_run(
        RUN / name, "vit_micro", resolution, "supervised", init=f"../checkpoints/{first.name}"
    )


def chances(method: Any, split: str = "train", resolution: int = 48) -> Tensor:
    """What softmax makes of a method's own logits, in float64."""
    store = open_store(folder_of("toy"), split)
    how: dict[str, Any] = {"resolution": resolution, "dtype": torch.float32}
    features = outputs(method.backbone, store, **how).double()
    logits: Tensor = features @ method.head.weight.double().T + method.head.bias.double()
    return logits.softmax(1)


def test_the_likeliest_class_by_the_last_stage(toy: str) -> None:
    """Of two stages on what was pretrained; of one from scratch only where it is named."""
    made_run(RUN)
    stage("finetune-32", 32)
    method, scratch = stage(STAGE.name, 48), stage("scratch-32", 32)
    rows, own = told("toy"), told("toy", RUN / "scratch-32")
    names = [f"train/class{label}/{number:03d}.png" for label in range(2) for number in range(10)]
    assert [row["path"] for row in rows[:20]] == names and len(rows) == 28
    for found, (which, side) in ((rows, (method, 48)), (own, (scratch, 32))):
        expected = torch.cat([chances(which, split, side) for split in ("train", "test")])
        labels = [int(row["class"].removeprefix("class")) for row in found]
        assert labels == expected.argmax(1).tolist()
        sure = torch.tensor([row["probability"] for row in found], dtype=torch.float64)
        torch.testing.assert_close(sure, expected.max(1).values, rtol=0, atol=1e-5)
        assert [row["split"] for row in found] == ["train"] * 20 + ["test"] * 8
    assert told("photos") == rows


def test_new_photographs_of_no_class(toy: str, typed: Type, photos: MakePhotos) -> None:
    """In the terminal, as a table in a file, and as JSON; what cannot be read is named."""
    made_run(RUN)
    stage(STAGE.name, 48)
    Path("new").mkdir()
    for number, name in enumerate(("b, c.png", "a.jpg")):
        Image.new("RGB", (60, 50), (90 * number, 10, 200)).save(Path("new", name))
    for number in range(12):
        Path("new", f"broken{number:02d}.jpg").write_bytes(b"no photograph")
    status, out, _ = typed("predict", "one", "--from", "new")
    first, *lines, last = out.splitlines()
    assert status == 0 and first.startswith("12 files left out: broken00.jpg (not an image), ")
    assert first.endswith(", broken09.jpg (not an image) and 2 more (see --json)")
    rows = json.loads(typed("predict", "one", "--from", "new", "--json")[1])["rows"]
    assert [row["path"] for row in rows] == ["a.jpg", "b, c.png"]
    for line, row, path in zip(lines, rows, ("a.jpg   ", "b, c.png"), strict=True):
        assert line == f"{path}  {row['class']}  {100 * row['probability']:.1f} %"
    assert last.startswith(f"by {STAGE}/checkpoints/step_")
    (alone,) = told("new/a.jpg")
    # Of one photograph products are summed in another order.
    assert alone == rows[0] | {"probability": pytest.approx(rows[0]["probability"], abs=1e-5)}
    status, _, err = typed("predict", "one", "--from", "new/broken11.jpg")
    assert status == 3 and "has no usable photograph: broken11.jpg (not an image)" in sentence(err)
    status, out, _ = typed("predict", "one", "--from", "new", "--out", "found.csv")
    assert status == 0 and "found.csv: 2 photographs: class" in out
    with open("found.csv", encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["path"] for row in table] == ["a.jpg", "b, c.png"]
    for found, row in zip(table, rows, strict=True):
        assert found["class"] == row["class"] and found.keys() == row.keys()
        assert abs(float(found["probability"]) - row["probability"]) <= 5e-5
    assert typed("predict", "one", "--from", "toy", "--out", "toy.csv")[0] == 0
    with open("toy.csv", encoding="utf-8", newline="") as file:
        assert [row["split"] for row in csv.DictReader(file)] == ["train"] * 20 + ["test"] * 8


def test_what_is_refused(toy: str, typed: Type) -> None:
    made_run(RUN)
    status, _, err = typed("predict", "one", "--from", "photos")
    assert status == 2
    assert sentence(err) == (
        "fastidmm: runs/one has learnt no classes yet: begin with `fastidmm finetune runs/one`."
    )
    stage(STAGE.name, 48)
    Path("there.csv").touch()
    for out, said in (
        ("found.txt", "--out found.txt: choose a file that ends in .csv."),
        ("there.csv", "there.csv exists: give --out another name."),
    ):
        status, _, err = typed("predict", "one", "--from", "photos", "--out", out)
        assert status == 2 and sentence(err) == f"fastidmm: {said}"
    Path("new.HEIC").touch()
    status, _, err = typed("predict", "one", "--from", "new.HEIC")
    assert status == 2 and "--from new.HEIC is no photograph that can be read (.jpg" in sentence(
        err
    )
    shutil.rmtree("home")
    status, _, err = typed("predict", "one", "--from", "photos")
    assert status == 2 and sentence(err).startswith("fastidmm: no dataset 'toy' is prepared: ")


def test_of_many_classes_those_of_most_photographs_are_told() -> None:
    rows = [{"class": f"c{number:02d}"} for number in range(12) for _ in range(20 - number)]
    told = {"left_out": [], "file": "a.csv", "num": len(rows), "rows": rows, "checkpoint": "k"}
    first, last = as_text(told).splitlines()
    assert first.startswith("a.csv: 174 photographs: c00 20, c01 19, ")
    assert first.endswith(", c09 11 and 19 of 2 others") and last == "by k"
