"""What other programs load of a run gives what the run gives."""

import importlib.util
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import exports
import pytest
import timm
import torch
import trials
from made_runs import made_run, noise, save, stir
from PIL import Image
from safetensors import safe_open
from torch import Tensor, nn

from fastidmm import scoring
from fastidmm.batch import Method
from fastidmm.errors import DataError, NumericalError, UsageError
from fastidmm.evaluate import PLAIN, Score, outputs
from fastidmm.exporting import formats
from fastidmm.exporting.export import export
from fastidmm.kernels.views import plain_views
from fastidmm.plan import central_crops
from fastidmm.record import Record
from fastidmm.store import folder_of, open_store

RUN, OUT = Path("runs/one"), Path("out")
THREE = ["README.md", "config.json", "model.safetensors"]
CASES = [
    ("vit_micro", 48),
    ("deit_tiny", 112),
    ("deit_tiny", 224),
    ("pvtv2_b0", 112),
    ("t2t_vit_7", 112),
    ("timm:test_resnet", 64),
    ("timm:deit_tiny_distilled_patch16_224", 32),  # two classifiers, whose mean is given
]


@torch.inference_mode()
def truth(method: Method, images: Tensor) -> Tensor:
    """What a method gives for images: logits where it has a classifier, or else features."""
    model = method.classifier() or method.backbone
    found: Tensor = model.eval()(images)
    return found


@torch.inference_mode()
def by_timm(folder: Path, images: Tensor, **changes: Any) -> Tensor:
    found: Tensor = timm.create_model(f"local-dir:{folder}", pretrained=True, **changes).eval()(
        images
    )
    return found


