"""What a long command says of itself while it runs."""

import io
import sys
import threading

import numpy as np
import pytest
from common import progress as progress_module
from common.progress import Progress

from ddim_jax.parallel import map_rows


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands until it is set."""
    now = [100.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    return now


def test_the_time_left_is_of_the_pace_after_what_compiled(clock):
    """30 s of compiling and drawing 10; then 10 in 5 s each: 70 more take 35 s."""
    progress = Progress("sample.py", 100, "images")
    assert progress.seconds_left() is None and "begun" in progress.line()
    clock[0] += 30
    progress.add(10)
    assert progress.seconds_left() == pytest.approx(270)  # nothing better is known yet
    for _ in range(2):
        clock[0] += 5
        progress.add(10)
    assert progress.seconds_left() == pytest.approx(35)
    assert progress.line() == "sample.py: 30 of 100 images in 00:40, about 00:35 left"
    progress.note("loss 0.5")
    assert progress.line().endswith("left, loss 0.5")


def test_what_was_done_before_is_counted_but_sets_no_pace(clock):
    """300 of 400 steps were there: 50 in 10 s, then 50 are left."""
    progress = Progress("train.py", 400, "steps", done=300)
    for _ in range(2):
        clock[0] += 5
        progress.add(25)
    assert progress.seconds_left() == pytest.approx(10)
    assert progress.line().startswith("train.py: 350 of 400 steps")
    progress.skip(25)
    assert progress.seconds_left() == pytest.approx(5)


def test_without_a_terminal_lines_come_while_a_batch_is_running(monkeypatch, capsys):
    monkeypatch.setattr(progress_module, "LINE_SECONDS", 0.01)
    assert not sys.stderr.isatty()
    with Progress("sample.py", 2, "images") as progress:
        for _ in progress.each("ab"):
            threading.Event().wait(0.1)  # a batch of which nothing is known until it ends
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "sample.py: 0 of 2 images in 00:00, begun"
    assert lines[-1].startswith("sample.py: 1 of 2 images in 00:00, about 00:0")
    threading.Event().wait(0.1)
    assert capsys.readouterr().err == ""  # and none after the end


def test_a_short_command_says_nothing_without_a_terminal(capsys):
    with Progress("sample.py", 1, "images") as progress:
        progress.add(1)
    assert capsys.readouterr().err == ""


def test_a_terminal_has_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with Progress("train.py", 4, "steps", done=1) as progress:
        progress.note("loss 0.25")
        progress.add(2)
        progress.say("step 3: measured")
    shown = terminal.getvalue()
    assert "train.py:  75%" in shown and "3/4" in shown and "loss 0.25" in shown
    assert capsys.readouterr().out == "step 3: measured\n"


def test_rows_are_told_as_their_batches_are_done():
    told = []
    result = map_rows(lambda params, x: x + params, 1, 3, np.arange(8), on_rows=told.append)
    assert told == [3, 3, 2] and result.tolist() == list(range(1, 9))
