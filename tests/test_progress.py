"""The bar and the lines of progress."""

import io
import threading

import pytest
from scripts import run, write

import network
import utils


@pytest.fixture
def clock(monkeypatch):
    """Return a list whose only number is the time, in seconds."""
    now = [100.0]
    monkeypatch.setattr(utils.time, "perf_counter", lambda: now[0])
    return now


def begun(left):
    """Return progress that draws only when the test asks for it, with seconds left."""
    progress = utils.Progress("in/a.png")
    progress.closed.set()
    progress.start()
    progress.expect(left)
    return progress


def test_the_time_left_falls_while_nothing_is_done(clock, capsys):
    progress = begun(left=20)
    for seconds in (5, 15, 25):
        clock[0] = 100 + seconds
        progress.draw()
    progress.expect(15)
    progress.draw()
    progress.close()
    assert capsys.readouterr().err.splitlines() == [
        "in/a.png: 25% done, 00:15 left",
        "in/a.png: 75% done, 00:05 left",
        "in/a.png: 100% done, 00:00 left",
        "in/a.png: 62% done, 00:15 left",
    ]


def test_without_a_terminal_a_line_comes_after_5_seconds_and_then_each_minute(
    clock, capsys
):
    progress, pauses = utils.Progress("in/a.png"), []

    def wait(seconds):
        pauses.append(seconds)
        if len(pauses) == 2:
            progress.expect(1000)
        return len(pauses) == 4

    progress.closed.wait = wait
    progress.start()
    progress.close()
    assert pauses == [5, 5, 60, 60]
    assert capsys.readouterr().err.count("in/a.png: 0% done, 16:40 left\n") == 2


def test_a_terminals_bar_counts_time(clock, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stderr", terminal)
    progress = begun(left=120)
    clock[0] += 30
    progress.bar.start_t -= 30  # tqdm has a clock of its own
    progress.draw()
    progress.close()
    last = terminal.getvalue().split("\r")
    assert any(
        "in/a.png:  25%|" in line and line.rstrip().endswith("<01:30") for line in last
    )


def test_a_long_part_does_not_stop_the_bar(monkeypatch):
    drawn = threading.Event()
    monkeypatch.setattr(utils.Progress, "draw", lambda self: drawn.set())
    monkeypatch.setattr(utils, "FIRST", 0.01)
    progress = utils.Progress("in/a.png")
    progress.start()
    progress.expect(9)
    assert drawn.wait(30)
    progress.close()
    assert not progress.thread.is_alive()


def test_no_thread_outlives_an_error_of_the_program(monkeypatch):
    def fail(learner):
        raise ZeroDivisionError

    write("in/a.png")
    monkeypatch.setattr(network.Self2Self, "train_step", fail)
    before = threading.active_count()
    with pytest.raises(ZeroDivisionError):
        run("denoise", "--path in/a.png")
    assert threading.active_count() == before
