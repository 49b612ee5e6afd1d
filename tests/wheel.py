"""Build the wheel by way of the sdist, install it alone, and use it from another folder."""

import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
MUST_HOLD = (
    "kernels/instance_loss.py",
    "configs/demo.toml",
    "reporting/page/report.html.j2",
    "reporting/page/style.css",
)
SCRIPT = """
import importlib.util, pathlib, fastidmm
from fastidmm.recipe import read_tables
from fastidmm.registry import find
home = pathlib.Path(fastidmm.__file__).parent
assert home.parts[-2] == "site-packages", home
assert read_tables("demo")["run"]["backbone"] == "vit_micro"
assert find("kernel", "instance_loss")
assert not any(importlib.util.find_spec(name) for name in ("kernels", "configs", "bench"))
print("wheel ok:", home)
"""


def main() -> None:
    """Fail loudly where the wheel is not what the checkout is."""
    with tempfile.TemporaryDirectory() as folder:
        build = [sys.executable, "-m", "build", "--outdir", folder, str(ROOT)]
        subprocess.run(build, check=True, stdout=subprocess.DEVNULL)
        (wheel,) = Path(folder).glob("*.whl")
        names = zipfile.ZipFile(wheel).namelist()
        missing = [n for n in MUST_HOLD if f"fastidmm/{n}" not in names]
        foreign = [n for n in names if not n.startswith("fastidmm")]
        assert not missing and not foreign, (missing, foreign)
        # What the environment already holds is borrowed: only the package itself is under test.
        venv.create(f"{folder}/venv", with_pip=True)
        python = f"{folder}/venv/bin/python"
        install = [python, "-m", "pip", "install", "--quiet", "--no-deps", str(wheel)]
        subprocess.run(install, check=True)
        site = next(p for p in sys.path if p.endswith("site-packages"))
        (own,) = Path(folder).glob("venv/lib/python*/site-packages")
        (own / "borrowed.pth").write_text(site + "\n")
        subprocess.run([python, "-c", SCRIPT], check=True, cwd=folder)
        subprocess.run([f"{folder}/venv/bin/fastidmm", "list"], check=True, cwd=folder)


if __name__ == "__main__":
    main()
