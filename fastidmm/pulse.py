"""Whether the other ranks are still there: each leaves signs, and looks for theirs.

A rank that is killed closes its connections, and others notice. One that is stopped, or whose
machine or cable is gone, closes none, and a message to it would be waited for as long as one to a
rank that evaluates. A thread leaves signs whatever else its rank does: only what rests altogether
gives none.
"""

import os
import select
import signal
import socket
import threading
from collections import Counter
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from fastidmm.errors import Gone

EVERY = 2.5  # seconds; all end within 60, other machines' ranks being waited for twice as long
# In a row without a sign. Seconds would count while all ranks are stopped together.
LOOKS = 10
ANSWERED = timedelta(seconds=30)


def machine() -> str:
    """This one's name, and what tells from others where processes have their numbers."""
    told = [socket.gethostname()]
    with suppress(OSError):
        told += [Path("/proc/sys/kernel/random/boot_id").read_text()[:8]]
        told += [os.readlink("/proc/self/ns/pid")]
    return "/".join(told)


def sign(rank: int) -> str:
    """The store's key of a rank's sign."""
    return f"sign {rank}"


def own_store(part: str) -> Any:
    """A way of one's own to the launcher's store: who waits for a key there lets nobody else by."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(address, port, is_master=False, timeout=ANSWERED)
    return PrefixStore(part, store)


class Pulse:
    """Leaves a rank's signs, and ends the ranks of this machine that give none.

    Where those of another machine do not do the same in as long again, it ends this rank; so too
    where the launcher's store gives no answer for as long.
    """

    def __init__(self, store: Any, rank: int, people: tuple[tuple[str, int], ...]) -> None:
        """`people`: machine and process of every rank, each of which has left its first sign."""
        self._store, self._rank, self._people = store, rank, people
        self._over = threading.Event()
        self._rounds = 0
        here = machine()
        # A number may be another process's by then; what stands for it is not.
        self._here: dict[int, int] = {}
        for each, (host, process) in enumerate(people):
            # Where the system has none (macOS, some sandboxes), ranks are as those of elsewhere.
            with suppress(OSError, AttributeError):
                if host == here:
                    self._here[each] = os.pidfd_open(process)
        self._threads = [
            threading.Thread(target=work, daemon=True) for work in (self._look, self._watch)
        ]

    def start(self) -> None:
        """From now on."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Leave no more."""
        self._over.set()
        for thread in self._threads:
            thread.join(EVERY)  # the store may never answer
        if not any(thread.is_alive() for thread in self._threads):
            for process in self._here.values():
                os.close(process)

    def _look(self) -> None:
        """Leave signs and look for the others', until the store is gone."""
        seen = [b""] * len(self._people)
        silent: Counter[int] = Counter()
        with suppress(RuntimeError):
            while not self._over.wait(EVERY):
                self._rounds += 1
                self._store.set(sign(self._rank), str(self._rounds))
                signs = self._store.multi_get([sign(each) for each in range(len(seen))])
                for rank, (before, now) in enumerate(zip(seen, signs, strict=True)):
                    silent[rank] = silent[rank] + 1 if now == before else 0
                    if silent[rank] and silent[rank] % LOOKS == 0:
                        self._miss(rank, long=silent[rank] > LOOKS)
                seen = signs

    def _watch(self) -> None:
        """Look whether the store answers; a call to one that does not may never come back."""
        before = silent = 0
        while not self._over.wait(EVERY):
            silent = silent + 1 if self._rounds == before else 0
            if silent >= 2 * LOOKS:
                _leave("the launcher gives no sign")
            before = self._rounds

    def _miss(self, rank: int, *, long: bool) -> None:
        """End a rank of this machine, or this one where that had no effect, or cannot be done."""
        process = self._here.get(rank)
        if process is not None and not long:
            self._store.set(f"silent {rank}", "")
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(process, signal.SIGKILL)
        elif long and (process is None or not select.select([process], [], [], 0)[0]):
            where = self._people[rank][0].partition("/")[0]
            first = self._store.add("leaving", 1) == 1
            _leave(f"rank {rank} on {where} gives no sign" if first else "")


def _leave(why: str) -> None:
    """End this process, whose main thread waits where no exception would reach it."""
    if why:
        os.write(2, f"fastidmm: {why}; `fastidmm resume` goes on.\n".encode())
    os._exit(Gone.status)