def missing(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """As if these packages were not installed."""
    there: Callable[[str], Any] = importlib.util.find_spec
    monkeypatch.setattr(formats, "find_spec", lambda n: None if n in names else there(n))


@pytest.mark.parametrize(("backbone", "resolution"), CASES)
@pytest.mark.parametrize("method", ["idmm", "supervised"])
def test_timm_gives_the_same(toy: str, backbone: str, resolution: int, method: str) -> None:
    learnt = made_run(RUN, backbone, resolution, method)
    told = export(RUN, "timm", OUT)
    assert sorted(p.name for p in OUT.iterdir()) == THREE
    images = noise(resolution)
    ours = truth(learnt, images)
    # To rounding: timm's last block works on every token, and ours on the class token alone.
    torch.testing.assert_close(by_timm(OUT, images), ours, rtol=0, atol=1e-5)
    assert told["gives"] == ("features" if method == "idmm" else "logits")
    assert tuple(ours.shape) == (3, told["width"])
    config = json.loads((OUT / "config.json").read_text())
    assert config["num_classes"] == (0 if method == "idmm" else 2)
    assert config.get("label_names", []) == ([] if method == "idmm" else ["class0", "class1"])
    seen = timm.data.resolve_data_config({}, model=timm.create_model(f"local-dir:{OUT}"))
    assert tuple(seen["input_size"]) == (3, resolution, resolution)
    # Features begin anew for other classes, with the backbone's weights and a head of their own.
    assert by_timm(OUT, images, num_classes=5).shape == (3, 5)


@pytest.mark.parametrize("resolution", [16, 48, 112, 224])
def test_timm_sees_photographs_as_evaluation_does(toy: str, resolution: int) -> None:
    """The same pixels, to the 8 bits that Pillow rounds to; 48 px takes 55 first, not 54."""
    made_run(RUN, "vit_micro", resolution)
    export(RUN, "timm", OUT)
    seen = timm.data.resolve_data_config({}, model=timm.create_model(f"local-dir:{OUT}"))
    transform = timm.data.create_transform(**seen)
    paths = [Path(f"photos/test/class0/{number:03d}.png") for number in range(4)]
    theirs = torch.stack([transform(Image.open(path)) for path in paths])
    store = open_store(folder_of("toy"), "test")
    crops = central_crops(
        torch.arange(4), store.height[:4], store.width[:4],
        size=resolution, resize=round(resolution * 256 / 224),
    )  # fmt: skip
    ours = plain_views(store, crops, PLAIN)
    assert (ours - theirs).abs().max() < 1.5 / 255 / min(PLAIN.std)


def test_a_stage_is_exported_by_the_weights_that_count(toy: str) -> None:
    """With held-out images the best on those; the newest otherwise."""
    made_run(RUN)
    stage = RUN / "finetune-48"
    newest = made_run(stage, "vit_micro", 48, "supervised", init="../checkpoints/step_000000006")
    export(stage, "timm", OUT)
    images = noise(48)
    torch.testing.assert_close(by_timm(OUT, images), truth(newest, images))
    held = RUN / "finetune-48-2"
    best = made_run(held, "vit_micro", 48, "supervised", holdout=0.2)
    record = Record(held)
    save(record, 4, best, record.best, best_step=4)
    last = made_run(RUN / "other", "vit_micro", 48, "supervised", holdout=0.2)
    stir(last, 2)
    save(record, record.total_steps, last, best_step=4)
    export(held, "timm", Path("best"))
    torch.testing.assert_close(by_timm(Path("best"), images), truth(best, images))
    assert (truth(best, images) - truth(last, images)).abs().max() > 1e-2
    assert "best on held-out images, after 2 of 2 epochs" in Path("best/README.md").read_text()


def answers(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What the card's Python finds for photograph.jpg, typed beside the folder."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    place: dict[str, Any] = {}
    with monkeypatch.context() as patch:
        patch.chdir(folder.parent)
        exec(compile(code, "README.md", "exec"), place)
    return place[name]


@pytest.mark.parametrize(
    ("backbone", "to"),
    [
        ("vit_micro", "timm"),
        ("t2t_vit_7", "timm"),
        pytest.param("vit_micro", "pt2", marks=pytest.mark.slow),
        pytest.param("vit_micro", "onnx", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("method", ["idmm", "supervised"])
def test_the_card_tells_how_to_load_it(
    toy: str, backbone: str, to: str, method: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """What it prints is what evaluation gives for that photograph."""
    if to == "onnx":
        pytest.importorskip("onnxruntime")
    learnt = made_run(RUN, backbone, 48, method)
    told = export(RUN, to, Path("some/where"))
    assert told["difference"] is not None and told["difference"] < 1e-5
    Image.open("photos/test/class1/002.png").save("some/photograph.jpg", format="PNG")
    found = torch.as_tensor(answers(Path("some/where"), told["gives"], monkeypatch))
    store = open_store(folder_of("toy"), "test").select(torch.tensor([6]))
    model = learnt.classifier() or learnt.backbone
    ours = outputs(model, store, resolution=48, dtype=torch.float32)
    torch.testing.assert_close(found, ours, rtol=0, atol=0.02 * float(ours.abs().max()))
    if method == "supervised":
        assert capsys.readouterr().out.strip() == f"class{int(ours.argmax())}"


@pytest.mark.slow
@pytest.mark.parametrize("to", ["pt2", "onnx"])
@pytest.mark.parametrize("backbone", ["vit_micro", "pvtv2_b0", "t2t_vit_7", "timm:test_resnet"])
def test_programs_take_any_number_of_images(toy: str, backbone: str, to: str) -> None:
    if to == "onnx":
        pytest.importorskip("onnxruntime")
    learnt = made_run(RUN, backbone, 64)
    export(RUN, to, OUT)
    assert sorted(p.name for p in OUT.iterdir()) == ["README.md", "config.json", f"model.{to}"]
    model = formats.FORMS[to].load(OUT)
    assert model
    for num in (1, 2, 5):
        images = noise(64, num)
        torch.testing.assert_close(model(images), truth(learnt, images), rtol=1e-4, atol=1e-4)


def test_transformers_finds_what_it_looks_for(toy: str) -> None:
    """The keys that its TimmWrapper reads, and weights said to be torch's."""
    made_run(RUN, "vit_micro", 48, "supervised")
    export(RUN, "timm", OUT)
    config = json.loads((OUT / "config.json").read_text())
    model = timm.create_model(
        config["architecture"], num_classes=config["num_classes"], **config["model_args"]
    )
    with safe_open(OUT / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(model.state_dict())
    assert config["label_names"] == ["class0", "class1"]
    assert config["pretrained_cfg"]["input_size"] == [3, 48, 48]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backbone", ["vit_micro", "t2t_vit_7"])
def test_transformers_gives_the_same(toy: str, backbone: str) -> None:
    transformers = pytest.importorskip("transformers")
    images = noise(48)
    for method, kind in (("supervised", "AutoModelForImageClassification"), ("idmm", "AutoModel")):
        learnt = made_run(RUN / method, backbone, 48, method)
        export(RUN / method, "timm", OUT / method)
        with torch.inference_mode():
            told = getattr(transformers, kind).from_pretrained(OUT / method).eval()(images)
        found = told.logits if method == "supervised" else told.pooler_output
        torch.testing.assert_close(found, truth(learnt, images))


def test_the_card_tells_scores_of_these_very_weights(toy: str) -> None:
    made_run(RUN)
    stage = RUN / "finetune-48"
    made_run(stage, "vit_micro", 48, "supervised", init="../checkpoints/step_000000006")
    export(RUN, "timm", Path("before"))
    assert "Not evaluated on test images." in Path("before/README.md").read_text()
    scores = scoring.evaluate(RUN)["scores"]
    export(RUN, "timm", Path("features"))
    card = Path("features/README.md").read_text()
    cells = [scores[arm]["knn"] for arm in ("pretrained", "random")]
    ours, theirs = (str(Score(cell["correct"], cell["num"])) for cell in cells)
    assert f"| kNN on frozen features | {ours} | {theirs} |" in card
    assert "- method: idmm, 2 epochs in batches of 8, from random weights" in card
    assert "- images: 20 of the dataset toy" in card and "label_names" not in card
    export(stage, "timm", Path("classes"))
    card = Path("classes/README.md").read_text()
    cell = scores["pretrained"]["finetuned_48"]
    assert f"| top-1 | {Score(cell['correct'], cell['num'])} |\n" in card
    assert "from idmm (2 epochs at 32 px)" in card
    assert Record(stage).recipe.toml() in card
    made_run(RUN / "finetune-48-2", "vit_micro", 48, "supervised")
    export(RUN / "finetune-48-2", "timm", Path("others"))
    assert "Not evaluated on test images." in Path("others/README.md").read_text()


def test_scores_of_weights_trained_on_since_are_not_on_the_card(toy: str) -> None:
    """Evaluated when three of its six steps were made."""
    learnt, record = made_run(RUN), Record(RUN)
    shutil.rmtree(record.checkpoints)
    save(record, 3, learnt)
    scoring.evaluate(RUN)
    export(RUN, "timm", Path("then"))
    assert "| kNN on frozen features |" in Path("then/README.md").read_text()
    stir(learnt, 2)
    save(record, 6, learnt)
    export(RUN, "timm", Path("now"))
    card = Path("now/README.md").read_text()
    assert "Not evaluated on test images." in card and "frozen features" not in card


def test_an_export_that_is_killed_leaves_nothing_half_done(tmp_path: Path) -> None:
    with trials.toy(tmp_path):
        found = exports.kills(4)
        assert not found.broken, str(found)


def test_every_form_is_put_to_the_test_by_backbone(tmp_path: Path) -> None:
    with trials.toy(tmp_path):
        found = exports.agreements("timm", {"vit_micro": 32})
    assert found.trials == 2 and not found.broken, str(found)


def test_a_folder_that_is_taken_is_refused(toy: str) -> None:
    made_run(RUN)
    OUT.mkdir()
    (OUT / "mine.txt").write_text("mine")
    Path("file").write_text("mine")
    for out in (OUT, Path("file")):
        with pytest.raises(UsageError, match="give --out another name"):
            export(RUN, "timm", out)
    with pytest.raises(UsageError, match="a file is in the way"):
        export(RUN, "timm", Path("file/out"))
    assert [p.name for p in OUT.iterdir()] == ["mine.txt"]
    Path("empty").mkdir()
    export(RUN, "timm", Path("empty"))
    assert sorted(p.name for p in Path("empty").iterdir()) == THREE


class Shifted(nn.Module):
    """A program that gives what it should, and a little more."""

    def forward(self, images: Tensor) -> Tensor:
        return by_timm(next(Path("deep").glob(".out.part")), images) * 1.001


def test_what_gives_other_numbers_gets_no_name(toy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made_run(RUN)
    form = formats.Form("model.safetensors", formats.FORMS["timm"].write, lambda folder: Shifted())
    monkeypatch.setitem(formats.FORMS, "timm", form)
    with pytest.raises(NumericalError, match="by 1e-03 of the largest"):
        export(RUN, "timm", Path("deep/out"))
    assert not list(Path("deep").iterdir())


def test_what_timm_cannot_build_is_said(toy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made_run(RUN, "timm:test_resnet", 32, "supervised")
    monkeypatch.setattr(
        "fastidmm.exporting.formats.configured",
        lambda found, whole=formats.configured: {
            **whole(found), "pretrained_cfg": {**whole(found)["pretrained_cfg"], "classifier": "no"}
        },
    )  # fmt: skip
    with pytest.raises(UsageError, match=r"timm:test_resnet cannot be had as timm .*another --to"):
        export(RUN, "timm", OUT)
    assert not OUT.exists()


def test_missing_packages_are_named_before_anything(
    toy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_run(RUN)
    missing(monkeypatch, "onnx", "onnxscript")
    with pytest.raises(UsageError, match=re.escape("pip install 'fastidmm[onnx]'")):
        export(RUN, "onnx", OUT)
    assert not OUT.exists()


def test_an_unfinished_classifier_is_refused_and_a_backbone_is_not(toy: str) -> None:
    made_run(RUN)
    stage = RUN / "finetune-48"
    made_run(stage, "vit_micro", 48, "supervised")
    for folder in (RUN, stage):
        record = Record(folder)
        (done,) = record.checkpoints.iterdir()
        done.rename(done.with_name("step_000000003"))
    with pytest.raises(UsageError, match="`fastidmm resume runs/one` goes on with it"):
        export(stage, "timm", OUT)
    export(RUN, "timm", OUT)
    assert "the last, after 1 of 2 epochs" in (OUT / "README.md").read_text()


def test_classes_of_another_dataset_are_not_taken(toy: str) -> None:
    from fastidmm.datasets.folder import Folder
    from fastidmm.preparing.prepare import prepare

    made_run(RUN, method="supervised")
    Path("photos/train/class1").rename("photos/train/other")
    Path("photos/test/class1").rename("photos/test/other")
    Path("photos/train/other/000.png").unlink()
    prepare(Folder().open(from_=Path("photos"), seed=0), "toy", workers=0, quiet=True)
    with pytest.raises(DataError, match="prepared anew"):
        export(RUN, "timm", OUT)
