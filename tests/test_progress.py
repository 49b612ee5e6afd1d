"""What stands on a terminal while a run goes, the time that is left, and one line elsewhere."""

import io
import re
import sys
import time

import pytest

from fastidmm.progress import Pace, Progress, say, spoken
from fastidmm.train import HEARD
from fastidmm.watch import Watch

LINE = {"epoch": 1, "loss": 3.0, "knn_top1": 0.25, "images_per_second": 99.6, "data_wait": 0.031}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def screen(written: str, width: int) -> list[str]:
    """The rows that a terminal of this width shows."""
    rows, row, column = [""], 0, 0
    for sign in re.findall(r"\x1b\[\??[\d;]*[A-Za-z]|[^\x1b]", written):
        if sign == "\r":
            column = 0
        elif sign == "\n":
            row, column = row + 1, 0
        elif sign == "\x1b[1A":
            row -= 1
        elif sign == "\x1b[2K":
            rows[row] = ""
        elif len(sign) == 1:
            if column == width:
                row, column = row + 1, 0
            rows += [""] * (row + 1 - len(rows))
            rows[row] = rows[row][:column].ljust(column) + sign + rows[row][column + 1 :]
            column += 1
        else:
            assert sign[-1] in "mhl", f"unknown: {sign!r}"  # colours, the cursor
        rows += [""] * (row + 1 - len(rows))
    return [row.rstrip() for row in rows]


def shown(steps: int, done: int = 0) -> Progress:
    return Progress("pretrain", Watch(None, 0), epochs=2, steps=steps, done=done)


@pytest.mark.parametrize("width", [40, 80, 200])
def test_a_terminal_of_any_width_shows_one_block_below_what_was_said(
    monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with shown(8) as running:
        for step in range(1, 9):
            running.show(LINE | {"step": step, "loss": 10.0 - step})
            if step == 4:
                say("step 4: something to know.")
    say("done.")
    rows = screen(terminal.getvalue(), width)
    assert rows[0] == "step 4: something to know." and rows[-2:] == ["done.", ""]
    assert rows[1] == "━" * width
    words = " ".join(" ".join(rows[2:-2]).split())
    assert re.fullmatch(
        r"pretrain: epoch 1/2 step 8/8 0:00 left "
        r"loss 2.000 knn top1 0.250 100 images/s data-wait 3 %",
        words,
    )
    assert all(len(row) <= width for row in rows)
    assert terminal.getvalue().rfind("\x1b[?25h") > terminal.getvalue().rfind("\x1b[?25l")


@pytest.mark.parametrize("width", [80, 200])
def test_an_answered_signal_leaves_what_was_shown(
    monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    """The rows that stood there with the answer at their end, and below them the next rows."""
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with shown(8) as running:
        running.shown = -float("inf")
        running.show(LINE | {"step": 4})
        terminal.write("^C" + HEARD.decode())
        before = screen(terminal.getvalue(), width)
        running.shown = -float("inf")
        running.show(LINE | {"step": 5, "loss": 2.0})
    *rows, last = screen(terminal.getvalue(), width)
    told = [row for row in before if row]
    assert "step 4/8" in told[1] and "^C stopping once" in "".join(told[2:])
    assert rows[: len(told)] == told and last == ""
    bar, where, figures = [row for row in rows[len(told) :] if row]
    assert "━" in bar and "step 5/8" in where and figures.startswith("loss 2.000")


def test_a_killed_run_leaves_a_cursor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with shown(8) as running:
        running.show(LINE | {"step": 8})
        written = terminal.getvalue()
    assert written.rfind("\x1b[?25h") > written.rfind("\x1b[?25l") > -1


def test_elsewhere_a_line_a_minute_and_the_last(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    with shown(steps=10, done=2) as running:
        for step in range(3, 11):
            now += 25.0
            running.show(LINE | {"step": step})
    assert capsys.readouterr().err.splitlines() == [
        "pretrain: epoch 1/2  step 5/10  2:05 left  "
        "loss 3.000  knn top1 0.250  100 images/s  data-wait 3 %",
        "pretrain: epoch 1/2  step 8/10  0:50 left  "
        "loss 3.000  knn top1 0.250  100 images/s  data-wait 3 %",
        "pretrain: epoch 1/2  step 10/10  0:00 left  "
        "loss 3.000  knn top1 0.250  100 images/s  data-wait 3 %",
    ]


def test_without_labels_the_line_tells_what_needs_none() -> None:
    line = {"epoch": 1, "loss": 3.0, "retrieval_top1": 0.5, "rankme": 12.34, "spread": 0.9}
    assert spoken(line) == ["loss 3.000", "retrieval top1 0.500", "rankme 12.340"]
    assert spoken(line | {"knn_top1": 0.25}) == ["loss 3.000", "knn top1 0.250"]
    assert spoken({"loss": None, "rankme": None}) == []


def test_what_is_left_has_an_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "perf_counter", lambda: 0.0)
    pace = Pace(1000, 100)
    pace.passed(110, 600.0)  # compiling
    assert pace.seconds == (53400.0, 53400.0, 53400.0) and str(pace) == "14:50:00"
    when = 600.0
    for step, seconds in [(120, 10), (130, 20), (140, 30), (150, 40), (160, 50)]:
        when += seconds
        pace.passed(step, when)
    # 1 to 5 seconds a step, the quarters at 2 and 4.
    assert pace.seconds == (840 * 3.0, 840 * 2.0, 840 * 4.0)
    assert str(pace) == "42:00 (28:00 to 56:00)"


def test_one_slow_look_is_no_interval_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "perf_counter", lambda: 0.0)
    pace = Pace(200, 0)
    for step in range(1, 100):
        pace.passed(step, step + (500.0 if step > 50 else 0.0))
    mean, low, high = pace.seconds
    assert low == 101.0 and mean == high == pytest.approx(101 * (98 + 500) / 98)
