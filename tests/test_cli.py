"""The commands as a person types them: right uses, and every wrong one in one sentence."""

import errno
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from typer.core import TyperGroup

import fastidmm
from fastidmm import assemble, checkpoint, cli
from fastidmm.errors import UsageError
from fastidmm.folders import existing_run, is_stage

Type = Callable[..., tuple[int, str, str]]
TINY = ["--backbone", "vit_micro", "--epochs", "1", "--batch-size", "8", "--resolution", "16"]
MakePhotos = Callable[..., Path]


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Type:
    """Type a command; its status, stdout and stderr."""

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fastidmm", *map(str, words)])
        try:
            cli.main()
            status: object = 0
        except SystemExit as end:
            status = end.code or 0
        shown = capsys.readouterr()
        assert isinstance(status, int)
        assert "Traceback" not in shown.err
        return status, shown.out, shown.err

    return run


def sentence(err: str) -> str:
    """The last line, which says what is wrong and what to do."""
    return err.strip().splitlines()[-1]


def test_help_is_instant_because_torch_stays_out() -> None:
    code = "import sys, fastidmm.cli; sys.exit('torch' in sys.modules or 'pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_command_shows_an_example_that_it_takes() -> None:
    whole = typer.main.get_command(cli.app)
    assert isinstance(whole, TyperGroup)
    groups = [c for c in whole.commands.values() if isinstance(c, TyperGroup)]
    found = [c for group in (whole, *groups) for c in group.commands.values()]
    alone = [c for c in found if c not in groups]
    assert len(alone) > 20
    for command in alone:
        (typed,) = re.findall(r"Example: fastidmm (.+)", command.help or "")
        words = shlex.split(typed)
        within = next((g for g in groups if g.name == words[0]), None)
        own = words[2:] if within else words[1:]
        assert command.name == words[1 if within else 0], typed
        command.make_context(command.name, own)  # as typing it would read it


def test_the_version(typed: Type) -> None:
    assert typed("--version") == (0, f"fastidmm {fastidmm.__version__}\n", "")


@pytest.mark.parametrize("command", ["run", "plan"])
def test_commands_of_all_stages_say_whose_their_sizes_are(typed: Type, command: str) -> None:
    said = " ".join(typed(command, "--help")[1].split())
    for key in ("epochs", "batch_size", "resolution"):
        assert f"--set finetune.{key}=N" in said
    assert said.count("retraining") >= 3


