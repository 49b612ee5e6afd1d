"""Bring the repository's Markdown together as the site's pages, in the same tree: `make docs`."""

import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
KINDS = ("*.md", "docs/*.md", "docs/*.ipynb", "configs/*.md", "bench/records/*/README.md")


def collect(root: Path, pages: Path) -> list[Path]:
    """Copy them to a fresh folder; which, by their path in both. Links between them hold."""
    shutil.rmtree(pages, ignore_errors=True)
    found = sorted(path.relative_to(root) for kind in KINDS for path in root.glob(kind))
    for name in found:
        (pages / name).parent.mkdir(parents=True, exist_ok=True)
        text = (root / name).read_text()
        # What is no page is named, not linked.
        (pages / name).write_text(text.replace("[MIT](LICENSE)", "MIT"))
    return found


if __name__ == "__main__":
    collect(ROOT, Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / ".site" / "pages")
