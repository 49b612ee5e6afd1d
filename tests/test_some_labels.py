"""Where only some photographs have a label: all are pretrained on, and those fine-tuned on."""

import re
from pathlib import Path

import pytest
import torch
from conftest import make_photos
from toy_runs import FIRST, RUN, losses, recipe

from fastidmm import scoring, stages, trial
from fastidmm.assemble import split_rows, training_rows
from fastidmm.backbones.build import build_encoder, load_weights
from fastidmm.chance import Counters
from fastidmm.datasets import Source
from fastidmm.datasets.folder import Folder
from fastidmm.errors import DataError, UsageError
from fastidmm.evaluate import knn, outputs, score
from fastidmm.preparing.prepare import prepare
from fastidmm.preparing.summary import Summary
from fastidmm.record import Record, encoder_weights
from fastidmm.reporting.report import write
from fastidmm.run import run_all
from fastidmm.store import folder_of, open_store


@pytest.fixture
def some(toy: str, tmp_path: Path) -> Summary:
    """The toy's 20 training and 8 test photographs, and 12 more without labels: "some"."""
    more = make_photos(tmp_path / "more", per_class=12, classes=1, side=28)
    (more / "class0").rename(tmp_path / "photos" / "unlabelled")
    source = Folder().open(from_=tmp_path / "photos", seed=0)
    return prepare(source, "some", workers=0, quiet=True)


def names(source: Source) -> list[tuple[str, int]]:
    return [(item.file, item.label) for item in source.train]


@pytest.mark.parametrize("folder", ["unlabelled", "Unlabeled"])
def test_a_folder_of_photographs_without_labels(tmp_path: Path, folder: str) -> None:
    """Beside a split, beside classes that are split by the seed, and alone."""
    bare = [f"{folder}/deep/{number}.jpg" for number in range(9)]
    for file in (*(f"{name}/{number}.jpg" for name in "ab" for number in range(5)), *bare, "x.jpg"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    known = [(file, -1) for file in bare]
    made = Folder().open(from_=tmp_path, seed=0)
    assert names(made)[8:] == known and [item.label for item in made.test] == [0, 1]
    assert made.class_names == ("a", "b") and made.notes == ()
    assert [(left.file, left.reason) for left in made.unusable] == [
        ("x.jpg", "outside the class folders")
    ]
    split = tmp_path / "split"
    (split / "train").mkdir(parents=True)
    for old, new in (("a", "train/a"), ("b", "train/b"), (folder, folder)):
        (tmp_path / old).rename(split / new)
    (split / "test" / "b").mkdir(parents=True)
    (split / "train" / "b" / "0.jpg").rename(split / "test" / "b" / "0.jpg")
    given = Folder().open(from_=split, seed=0)
    assert names(given)[9:] == known and len(given.train) == 18 and not given.unusable
    assert [(item.file, item.label) for item in given.test] == [("test/b/0.jpg", 1)]
    alone = tmp_path / "alone"
    alone.mkdir()
    (split / folder).rename(alone / folder)
    assert names(Folder().open(from_=alone, seed=0)) == known
    assert Folder().open(from_=alone, seed=0).class_names == ()


def test_train_without_classes_takes_those_beside_it(tmp_path: Path) -> None:
    for file in ("train/0.jpg", "unlabelled/1.jpg", "test/2.jpg"):
        (tmp_path / file).parent.mkdir()
        (tmp_path / file).touch()
    source = Folder().open(from_=tmp_path, seed=0)
    assert names(source) == [("train/0.jpg", -1), ("unlabelled/1.jpg", -1)]


@pytest.mark.parametrize("tested", ["a", "unlabelled"])
def test_within_train_it_is_no_class_but_where_it_has_test_images(
    tmp_path: Path, tested: str
) -> None:
    train = [f"train/{name}/{number}.jpg" for name in ("a", "unlabelled", "z") for number in "01"]
    for file in (*train, f"test/{tested}/2.jpg", "unlabelled/3.jpg"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    source = Folder().open(from_=tmp_path, seed=0)
    classes = {"a": ("a", "z"), "unlabelled": ("a", "unlabelled", "z")}[tested]
    assert source.class_names == classes and not source.unusable and source.notes == ()
    assert [(item.file, item.label) for item in source.test] == [
        (f"test/{tested}/2.jpg", classes.index(tested))
    ]
    known = {name: number for number, name in enumerate(classes)}
    assert dict(names(source)) == {
        **{file: known.get(file.split("/")[1], -1) for file in train},
        "unlabelled/3.jpg": -1,
    }


def test_train_may_hold_nothing_else(tmp_path: Path) -> None:
    for file in ("train/unlabelled/0.jpg", "test/a/1.jpg"):
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).touch()
    source = Folder().open(from_=tmp_path, seed=0)
    assert names(source) == [("train/unlabelled/0.jpg", -1)]
    assert not source.class_names and not source.test


def test_training_folders_alone_are_no_classes_beside_it(tmp_path: Path) -> None:
    for file in ("train/a/0.jpg", "train/b/1.jpg", "unlabelled/2.jpg"):
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).touch()
    source = Folder().open(from_=tmp_path, seed=0)
    assert names(source) == [("train/a/0.jpg", 0), ("train/b/1.jpg", 1), ("unlabelled/2.jpg", -1)]
    assert source.class_names == ("a", "b") and not source.test and source.split_seed is None


