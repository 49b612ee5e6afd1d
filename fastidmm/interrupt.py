"""Stop at the next step when the system asks for it; at once when it asks twice."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from fastidmm.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SOON = 0.05  # seconds
STOPPED = (
    b"fastidmm: stopped; `fastidmm resume` goes on with a run that has begun, the same command "
    b"begins all else anew.\n"
)


class Left(Exception):
    """What can be begun anew was left unfinished, since a signal asked to stop."""


class Stop:
    """Whether a signal has asked the run to stop."""

    requested = False

    def leave(self) -> None:
        """Raise `Left` where one has."""
        if self.requested:
            raise Left


def heed() -> None:
    """From here on a signal ends the command by a sentence and the status of `Interrupted`.

    For whatever is not `stoppable`: imports, lists, reports. All that is written bears it.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(Interrupted.status)

    def lost(told: "sys.UnraisableHookArgs") -> None:
        if isinstance(told.exc_value, SystemExit):
            # Raised in what C had called, which drops it: once more when that has returned.
            signal.signal(signal.SIGALRM, leave)
            signal.setitimer(signal.ITIMER_REAL, SOON)
        else:
            before(told)

    before, sys.unraisablehook = sys.unraisablehook, lost

    def end(number: int, frame: FrameType | None) -> None:
        _usual_effect()
        # Of several ranks one speaks: launchers end them all.
        if os.environ.get("RANK", "0") == "0":
            _say(STOPPED)
        raise SystemExit(Interrupted.status)

    for number in _heeded():
        signal.signal(number, end)


@contextmanager
def stoppable(*, among_ranks: bool = False, heard: bytes = b"") -> Iterator[Stop]:
    """Catch SIGINT, SIGTERM and SIGHUP once; a second one ends the process at once.

    Whoever asks at a terminal is told `heard`: without an answer people ask twice.
    Among ranks it does not, nor does one that comes once they have agreed to stop: launchers send
    one to every rank as soon as any has ended.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in _heeded()}

    def ask(number: int, frame: FrameType | None) -> None:
        stop.requested = True
        if not among_ranks:
            _usual_effect()
            if heard and os.isatty(2):
                _say(heard)

    for number in before:
        signal.signal(number, ask)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, ask if among_ranks and stop.requested else handler)


@contextmanager
def unheard() -> Iterator[None]:
    """Processes started meanwhile never get these signals: they end with the one that began them.

    A scheduler and Ctrl-C ask every process of a run; were a worker to obey, the step would fail.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _say(message: bytes) -> None:
    """Past print, which may be what was interrupted; the terminal may be what is gone."""
    with suppress(OSError):
        os.write(2, message)


def _heeded() -> list[signal.Signals]:
    """All but what is ignored: that is how nohup and a shell's background jobs are meant."""
    return [n for n in SIGNALS if signal.getsignal(n) not in (signal.SIG_IGN, None)]


def _usual_effect() -> None:
    for number in _heeded():
        signal.signal(number, signal.SIG_DFL)
