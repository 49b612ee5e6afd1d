"""What is printed: names of files and classes cannot control the terminal they are shown on."""

import ast
import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_cli import MakePhotos, Type, sentence
from test_cli import typed as typed

from fastidmm import compare, runs, scoring
from fastidmm.preparing.watching import watching
from fastidmm.progress import Progress, say
from fastidmm.record import Record
from fastidmm.terminal import line, printable, safe, show
from fastidmm.watch import Watch

ROOT = Path(__file__).parents[1]
EVIL = "new\nline\x1b[31m\r\x9b2J\x7f"
WRITTEN = "\\u001b[31m\\u000d\\u009b2J\\u007f"


def test_what_controls_a_terminal_is_written_out() -> None:
    assert safe(EVIL) == f"new\nline{WRITTEN}" and line(EVIL) == f"new\\nline{WRITTEN}"
    assert printable(EVIL) == "'new\\nline\\x1b[31m\\r\\x9b2J\\x7f'"
    assert safe("tab\there") == "tab\\u0009here"
    for kept in ("è 花 🌻", "two\nlines", "95 % [1.0, 2.0] ~ x"):
        assert safe(kept) == kept
    assert safe(os.fsdecode(b"bad\xff")) == "bad\\udcff"


def test_an_answer_in_json_stays_one() -> None:
    place = io.StringIO()
    show(json.dumps({"name": EVIL}, indent=2), place)
    assert json.loads(place.getvalue()) == {"name": EVIL}


def test_nothing_else_prints() -> None:
    files = [path for path in (ROOT / "fastidmm").rglob("*.py") if "bench" not in path.parts]
    found = {
        path.name
        for path in files
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "print"
    }
    assert len(files) > 50 and found == {"terminal.py"}


def test_remarks_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    say(EVIL)
    assert capsys.readouterr().err == f"new\\nline{WRITTEN}\n"


def test_class_folders_with_odd_names_are_told_in_lines(
    typed: Type, home: Path, photos: MakePhotos
) -> None:
    evil = "new\nline\x1b[31m"
    photos(Path("photos"), per_class=2)
    Path("photos/class0").rename(Path("photos") / evil)
    (Path("photos") / f"{evil}empty").mkdir()
    words = ("prepare", "--dataset", "folder", "--from", "photos", "--name", "mine")
    status, out, err = typed(*words)
    assert status == 0 and "\x1b" not in out + err
    (few,) = (row for row in out.splitlines() if "fewer than 5" in row)
    assert few.endswith(": class1 (1), 'new\\nline\\x1b[31m' (1)")
    assert "no images in: 'new\\nline\\x1b[31mempty'" in out.splitlines()
    Path("photos/train").mkdir()
    Path("photos/class1").rename("photos/train/a")
    Path("photos/test").mkdir()
    (Path("photos") / evil).rename(Path("photos/test") / evil)
    status, out, err = typed(*words)
    assert status == 3 and len(err.splitlines()) == 1 and "\x1b" not in err
    assert "has not: 'new\\nline\\x1b[31m'; rename or remove" in sentence(err)


def test_labels_that_differ_are_told_in_a_line(typed: Type, home: Path, photos: MakePhotos) -> None:
    photos(Path("photos"), per_class=5)
    Path("photos/class0").rename("photos/new\nline")
    Path("photos/class1/000.png").write_bytes(Path("photos/new\nline/001.png").read_bytes())
    _, out, _ = typed("prepare", "--dataset", "folder", "--from", "photos", "--name", "mine")
    (differ,) = (row for row in out.splitlines() if "another label" in row)
    assert "('new\\nline')" in differ


