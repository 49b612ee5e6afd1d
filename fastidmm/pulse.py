"""Whether the other ranks are still there: each leaves signs, and looks for theirs.

A rank that is killed closes its connections, and others notice. One that is stopped, or whose
machine is, closes none, and a message to it would be waited for as long as one to a rank that
evaluates. A thread leaves signs whatever else its rank does: only what rests altogether gives none.
"""

import os
import signal
import socket
import threading
from collections import Counter
from contextlib import suppress
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any

from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from fastidmm.errors import Gone

EVERY = 4.0  # seconds
# In a row without a sign. Seconds would count while all ranks are stopped together.
LOOKS = 10


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
    store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=EVERY * LOOKS))
    return PrefixStore(part, store)


class Pulse(threading.Thread):
    """Leaves a rank's signs, and ends the ranks of this machine that give none.

    Where those of another machine do not do the same in as long again, it ends this rank.
    """

    def __init__(self, store: Any, rank: int, people: tuple[tuple[str, int], ...]) -> None:
        """`people`: machine and process of every rank, each of which has left its first sign."""
        super().__init__(daemon=True)
        self._store, self._rank, self._people = store, rank, people
        self._over = threading.Event()
        here = machine()
        # A number may be another process's by then; what stands for it is not.
        self._here: dict[int, int] = {}
        for each, (host, process) in enumerate(people):
            # Where the system has none (macOS, some sandboxes), ranks are as those of elsewhere.
            with suppress(OSError, AttributeError):
                if host == here:
                    self._here[each] = os.pidfd_open(process)

    def stop(self) -> None:
        """Leave no more."""
        self._over.set()
        self.join()
        for process in self._here.values():
            os.close(process)

    def run(self) -> None:
        """Until it is stopped, or the store is gone: then so is who holds it, and all notice."""
        seen = [b""] * len(self._people)
        silent: Counter[int] = Counter()
        with suppress(RuntimeError):
            for number in count(1):
                if self._over.wait(EVERY):
                    return
                self._store.set(sign(self._rank), str(number))
                signs = self._store.multi_get([sign(each) for each in range(len(seen))])
                for rank, (before, now) in enumerate(zip(seen, signs, strict=True)):
                    silent[rank] = silent[rank] + 1 if now == before else 0
                    if silent[rank] and silent[rank] % LOOKS == 0:
                        self._miss(rank, long=silent[rank] > LOOKS)
                seen = signs

    def _miss(self, rank: int, *, long: bool) -> None:
        """End a rank of this machine, or this one where nobody has ended one of another."""
        if rank in self._here:
            self._store.set(f"silent {rank}", "")
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._here[rank], signal.SIGKILL)
        elif long:
            if self._store.add("leaving", 1) == 1:
                where = self._people[rank][0].partition("/")[0]
                told = f"rank {rank} on {where} gives no sign; `fastidmm resume` goes on."
                os.write(2, f"fastidmm: {told}\n".encode())
            os._exit(Gone.status)
