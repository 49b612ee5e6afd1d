"""The repository keeps its shape: small files, small functions, nothing of a machine in it."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def tracked(pattern: str) -> list[Path]:
    """Files of the checkout by pattern, without virtual environments and links."""
    folders = ("fastidmm", "kernels", "configs", "bench", "tests", "docs", ".ci")
    found = [p for folder in folders for p in (ROOT / folder).rglob(pattern)]
    return sorted({p.resolve() for p in found if "__pycache__" not in p.parts})


@pytest.mark.parametrize("path", tracked("*.py"), ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_are_small(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 400
    tree = ast.parse(text)
    assert ast.get_docstring(tree), "a file's first line says its one job"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 60, node.name


def test_the_three_folders_are_links_without_init() -> None:
    for name in ("kernels", "configs", "bench"):
        assert (ROOT / "fastidmm" / name).readlink() == Path("..") / name
        assert not (ROOT / name / "__init__.py").exists()


def test_no_global_generator_in_a_step() -> None:
    """What a step runs draws from counters only."""
    drawing = ("torch.rand", "torch.bernoulli", "random_(", ".normal_(", "np.random", "multinomial")
    for name in (
        "chance",
        "plan",
        "augment",
        "colour",
        "train",
        "optim",
        "batch",
        "loaders/resident",
    ):
        text = (ROOT / "fastidmm" / f"{name}.py").read_text()
        assert not [word for word in drawing if word in text], name


def test_every_file_of_the_readmes_tree_is_there() -> None:
    lines = (ROOT / "README.md").read_text().split("```")
    tree = next(block for block in lines if "kernels/" in block and "bench/" in block)
    names = [line.split()[0] for line in tree.splitlines() if line and not line.startswith(" ")]
    assert names
    for name in (n for n in names if "/" in n or "." in n):
        assert (ROOT / name).exists(), name


def test_the_readme_names_commands_that_exist() -> None:
    from fastidmm.cli import app

    known = {c.name or getattr(c.callback, "__name__", "") for c in app.registered_commands}
    known |= {group.name or "" for group in app.registered_groups}
    typed = set(re.findall(r"(?m)(?:^|`)fastidmm ([a-z]+)", (ROOT / "README.md").read_text()))
    assert typed and typed <= known


def test_make_lists_its_targets() -> None:
    shown = subprocess.run(["make", "-C", ROOT, "help"], capture_output=True, text=True, check=True)
    for target in ("setup", "demo", "test", "check", "fix", "wheel"):
        assert f"\n{target} " in "\n" + shown.stdout