def test_list_prints_every_name_whatever_the_width(
    typed: Type, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastidmm.registry import TABLES

    monkeypatch.setenv("COLUMNS", "10")
    _, out, _ = typed("list")
    for kind in ("dataset", "method", "backbone", "loader"):
        assert all(f"  {name}\n" in out + "\n" for name in TABLES[kind])
    _, out, _ = typed("list", "--json")
    assert "timm:NAME" in json.loads(out)["backbones"]


def test_from_photographs_to_a_report(typed: Type, home: Path, photos: MakePhotos) -> None:
    """The README's commands in their order, each naming what it took."""
    photos(Path("photos/train"), per_class=10)
    photos(Path("photos/test"), per_class=4)
    status, out, _ = typed("prepare", "--dataset", "folder", "--from", "photos", "--name", "mine")
    assert status == 0 and "20" in out and "8" in out
    status, out, err = typed("pretrain", *TINY)
    assert status == 0 and "'mine', the one prepared last" in err.splitlines()[0]
    assert "next: fastidmm finetune --resolution 32 --epochs 1 --batch-size 8" in out.splitlines()
    stage = ("--resolution", 16, "--epochs", 1, "--batch-size", 8)
    status, _, err = typed("finetune", *stage)
    assert status == 0 and "runs/mine_vit_micro_idmm, the newest" in err.splitlines()[0]
    assert "54 of 54 tensors, head new" in err
    assert typed("finetune", "--scratch", *stage)[0] == 0
    status, out, _ = typed("evaluate", "--json")
    scores = json.loads(out)["scores"]
    for arm in ("pretrained", "random"):
        assert set(scores[arm]) == {"knn", "linear_probe", "finetuned_16"}
        assert all(cell["num"] == 8 for cell in scores[arm].values())
    status, out, _ = typed("report")
    assert status == 0 and Path(out.strip()).is_file()
    status, out, err = typed("export", "--out", "model", "--json")
    assert status == 0 and "runs/mine_vit_micro_idmm, the newest" in err.splitlines()[0]
    assert set(json.loads(out)["files"]) == {path.name for path in Path("model").iterdir()}
    status, out, _ = typed("embed", "--from", "photos", "--out", "features.npz")
    assert status == 0 and out == "features.npz: 28 photographs, 128 features of each\n"


def test_from_photographs_without_labels_to_features(typed: Type, bare: str) -> None:
    status, out, _ = typed("pretrain", *TINY)
    assert status == 0 and "finetune" not in out
    told, few, *following = out.splitlines()
    assert re.search(r", retrieval top1 \d\.\d{3}, rankme \d+\.\d{3}$", told)
    assert "crops logged were recognised as their own image" in few and "--epochs 2 " in few
    assert following == [
        "next: fastidmm report",
        "next: fastidmm embed --from PHOTOS --out features.npz",
    ]
    for line in following:
        words = line.replace("PHOTOS", bare).split()
        assert typed(*words[2:])[0] == 0
    status, _, err = typed("finetune")
    assert status == 3 and "have no labels" in sentence(err)
    (row,) = json.loads(typed("runs", "list", "--json")[1])
    assert row["knn_top1"] is None and row["rankme"] >= 1.0
    assert f"retrieval {100 * row['retrieval_top1']:.1f} %" in typed("runs", "list")[1]


def test_a_split_that_was_drawn_is_said(typed: Type, home: Path, photos: MakePhotos) -> None:
    photos(Path("plain"), per_class=10)
    _, out, _ = typed("prepare", "--dataset", "folder", "--from", "plain", "--name", "plain")
    assert "which image is for training and which for testing: seed 0" in out.splitlines()


def test_run_does_it_all(typed: Type, toy: str) -> None:
    words = ["--set", "finetune.resolution=16", "--set", "finetune.epochs=1"]
    words += ["--set", "finetune_high.epochs=1", "--set", "finetune_high.batch_size=8"]
    status, out, err = typed("run", "--dataset", toy, *TINY, *words, "--run", "all")
    assert status == 0 and "top-1 on 8 test images" in out
    assert "56 of 56 tensors, head included: from runs/all/finetune-16" in err
    assert Path("runs/all/finetune-32").is_dir() and not Path("runs/all/scratch-32").exists()
    assert Path("runs/all/report.html").is_file()
    assert out.splitlines()[-1] == "next: open runs/all/report.html in a browser"


def test_a_part_of_the_images_is_taken_by_class_and_said(typed: Type, toy: str) -> None:
    status, out, err = typed("pretrain", *TINY, "--set", "run.num_images=6", "--json")
    assert status == 0 and "training on 6 images, chosen by class and seed 0." in err
    assert json.loads(out)["steps"] == 1


def test_timms_models_are_found_by_a_fresh_process(toy: str) -> None:
    """Elsewhere in this process torchvision was made importable already."""
    words = [*TINY[2:], "--backbone", "timm:vit_tiny_patch16_224", "--run", "timm"]
    done = subprocess.run(
        [sys.executable, "-m", "fastidmm", "pretrain", *words], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_nothing_prepared(typed: Type, home: Path) -> None:
    status, _, err = typed("pretrain")
    assert status == 2 and "fastidmm prepare --dataset demo" in sentence(err)


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["prepare", "--dataset", "folder", "--from", "nowhere"], 2, "nowhere"),
        (["prepare", "--dataset", "folder", "--from", "nope.csv"], 2, "there is no file nope.csv"),
        (["prepare", "--dataset", "folder", "--from", "empty"], 3, "empty"),
        (["prepare", "--dataset", "folder"], 2, "--from"),
        (["prepare", "--dataset", "fodler"], 2, "did you mean 'folder'"),
        (["prepare"], 2, "one of --dataset NAME, --list and --weights NAME"),
        (["prepare", "--from", "two", "--name", "mine"], 2, "add --dataset folder for your own"),
        (["prepare", "--list", "--dataset", "folder"], 2, "one of --dataset NAME"),
        (["prepare", "--dataset", "cars"], 2, "put cars_train.tgz, cars_test.tgz, car_devkit.tgz"),
        (["prepare", "--dataset", "pets", "--from", "empty"], 2, "images.tar.gz"),
        (["prepare", "--dataset", "sin10k"], 2, "image-net.org"),
        (["prepare", "--dataset", "folder", "--from", "one"], 3, "2"),
        (["prepare", "--dataset", "folder", "--from", "two", "--name", "../x"], 2, "cannot name"),
    ],
)
def test_wrong_ways_to_prepare(
    typed: Type, home: Path, photos: MakePhotos, words: list[str], status: int, message: str
) -> None:
    Path("empty").mkdir()
    photos(Path("one"), per_class=1, classes=1)
    photos(Path("two"), per_class=2)
    found, _, err = typed(*words)
    assert (found, message in sentence(err)) == (status, True), err
    assert not list(home.glob("stores/*"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dataset", "tou"], "did you mean 'toy'"),
        (["--backbone", "vit_mikro"], "did you mean 'vit_micro'"),
        (["--method", "immd"], "did you mean 'idmm'"),
        (["--method", "supervised", "--recipe", "nothing"], "no recipe 'nothing'"),
        (["--set", "optim.lrr=1"], "did you mean 'lr'"),
        (["--set", "optim.lr=fast"], "optim.lr = 'fast'"),
        (["--resolution", "20"], "try --resolution 16"),
        (["--device", "cuda:7"], "no such GPU"),
        (["--device", "gpu"], "choose auto, cpu, cuda"),
        (["--precision", "fp8"], "run.precision = 'fp8'"),
        (["--optimizer", "fused_lamb"], "needs an NVIDIA GPU"),
        (["--optimizer", "lamb"], "run.optimizer = 'lamb'"),
        (["--loader", "residence"], "did you mean 'resident'? Known: auto, dali"),
        (["--recipe", "absent.toml"], "absent.toml cannot be read (No such file or directory)"),
        (["--method=supervised", "--set=method.mix=nome"], "'cutmix', 'mixup' or 'alternate'"),
        (["--set", "optim.warmup_epochs=2"], "as by --set optim.warmup_epochs=0"),
        (["--set", "run.num_images=21"], "the store has 20 images: lower it, or take all by "),
        (["--run", "a/../.b"], "cannot name a run"),
        (["--set", "optim.lr=inf"], "optim.lr"),
        (["--set", "optim.betas=[2,3]"], "optim.betas"),
        (["--set", "method.cutmix_groups=0"], "method.cutmix_groups"),
        (["--set", "method.large_scale=[0,0]"], "0 < low <= high <= 1"),
        (["--set", "backbone.drop_path=1.0"], "backbone.drop_path"),
        (["--backbone", "timm:resnet999"], "timm has no model 'resnet999': the nearest are resnet"),
        (["--backbone", "timm:vitt_tiny"], "timm.list_models('vitt*')"),
    ],
)
def test_wrong_ways_to_pretrain(typed: Type, toy: str, words: list[str], message: str) -> None:
    status, _, err = typed("pretrain", *TINY, *words)
    assert status == 2 and message in sentence(err), err
    assert not Path("runs").exists()


