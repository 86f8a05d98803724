"""Forecasts how long a training takes, from the times that its parts have taken so far."""

import math
import time
from collections import Counter

FUSING = 60  # predictions of one channel that take as long as fusing it


class Forecast:
    """The seconds that a learner's steps, predictions and tests still take.

    A test is what follows an ensemble: fusing, scores and files. A part takes the mean time
    of those done. Until one is done we guess how many steps' time it takes.

    Args:
        learner: a Self2Self.
        test_frequency: steps between two ensembles.
        num_prediction: see Self2Self.ensemble_size.
    """

    def __init__(self, learner, test_frequency, num_prediction):
        self.learner, self.test_frequency = learner, test_frequency
        self.ensemble_size = learner.ensemble_size(num_prediction)
        recipe, (channels, *side) = learner.recipe, learner.y.shape[1:]
        pixels = math.prod(side)
        window = min(recipe.window**2 or pixels, pixels)
        forward = pixels / window / recipe.bs / 3  # the backward pass takes two thirds
        fusing = FUSING * channels * forward if recipe.fuse != "none" else 1
        self.guess = {"step": 1, "prediction": forward, "test": fusing}
        self.left, self.done, self.seconds = {}, Counter(), Counter()
        self.at = 0.0  # when the last part ended

    def start(self, complete):
        """Start the clock, at the learner's step; complete: whether no test is left."""
        left = self.learner.recipe.iteration - self.learner.step
        tests = 0 if complete else max(1, math.ceil(left / self.test_frequency))
        predictions = tests * self.ensemble_size
        self.left = {"step": left, "prediction": predictions, "test": tests}
        self.at = time.perf_counter()

    def count(self, part, n):
        """Count n parts (step, prediction or test) as done since the last call."""
        now = time.perf_counter()
        self.left[part] -= n
        self.done[part] += n
        self.seconds[part] += now - self.at
        self.at = now

    def seconds_left(self):
        """Return the seconds that all parts left take, once one is done."""
        guessed = sum(n * self.guess[part] for part, n in self.done.items())
        step = self.seconds.total() / guessed
        each = {part: step * guess for part, guess in self.guess.items()}
        each |= {part: self.seconds[part] / n for part, n in self.done.items()}
        return sum(n * each[part] for part, n in self.left.items())
