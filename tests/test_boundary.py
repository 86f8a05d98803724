"""Blurs that have seen what lies beyond the picture, as a camera's have."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from references import photograph
from scipy.signal import convolve2d
from scripts import results_folder, run, write
from tensors import random_image

import network
from network.blur import CircularBlur
from network.ensemble import Restoration
from network.fusing import noisy

SHAPES = [(3, 3), (4, 7), (1, 6), (8, 2)]


def random_psf(shape):
    psf = np.random.default_rng(0).random(shape)
    return psf / psf.sum()


def read(path):
    return cv2.imread(str(path), cv2.IMREAD_UNCHANGED)


def place(blur, size):
    """Where y lies on its canvas."""
    return tuple(slice(a, n - b) for (a, b), n in zip(blur.margin, size))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_blur_within_its_margin_is_scipys_valid_one(shape):
    psf = random_psf(shape)
    blur, x = CircularBlur(psf), random_image(1, 1, 40, 37)
    expected = convolve2d(x[0, 0].numpy(), psf, mode="valid")
    made = blur(x)[0, 0][place(blur, x.shape[2:])]
    np.testing.assert_allclose(made, expected, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_simulated_border_is_valid_and_results_lie_in_ys_place(shape, monkeypatch):
    """A learner that predicts the truth gets a score without error."""
    write("in/a.png", 3, side=48)
    clean, psf = read("in/a.png"), random_psf(shape)
    np.save("psf.npy", psf)
    x = np.float32(clean[..., ::-1].transpose(2, 0, 1) / 255)
    learners = []

    def predict(learner, *_):
        learners.append(learner)
        return Restoration(x, x, x)

    monkeypatch.setattr(network.Self2Self, "predict", predict)
    flags = "--path in/a.png --kernel psf.npy --boundary valid --sigma 0 --iteration 1"
    assert run("deblur", flags) == 0
    assert "_boundary-valid_" in results_folder().name + "_"
    inner = place(CircularBlur(psf), (48, 48))
    np.testing.assert_array_equal(read(results_folder() / "restored.png"), clean[inner])
    expected = [convolve2d(c, psf, mode="valid") for c in clean.transpose(2, 0, 1)]
    made = read(results_folder() / "noisy.png").astype(float)  # sigma is 0
    assert np.abs(made - np.dstack(expected)).max() < 0.51
    (learner,) = learners
    known = learner.known[0, 0].numpy()
    assert known[inner].all() and known.sum() == known[inner].size
    assert "PSNR inf" in Path("logs/deblur/log.txt").read_text()


@pytest.mark.parametrize("shape", SHAPES)
def test_an_observed_picture_gets_a_margin_that_is_cut_again(shape, monkeypatch):
    write("in/a.png", side=40)
    psf = random_psf(shape)
    np.save("psf.npy", psf)
    size = tuple(40 + s - 1 for s in shape)
    canvas = random_image(1, *size).numpy()
    restored = Restoration(canvas, canvas, canvas)
    monkeypatch.setattr(network.Self2Self, "predict", lambda *_: restored)
    assert (
        run(
            "deblur",
            "--path in/a.png --observed --kernel psf.npy --iteration 1 --fuse off",
        )
        == 0
    )
    assert "boundary" not in results_folder().name
    inner = place(CircularBlur(psf), size)
    expected = np.rint(255 * canvas[0][inner])
    np.testing.assert_array_equal(read(results_folder() / "restored.png"), expected)
    np.testing.assert_array_equal(
        read(results_folder() / "noisy.png"), read("in/a.png")
    )


@pytest.mark.parametrize(
    "place, told",
    [
        ((4, 5), None),
        ((3, 5), None),
        ((6, 5), "0.0 pixels left of its array's centre and 2.0 below"),
        ((1, 8), "3.0 pixels right of its array's centre and 3.0 above"),
    ],
)
def test_a_psf_that_moves_the_picture_is_named(place, told, capsys):
    """The blur moves a point as far as is told; restoring moves it back."""
    psf = np.zeros((9, 10))
    psf[place] = 2
    point = torch.zeros(1, 1, 33, 40)
    point[..., 10, 20] = 1
    moved = CircularBlur(psf / 2)(point)[0, 0] > 0.5
    assert moved.nonzero().tolist() == [[10 + place[0] - 4, 20 + place[1] - 5]]
    write("in/a.png", side=40)
    np.save("psf.npy", psf)
    assert run("deblur", "--path in --kernel psf.npy --iteration 1") == 0
    out = capsys.readouterr().out
    assert (told in out) if told else ("centre" not in out)


def test_what_is_not_known_of_y_changes_nothing_in_fusing():
    blur, x = CircularBlur(random_psf((4, 5))), photograph(side=50).astype(np.float32)
    draws = np.random.default_rng(0).standard_normal((2, *x.shape), np.float32)
    f, variance = x + 0.05 * draws[0], np.full_like(x, 0.05**2 / noisy.SPREAD)
    y = blur(torch.from_numpy(x)[None])[0].numpy() + 0.02 * draws[1]
    known, inner = np.zeros_like(x), place(blur, x.shape[1:])
    known[0][inner] = 1
    made = [
        noisy.fuse_noisy(f, variance, np.where(known, y, other), known, 5.1, blur)[0]
        for other in (0, 9)
    ]
    np.testing.assert_array_equal(*made)
    errors = [((a - x)[0][inner] ** 2).mean() for a in (f, made[0])]
    assert errors[1] < 0.95 * errors[0]


def test_a_resumed_run_keeps_its_margin(crash):
    write("in/a.png", side=40)
    flags = "--path in/a.png --observed --kernel_size 6 --recipe paper"
    assert run("deblur", flags) == 0
    whole = {f.name: f.read_bytes() for f in results_folder().glob("*.png")}
    results_folder().rename("before")
    crash(3)
    assert run("deblur", flags) == 99
    crash(10**9)
    assert run("deblur", f"{flags} --resume") == 0
    for name in ("restored.png", "noisy.png", "uncertainty.png"):
        assert (results_folder() / name).read_bytes() == whole[name]
