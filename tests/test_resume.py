"""Crashes, kills and signals lose nothing."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from scripts import QUICK, ROOT, files, run, without_seconds, write

import network
import results
import utils


@pytest.mark.parametrize("recipe", ["paper", "fast"])
def test_a_run_resumed_after_crashes_is_the_uninterrupted_one(
    recipe, folder, crash, monkeypatch
):
    write("in/a.png")
    write("in/b.png", channels=3)
    flags = f"--path {folder}/in --iteration 7 --test_frequency 2 --recipe {recipe}"
    made = []
    for name, crashes in (("whole", []), ("cut", [1, 4, 5, 6, 2])):
        Path(name).mkdir()
        monkeypatch.chdir(folder / name)
        for steps in crashes:
            crash(steps)
            assert run("denoise", flags + " --resume") == 99
        crash(10**9)
        assert run("denoise", flags + " --resume") == 0
        made.append(without_seconds(files()))
        monkeypatch.chdir(folder)
    assert made[0] == made[1]


def test_a_killed_run_resumes_to_the_same_bytes(folder, monkeypatch):
    write("in/a.png", channels=3)
    flags = f"--path {folder}/in/a.png --iteration 60 --test_frequency 5"
    command = [sys.executable, ROOT / "denoise.py", *f"{QUICK} {flags}".split()]
    for name in ("whole", "killed"):
        Path(name).mkdir()
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, cwd="killed", **quiet) as process:
        while not list(Path("killed").rglob("checkpoint.pt")):
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    made = []
    for name, resume in (("whole", ""), ("killed", "--resume")):
        monkeypatch.chdir(folder / name)
        assert run("denoise", f"{flags} {resume}") == 0
        made.append(without_seconds(files()))
    assert made[0] == made[1]


def test_finished_images_are_skipped(capsys, crash, monkeypatch):
    write("in/a.png")
    flags = "--path in/a.png --recipe paper"
    with monkeypatch.context() as patch:  # it ends when all but the record is done
        patch.setattr(results.Result, "finish", lambda *_: sys.exit(99))
        assert run("denoise", flags) == 99
    assert run("denoise", f"{flags} --resume") == 0
    before = without_seconds(files())
    capsys.readouterr()
    crash(1)  # no step is made
    assert run("denoise", f"{flags} --resume") == 0
    assert "finished already" in capsys.readouterr().out
    assert without_seconds(files()) == before


@pytest.mark.parametrize("kind", ["damaged", "version"])
def test_a_checkpoint_that_cannot_be_read_is_refused_and_not_touched(
    kind, capsys, crash
):
    write("in/a.png")
    crash(3)  # after a test and its checkpoint
    assert run("denoise", "--path in/a.png --recipe paper") == 99
    (path,) = Path("images").rglob("checkpoint.pt")
    if kind == "damaged":
        path.write_bytes(path.read_bytes()[:1000])
    else:
        saved = torch.load(path)
        del saved["learner"]
        torch.save(saved, path)
    before = files()
    capsys.readouterr()
    assert run("denoise", "--path in/a.png --recipe paper --resume") == 2
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


def signalled(monkeypatch, method, calls, number=signal.SIGINT):
    """Send this process a signal within the n-th call of a learner's method."""
    real, left = getattr(network.Self2Self, method), itertools.count(calls - 1, -1)

    def sending(learner, *args):
        if next(left) == 0:
            os.kill(os.getpid(), number)
        return real(learner, *args)

    # else ignored behind a "&"
    signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(network.Self2Self, method, sending)


@pytest.mark.parametrize(
    ("recipe", "method", "calls", "step"),
    [
        ("fast", "train_step", 1, 1),
        ("paper", "train_step", 3, 3),
        ("paper", "sample", 4, 2),  # within the first test
        ("fast", "sample", 7, 4),  # within the last one
    ],
)
def test_what_a_signal_interrupts_goes_on_from_there(
    recipe, method, calls, step, folder, monkeypatch, capsys
):
    write("in/a.png")
    flags = f"--path {folder}/in/a.png --recipe {recipe}"
    assert run("denoise", flags) == 0
    expected, (record,) = without_seconds(files()), Path("images").rglob("record.json")
    losses = json.loads(record.read_text())["losses"]
    Path("cut").mkdir()
    monkeypatch.chdir("cut")
    with monkeypatch.context() as patch:
        signalled(patch, method, calls)
        capsys.readouterr()
        assert run("denoise", flags) == 130
    err = capsys.readouterr().err
    assert f"a.png: interrupted; --resume goes on from step {step}" in err
    assert err.count("\n") == 1
    assert run("denoise", f"{flags} --resume") == 0
    assert f"going on from step {step}" in capsys.readouterr().out
    assert without_seconds(files()) == {
        k: v for k, v in expected.items() if not k.startswith("in/")
    }
    (record,) = Path("images").rglob("record.json")
    assert json.loads(record.read_text())["losses"] == losses


