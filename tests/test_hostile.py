"""Files made to do harm: none is run, none takes memory, and no name becomes part of a page."""

import ast
import hashlib
import json
import os
import pickle
import re
import resource
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_cli import TINY, MakePhotos, Type
from test_cli import typed as typed
from toy_runs import recipe

from fastidmm import checkpoint, stages
from fastidmm.datasets.folder import Folder
from fastidmm.errors import DataError, FastidmmError
from fastidmm.preparing.prepare import prepare
from fastidmm.record import Record
from fastidmm.reporting.report import Page, write
from fastidmm.store import folder_of, open_store

ROOT = Path(__file__).parents[1]
EVIL = "<script src=x>alert(1)<img src=y onerror=alert(2)>"


class Harm:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return open, (str(self.mark), "w")


def disguised(folder: Path, data: bytes) -> Path:
    """A checkpoint whose sums are right, and whose weights are `data`."""
    folder.mkdir(parents=True)
    (folder / checkpoint.MODEL).write_bytes(data)
    sums = {checkpoint.MODEL: hashlib.sha256(data).hexdigest()}
    (folder / checkpoint.STATE).write_text(json.dumps({"step": 1, "state": {}, "sha256": sums}))
    return folder


def test_a_pickle_is_never_unpickled(toy: str, tmp_path: Path) -> None:
    mark, code = tmp_path / "mark", tmp_path / "weights.pth"
    torch.save(Harm(mark), code)
    plain = pickle.dumps(Harm(mark))
    places = [code, *(disguised(tmp_path / str(len(d)), d) for d in (code.read_bytes(), plain))]
    for place in places:
        with pytest.raises(FastidmmError, match=re.escape(str(place))) as said:
            stages.pretrain(recipe(init=str(place)), "run")
        assert "\n" not in str(said.value) and not Path("runs/run").exists()
    assert not mark.exists()
    pickle.loads(plain).close()
    assert mark.exists()  # it would have


def test_nothing_unpickles() -> None:
    for path in (p for f in ("fastidmm", "bench", "kernels") for p in (ROOT / f).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [a.name for a in node.names] + [getattr(node, "module", None) or ""]
                assert not {"pickle", "dill", "marshal", "joblib", "shelve"} & set(names), path
            if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.load":
                raise AssertionError(f"{path} calls torch.load")


def lying(header: dict[str, Any], data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file of that header, whatever is behind it."""
    text = json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def tensor(kind: str, shape: list[int], first: int, last: int) -> dict[str, Any]:
    return {"dtype": kind, "shape": shape, "data_offsets": [first, last]}


LIES = {
    "beyond the end": lying({"a": tensor("F32", [2**34], 0, 2**36)}, bytes(16)),
    "overlapping": lying({n: tensor("F32", [4], 0, 16) for n in "ab"}, bytes(16)),
    "a huge header": lying({}, length=2**62),
    "a long header": lying({}, length=2**30),
    "another shape": lying({"a": tensor("F32", [2**40], 0, 16)}, bytes(16)),
    "an unknown type": lying({"a": tensor("F33", [4], 0, 16)}, bytes(16)),
    "nothing": b"",
    "text": b"x" * 4096,
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_header_is_refused(lie: str, toy: str, tmp_path: Path) -> None:
    place = disguised(tmp_path / "evil", LIES[lie])
    path = folder_of("toy") / "train.safetensors"
    path.write_bytes(LIES[lie])
    before = peak()
    for read in (
        lambda: checkpoint.load(place, checkpoint.MODEL),
        lambda: open_store(folder_of("toy"), "train"),
    ):
        with pytest.raises(DataError) as said:
            read()
        assert "\n" not in str(said.value) and len(str(said.value)) < 1000
    assert peak() - before < 64 << 20


def peak() -> int:
    """The most memory this process has had, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("offset", 2**62),
        ("offset", -(2**63)),
        ("offset", -3),
        ("offset", 10**6),
        ("height", 2**31 - 1),
        ("height", 0),
        ("width", -1),
        ("label", 2),
        ("label", -2),
    ],
)
def test_tables_that_point_elsewhere_are_refused(toy: str, name: str, value: int) -> None:
    path = folder_of("toy") / "train.safetensors"
    tensors = {k: t.clone() for k, t in load_file(path).items()}
    tensors[name][7] = value
    save_file(tensors, path)
    with pytest.raises(DataError, match="its tables do not fit its pixels or classes"):
        open_store(folder_of("toy"), "train")


@pytest.mark.parametrize("change", ["type", "shape", "more", "fewer"])
def test_tensors_of_another_kind_are_refused(toy: str, change: str) -> None:
    path = folder_of("toy") / "train.safetensors"
    tensors = {k: t.clone() for k, t in load_file(path).items()}
    if change == "type":
        tensors["width"] = tensors["width"].float()
    elif change == "shape":
        tensors["label"] = tensors["label"][:-1].clone()
    elif change == "more":
        tensors["folder"] = torch.zeros(1)
    else:
        del tensors["height"]
    save_file(tensors, path)
    with pytest.raises(DataError, match=r"its tensors .* a store.*; prepare the dataset again"):
        open_store(folder_of("toy"), "train")


