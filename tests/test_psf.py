"""The PSF of a blurred picture, estimated."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import scipy.io
import skimage.data
import tifffile
from references import photograph
from scipy.optimize import nnls
from scipy.signal import convolve2d
from scripts import chosen, parse, results_folder, run

import deblur
import utils
from network import psf as estimation
from network.blur import gaussian_psf
from network.psf import doubt, estimate_psf, point
from pictures import read_psf

MOTION = np.zeros((11, 11))
MOTION[[2, 3, 4, 5, 6, 7, 7, 7], [1, 2, 3, 4, 5, 6, 7, 8]] = [1, 1, 2, 2, 1, 1, 2, 2]
MOTION /= MOTION.sum()


def blurred(psf, sigma=1.0):
    """A photograph, blurred and cut to what the blur has seen, (1, H, W)."""
    clean = skimage.data.camera()[60:236, 180:356] / 255
    y = convolve2d(clean, psf, mode="valid")
    return (y + np.random.default_rng(0).normal(0, sigma / 255, y.shape))[None]


def likeness(a, b):
    """Correlation of two PSFs at the best shift."""
    fits = convolve2d(a, b[::-1, ::-1]).max()
    return fits / np.sqrt((a**2).sum() * (b**2).sum())


@pytest.mark.parametrize("psf", [MOTION, MOTION[:, ::-1]], ids=["", "mirrored"])
def test_a_known_psf_comes_back(psf):
    found = estimate_psf(blurred(psf), 15)
    assert found.shape == (15, 15) and (found >= 0).all()
    assert found.sum() == pytest.approx(1)
    assert likeness(found, psf) > 0.9
    assert likeness(found, psf) > likeness(found, psf[:, ::-1]) + 0.05
    centre = (np.indices((15, 15)) * found).sum((1, 2))
    assert np.abs(centre - 7).max() < 1


def test_a_thin_tail_is_found():
    """As a shaking hand leaves it: far weaker than the place where it rested."""
    psf = np.zeros((15, 15))
    psf[9:12, 3:5] = 1
    tail = np.arange(3, 9), np.arange(11, 5, -1)
    psf[tail] = 0.2
    found = estimate_psf(blurred(psf / psf.sum()), 17)
    assert likeness(found, psf) > 0.9
    fits = convolve2d(found, psf[::-1, ::-1])  # where it came to lie
    moved = np.subtract(np.unravel_index(fits.argmax(), fits.shape), 14)
    down, right = (np.array(tail) + moved.reshape(2, 1)).clip(0, 16)
    share = psf[tail].sum() / psf.sum()
    assert found[down, right].sum() > share / 3  # those pixels alone, not beside them


def test_a_wide_gaussian_is_found_where_it_has_left_detail():
    wide = gaussian_psf(21, 3.0)
    found = estimate_psf(blurred(wide), 21)
    assert likeness(found, wide) > 0.95
    distance = (np.indices((21, 21))[0] - 10) ** 2
    assert (found * distance).sum() == pytest.approx(9, rel=0.35)


def test_units_do_not_matter_and_the_same_comes_back():
    y = blurred(MOTION)
    y = y[:, 60:160, 60:160]
    found = estimate_psf(y, 11)
    np.testing.assert_array_equal(found, estimate_psf(y, 11))
    np.testing.assert_allclose(estimate_psf(600 * y + 3000, 11), found, atol=1e-3)


def test_a_sharp_picture_has_a_point():
    found = estimate_psf(blurred(np.ones((1, 1)), 2.55), 15)
    assert found[6:9, 6:9].sum() > 0.7
    assert "hardly any blur" in doubt(found, found)
    mild = estimate_psf(blurred(gaussian_psf(9, 1.0)), 15)
    assert "hardly any blur" not in doubt(mild, mild)
    full = np.full((5, 5), 1 / 25)
    assert "larger --kernel_size" in doubt(full, full)
    inner = np.pad(full, 2)
    assert "kernel.png shows it" in doubt(inner, np.roll(inner, 1, 1))
    assert "two estimates differ" in doubt(inner, np.eye(9) / 9)


@pytest.mark.filterwarnings("error")
def test_nothing_is_learnt_where_no_edge_is_strong_enough(monkeypatch):
    monkeypatch.setattr(
        estimation, "_estimate_latent", lambda blurred, *_: np.zeros_like(blurred)
    )
    found = estimate_psf(photograph(), 15)
    assert found.sum() == pytest.approx(1)  # the point, brought from scale to scale
    np.testing.assert_allclose(found, found[::-1, ::-1], atol=1e-9)
    assert found[7, 7] == found.max()


def test_the_fit_is_that_of_a_dense_solver(monkeypatch):
    """Least squares, not below 0, of the gradients of a small periodic picture."""
    monkeypatch.setattr(estimation, "FISTA_STEPS", 4000)
    rng = np.random.default_rng(0)
    latent, truth = rng.random((16, 16)), np.zeros((3, 3))
    truth[1], truth[0, 2] = [0.2, 0.5, 0.2], 0.1
    seen = np.fft.ifft2(
        np.fft.fft2(np.roll(np.pad(truth, (0, 13)), (-1, -1), (0, 1)))
        * np.fft.fft2(latent)
    ).real + rng.normal(0, 0.05, (16, 16))
    made = estimation._fit_psf(latent, seen, np.ones((16, 16)), 3)
    gradients = estimation._gradients(latent)
    columns = [
        np.roll(gradients, (i, j), (1, 2)).ravel()
        for i in (-1, 0, 1)
        for j in (-1, 0, 1)
    ]
    ridge = np.sqrt(estimation.RIDGE * (gradients**2).sum()) * np.eye(9)
    dense = np.vstack((np.stack(columns, 1), ridge))
    wanted = np.concatenate((estimation._gradients(seen).ravel(), np.zeros(9)))
    np.testing.assert_allclose(made.ravel(), nnls(dense, wanted)[0], atol=1e-4)


def test_small_parts_are_cut_and_the_rest_is_centred():
    psf = np.zeros((9, 9))
    psf[1:4, 2] = 1
    psf[7, 7] = 0.2  # an island
    psf[2, 3] = 0.01
    made = estimation._normalise(psf, 0.05, 0.1)
    expected = np.zeros((9, 9))
    expected[3:6, 4] = 1 / 3
    np.testing.assert_allclose(made, expected)
    empty = estimation._normalise(np.zeros((5, 5)), 0.05, 0.1)
    np.testing.assert_array_equal(empty, point(5))


def test_the_script_estimates_writes_and_resumes(capsys, monkeypatch):
    Path("in").mkdir()
    pixels = np.rint(255 * blurred(MOTION)[0, 60:160, 60:160].clip(0, 1))
    cv2.imwrite("in/a.png", pixels)
    flags = "--path in/a.png --observed --kernel estimate --kernel_size 12"
    assert run("deblur", flags) == 0
    out = capsys.readouterr().out
    assert "--kernel_size 12: 13" in out and "kernel.png shows it" in out
    assert "estimate13" in results_folder().name
    psf = scipy.io.loadmat(results_folder() / "kernel.mat")["kernel"]
    assert psf.shape == (13, 13) and psf.sum() == pytest.approx(1)
    assert cv2.imread(str(results_folder() / "kernel.png")) is not None
    restored = (results_folder() / "restored.png").read_bytes()
    with monkeypatch.context() as patch:  # what is found is not looked for again
        patch.setattr("deblur.estimate_psf", None)
        assert run("deblur", f"{flags} --resume") == 0
    assert (results_folder() / "restored.png").read_bytes() == restored
    cv2.imwrite("in/a.png", pixels[::-1])
    assert run("deblur", f"{flags} --resume") == 2  # of another picture it is
    assert "another image" in capsys.readouterr().err


def test_no_psf_is_taken_for_exact():
    for flags in ("", "--kernel estimate", "--kernel_sigma 2"):
        recipe, noise = chosen(f"--observed {flags}", "deblur", photograph())
        assert recipe.fuse == "noise" and recipe.noise > 1.5 > noise.sigma()
    hot = photograph()
    hot[:, 99, 99] = 30
    spoiled, _ = chosen("--observed", "deblur", hot)
    assert spoiled.noise < 1.5 * recipe.noise
    told, _ = chosen("--observed --noise_sigma 0.5", "deblur", photograph())
    assert told.noise < 1


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ("--kernel estimate", "--kernel estimate goes with --observed"),
        ("--kernel estimate --observed --kernel_size 65", "a smaller --kernel_size"),
        ("--kernel estimate --observed --path flat.png", "flat, or not twice"),
    ],
)
def test_what_cannot_be_estimated_is_said(flags, text, capsys):
    cv2.imwrite("a.png", np.rint(255 * blurred(MOTION)[0, :120, :120].clip(0, 1)))
    cv2.imwrite("flat.png", np.full((80, 80), 7, np.uint8))
    flags = flags if "--path" in flags else f"{flags} --path a.png"
    assert run("deblur", flags) == 2
    assert text in capsys.readouterr().err


def bead(offset, peak=1000):
    """A bead on a camera's offset, which has noise, 16 bits."""
    noise = np.random.default_rng(0).normal(0, 2, (31, 31))
    spot = gaussian_psf(31, 2.0)
    return np.rint(offset + noise + peak * spot / spot.max()).clip(0).astype(np.uint16)


