"""The bar and the lines of progress."""

import io

import pytest

import utils


@pytest.fixture
def clock(monkeypatch):
    """Return a list whose only number is the time, in seconds."""
    now = [100.0]
    monkeypatch.setattr(utils.time, "perf_counter", lambda: now[0])
    return now


def test_without_a_terminal_a_line_comes_after_5_seconds_and_then_each_minute(
    clock, capsys
):
    progress = utils.Progress("in/a.png")
    progress.start()
    for seconds, left in (
        (4.9, 60),
        (5.1, 15.3),
        (64, 9),
        (66, 22),
        (125, 0),
        (127, 0),
    ):
        clock[0] = 100 + seconds
        progress.show(left)
    progress.close()
    assert capsys.readouterr().err.splitlines() == [
        "in/a.png: 25% done, 00:15 left",
        "in/a.png: 75% done, 00:22 left",
        "in/a.png: 100% done, 00:00 left",
    ]


def test_a_terminals_bar_counts_time(clock, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stderr", terminal)
    progress = utils.Progress("in/a.png")
    progress.start()
    clock[0] += 30
    progress.bar.start_t -= 30  # tqdm has a clock of its own
    progress.show(90)
    progress.close()
    last = terminal.getvalue().split("\r")
    assert any(
        "in/a.png:  25%|" in line and line.rstrip().endswith("<01:30") for line in last
    )
