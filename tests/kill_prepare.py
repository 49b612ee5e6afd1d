"""Kill `prepare` at one line of its code after another, go on each time, and compare the stores.

    python tests/kill_prepare.py PHOTOS WORK STRIDE

A process of its own, since it forks: no thread may run, and torch must not be loaded. Prints how
often it killed and on how many files work went on.
"""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import fastidmm
from fastidmm.datasets.folder import Folder
from fastidmm.preparing import decode, prepare

PACKAGE = str(Path(fastidmm.__file__).parent)
prepare.SYNC_BYTES = 500


def in_child(work: Callable[[], int]) -> int:
    """Run it in a fork; its exit status, or minus the signal that ended it."""
    child = os.fork()
    if not child:
        os._exit(work())
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def made(photos: Path, home: Path, max_side: int = 1024) -> int:
    """Prepare; the number of files decoded."""
    os.environ["FASTIDMM_HOME"] = str(home)
    calls: list[Path] = []
    real = decode.decode

    def counted(path: Path, max_side: int, seat: decode.Seat) -> decode.Picture | str:
        calls.append(path)
        return real(path, max_side, seat)

    decode.decode = counted
    source = Folder().open(from_=photos, seed=0)
    prepare.prepare(source, "mine", max_side=max_side, shard_bytes=1000, workers=2, quiet=True)
    return len(calls)


def traced(photos: Path, home: Path, kill_at: int) -> int:
    """Prepare, and be killed at a line of fastidmm; the number of lines, in thousands, if not."""
    seen = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal seen
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            seen += 1
            if seen == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)
    made(photos, home)
    sys.settrace(None)
    (home / "lines").write_text(str(seen))
    return 0


def tree(home: Path) -> dict[str, bytes]:
    """Every file below a home's stores, hidden or not."""
    files = (home / "stores").rglob("*")
    return {str(p.relative_to(home)): p.read_bytes() for p in files if p.is_file()}


def noted(home: Path) -> int:
    """Files of which the journal tells."""
    path = home / "stores" / ".mine.journal"
    text = path.read_bytes() if path.exists() else b""
    return sum(line.endswith(b"\n") and line != b"null\n" for line in text.splitlines(True)[1:])


def main(photos: Path, work: Path, stride: int) -> None:
    """Kill, go on, compare."""
    truth, older = work / "truth", work / "older"
    num_files = in_child(lambda: made(photos, truth))
    in_child(lambda: made(photos, older, 5))
    in_child(lambda: traced(photos, work / "traced", 0))
    num_lines = int((work / "traced" / "lines").read_text())
    killed, spared = 0, 0
    for kill_at in range(1, num_lines, stride):
        home = work / str(kill_at)
        if kill_at % 2:
            shutil.copytree(older, home)
        assert in_child(lambda h=home, k=kill_at: traced(photos, h, k)) == -signal.SIGKILL  # type: ignore[misc]
        before = noted(home)
        finished = tree(home).get("stores/mine/store.json") == tree(truth)["stores/mine/store.json"]
        decoded = in_child(lambda h=home: made(photos, h))  # type: ignore[misc]
        assert decoded == (0 if finished else num_files - before), (kill_at, decoded, before)
        assert tree(home) == tree(truth), kill_at
        killed, spared = killed + 1, spared + before
        shutil.rmtree(home)
    print(json.dumps({"killed": killed, "spared": spared, "files": sorted(tree(truth))}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