def test_views_that_a_cpus_memory_cannot_hold(
    typed: Type, toy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two batches of 8 images with six crops of 16 px each, in float32."""
    needed = 2 * 8 * 6 * 3 * 16**2 * 4
    words = ["pretrain", *TINY, "--device", "cpu"]
    monkeypatch.setattr(assemble, "available_memory", lambda: needed - 1001)
    monkeypatch.setattr(
        assemble, "peak_memory", lambda: 1000
    )  # an earlier stage's, to be had again
    status, _, err = typed(*words)
    assert status == 5 and "lower --batch-size, 8, or --resolution, 16." in sentence(err)
    assert not Path("runs").exists()
    monkeypatch.setattr(assemble, "available_memory", lambda: needed - 1000)
    assert typed(*words)[0] == 0


@pytest.mark.parametrize("way", ["-q", "--quiet", "--log-file"])
def test_messages_go_elsewhere(way: str, typed: Type, toy: str) -> None:
    """Answers and errors stay; a file has what the terminal would have, one run after the other."""
    words = [way, "notes.txt"] if way == "--log-file" else [way]
    for name in ("one", "two"):
        status, out, err = typed(*words, "pretrain", *TINY, "--run", name)
        assert (status, err) == (0, "") and out.startswith(f"runs/{name}: ")
    status, out, err = typed(*words, "pretrain", *TINY, "--run", "one")
    assert status == 2 and "runs/one exists" in sentence(err)
    if way == "--log-file":
        told = Path("notes.txt").read_text()
        assert "one: epoch" in told and "two: epoch" in told
    assert typed("list")[2] == ""  # and stderr is what it was
    status, _, err = typed("--log-file", ".", "list")
    assert status == 2 and sentence(err).endswith("--log-file . is a folder: name a file in it.")
    status, _, err = typed("--log-file", "nowhere/notes.txt", "list")
    assert status == 2 and "there is no such folder" in sentence(err)


@pytest.mark.parametrize(
    "words",
    ["evaluate", "finetune", "resume", "verify", "report", "export --out o",
     "embed --from photos --out f.npz", "predict --from photos"],
)  # fmt: skip
def test_a_run_is_named_once(typed: Type, home: Path, words: str) -> None:
    """Twice the same is no error: there is none of that name."""
    command, *flags = words.split()
    status, _, err = typed(command, "one", "--run", "two", *flags)
    told = "RUN and --run mean the same, and name one and two: give one."
    assert status == 2 and sentence(err) == f"fastidmm: {told}"
    assert "no run at runs/one" in sentence(typed(command, "one", "--run", "one", *flags)[2])


def test_a_stage_is_named_by_its_run_in_runs(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the same path elsewhere, unless that begins with a dot or a slash."""
    for folder in ("runs/h", "runs/h/finetune-32", "elsewhere/h", "h/finetune-32"):
        Path(folder).mkdir(parents=True)
        Path(folder, "recipe.toml").touch()
    stage = Path("runs/h/finetune-32")
    assert existing_run("h/finetune-32") == stage
    assert existing_run("runs/h/finetune-32") == stage
    assert existing_run("elsewhere/h") == Path("elsewhere/h")
    assert existing_run("./h/finetune-32") == Path("h/finetune-32")
    assert existing_run(str(stage.resolve())) == stage.resolve()
    with pytest.raises(UsageError, match="no run at h/finetune-64"):
        existing_run("h/finetune-64")
    monkeypatch.chdir("runs/h")
    for here in ("./", ".", "finetune-32/.."):
        assert existing_run(here) == Path.cwd()
        assert not is_stage(existing_run(here))


def test_a_run_elsewhere_is_named_in_what_comes_next(typed: Type, toy: str) -> None:
    """Without a name the next command would take the newest in ./runs."""
    status, out, _ = typed("pretrain", *TINY, "--run", "else where/mine")
    named = "--run 'else where/mine' --resolution 32 --epochs 1 --batch-size 8"
    assert status == 0 and f"next: fastidmm finetune {named}" in out.splitlines()


def test_a_run_folder_that_exists(typed: Type, toy: str) -> None:
    assert typed("pretrain", *TINY, "--run", "mine")[0] == 0
    before = Path("runs/mine/metrics.jsonl").read_bytes()
    status, _, err = typed("pretrain", *TINY, "--run", "mine")
    assert status == 2 and "fastidmm resume runs/mine" in sentence(err)
    assert Path("runs/mine/metrics.jsonl").read_bytes() == before
    Path("runs/else").mkdir()
    status, _, err = typed("pretrain", *TINY, "--run", "else")
    told = "fastidmm: runs/else exists: give --run another name to start a new one."
    assert status == 2 and sentence(err) == told
    status, _, err = typed("finetune", "--run", "mine", "--backbone", "deit_tiny")
    assert status == 2 and "trained with vit_micro, not deit_tiny" in sentence(err)
    status, _, err = typed("finetune", "mine", "--set", "finetune.lr=7")
    assert status == 2 and "optim.lr" in sentence(err)
    status, _, err = typed("finetune", "--run", "mime")
    assert status == 2 and "did you mean 'mine'" in sentence(err)
    status, out, err = typed("resume", "mine")
    assert status == 0 and "is finished" in err
    assert [line for line in out.splitlines() if line.startswith("next: ")] == [
        "next: fastidmm finetune --run mine --resolution 32 --epochs 1 --batch-size 8",
        "next: fastidmm finetune --run mine --resolution 32 --epochs 1 --batch-size 8 --scratch",
        "next: fastidmm evaluate --run mine",
        "next: fastidmm report --run mine",
    ]


def test_no_runs_yet(typed: Type, toy: str) -> None:
    embed = ("embed", "--from", toy, "--out", "features.npz")
    others = ("finetune", "evaluate", "report", "resume")
    predict = ("predict", "--from", toy)
    for command in (("export", "--out", "out"), embed, predict, *((name,) for name in others)):
        status, _, err = typed(*command)
        assert status == 2 and "begin with `fastidmm pretrain`" in sentence(err)


def test_photographs_without_labels(typed: Type, home: Path, photos: MakePhotos) -> None:
    """They can be pretrained on, and nothing else; one class is not enough to classify."""
    photos(Path("flat"), per_class=6, classes=1)
    typed("prepare", "--dataset", "folder", "--from", "flat/class0", "--name", "flat")
    assert typed("pretrain", *TINY, "--run", "flat")[0] == 0
    for words in (["finetune", "--run", "flat"], ["evaluate", "--run", "flat"]):
        status, _, err = typed(*words)
        assert (status, "a folder per class" in sentence(err)) == (3, True), err
    typed("prepare", "--dataset", "folder", "--from", "flat", "--name", "one")
    assert typed("pretrain", *TINY, "--dataset", "one", "--run", "one")[0] == 0
    status, _, err = typed("finetune", "--run", "one")
    assert status == 3 and "one class" in sentence(err)
    assert not list(Path("runs").glob("*/finetune*"))


@pytest.mark.parametrize(
    ("number", "status", "message"),
    [(errno.ENOSPC, 3, "free some space"), (errno.EACCES, 2, "check its permissions")],
)
def test_a_disk_that_cannot_be_written(
    typed: Type,
    toy: str,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    status: int,
    message: str,
) -> None:
    """While a checkpoint is written: nothing half-written stays, and the run can be resumed."""
    sync, calls = checkpoint.sync, iter(range(100))

    def failing(path: Path) -> None:
        if path.name == checkpoint.STATE and next(calls) == 1:
            raise OSError(number, "no", str(path))
        sync(path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "sync", failing)
        found, _, err = typed("pretrain", *TINY, "--run", "full")
    assert found == status and message in sentence(err) and "runs/full" in sentence(err)
    folder = Path("runs/full/checkpoints")
    assert [p.name for p in folder.iterdir()] == ["step_000000000"]
    assert typed("resume", "full")[0] == 0
