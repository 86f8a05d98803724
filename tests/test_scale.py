"""A picture is a picture in any units: the learner cares for neither scale nor offset."""

import re
from dataclasses import asdict
from pathlib import Path

import cv2
import numpy as np
import pytest
import scipy.io
import skimage.data
import tifffile
import torch
from scripts import run
from tensors import begun, block_mask, train

from network import Self2Self
from network.blur import CircularBlur, gaussian_psf
from network.punet import bent_sigmoid, inverse_bent_sigmoid
from network.recipes import RECIPES
from network.scale import MAX_SPREAD, RANGE_MARGIN, UNIT, find_scale

FAST = {"drop_rate": 0.2, "averaging_power": 3, "iteration": 3, "fuse": True}
FAST = asdict(RECIPES["fast"]) | FAST | {"precision": "float32", "photons": None}
ALL = np.ones((1, 1, 1))
SCALES = [(1 / 128, 0.0), (1 / 8, -3.0), (1.0, 0.25), (1 / 128, 0.5)]
GAUSSIAN = CircularBlur(gaussian_psf(5, 1.0))


def picture(channels=1):
    """A crop of a photograph with noise, in 256ths: exact in any of SCALES."""
    pixels = np.atleast_3d(skimage.data.astronaut()[40:104, 180:244, :channels])
    noise = np.random.default_rng(0).normal(0, 15, pixels.shape)
    return (np.rint(pixels + noise) / 256).transpose(2, 0, 1)


@pytest.mark.parametrize("blurred", [False, True])
@pytest.mark.parametrize(("a", "b"), SCALES)
def test_the_learners_units_are_bit_equal(a, b, blurred):
    y, known = picture(3), block_mask(1, 64, 64).numpy()
    scale, other = (find_scale(x, known, blurred) for x in (y, a * y + b))
    np.testing.assert_array_equal(scale.to(y), other.to(a * y + b))
    assert (other.span, other.offset) == pytest.approx(
        (a * scale.span, a * scale.offset + b), abs=1e-9
    )


CASES = [
    ({}, 1, 0.001),
    ({}, 3, 0.001),
    ({"operator": GAUSSIAN}, 1, 0.001),
    ({"known": True}, 1, 0.001),
    ({"photons": 100}, 1, 0.02),
]


@pytest.mark.parametrize(("changes", "channels", "most"), CASES)
def test_restoring_goes_with_scale_and_offset(changes, channels, most):
    y, changes = picture(channels), dict(changes)
    known = block_mask(1, 64, 64).float() if changes.pop("known", False) else None
    results = []
    for a, b in ((1.0, 0.0), *SCALES[:2]):
        blurred = "operator" in changes
        scale = find_scale(a * y + b, ALL if known is None else known, blurred)
        settings = FAST | {"scale": scale, "noise": scale.sigma(a * 15)} | changes
        learner = begun(a * y + b, known=known, **settings)
        ensemble = train(learner, 3).predict(2)
        fused, error = learner.fuse(ensemble)
        made = [(x - b) / a for x in (ensemble.image, fused)]
        results.append([*made, ensemble.variance / a**2, error / a**2])
    for other in results[1:]:
        for x, y in zip(other, results[0], strict=True):
            assert np.abs(x - y).max() <= most
    assert results[0][2].max() > 1e-5 and results[0][3].max() > 1e-5


def test_neither_noise_nor_outliers_widen_the_range():
    clean = np.clip(skimage.data.camera()[None, ::2, ::2] / 255, 0.1, 0.9)
    for sigma in (0, 10, 25, 50):
        noise = np.random.default_rng(0).normal(0, sigma / 255, clean.shape)
        noisy = clean + noise
        noisy[0, 7, 7::50] = 10  # hot pixels
        low, high = find_scale(noisy, ALL).back(np.array([0, 1]))
        assert low == pytest.approx(
            0.1 - 0.8 * RANGE_MARGIN, abs=0.03 + 0.85 * sigma / 255
        )
        assert high == pytest.approx(
            0.9 + 0.8 * RANGE_MARGIN, abs=0.03 + 0.85 * sigma / 255
        )


def test_flat_pictures_and_single_points_have_a_range():
    flat = np.full((1, 40, 40), 7.0)
    assert find_scale(flat, ALL).to(flat)[0, 0, 0] == 0.5
    flat[0, 3, 4] = 9  # less than a thousandth of the entries
    scaled = find_scale(flat, ALL).to(flat)
    assert np.ptp(scaled) <= MAX_SPREAD * 1.001 and np.isfinite(scaled).all()


