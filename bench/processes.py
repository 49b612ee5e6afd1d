"""What a process and all below it use, as Linux counts it: seconds of CPU, bytes of memory."""

import os
import time
from collections import defaultdict
from pathlib import Path

PROC = Path("/proc")
TICKS = os.sysconf("SC_CLK_TCK")  # per second


def tree(pid: int) -> list[int]:
    """A process and all its descendants that still live."""
    below = defaultdict(list)
    for entry in PROC.iterdir():
        if entry.name.isdecimal() and (fields := _stat(int(entry.name))):
            below[int(fields[1])].append(int(entry.name))
    found = [pid]
    for each in found:
        found += below[each]
    return found


def cpu_seconds(pid: int) -> float | None:
    """CPU time that a process, its threads and its descendants have used, ended ones included.

    None where the system does not say.
    """
    if not PROC.is_dir():
        return None
    spent = 0.0
    for each in tree(pid):
        # A short window is less than a tick: 10 ms count as none.
        spent += _clock(each) + sum(map(int, _stat(each)[13:15])) / TICKS  # ended children
    return spent


def memory(pid: int) -> tuple[int, int] | None:
    """Bytes that a process and its descendants hold, and bytes of the files they have mapped.

    What they hold (anonymous and shared memory) counts once, however many share it. Mapped files
    are libraries and stores, which the system may take back; those of the process with the most
    count, since the others map the same. None where the system does not say.
    """
    if not PROC.is_dir():
        return None
    held, mapped = 0, 0
    for each in tree(pid):
        shares = _kilobytes(PROC / str(each) / "smaps_rollup")
        sizes = _kilobytes(PROC / str(each) / "status")
        if "Pss_Anon" in shares:
            held += shares["Pss_Anon"] + shares["Pss_Shmem"]
        else:  # an old kernel: what is shared counts for each
            held += sizes.get("RssAnon", 0) + sizes.get("RssShmem", 0)
        mapped = max(mapped, sizes.get("RssFile", 0))
    return held * 1024, mapped * 1024


def _clock(pid: int) -> float:
    """Seconds that a process and its threads have run; none once it has ended.

    Of the clock that clock_getcpuclockid(3) names, which Python has for threads only.
    """
    try:
        return time.clock_gettime((~pid << 3) | 2)
    except OSError:
        return 0.0


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat behind the name, from the state on; empty once it has ended."""
    try:
        return (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _kilobytes(path: Path) -> dict[str, int]:
    """The lines "Name: 12 kB" of a file."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return {}
    parts = [line.split() for line in lines]
    return {p[0].rstrip(":"): int(p[1]) for p in parts if len(p) == 3 and p[2] == "kB"}