def chosen_psf(name):
    return deblur.choose_psf(parse(f"--kernel {name}", "deblur"))[0]


def test_a_cameras_offset_is_no_part_of_a_bead(capsys):
    tifffile.imwrite("bead.tif", bead(100))
    truth = gaussian_psf(31, 2.0)
    found = chosen_psf("bead.tif")
    assert "bead.tif: a camera's offset is subtracted" in capsys.readouterr().out
    assert np.abs(found - truth).max() < 0.1 * truth.max()
    assert found[0].sum() < 0.01  # as it is, a thirtieth
    np.save("bead.npy", bead(100))
    scipy.io.savemat("bead.mat", {"kernel": bead(100)})
    tifffile.imwrite("high.tif", bead(300))  # a fifth of the peak, and more
    tifffile.imwrite("none.tif", bead(0))
    uneven = bead(100)
    uneven[0, :9] = 200
    tifffile.imwrite("uneven.tif", uneven)
    for name, given in (
        ("bead.npy", bead(100)),
        ("bead.mat", bead(100)),
        ("high.tif", bead(300)),
        ("none.tif", bead(0)),
        ("uneven.tif", uneven),
    ):
        np.testing.assert_allclose(chosen_psf(name), given / given.sum(), rtol=1e-12)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_a_psf_whose_file_calls_white_zero_is_read_as_it_looks(dtype):
    shown = np.rint(np.iinfo(dtype).max * MOTION / MOTION.max()).astype(dtype)
    inverted = np.iinfo(dtype).max - shown
    tifffile.imwrite("a.tif", inverted, photometric="miniswhite")
    np.testing.assert_allclose(read_psf("a.tif"), shown / shown.sum())


