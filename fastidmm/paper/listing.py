"""The page `configs/README.md`, out of the recipes' own headers.

python -m fastidmm.paper.listing
"""

from pathlib import Path

import fastidmm

CONFIGS = Path(fastidmm.__file__).parent / "configs"
MEASURED = "Machine, minutes, top-1, seeds: "
HEAD = """# Recipes

`--recipe NAME` takes one of these, or the path of a file like them. Each header says what it is,
the command, and what was measured with it. This page is made of them by
`python -m fastidmm.paper.listing`.

| recipe | what it is | command | machine, minutes, top-1, seeds |
| --- | --- | --- | --- |
"""


def page() -> str:
    """The whole page."""
    rows = [" | ".join(_row(path)) for path in sorted(CONFIGS.glob("*.toml"))]
    return HEAD + "".join(f"| {row} |\n" for row in rows)


def _row(path: Path) -> tuple[str, str, str, str]:
    """A recipe's name, its first words, its command and what was measured with it."""
    header, _, _ = path.read_text().partition("\n\n")
    lines = [line.removeprefix("#") for line in header.splitlines()]
    place = next(number for number, line in enumerate(lines) if line.startswith("   "))
    what = " ".join(line.strip() for line in lines[:place])
    rest = " ".join(line.strip() for line in lines[place + 1 :])
    _, _, measured = rest.partition(MEASURED)
    return f"[{path.stem}]({path.name})", what, f"`{lines[place].strip()}`", measured


if __name__ == "__main__":
    (CONFIGS / "README.md").write_text(page())