def test_hard_classes_are_told_in_a_line() -> None:
    measure = {
        "correct": 0, "num": 2, "top5": None, "per_class": [[0, 1], [0, 1]],
        "confusion": [[0, 1, 1], [1, 0, 1]],
    }  # fmt: skip
    found = {
        "num_test": 2, "class_names": ["a\nb", "c\x1b"],
        "scores": {"pretrained": {"knn": measure}, "random": {}},
    }  # fmt: skip
    assert scoring.evaluation_text(found).splitlines()[-2:] == [
        "  hardest: 'a\\nb' 0/1, 'c\\x1b' 0/1",
        "  confused: 'a\\nb' taken for 'c\\x1b' (1), 'c\\x1b' taken for 'a\\nb' (1)",
    ]


def test_runs_with_odd_names_are_told_in_a_line() -> None:
    table = runs.as_table([{"run": "a\nb\x1b", "state": "broken: c\nd"}])
    assert table.splitlines()[1:] == ["a\\nb\\u001b  broken: c\\nd"]
    told: dict[str, Any] = {"scores": {}, "budget": {}, "seconds": 1.0}
    claim = {"run": "runs/c\nd", "measure": "kNN", "outcome": "missing", "points": None, "why": ""}
    found = {
        "runs": [{"run": "runs/a\nb", **told}, {"run": "runs/c\nd", **told}],
        "groups": [
            {"name": "a\nb", "runs": ["runs/a\nb"], **told},
            {"name": "c\nd", "runs": ["runs/c\nd", "runs/e\nf"], **told},
        ],
        "claims": [{**claim, "seeds": [0, 0]}],
        "unequal": [],
    }
    rows = compare.as_text(found).splitlines()
    assert rows[0].split() == ["a\\nb", "c\\nd"] and "  c\\nd, kNN: not run" in rows
    assert "c\\nd: the mean, and its 95 % interval over seeds, of c\\nd, e\\nf" in rows


@pytest.mark.parametrize("wide", [True, False])
def test_what_is_being_embedded_is_told_in_a_line(
    wide: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fastidmm.preparing import watching

    monkeypatch.setattr("sys.stderr.isatty", lambda: wide, raising=False)
    monkeypatch.setattr(watching, "SECONDS_BETWEEN_LINES", -1.0)
    with watching.watching("Embedding a\nb\x1b[/c]", 2, quiet=False) as watch:
        watch(1)
    err = capsys.readouterr().err
    assert "\x1b[/c]" not in err and (wide or err.count("\n") == 1)


class Refusing(io.StringIO):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def write(self, text: str) -> int:
        raise OSError(self.number, os.strerror(self.number))

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("number", [errno.EPIPE, errno.EIO, errno.ENOSPC])
def test_remarks_that_cannot_be_told_are_no_errors(
    monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(sys, "stderr", Refusing(number))
    line = {"epoch": 1, "step": 8, "loss": 3.0, "images_per_second": 9.0, "data_wait": 0.0}
    with Progress("run", Watch(None, 0), epochs=1, steps=8, done=0) as progress:
        progress.show(line)
        say("no one hears this")
    with watching("reading", 3, quiet=False) as watch:
        watch(3)


def test_an_answer_that_nobody_reads_is_no_error_but_one_that_cannot_be_kept_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "stdout", Refusing(errno.EPIPE))
    show("answer")
    monkeypatch.setattr(sys, "stdout", Refusing(errno.ENOSPC))
    with pytest.raises(OSError, match="No space"):
        show("answer")


PRETRAIN = "pretrain --dataset toy --backbone vit_micro --resolution 16 --batch-size 8 --epochs 9"


@pytest.mark.parametrize("closed", ["2>&1 | true", "<&- 2>&-", "2>/dev/full"])
def test_a_run_whose_stderr_leads_nowhere_is_finished(toy: str, closed: str) -> None:
    """And none of it goes into a file that has the number of a stream that was closed."""
    command = f'set -o pipefail; "$PYTHON" -m fastidmm {PRETRAIN} --run run --device cpu {closed}'
    done = subprocess.run(
        ["bash", "-c", command],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert "forecast" not in done.stdout
    record = Record(Path("runs/run"))
    assert record.finished and [line["step"] for line in record.metrics()] == list(range(1, 28))