def test_what_is_not_known_does_not_count():
    y, known = picture(), block_mask(1, 64, 64).numpy()
    assert find_scale(y, known) == find_scale(np.where(known, y, 99.0), known)
    rest = np.zeros((1, 33, 33))
    rest[..., 32] = 1  # beyond the last whole block
    scaled = find_scale(y[:, :33, :33], rest).to(y[:, :33, 32:33])
    assert 0 <= np.median(scaled) <= 1


@pytest.mark.parametrize("bend", [0, 0.1])
def test_a_bent_sigmoid_is_the_sigmoid_and_its_tangents(bend):
    x = torch.linspace(-60, 60, 500, dtype=torch.float64, requires_grad=True)
    y = bent_sigmoid(x, bend)
    (slope,) = torch.autograd.grad(y.sum(), x)
    inner = (torch.sigmoid(x) - 0.5).abs() <= 0.5 - bend
    torch.testing.assert_close(y[inner], torch.sigmoid(x)[inner])
    if bend:
        assert slope.min() == pytest.approx(bend * (1 - bend))
        assert y.max() > 2 and y.min() < -1
        torch.testing.assert_close(inverse_bent_sigmoid(y, bend), x)
    else:
        torch.testing.assert_close(y, torch.sigmoid(x))


FLAGS = "--iteration 8 --test_frequency 8 --num_prediction 5 --precision float32"


def restore(name, pixels, flags=FLAGS):
    """Restore a TIFF of these numbers as an observed picture; return its numbers."""
    tifffile.imwrite(f"{name}.tif", pixels)
    assert run("denoise", f"--path {name}.tif --observed {flags}") == 0
    (path,) = (
        f for f in Path("images").rglob("restored.tif") if f"{name}.tif" in f.parts
    )
    return tifffile.imread(path).astype(float), path.parent


def test_a_dark_or_raised_picture_is_restored_like_a_bright_one():
    y = picture()[0].clip(0, 1)
    whole, _ = restore("full", np.rint(y * 65535).astype("u2"))
    for name, dtype, times, plus in (
        ("low", "u2", 600, 0),
        ("pedestal", "u2", 600, 30000),
        ("floats", "f4", 5000, -1000),
        ("signed", "i2", 2000, -900),
    ):
        pixels = (y * times + plus).astype("f4")
        pixels = pixels if dtype == "f4" else np.rint(pixels).astype(dtype)
        made, _ = restore(name, pixels)
        distance = (made - plus) / times - whole / 65535
        assert np.sqrt((distance**2).mean()) < 0.02, name
        assert np.abs(distance).max() < 0.1, name


def test_a_float_pictures_values_are_its_own(capsys):
    """Scores go by the reference's range, PNGs go from end to end, files by its units."""
    y = picture()[0].clip(0, 1)
    tifffile.imwrite("clean.tif", (y * 4000 - 1000).astype("f4"))
    noisy = y * 4000 - 1000 + np.random.default_rng(1).normal(0, 100, y.shape)
    made, results = restore(
        "a", noisy.astype("f4"), "--reference clean.tif --fuse on --noise_sigma 25500"
    )
    out = capsys.readouterr().out
    clean = y * 4000 - 1000
    expected = 20 * np.log10(np.ptp(clean) / np.sqrt(((noisy - clean) ** 2).mean()))
    assert float(re.search(r"observation ([\d.]+) dB", out)[1]) == pytest.approx(
        expected, abs=0.01
    )
    assert "peak: the reference's range" in out
    assert "white, sigma 100 (in the file's numbers)" in out
    shown = cv2.imread(str(results / "noisy.png"), cv2.IMREAD_UNCHANGED)
    assert (shown.min(), shown.max(), shown.dtype) == (0, 65535, np.uint16)
    error = scipy.io.loadmat(results / "error.mat")["error"]
    assert 1 < np.sqrt(error.mean()) < 2000
    assert made.min() > -3000 and made.max() < 5000


def test_paper_takes_an_8_bit_picture_as_it_is(monkeypatch):
    scales, make = [], Self2Self.__init__

    def made(learner, y, operator, known, recipe, *args):
        scales.append(recipe.scale)
        make(learner, y, operator, known, recipe, *args)

    monkeypatch.setattr(Self2Self, "__init__", made)
    y = picture()[0].clip(0, 1)
    for dtype, peak in (("u1", 255), ("u2", 600)):
        tifffile.imwrite("a.tif", np.rint(y * peak).astype(dtype))
        for recipe in ("paper", "fast"):
            flags = f"--path a.tif --observed --recipe {recipe} --iteration 1"
            assert run("denoise", flags + f" --seed {peak}") == 0
    assert [scale == UNIT for scale in scales] == [True, False, False, False]
