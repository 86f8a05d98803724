"""Networks that begin with another picture's weights."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from scripts import files, run, without_seconds, write
from tensors import begun, random_image, train

from network import Self2Self


@pytest.fixture
def watched(monkeypatch):
    """Collect the weights that every image begins with and ends with."""
    weights, make = [], Self2Self.__init__

    def made(learner, *args):
        make(learner, *args)
        weights.append(learner.network_weights())

    monkeypatch.setattr(Self2Self, "__init__", made)
    return weights


def same(weights, others):
    pairs = zip(weights, others, strict=True)
    return all(a.shape == b.shape and torch.equal(a, b) for a, b in pairs)


def checkpoint(name):
    (path,) = Path("images/in", name).rglob("checkpoint.pt")
    return torch.load(path)["learner"]["weights"]


def test_a_checkpoints_weights_are_where_training_begins(watched, capsys):
    for name in "ab":
        write(f"in/{name}.png")
    write("in/c.png", channels=3)
    assert run("denoise", "--path in/a.png") == 0
    (path,) = Path("images").rglob("checkpoint.pt")
    learnt = torch.load(path)["learner"]["weights"]
    path = path.rename("a.pt")
    assert run("denoise", "--path in/b.png --init a.pt") == 0
    assert same(watched[1], learnt) and not same(watched[0], learnt)
    (folder,) = Path("images/in/b.png/denoise").iterdir()
    assert "_init-a-" in folder.name
    before = files("images")
    assert run("denoise", "--path in/c.png --init a.pt") == 2
    assert "a.pt: of a picture with other channels" in capsys.readouterr().err
    assert run("denoise", "--path in/b.png --init a.pt --width 1") == 2
    assert "a.pt: it goes with --width 0.5" in capsys.readouterr().err
    path.write_bytes(path.read_bytes()[:2000])
    assert run("denoise", "--path in/b.png --init a.pt") == 2
    assert "a.pt: damaged, or" in capsys.readouterr().err
    assert files("images") == before


def test_a_folders_images_hand_their_weights_on(watched, monkeypatch, capsys):
    for name, channels in zip("abcd", (1, 3, 1, 1)):
        write(f"in/{name}.png", channels)
    flags = "--path in --init previous --test_frequency 4"
    assert run("denoise", flags) == 0
    a, b, c, d = watched
    assert not same(a, checkpoint("a.png"))
    chance = begun(random_image(3, 32, 32), initialisation="pytorch", width=0.5)
    chance = chance.network_weights()
    assert same(b[:-1], chance[:-1])  # but for the last bias, the observation's mean
    assert same(c, checkpoint("a.png")) and same(d, checkpoint("c.png"))
    expected = without_seconds(files("images"))
    shutil.rmtree("images/in/d.png")
    assert run("denoise", f"{flags} --resume") == 0
    assert without_seconds(files("images")) == expected
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run("denoise", flags) == 2
    assert "--init previous goes with one process" in capsys.readouterr().err


def test_a_failed_images_weights_are_not_handed_on(watched, monkeypatch):
    for name in "abc":
        write(f"in/{name}.png")
    monkeypatch.setattr(Self2Self, "alive", lambda learner: len(watched) != 2)
    assert run("denoise", "--path in --init previous") == 1
    assert same(watched[1], watched[2]) and same(watched[2], checkpoint("a.png"))


def test_a_checkpoint_that_began_elsewhere_is_not_resumed(capsys):
    write("in/b.png")
    flags = "--path in --init previous"
    assert run("denoise", flags) == 0
    before = files("images/in/b.png")
    write("in/a.png")  # comes first, and has other weights to hand on
    assert run("denoise", f"{flags} --resume") == 1
    assert "of another initial weights" in capsys.readouterr().err
    assert files("images/in/b.png") == before


def test_a_network_that_dies_does_not_begin_there_again():
    y = random_image(1, 32, 33)
    weights = train(begun(y), 2).network_weights()
    fresh, learner = begun(y), begun(y, weights=weights)
    assert same(learner.network_weights(), weights)
    for other in (fresh, learner):
        other.restart()
    assert same(learner.network_weights(), fresh.network_weights())
    np.testing.assert_array_equal(
        train(learner, 1).predict(1), train(fresh, 1).predict(1)
    )