@pytest.mark.parametrize("name", ["psf.txt", "psf.csv", "psf.fits", "psf"])
def test_a_psf_of_another_format_is_named(name):
    Path(name).write_bytes(b"SIMPLE  =                    T".ljust(2880))
    with pytest.raises(utils.InputError, match=r"a PSF is \.mat, \.npy or an image"):
        read_psf(name)


def test_a_result_that_its_psf_has_moved_is_scored_at_the_best_shift(capsys):
    moved = np.pad(MOTION, ((6, 0), (0, 4)))  # 3 pixels down, 2 left
    clean = np.rint(skimage.data.camera()[60:160, 180:280])
    y = convolve2d(skimage.data.camera()[50:170, 170:290] / 255, MOTION, mode="same")
    cv2.imwrite("clean.png", clean)
    cv2.imwrite("a.png", np.rint(255 * y[10:110, 10:110]))
    np.save("moved.npy", moved)
    np.save("true.npy", MOTION)
    flags = "--path a.png --observed --reference clean.png --iteration 1 --kernel "
    assert run("deblur", f"{flags} true.npy") == 0
    assert "if moved" not in capsys.readouterr().out
    assert run("deblur", f"{flags} moved.npy") == 0
    assert "dB if moved" in capsys.readouterr().out
    table = Path("logs/deblur/log.csv").read_text().splitlines()
    assert table[0].endswith("moved_psnr,down,right,seconds")
    assert "dB if moved" in Path("logs/deblur/log.txt").read_text()
