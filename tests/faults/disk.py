"""Refuse one call after the other of those that write a run, and go on with it.

    python tests/faults/disk.py [--trials N]

Without --trials: every call, with each of four errors. Calls are refused in Python, and in
safetensors' name with its own words; `on_a_small_disk` meets the errors of a real full one.
"""

import builtins
import errno
import io
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import safetensors.torch
from safetensors import SafetensorError
from trials import Figure, Outcome, main, outcome, same, stopped, whole

from fastidmm import checkpoint, stages
from fastidmm.errors import FULL, FastidmmError, unwritable
from fastidmm.record import Record

STATUS = {errno.ENOSPC: 3, errno.EDQUOT: 3, errno.EIO: 3, errno.EROFS: 2}
EVERY = 10**6


class Faults:
    """Counts the calls that write below a folder, and refuses them from one number on."""

    def __init__(self, root: Path, first: int, number: int) -> None:
        self.root, self.first, self.number = str(root.resolve()), first, number
        self.calls: list[str] = []

    def meet(self, call: str, path: Any) -> None:
        """Count a call, and refuse it where its turn has come."""
        self.calls.append(call)
        # A full disk stays full and a read-only one read-only; an I/O error is one bad place.
        at = len(self.calls) - 1
        if at == self.first or (at > self.first and self.number != errno.EIO):
            raise OSError(self.number, os.strerror(self.number), os.fspath(path) if path else None)

    def below(self, path: Any) -> bool:
        """Whether a path is of the run."""
        return not isinstance(path, int) and os.path.abspath(path).startswith(self.root)

    @contextmanager
    def on(self) -> Iterator[None]:
        """Stand between the run and the system."""
        real: dict[str, Any] = {n: getattr(os, n) for n in ("mkdir", "rename", "replace", "open")}
        fsync, save_file, faults = os.fsync, safetensors.torch.save_file, self

        def named(name: str) -> Any:
            def call(path: Any, *given: Any, **named: Any) -> Any:
                if faults.below(path) and named.get("dir_fd") is None:
                    faults.meet(name, path)
                return real[name](path, *given, **named)

            return call

        def synced(handle: int) -> None:
            faults.meet("fsync", None)
            fsync(handle)

        class File(io.FileIO):
            def write(self, data: Any) -> Any:
                faults.meet("write", None)  # the system names no file here
                return super().write(data)

        def opened(path: Any, mode: str = "r", *given: Any, **named: Any) -> Any:
            if "r" in mode or not faults.below(path):
                return io_open(path, mode, *given, **named)
            faults.meet("open to write", path)
            return io.TextIOWrapper(io.BufferedWriter(File(path, mode)), encoding="utf-8")

        def saved(tensors: Any, path: Path) -> None:
            try:
                faults.meet("open to write", path)
                save_file(tensors, path)
                size = path.stat().st_size
                os.truncate(path, size // 2)
                faults.meet("write", path)
                save_file(tensors, path)
            except OSError as problem:
                told = f"I/O error: {problem.strerror} (os error {problem.errno})"
                raise SafetensorError(f"Error while serializing: {told}") from None

        io_open = builtins.open
        with mock.patch.multiple(os, fsync=synced, **{n: named(n) for n in real}), \
            mock.patch.object(io, "open", opened), \
            mock.patch.object(safetensors.torch, "save_file", saved):  # fmt: skip
            yield


def resumed(run: Path, first: int, number: int) -> tuple[list[str], FastidmmError | None]:
    """Go on with a run whose disk refuses from a call on; the calls, and the sentence said."""
    faults = Faults(run, first, number)
    try:
        with faults.on():
            stages.resume(run)
    except FastidmmError as said:
        return faults.calls, said
    except OSError as problem:  # as the command line tells it
        return faults.calls, unwritable(problem, problem.filename or "the disk")
    return faults.calls, None


def wrong(run: Path, said: FastidmmError | None, number: int, truth: Outcome) -> str:
    """What is not as promised after a refusal; "" where all is."""
    if said is None and Record(run).finished:  # what cannot be cleared away costs nothing
        return "" if same(outcome(run), truth) else "the bits differ"
    if said is None or said.status != STATUS[number]:
        return f"said {said!r}"
    if str(run) not in str(said) or os.strerror(number) not in str(said) or "\n" in str(said):
        return f"said {said}"
    if number in FULL and "/checkpoints/" in str(said) and "bytes are" not in str(said):
        return f"said no bytes: {said}"
    path = checkpoint.newest(run / "checkpoints")
    if path is None or set(checkpoint.load(path, checkpoint.MODEL)[0][0]) != set(truth[1]):
        return "no checkpoint loads"
    stages.resume(run)
    return "" if same(outcome(run), truth) else "the bits differ"


def refused(trials: int) -> Figure:
    """Every call (or `trials` of them) refused with every error."""
    truth, begun = whole(), stopped("begun", 3)
    counted = Path(shutil.copytree(begun, "runs/counted"))
    calls, _ = resumed(counted, EVERY, errno.EIO)
    every = [(at, number) for at in range(len(calls)) for number in STATUS]
    chosen = every[:: max(len(every) // trials, 1) | 1]  # odd: errors take turns
    broken = []
    for at, number in chosen:
        run = Path(shutil.copytree(begun, "runs/refused"))
        _, said = resumed(run, at, number)
        if bad := wrong(run, said, number, truth):
            broken.append(f"call {at} ({calls[at]}), {os.strerror(number)}: {bad}")
        shutil.rmtree(run)
    kinds = ", ".join(f"{calls.count(kind)} {kind}" for kind in sorted(set(calls)))
    promised = "a refused call leaves a checkpoint that loads and resumes to the same bits"
    return Figure(f"{promised} ({kinds}; {len(STATUS)} errors)", len(chosen), broken)


def full_of(run: Path, truth: Outcome, needed: int) -> Iterator[str]:
    """Go on with a run on a full disk, which a file fills; then without that file."""
    weight = run / "weight"
    free = shutil.disk_usage(run).free
    weight.write_bytes(bytes(free - needed))
    try:
        stages.resume(run)
        yield "it found room"
    except FastidmmError as said:
        told = str(said)
        if said.status != 3 or str(run) not in told or "bytes are needed" not in told:
            yield f"said {said}"
    weight.unlink()
    stages.resume(run)
    if not same(outcome(run), truth):
        yield "the bits differ"


def on_a_small_disk(trials: int) -> Figure:
    """Runs on a tmpfs that is full but for so many bytes, a little more each time."""
    truth, begun, broken = whole("truth"), stopped("begun2", 3), []
    size = sum(p.stat().st_size for p in begun.rglob("*") if p.is_file())
    promised = "a full disk of 16 MB leaves a run that resumes to the same bits, and says the bytes"
    with tempfile.TemporaryDirectory() as place:
        mount = ["mount", "-t", "tmpfs", "-o", f"size={max(16_000_000, 4 * size)}", "none", place]
        if subprocess.run(mount, capture_output=True, check=False).returncode:
            return Figure(promised, 0, [], "not tried: no tmpfs may be mounted here")
        try:
            for trial in range(trials):
                run = Path(shutil.copytree(begun, Path(place) / str(trial)))
                needed = 20_000 + size // 2 * trial // trials
                broken += [f"{needed:,} bytes free: {b}" for b in full_of(run, truth, needed)]
                shutil.rmtree(run)
        finally:
            subprocess.run(["umount", place], check=True)
    return Figure(promised, trials, broken)


def figures(trials: int) -> list[Figure]:
    """Both."""
    return [refused(trials), on_a_small_disk(min(trials, 10))]


if __name__ == "__main__":
    main(__doc__, figures, EVERY)
