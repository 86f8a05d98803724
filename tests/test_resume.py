"""Crashes, kills and signals lose nothing."""

import itertools
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from kill import kill_and_compare
from scripts import files, run, without_seconds, write

import network
import utils


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


@pytest.mark.parametrize("recipe", ["paper", "fast"])
def test_a_run_resumed_after_crashes_is_the_uninterrupted_one(
    recipe, folder, crash, monkeypatch
):
    write("in/a.png")
    write("in/b.png", channels=3)
    flags = f"--path {folder}/in --iteration 7 --test_frequency 2 --recipe {recipe}"
    results = []
    for name, crashes in (("whole", []), ("cut", [1, 4, 5, 6, 2])):
        Path(name).mkdir()
        monkeypatch.chdir(folder / name)
        for steps in crashes:
            crash(steps)
            assert run("denoise", flags + " --resume") == 99
        crash(10**9)
        assert run("denoise", flags + " --resume") == 0
        results.append(without_seconds(files()))
        monkeypatch.chdir(folder)
    assert results[0] == results[1]


def test_a_killed_run_resumes_to_the_same_bytes():
    kills, differences = kill_and_compare(1, 16, longest=5)
    assert kills
    assert not differences


def test_finished_images_are_skipped_and_more_steps_extend_them(
    capsys, crash, monkeypatch
):
    write("in/a.png")
    assert run("denoise", "--path in/a.png --recipe paper --iteration 6") == 0
    (results,) = Path("images/in/a.png/denoise").iterdir()
    longer = without_seconds(files(results))
    assert run("denoise", "--path in/a.png --recipe paper --iteration 4") == 0
    capsys.readouterr()
    crash(1)  # no step is made
    assert run("denoise", "--path in/a.png --recipe paper --iteration 4 --resume") == 0
    assert "finished already" in capsys.readouterr().out
    crash(3)  # two steps are enough
    with monkeypatch.context() as patch:
        patch.setattr(utils.Result, "finish", lambda *_: sys.exit(99))
        assert (
            run("denoise", "--path in/a.png --recipe paper --iteration 6 --resume")
            == 99
        )
    assert run("denoise", "--path in/a.png --recipe paper --iteration 6 --resume") == 0
    assert without_seconds(files(results)) == longer


@pytest.mark.parametrize("kind", ["damaged", "version"])
def test_a_checkpoint_that_cannot_be_read_is_refused_and_not_touched(kind, capsys):
    write("in/a.png")
    assert run("denoise", "--path in/a.png") == 0
    (path,) = Path("images").rglob("checkpoint.pt")
    if kind == "damaged":
        path.write_bytes(path.read_bytes()[:1000])
    else:  # of the first version, which had no number and a rate of its own
        saved = torch.load(path)
        del saved["format"]
        torch.save(saved, path)
    before = files()
    capsys.readouterr()
    assert run("denoise", "--path in/a.png --resume") == 2
    err = capsys.readouterr().err
    assert str(path) in err and kind in err and err.count("\n") == 1
    assert files() == before


def test_a_checkpoint_of_another_picture_is_refused(capsys):
    write("in/a.png")
    assert run("denoise", "--path in/a.png") == 0
    write("in/a.png")
    before = files()
    assert run("denoise", "--path in/a.png --resume") == 2
    assert "of another image or noise" in capsys.readouterr().err
    assert files() == before


def test_a_checkpoint_with_another_reference_is_refused(capsys):
    write("in/a.png")
    write("b.png")
    observed = "--path in/a.png --observed"
    assert run("denoise", f"{observed} --reference b.png") == 0
    assert run("denoise", f"{observed} --resume") == 2
    assert "of another reference" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "status"), [(2, 130), (15, 143)])
def test_a_signal_ends_the_run_in_a_line(number, status, monkeypatch, capsys):
    write("in/a.png")
    real = network.Self2Self.train_step

    def train_step(learner):
        real(learner)
        if learner.step == 3:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(network.Self2Self, "train_step", train_step)
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # else ignored behind a "&"
    assert run("denoise", "--path in/a.png --recipe paper") == status
    err = capsys.readouterr().err
    assert "interrupted; --resume goes on" in err and err.count("\n") == 1
    monkeypatch.setattr(network.Self2Self, "train_step", real)
    assert run("denoise", "--path in/a.png --recipe paper --resume") == 0
    assert "going on from step 2" in capsys.readouterr().out


def test_checkpoints_come_by_the_clock_too(monkeypatch):
    write("in/a.png")
    saved, save = [], utils.Result._save_checkpoint

    def watched(result, learner):
        save(result, learner)
        saved.append(learner.step)

    monkeypatch.setattr(utils.Result, "_save_checkpoint", watched)
    flags = "--path in/a.png --iteration 4 --test_frequency 4"
    assert run("denoise", flags) == 0
    monkeypatch.setattr(utils, "SAVE_EVERY", 0)
    monkeypatch.setattr(utils, "SAVING", 0)
    assert run("denoise", flags) == 0
    assert saved == [4, 1, 2, 3, 4]
