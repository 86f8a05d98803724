"""Lets the tests import the scripts; every test runs in an empty folder of its own."""

import itertools
import os
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # tiny tensors, and perhaps a busy machine

import cv2
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

import network


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Run every test in an empty folder, whose files need not outlive a power cut."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.fsync", lambda _: None)
    return tmp_path


@pytest.fixture
def figures():
    """Asked for by tests that look at a figure: theirs are drawn."""


@pytest.fixture(autouse=True)
def blank_figures(request, monkeypatch):
    """Draw no figure, which takes longer than a few steps, where no test looks at one."""
    if "figures" not in request.fixturenames:
        blank = cv2.imencode(".png", np.zeros((1, 1), np.uint8))[1].tobytes()
        for figure in ("comparison", "curves"):
            monkeypatch.setattr(f"results.{figure}", lambda *_: blank)


@pytest.fixture
def crash(monkeypatch):
    """Return a function that makes the n-th training step from now end the process."""
    real = network.Self2Self.train_step

    def at(steps):
        left = itertools.count(steps - 1, -1)

        def train_step(learner):
            if next(left) == 0:
                raise SystemExit(99)
            real(learner)

        monkeypatch.setattr(network.Self2Self, "train_step", train_step)

    return at
