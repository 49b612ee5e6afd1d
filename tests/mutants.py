"""Plants mistakes, one at a time, and sees whether the tests notice.

    python tests/mutants.py [kernels|trainer|NAME ...]

Works on a copy of the checkout; some ten seconds a mistake. Exit status 1 if any lives.
"""

import multiprocessing
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import mutants_kernels
import mutants_trainer
import pytest

# A file and the tests that must notice, as NAME or NAME::FUNCTION of tests/test_NAME.py, several
# with spaces between; then pairs of what stands in the file and what is put in its place.
Mutant = tuple[tuple[str, str], list[tuple[str, str]]]

ROOT = Path(__file__).parents[1]
MUTANTS = {"kernels": mutants_kernels.MUTANTS, "trainer": mutants_trainer.MUTANTS}


def planted(mutant: Mutant) -> str:
    """What the file holds with the mistake in it."""
    (file, _), edits = mutant
    text = (ROOT / file).read_text()
    for old, new in edits:
        assert old in text, f"{file} no longer holds {old!r}"
        text = text.replace(old, new)
    return text


def run(tests: list[str], place: Path) -> None:
    """Run tests of the copy at `place`, in a process of their own; pytest's status is its own."""
    os.chdir(place)
    os.environ |= {"PYTHONPATH": str(place), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    sys.path.insert(0, str(place))
    for stream, name in ((1, "said"), (2, "said-amiss")):
        os.dup2(os.open(place.parent / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    # Golden losses notice any change, and do not know what is right.
    sys.exit(pytest.main(["-x", "-q", "-k", "not golden", *tests]))


def passes(tests: Iterable[str], place: Path) -> bool:
    """Whether tests pass in the copy at `place`."""
    parted = (test.partition("::") for test in sorted(tests))
    chosen = [f"tests/test_{name}.py{colons}{function}" for name, colons, function in parted]
    # Half of what a test takes is to import these: here only once.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "torch", "scipy.stats", "hypothesis", "pydantic"])
    process = context.Process(target=run, args=(chosen, place))
    process.start()
    process.join()
    status = process.exitcode
    # A wild read may end the process; other statuses mean that pytest was not run.
    assert status is not None and status < 2, (place.parent / "said").read_text()[-2000:]
    return status == 0


def noticed(mutant: Mutant, place: Path) -> bool:
    """Whether its tests fail with the mistake planted in the copy at `place`."""
    file, tests = mutant[0]
    (place / file).write_text(planted(mutant))
    caught = not passes(tests.split(), place)
    shutil.copyfile(ROOT / file, place / file)
    return caught


@contextmanager
def copied() -> Iterator[Path]:
    """A copy of the checkout, to make mistakes in."""
    left_out = shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__", ".*_cache")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "copy"
        shutil.copytree(ROOT, place, symlinks=True, ignore=left_out)
        yield place


def survivors(mutants: dict[str, Mutant]) -> list[str]:
    """Plant each, print what became of it; those that no test noticed."""
    alive = []
    with copied() as place:
        tests = {test for (_, several), _ in mutants.values() for test in several.split()}
        assert passes(tests, place), "its tests fail without a mistake"
        for name, mutant in mutants.items():
            caught = noticed(mutant, place)
            print("caught" if caught else "ALIVE ", name, flush=True)
            alive += [] if caught else [name]
    return alive


def main() -> None:
    """Plant all, those of a subject, or those named; a line that sums each up."""
    asked = sys.argv[1:] or list(MUTANTS)
    chosen = {word: MUTANTS[word] for word in asked if word in MUTANTS}
    everything = mutants_kernels.MUTANTS | mutants_trainer.MUTANTS
    if named := {word: everything[word] for word in asked if word not in MUTANTS}:
        chosen["named"] = named
    alive = {subject: survivors(mutants) for subject, mutants in chosen.items()}
    for subject, names in alive.items():
        num = len(chosen[subject])
        print(f"{subject}: caught {num - len(names)} of {num}", *names, sep="\n  alive: ")
    sys.exit(any(alive.values()))


if __name__ == "__main__":
    main()
