"""Every command by an audit hook: none reaches for the network, and learning opens no test file."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from conftest import make_photos

TINY = "--backbone vit_micro --epochs 1 --batch-size 8 --resolution 16 --device cpu"

# As sitecustomize.py it is in every process, those that a command starts included.
HOOK = """
import os, sys
_log = os.open(os.environ["AUDIT_LOG"], os.O_WRONLY | os.O_APPEND)
def _hook(event, given):
    if event in ("socket.connect", "socket.sendto", "socket.bind"):
        if isinstance(given[1], tuple):  # not of a socket in the file system
            os.write(_log, f"net {event} {given[1]!r}\\n".encode())
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        os.write(_log, f"net {event} {given[0]!r}\\n".encode())
    elif event == "open" and isinstance(given[0], (str, bytes)):
        path = os.path.abspath(os.fsdecode(given[0]))
        if path.startswith(os.environ["AUDIT_ROOT"]):
            os.write(_log, f"open {path}\\n".encode())
sys.addaudithook(_hook)
"""
TYPED = """
import json, sys
from fastidmm import cli
from fastidmm.bench import loader
loader.Plan.of = lambda *_, **__: loader.Plan(1, 0, 0.0)  # windows of one batch
for words in json.loads(sys.argv[1]):
    sys.argv = ["fastidmm", *words.split()]
    try:
        cli.main()
    except SystemExit as end:
        assert not end.code or words == "doctor", (words, end.code)
"""


class Audited:
    """A folder where commands are typed, and what they opened and connected to."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder, folder / "audit.log"
        hooks = folder / "hooks"
        hooks.mkdir()
        (hooks / "sitecustomize.py").write_text(HOOK)
        self.environ = {
            **os.environ,
            "FASTIDMM_HOME": str(folder / "home"),
            "PYTHONPATH": os.pathsep.join([str(hooks), *sys.path]),
            "AUDIT_LOG": str(self.log),
            "AUDIT_ROOT": str(folder),
        }

    def run(self, code: str, *given: Any) -> None:
        """Run Python under the hook."""
        self.log.write_text("")
        done = subprocess.run(
            [sys.executable, "-c", code, *given],
            cwd=self.folder, env=self.environ, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr

    def type(self, *commands: str) -> None:
        """Type commands, one after the other in one process; all end well."""
        self.run(TYPED, json.dumps(commands))

    def seen(self, kind: str) -> list[str]:
        """What was opened, or which net was asked."""
        told = [line.split(" ", 1) for line in self.log.read_text().splitlines()]
        return [what for event, what in told if event == kind]


@pytest.fixture(scope="module")
def audited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Audited]:
    folder = tmp_path_factory.mktemp("audit").resolve()
    make_photos(folder / "photos" / "train", per_class=8)
    make_photos(folder / "photos" / "test", per_class=3)
    audited = Audited(folder)
    audited.type("prepare --dataset folder --from photos --name toy")
    assert not audited.seen("net") and len(audited.seen("open")) > 22
    yield audited


def test_the_hook_hears_of_sockets_in_children_too(audited: Audited) -> None:
    reach = "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect(%r)"
    start = (
        "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]], check=True)"
    )
    audited.run(start, reach % (("127.0.0.1", 9),))
    assert audited.seen("net") == ["socket.connect ('127.0.0.1', 9)"]


@pytest.mark.slow
@pytest.mark.parametrize("loader", ["resident", "torch"])
def test_learning_opens_no_test_file(audited: Audited, loader: str) -> None:
    """Safetensors opens its files unheard: that the test split's is away shows it needs none."""
    run = f"learnt-{loader}"
    store, photos = audited.folder / "home" / "stores" / "toy", audited.folder / "photos"
    moved = [(store / "test.safetensors", store / "away"), (photos / "test", photos / "away")]
    for place, away in moved:
        place.rename(away)
    try:
        audited.type(
            f"pretrain --dataset toy --loader {loader} --holdout 0.2 --run {run} {TINY}",
            f"finetune {run} --epochs 1 --batch-size 8 --resolution 16",
        )
    finally:
        for place, away in moved:
            away.rename(place)
    opened = audited.seen("open")
    assert not [path for path in opened if "/test" in path.removeprefix(str(audited.folder))]
    trained = {path for path in opened if path.startswith(str(photos / "train"))}
    assert len(trained) == (13 if loader == "torch" else 0)  # 16 but for those held out
    assert not audited.seen("net")


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        "loss --rounds 1",
        "prepare --from photos --cores 1 --repeats 1",
        "step --backbone vit_micro --batch-size 4 --resolution 16 --device cpu --quick",
        "loader --dataset toy --backbone vit_micro --batch-size 4 --device cpu --quick",
    ],
    ids=lambda words: words.split()[0],
)
def test_no_benchmark_asks_the_net(audited: Audited, words: str) -> None:
    """Nor do the processes that it measures loaders and preparing in."""
    audited.type(f"bench {words} --json told.json")
    assert audited.seen("net") == []
    tables = json.loads((audited.folder / "told.json").read_text())["tables"]
    assert any(row["status"] == "ok" for rows in tables.values() for row in rows.values())


@pytest.mark.slow
def test_no_command_asks_the_net(audited: Audited) -> None:
    onnx = ["export one --to onnx --out one-onnx"] if find_spec("onnxscript") else []
    audited.type(
        "list",
        "doctor",
        "prepare --list",
        "prepare --dataset folder --from photos --name toy",
        f"plan --dataset toy {TINY} --set finetune.resolution=16 --set finetune_high.epochs=0",
        f"pretrain --dataset toy --run one {TINY}",
        "finetune one --epochs 1 --batch-size 8 --resolution 16",
        "evaluate one",
        "report one",
        "resume one",
        "verify one",
        "export one --out one-timm",
        "export runs/one/finetune-16 --to pt2 --out one-pt2",
        *onnx,
        "embed one --from toy --out store.npz",
        "embed one --from photos --out folder.npz",
        "predict one --from photos --out classes.csv",
        f"run --dataset toy --run all {TINY} --set finetune.epochs=1 --set finetune.resolution=16",
        "compare one all",
        "reproduce T2 --dry-run",
        "bench views --size 16 --images 4 --repeats 1",
    )
    assert audited.seen("net") == []
    assert (audited.folder / "runs" / "all" / "report.html").exists()
