"""Stop at the next step when the system asks for it; at once when it asks twice."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stop:
    """Whether a signal has asked the run to stop."""

    requested = False


@contextmanager
def stoppable() -> Iterator[Stop]:
    """Catch SIGINT, SIGTERM and SIGHUP once; a second one has its usual effect."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    # What is ignored stays ignored: that is how nohup and a shell's background jobs are meant.
    before = {n: h for n, h in handlers.items() if h not in (signal.SIG_IGN, None)}

    def ask(number: int, frame: FrameType | None) -> None:
        stop.requested = True
        for each, handler in before.items():
            signal.signal(each, handler)

    for number in before:
        signal.signal(number, ask)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
