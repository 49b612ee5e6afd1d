"""What README and docs tell to type can be typed, and the pages make a site."""

import ast
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import typer

from fastidmm.cli import app
from fastidmm.errors import UsageError
from fastidmm.recipe import Recipe, with_settings
from fastidmm.registry import LOADERS, METHODS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, kind: str) -> list[str]:
    """Code of a kind, in the page's order; indented code is the shell's."""
    text = page.read_text()
    found = re.findall(rf"(?ms)^```{kind}\n(.*?)^```", text)
    if kind == "bash":
        found += re.findall(r"(?m)(?:^(?: {4}.+\n)+)", re.sub(r"(?ms)^```.*?^```", "", text))
    return found


def commands(page: Path) -> list[str]:
    """Whole commands of fastidmm's, without what a shell does around them."""
    text = "\n".join(blocks(page, "bash")).replace("\\\n", " ")
    for name, value in re.findall(r'(?m)^([A-Z]+)="(.*)"$', text):
        text = text.replace(f"${name}", value)
    lines = text.splitlines()
    words = [re.sub(r"\s#.*|[|&>].*", "", line).strip() for line in lines]
    words = [re.sub(r"^(?:\w+=\S+ )+", "", line) for line in words]
    words += re.findall(r"`(fastidmm [a-z][^`]*)`", page.read_text().replace("\n", " "))
    return [line for line in words if line.startswith("fastidmm ")]


def parse(words: list[str]) -> None:
    """As the command line does, up to where the command would begin."""
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands") and words:
        if words[0] not in command.commands and command.invoke_without_command:
            break
        assert words[0] in command.commands, f"no command {words[0]}"
        command, words = command.commands[words[0]], words[1:]
    command.make_context("fastidmm", words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_can_be_typed(page: Path) -> None:
    for line in commands(page):
        words = shlex.split(re.sub(r"\[(--[^\]]*)\]", r"\1", line))[1:]
        if words[0].isupper():  # stands for any
            continue
        try:
            parse(words)
        except Exception as problem:
            # Typer has click within itself. A command may be spoken of by its name alone.
            missing = type(problem).__name__ in ("MissingParameter", "NoArgsIsHelpError")
            if not (missing and len(words) <= 2):
                pytest.fail(f"{page.name}: {line}: {problem!r}")


def test_pages_hold_commands_that_are_seen() -> None:
    """Or the test above would find nothing wrong with anything."""
    assert len(commands(ROOT / "README.md")) > 20
    with pytest.raises(Exception, match="--bakbone"):
        parse(["pretrain", "--bakbone", "deit_tiny"])
    with pytest.raises(AssertionError, match="no command"):
        parse(["pretrane"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_on_pages_uses_names_that_are_there(page: Path) -> None:
    for code in blocks(page, "python"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "fastidmm":
                assert hasattr(import_module("fastidmm"), node.attr), node.attr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_setting_is_one(page: Path) -> None:
    """TABLE.KEY=VALUE, whole numbers, words and switches; capitals stand for any."""
    if page.name == "log.md":
        return  # what was so that day
    for told in set(re.findall(r"\b[a-z_]+\.[a-z_]+=[\w.-]+", page.read_text())):
        check(told.rstrip("."))


def check(told: str) -> None:
    """Whether some method and some loader take a setting."""
    problems = []
    for method, loader in product(METHODS, LOADERS):
        asked: dict[str, Any] = {"run.method": method, "run.loader": loader}
        asked |= {"run.dataset": "demo", "run.holdout": 0.1}  # which patience needs
        try:
            Recipe.of(with_settings({}, asked, [told]))
        except UsageError as problem:
            problems.append(str(problem))
        else:
            return
    pytest.fail(f"{told}: {problems[0]}")


def test_a_setting_that_is_none_is_seen() -> None:
    check("loader.cache=40000")
    with pytest.raises(pytest.fail.Exception, match=r"loader\.tier=pinned"):
        check("loader.tier=pinned")


def test_the_notebook_runs(home: Path) -> None:
    """All of it, in less time: its first cell says how much."""
    pytest.importorskip("elpv_dataset", reason="the demo's photographs are not installed")
    cells = json.loads((ROOT / "docs" / "first_run.ipynb").read_text())["cells"]
    first, *rest = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    names: dict[str, Any] = {}
    exec(first, names)
    assert (names["EPOCHS"], names["STAGE_EPOCHS"], names["IMAGES"]) == (24, 8, 400)
    names |= {"EPOCHS": 3, "STAGE_EPOCHS": 1, "IMAGES": 32}
    for code in rest:
        exec(code, names)
    assert set(names["scores"]["pretrained"]) >= {"knn", "linear_probe", "finetuned_48"}
    assert (names["run"].folder / "report.html").is_file()


def test_the_site_is_built_strictly(tmp_path: Path) -> None:
    """No page left out, no link into nowhere, a reference out of the docstrings."""
    if importlib.util.find_spec("mkdocs") is None or importlib.util.find_spec("material") is None:
        pytest.skip("mkdocs-material is not installed: pip install 'fastidmm[docs]'; CI has it")
    for name in ("fastidmm", "docs", "configs", "bench"):
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True)
    for path in (*ROOT.glob("*.md"), ROOT / "mkdocs.yml"):
        shutil.copy(path, tmp_path)
    subprocess.run([sys.executable, tmp_path / "docs" / "pages.py"], check=True)
    asked = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet"]
    done = subprocess.run(asked, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    built = tmp_path / ".site" / "html"
    assert "pretrain" in (built / "docs" / "python" / "index.html").read_text()
    home = (built / "index.html").read_text()
    assert not re.findall(r"<(?:script|link)[^>]+(?:src|href)=\"https?:", home)