@pytest.mark.parametrize("tests", [("test",), ("test", "val"), ("Val", "test", "validation")])
@pytest.mark.parametrize("loose", [(), ("0.jpg",)])
def test_test_images_are_no_class_to_train_on(
    tmp_path: Path, tests: tuple[str, ...], loose: tuple[str, ...]
) -> None:
    held = [f"{name}/a/0.jpg" for name in tests]
    for file in (*held, *loose, "unlabelled/1.jpg"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    source = Folder().open(from_=tmp_path, seed=0)
    assert names(source) == [(file, -1) for file in (*loose, "unlabelled/1.jpg")]
    assert not source.test
    assert [(left.file, left.reason) for left in source.unusable] == [
        (file, "no train/ beside it") for file in sorted(held)
    ]


def test_the_store_tells_which_have_labels(some: Summary) -> None:
    store = open_store(folder_of("some"), "train")
    assert store.label.tolist() == [0] * 10 + [1] * 10 + [-1] * 12
    assert store.labelled and store.learnable
    known = store.with_labels()
    assert known.label.tolist() == [0] * 10 + [1] * 10
    toy = open_store(folder_of("toy"), "train")
    assert toy.with_labels() is toy and torch.equal(known.image(13), toy.image(13))
    assert not store.select(torch.arange(20, 32)).learnable
    assert some.notes == (
        "12 of the 32 training images have no label: pretraining learns from all, fine-tuning and "
        "scores from the others",
    )


@pytest.mark.parametrize(("classes", "bare"), [(1, 2), (2, 1), (2, 2)])
def test_fine_tuning_is_told_of_where_there_is_any(
    home: Path, tmp_path: Path, classes: int, bare: int
) -> None:
    photos = make_photos(tmp_path / "photos", per_class=2, classes=classes)
    more = make_photos(tmp_path / "more", per_class=bare, classes=1, side=28)
    (more / "class0").rename(photos / "unlabelled")
    told = prepare(Folder().open(from_=photos, seed=0), "few", workers=0, quiet=True)
    verb = "has" if bare == 1 else "have"
    count = f"{bare} of the {2 + bare} training images {verb} no label: pretraining learns from all"
    assert told.notes == (
        (f"{count}, fine-tuning and scores from the others",)
        if classes > 1
        else ("one class only (class0), so every image is for training",)
    )


def test_a_copy_without_a_label_has_no_other_label(toy: str, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    (photos / "unlabelled").mkdir()
    copied = (photos / "train" / "class1" / "003.png").read_bytes()
    (photos / "unlabelled" / "copy.png").write_bytes(copied)
    checks = prepare(Folder().open(from_=photos, seed=0), "some", workers=0, quiet=True).checks
    case = {"file": "unlabelled/copy.png", "like": "train/class1/003.png"}
    assert checks["same_in_train"] == {"count": 1, "cases": [case]}
    assert checks["labels_differ"]["count"] == 0


def test_none_without_a_label_is_held_out(some: Summary) -> None:
    """As of the labelled images alone, and the same for both methods."""
    store = open_store(folder_of("some"), "train")
    learnt, held = split_rows(recipe(dataset="some", holdout=0.2), store)
    assert torch.equal(held, split_rows(recipe(holdout=0.2), store.with_labels())[1])
    assert sorted([*learnt.tolist(), *held.tolist()]) == list(range(32)) and len(held) == 4
    tuned = training_rows(recipe(dataset="some", holdout=0.2, method="supervised"))
    assert tuned.row is not None
    assert tuned.row.tolist() == [row for row in learnt.tolist() if row < 20]
    with pytest.raises(UsageError, match=r"--holdout 0.02 would hold none of 20 images out"):
        split_rows(recipe(dataset="some", holdout=0.02), store)


@pytest.mark.parametrize(("num", "labels"), [(3, "none"), (6, "1")])
def test_too_few_labels_are_told_before_the_first_step(
    toy: str, tmp_path: Path, num: int, labels: str
) -> None:
    """One label is no more than none: it has no neighbour, and no other class."""
    photos = tmp_path / "photos"
    for label in (0, 1):
        for path in (photos / "train" / f"class{label}").glob("00[1-9].png"):
            path.rename(tmp_path / f"{label}{path.name}")
    more = make_photos(tmp_path / "more", per_class=8, classes=1, side=28)
    (more / "class0").rename(photos / "unlabelled")
    prepare(Folder().open(from_=photos, seed=0), "few", workers=0, quiet=True)
    few = recipe(dataset="few", num_images=num, epochs=1)
    assert not training_rows(few).learnable
    told = f"of the {num} images of 'few' to learn from {labels} has a label, .* raise run.num_"
    stages.pretrain(few, "run")
    assert all("knn_top1" not in line for line in Record(RUN).metrics())
    assert not any(command.startswith("fastidmm finetune") for command in stages.following(RUN))
    with pytest.raises(DataError, match=told):
        run_all(few, "other")
    assert not Path("runs/other").exists()
    with pytest.raises(DataError, match=told):
        stages.finetune(RUN, FIRST, [])
    with pytest.raises(DataError, match=told):
        scoring.evaluate(RUN)
    with pytest.raises(DataError, match=told):
        stages.pretrain(recipe(dataset="few", num_images=num, method="supervised"), "labels")


def test_learning_classes_is_as_without_the_others(
    some: Summary, capsys: pytest.CaptureFixture[str]
) -> None:
    """To the bit: what is never seen changes nothing."""
    for name in ("toy", "some"):
        stages.pretrain(recipe(dataset=name, method="supervised", epochs=2), name)
    assert losses(Path("runs/some")) == losses(Path("runs/toy"))
    assert Record(Path("runs/some")).environment()["num_train"] == 20
    told = "training on 20 images: others have no labels."
    assert capsys.readouterr().err.count(told) == 1


def test_a_run_pretrains_on_all_and_judges_by_those_with_labels(some: Summary) -> None:
    stages.pretrain(recipe(dataset="some", epochs=2), "run")
    record = Record(RUN)
    assert record.environment()["num_train"] == 32
    encoder = build_encoder(
        "vit_micro", record.recipe.backbone, resolution=16, counters=Counters(0)
    )
    load_weights(encoder, encoder_weights(record.result), source="the run")
    known = open_store(folder_of("toy"), "train")
    features = outputs(encoder, known, resolution=16, dtype=torch.float32)
    near = knn(features, known.label, features, 2, own=True)
    assert record.metrics()[-1]["knn_top1"] == score(near, known.label).value
    assert stages.following(RUN)[0].startswith("fastidmm finetune")
    stages.finetune(RUN, FIRST, [])
    assert Record(RUN / "finetune-16").environment()["num_train"] == 20
    found = scoring.evaluate(RUN)
    assert (found["num_train"], found["num_test"]) == (20, 8)
    # kNN and the probe learn from the labelled alone: as on the toy, by the same weights.
    toy_test = open_store(folder_of("toy"), "test")
    same = scoring.frozen_scores(record.recipe, encoder_weights(record.result), known, toy_test)
    assert {key: found["scores"]["pretrained"][key] for key in same} == same
    page = write(RUN).read_text()
    assert "Pretraining on these 32 images" in page and "A dashed frame: of another" in page
    groups = re.findall(r'<div class="near">(.*?)</div>', page, re.DOTALL)
    framed, differ, kinds = [], [], set()
    for group in groups:
        figures = re.findall(r'class="face( other)?">.*?<figcaption>(.*?)</fig', group)
        labels = [caption.split()[-1] for _, caption in figures]
        framed += [bool(other) for other, _ in figures]
        differ += [{labels[0], label} == {"class0", "class1"} for label in labels]
        kinds |= {"none" if label.endswith(".png") else label for label in labels}
    assert framed == differ and kinds == {"none", "class0", "class1"}


def test_a_forecast_has_all_stages(some: Summary, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "STEPS", 4)
    small = recipe(dataset="some", epochs=1)
    assert [stage.stage for stage in trial.forecasts(small)] == [
        "pretrain",
        "finetune-16",
        "scratch-16",
        "finetune-32",
        "evaluate",
    ]