def test_a_wish_to_end_is_a_signal_too_and_the_handlers_are_put_back(
    monkeypatch, capsys
):
    write("in/a.png")
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    signalled(monkeypatch, "train_step", 3, signal.SIGTERM)
    assert run("denoise", "--path in/a.png") == 143
    assert "goes on from step 3" in capsys.readouterr().err
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_before_the_first_step_nothing_is_lost_and_that_is_said(monkeypatch, capsys):
    write("in/a.png")
    signalled(monkeypatch, "__init__", 1)
    assert run("denoise", "--path in/a.png") == 130
    assert "interrupted; nothing is saved\n" in capsys.readouterr().err
    assert not list(Path().rglob("checkpoint.pt"))


def test_a_second_signal_ends_a_run_at_once(monkeypatch, capsys):
    write("in/a.png")
    real = network.Self2Self._train

    def train(learner):
        real(learner)
        if learner.step == 2:  # this, the third one, is not done
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(network.Self2Self, "_train", train)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # else ignored behind "&"
    assert run("denoise", "--path in/a.png --test_frequency 4") == 130
    assert "interrupted; nothing is saved" in capsys.readouterr().err


def test_a_finished_run_of_fast_needs_no_checkpoint(crash, capsys):
    write("in/a.png")
    assert run("denoise", "--path in/a.png") == 0
    assert not list(Path().rglob("checkpoint.pt"))
    before, (restored,) = without_seconds(files()), Path("images").rglob("restored.png")
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(network.Self2Self, "train_step", None)
        for _ in range(2):
            assert run("denoise", "--path in/a.png --resume") == 0
            assert "finished already, at step 4" in capsys.readouterr().out
    assert without_seconds(files()) == before
    restored.unlink()
    assert run("denoise", "--path in/a.png --resume") == 0
    assert without_seconds(files()) == before


@pytest.mark.parametrize("recipe", ["paper", "fast"])
def test_an_edited_program_does_not_go_on(recipe, monkeypatch, capsys):
    write("in/a.png")
    flags = f"--path in/a.png --recipe {recipe}"
    assert run("denoise", flags) == 0
    before = files()
    monkeypatch.setattr(utils, "sources_digest", lambda: "of edited ones")
    assert run("denoise", f"{flags} --resume") == 2
    assert "of another program; without --resume" in capsys.readouterr().err
    assert files() == before


def test_every_source_of_the_program_tells_it_from_others(tmp_path):
    names = ["denoise.py", "results.py", "network/punet.py", "network/fusing/plain.py"]
    names += ["tests/test_a.py", "README.md", "images/a.py"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    seen = [utils.sources_digest(tmp_path)]
    for name in names:
        (tmp_path / name).write_text("edited")
        seen.append(utils.sources_digest(tmp_path))
    assert len({*seen[:5]}) == 5 and len({*seen[4:]}) == 1
    (tmp_path / "results.py").rename(tmp_path / "other.py")
    assert utils.sources_digest(tmp_path) not in seen


def test_checkpoints_come_by_the_clock_and_progress_with_every_part(
    monkeypatch, capsys
):
    write("in/a.png")
    saved, save = [], results.Result._save_checkpoint
    expect = utils.Progress.expect

    def watched(result):
        save(result)
        saved.append(result.learner.step)

    def drawn(progress, left):
        expect(progress, left)
        progress.draw()

    monkeypatch.setattr(results.Result, "_save_checkpoint", watched)
    flags = "--path in/a.png --test_frequency 4 --recipe paper"
    assert run("denoise", flags) == 0
    monkeypatch.setattr(utils, "EVERY", 0)
    monkeypatch.setattr(utils.Progress, "expect", drawn)
    monkeypatch.setattr(utils.Progress, "_draw_until_closed", lambda progress: None)
    assert run("denoise", flags) == 0
    assert saved == [1, 2, 3, 4]  # the last before the test, which takes long
    told = [line for line in capsys.readouterr().err.splitlines() if "% done" in line]
    # 4 steps, 2 predictions, the end of the test.
    assert len(told) == 7 and told[-1] == "in/a.png: 100% done, 00:00 left"
    assert all(re.fullmatch(r"in/a.png: \d+% done, \d\d:\d\d left", x) for x in told)