class Tags(HTMLParser):
    """The tags of a page with the names of their attributes, as a browser reads them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, ...]] = []
        self.words: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, *(name for name, _ in attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def page_of(name: str, evil: str) -> Tags:
    """The report of a run in which `evil` is a part of every name there is."""
    photos = Path(f"photos-{name}")
    photos.mkdir()
    rows = []
    for number in range(8):
        file = f"{evil}{number}.png"
        Image.new("RGB", (20, 20), (number * 30, 9, 9)).save(photos / file)
        rows.append(f'"{file}","{evil}{number % 2}"\n')
    table = photos / "photos.csv"
    table.write_text("path,label\n" + "".join(rows))
    prepare(Folder().open(from_=table, seed=0), name, workers=0, quiet=True)
    stages.pretrain(recipe(dataset=name, epochs=1, num_images=0), name)
    run = Path("runs", name).rename(Path("runs", f"{evil}run"))
    started = Record(run).environment()
    started |= {"command": ["fastidmm", evil], evil: evil}
    (run / "environment.json").write_text(json.dumps(started))
    (run / "recipe.toml").write_text((run / "recipe.toml").read_text() + f"# {evil}\n")
    # The same numbers, so that curves have as many ticks.
    line = {"epoch": 1, "step": 1, "loss": 3.5, "skipped": 0.0, evil: 1.0}
    (run / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    return Tags(write(run).read_text())


def test_no_name_becomes_an_element(home: Path) -> None:
    tame, evil = page_of("tame", "abc"), page_of("evil", EVIL)
    assert evil.found == tame.found
    assert EVIL in "".join(evil.words)


def test_names_that_are_no_utf8_go_all_the_way(
    typed: Type, home: Path, photos: MakePhotos, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A photograph's and a class's, from preparing to the page and to every kind of table."""
    odd, shown = os.fsdecode(b"bad\xff"), "bad\\udcff"
    photos(Path("photos"), per_class=5)
    Path("photos/class0").rename(f"photos/{odd}")
    for number in range(5):
        Path(f"photos/{odd}/{number:03d}.png").rename(f"photos/{odd}/{number}{odd}.png")
    Path(f"photos/{odd}/9{odd}.jpg").write_text("no photograph")
    status, out, _ = typed("prepare", "--dataset", "folder", "--from", "photos", "--name", "odd")
    assert status == 0 and f"'{shown}/9{shown}.jpg' (not an image)" in out
    assert typed("pretrain", *TINY, "--run", "mine")[0] == 0
    assert typed("finetune", "mine", "--resolution", 16, "--epochs", 1)[0] == 0
    status, out, _ = typed("evaluate", "mine")
    assert status == 0 and out.isascii()
    assert typed("report", "mine")[0] == 0
    page = Path("runs/mine/report.html").read_text(encoding="utf-8")
    assert f"{shown}.png" in page
    assert Page(Path("runs/mine")).text(renew=5).encode()  # as it is served
    for kind in ("npz", "parquet"):
        words = ("embed", "mine", "--from", "photos", "--out", f"features.{kind}")
        if kind == "npz" or find_spec("pyarrow"):
            assert typed(*words)[0] == 0
    assert typed("predict", "mine", "--from", "photos")[0] == 0
    assert typed("predict", "mine", "--from", "photos", "--out", "classes.csv")[0] == 0
    assert "bad\ufffd/0bad\ufffd.png," in Path("classes.csv").read_text(encoding="utf-8")
    with np.load("features.npz") as table:
        assert table["class_names"].tolist() == ["bad\ufffd", "class1"]
        assert "bad\ufffd/0bad\ufffd.png" in table["path"].tolist()
    assert typed("export", "runs/mine/finetune-16", "--out", "model")[0] == 0


TEMPLATES = sorted({p for f in ("fastidmm", "bench") for p in (ROOT / f).rglob("*.j2")})
PAGES = [path for path in TEMPLATES if "<html" in path.read_text()]


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_template_lets_nothing_through(path: Path) -> None:
    text = path.read_text()
    assert not re.search(r"\|\s*safe\b|autoescape", text)
    for script in re.findall(r"(?s)<script.*?</script>", text):
        values = re.findall(r"{{(.*?)}}", script)
        assert all(re.search(r"\|\s*tojson\s*$", value) for value in values)
    policies = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    if path not in PAGES:  # a part of one
        assert not policies and not re.search(r"<(script|style|meta|link)\b", text)
        return
    (policy,) = policies
    allowed = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    assert allowed.pop("default-src") == "'none'"
    known = {"img-src": {"data:"}, "style-src": {"'unsafe-inline'"}, "script-src": None}
    for source, given in allowed.items():
        mine = known[source]
        assert set(given.split()) <= mine if mine else "http" not in given and "*" not in given


def test_every_page_escapes_by_itself() -> None:
    escaped = 0
    for path in (p for f in ("fastidmm", "bench") for p in (ROOT / f).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Environment"):
                assert "autoescape=True" in [ast.unparse(word) for word in node.keywords], path
                escaped += 1
    assert escaped >= len(PAGES) > 1
