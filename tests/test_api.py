"""fastidmm from Python: the same runs as the commands make."""

import ast
import inspect
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import ExifTags, Image
from test_cli import Type
from test_cli import typed as typed
from torch import nn
from torchvision.transforms import v2

import fastidmm
from fastidmm import api, checkpoint, cli
from fastidmm.assemble import build_method, initialise
from fastidmm.chance import Counters
from fastidmm.errors import UsageError
from fastidmm.evaluate import outputs
from fastidmm.record import Record, encoder_weights
from fastidmm.store import folder_of, open_store

SMALL = {"backbone": "vit_micro", "resolution": 16, "epochs": 2, "batch_size": 8}


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in Record(folder).metrics()]


def test_a_run_from_python_is_the_command_s(
    typed: Type, home: Path, photos: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos(Path("mine"), per_class=10)  # type: ignore[operator]
    summary = fastidmm.prepare("folder", from_="mine", name="toy")
    assert summary.lines()[0].startswith("toy: 16 training and 4 test images, 2 classes")
    settings = {"finetune.resolution": 16, "run.knn_every": 1}
    run = fastidmm.pretrain(dataset="toy", seed=3, run="ours", settings=settings, **SMALL)  # type: ignore[arg-type]
    words = "--dataset toy --backbone vit_micro --resolution 16 --epochs 2 --batch-size 8 --seed 3"
    sets = [w for key, value in settings.items() for w in ("--set", f"{key}={value}")]
    assert typed("pretrain", *words.split(), *sets, "--run", "theirs")[0] == 0
    assert losses(run.folder) == losses(Path("runs/theirs")) and run.finished
    assert [line["loss"] for line in run.metrics()] == losses(run.folder)

    stage = run.finetune(resolution=16, epochs=1, batch_size=8, settings={"method.mix": "none"})
    words = "--resolution 16 --epochs 1 --batch-size 8 --set method.mix=none"
    assert typed("finetune", "theirs", *words.split())[0] == 0
    assert losses(stage.folder) == losses(Path("runs/theirs/finetune-16"))
    assert [each.folder for each in run.stages] == [stage.folder]
    run.finetune(scratch=True, resolution=16, epochs=1, batch_size=8)
    assert [each.folder.name for each in run.stages] == ["finetune-16", "scratch-16"]
    assert stage.summary()["test_top1"]["num"] == 4
    assert set(run.evaluate()["scores"]) == {"pretrained", "random"}
    assert run.report().is_file() and run.resume() is run
    assert fastidmm.Run("ours").folder == run.folder and repr(run) == "Run('runs/ours')"

    store = open_store(folder_of("toy"), "train")
    features = outputs(run.backbone(), store, resolution=16, dtype=torch.float32)
    assert features.shape == (16, 128) and not run.backbone().training
    kept = encoder_weights(Record(run.folder).result)
    assert all(torch.equal(p, kept[name]) for name, p in run.backbone().named_parameters())


@pytest.fixture
def tuned(toy: str) -> api.Run:
    """A run of one epoch that drops half the paths, with a stage of one."""
    settings = {"backbone.drop_path": 0.5, "finetune.resolution": 24}
    run = fastidmm.pretrain(dataset=toy, run="run", settings=settings, **SMALL | {"epochs": 1})  # type: ignore[arg-type]
    run.finetune(resolution=24, epochs=1, batch_size=8)
    return run


def test_a_classifier_is_the_one_that_is_scored(tuned: api.Run) -> None:
    """Its logits are the head's of a checkpoint on the backbone's features."""
    (stage,) = tuned.stages
    found = stage.classifier()
    images = torch.randn(3, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    (kept,), _ = checkpoint.load(Record(stage.folder).result, checkpoint.MODEL)
    features = stage.backbone()(images)
    logits = features @ kept["head.weight"].T + kept["head.bias"]
    torch.testing.assert_close(found(images), logits)
    assert not found.training and all(p.requires_grad for p in found[1].parameters())  # type: ignore[index]
    test = open_store(folder_of("toy"), "test")
    right = outputs(found, test, resolution=24, dtype=torch.float32).argmax(1) == test.label
    assert int(right.sum()) == tuned.evaluate()["scores"]["pretrained"]["finetuned_24"]["correct"]
    with pytest.raises(UsageError, match=r"runs/run learnt no classes, by idmm: take a stage"):
        tuned.classifier()


def test_a_transform_gives_what_is_scored(tuned: api.Run, tmp_path: Path) -> None:
    """To the bit what `outputs` gives a model, and to a level what torchvision makes of it."""
    look = pickle.loads(pickle.dumps(tuned.transform()))  # as workers of a DataLoader have it
    test = open_store(folder_of("toy"), "test")
    seen = outputs(nn.Flatten(), test, resolution=16, dtype=torch.float32)
    files = sorted((tmp_path / "photos" / "test").rglob("*.png"))
    plain = v2.Compose(
        [
            v2.Resize(18, interpolation=v2.InterpolationMode.BICUBIC),  # 16 x 256 / 224
            v2.CenterCrop(16),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    for file, pixels in zip(files, seen, strict=True):
        image = Image.open(file)
        assert torch.equal(look(image).flatten(), pixels)
        torch.testing.assert_close(look(image), plain(image), rtol=0, atol=2.01 / 255 / 0.224)
    assert len(files) == 8 and tuned.stages[0].transform()(image).shape == (3, 24, 24)
    assert tuned.transform(resolution=32)(image).shape == (3, 32, 32)


def test_a_transform_looks_at_photographs_upright_and_leaves_them_alone(tuned: api.Run) -> None:
    upright = Image.effect_noise((40, 30), 80).convert("RGB")
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    turned.getexif()[ExifTags.Base.Orientation] = 6  # to be turned clockwise
    look = tuned.transform()
    assert torch.equal(look(turned), look(upright)) and turned.size == (30, 40)
    clear = Image.new("RGBA", (20, 20))
    assert torch.equal(look(clear), look(Image.new("RGB", (20, 20), "white")))


def test_a_backbone_at_another_resolution_is_a_stage_s(tuned: api.Run) -> None:
    """Which begins with the run's weights, position embeddings resized."""
    images = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    stage = Record(tuned.stages[0].folder)
    method = build_method(stage.recipe, open_store(folder_of("toy"), "train"), Counters(0))
    initialise(method, stage.folder, stage.recipe)
    theirs = method.backbone.eval()(images)
    assert torch.equal(tuned.backbone(resolution=24)(images), theirs)
    with pytest.raises(UsageError, match=r"16 x 16 px, not 24 x 24"):
        tuned.backbone()(images)
    with pytest.raises(UsageError, match="multiple of 8 px, not 20"):
        tuned.backbone(resolution=20)


def test_a_loop_of_one_s_own_says_which_step_and_images_come(tuned: api.Run) -> None:
    """What is dropped is a function of both."""
    backbone, images = tuned.backbone().train(), torch.ones(1, 3, 16, 16).expand(8, -1, -1, -1)
    with pytest.raises(UsageError, match=r"backbone\.set_place\(.*step=STEP\), or backbone\.eval"):
        backbone(images)

    def made(step: int) -> torch.Tensor:
        backbone.set_place(torch.arange(8), step=step)
        return backbone(images).detach()  # type: ignore[no-any-return]

    first, second = made(0), made(1)
    assert torch.equal(made(0), first) and not torch.equal(first, second)
    assert len(first.unique(dim=0)) > 1 and len(backbone.eval()(images).unique(dim=0)) == 1


def test_wrong_ways(toy: str) -> None:
    with pytest.raises(UsageError, match="did you mean 'vit_micro'"):
        fastidmm.pretrain(dataset=toy, backbone="vit_mikro")
    with pytest.raises(UsageError, match="did you mean 'epochs'"):
        fastidmm.pretrain(dataset=toy, epoch=3)  # type: ignore[call-arg]
    with pytest.raises(UsageError, match=r"settings are TABLE\.KEY, such as optim\.lr, not 'lr'"):
        fastidmm.pretrain(dataset=toy, settings={"lr": 1e-3})
    with pytest.raises(UsageError, match="no run at"):
        fastidmm.Run("nothing")
    with pytest.raises(AttributeError, match="no attribute 'pretrane'"):
        fastidmm.pretrane  # noqa: B018
    assert not Path("runs").exists()


def test_names_are_the_commands_flags() -> None:
    """Whoever adds a flag to a command adds it to Python."""
    others = {
        "named",
        "run",
        "recipe",
        "assignments",
        "as_json",
        "dataset",
        "backbone",
        "scratch",
        "gpus",
    }
    others |= {"method", "init", "num_images", "gpus"}
    for command, flags in ((cli.pretrain, api.Flags), (cli.finetune, api.StageFlags)):
        asked = set(inspect.signature(command).parameters)
        assert asked - others == set(flags.__annotations__) - others


def test_importing_costs_nothing() -> None:
    code = "import fastidmm, sys; assert not {'torch', 'typer', 'pydantic'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert set(fastidmm.__all__) == {"__version__", "Run", "prepare", "pretrain"}


def test_the_snippet_of_the_module_parses() -> None:
    """Its calls take the names it gives them."""
    snippet = inspect.cleandoc((api.__doc__ or "").partition("\n\n")[2])
    calls = [node for node in ast.walk(ast.parse(snippet)) if isinstance(node, ast.Call)]
    told = {k.arg for call in calls for k in call.keywords}
    assert told <= {"from_", "name", *api.Flags.__annotations__}
