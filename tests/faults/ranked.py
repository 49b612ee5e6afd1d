"""Work done by several ranks: forked processes of this machine, which talk by gloo."""

import contextlib
import os
import pickle
import select
import signal
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from fastidmm.ranks import joined

T = TypeVar("T")
HUNG = 180.0  # seconds


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port: int = listening.getsockname()[1]
        return port


def as_rank(rank: int, size: int, port: int) -> None:
    """Be a process that torchrun has started as that rank."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip


def by(num: int, work: Callable[[], T]) -> list[T]:
    """What the work gives on each of so many ranks, which all must come to their end."""
    port = free_port()
    with tempfile.TemporaryDirectory() as place:
        children = [_forked(rank, num, port, work, Path(place)) for rank in range(num)]
        until = time.monotonic() + HUNG
        try:
            for child in children:
                ended = os.pidfd_open(child)
                if not select.select([ended], [], [], max(0, until - time.monotonic()))[0]:
                    raise TimeoutError(f"ranks hung for {HUNG:.0f} s")
                os.close(ended)
        finally:
            for child in children:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
        found: list[Any] = [
            pickle.loads((Path(place) / str(rank)).read_bytes()) for rank in range(num)
        ]
    problems = [problem for problem, _ in found if problem]
    assert not problems, "\n".join(problems)  # the first may only tell that another has ended
    return [value for _, value in found]


def _forked(rank: int, size: int, port: int, work: Callable[[], T], place: Path) -> int:
    child = os.fork()
    if child:
        return child
    problem, value = "", None
    try:
        as_rank(rank, size, port)
        with joined():
            value = work()
    except BaseException:
        problem = traceback.format_exc()
    finally:
        (place / str(rank)).write_bytes(pickle.dumps((problem, value)))
        os._exit(0)
