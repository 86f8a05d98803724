"""How long is left: from measured times, and from guesses until they are measured."""

from types import SimpleNamespace

import numpy as np
import pytest

from network import forecast


@pytest.fixture
def clock(monkeypatch):
    """Return a function that lets seconds pass."""
    now = [0.0]

    def perf_counter():
        return now[0]

    monkeypatch.setattr(forecast.time, "perf_counter", perf_counter)
    return lambda seconds: now.__setitem__(0, now[0] + seconds)


def learner(iteration=10, side=64, window=32, fuse="noise", bs=2, step=0):
    recipe = SimpleNamespace(iteration=iteration, window=window, fuse=fuse, bs=bs)
    y = np.zeros((1, 3, side, side))
    return SimpleNamespace(recipe=recipe, y=y, step=step, ensemble_size=lambda n: n)


def test_until_a_part_is_measured_it_is_guessed_by_its_pixels(clock):
    made = forecast.Forecast(learner(), 5, 4)
    made.start(complete=False)
    clock(2)
    made.count("step", 1)
    prediction = 2 * (64 / 32) ** 2 / 2 / 3
    test = forecast.FUSING * 3 * prediction
    assert made.seconds_left() == pytest.approx(9 * 2 + 8 * prediction + 2 * test)
    made = forecast.Forecast(learner(fuse="none", window=0, bs=1), 5, 4)
    made.start(complete=False)
    clock(2)
    made.count("step", 1)
    assert made.seconds_left() == pytest.approx(9 * 2 + 8 * 2 / 3 + 2 * 2)


def test_measured_times_replace_the_guesses(clock):
    made = forecast.Forecast(learner(iteration=5), 2, 3)
    made.start(complete=False)
    for part, seconds, n in (
        ("step", 1, 1),
        ("step", 3, 1),
        ("prediction", 10, 2),
        ("prediction", 5, 1),
        ("test", 40, 1),
    ):
        clock(seconds)
        made.count(part, n)
    assert made.seconds_left() == pytest.approx(3 * 2 + 6 * 5 + 2 * 40)


def test_a_restart_counts_from_its_step_and_keeps_what_was_measured(clock):
    one = learner(iteration=6)
    made = forecast.Forecast(one, 3, 1)
    made.start(complete=False)
    clock(2)
    made.count("step", 1)
    one.step = 0
    made.start(complete=False)
    clock(4)
    made.count("step", 1)
    assert made.left == {"step": 5, "prediction": 2, "test": 2}
    assert made.seconds["step"] / made.done["step"] == 3


def test_nothing_is_left_of_a_complete_run(clock):
    made = forecast.Forecast(learner(step=10), 5, 4)
    made.start(complete=True)
    assert made.left == {"step": 0, "prediction": 0, "test": 0}
