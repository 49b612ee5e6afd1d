"""fastidmm from Python: the same runs as the commands make."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_cli import Type
from test_cli import typed as typed

import fastidmm
from fastidmm import api, cli
from fastidmm.errors import UsageError
from fastidmm.evaluate import outputs
from fastidmm.record import Record, newest_weights
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
    kept = newest_weights(run.folder)
    assert all(torch.equal(p, kept[name]) for name, p in run.backbone().named_parameters())


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
