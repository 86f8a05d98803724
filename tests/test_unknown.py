"""Which entries cannot be the picture's, what comes back there, and what is left alone."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import scipy.ndimage
import skimage.data
import tifffile
from scripts import run
from tensors import identity, random_image, train

from network import recipes
from network.noise import find_noise, white
from network.self2self import Self2Self
from network.unknown import at_white, find_unknown

RNG = np.random.default_rng(0)
CAMERA = skimage.data.camera()[128:256, 160:288] / 255


def found(y):
    """Which entries of a picture (H, W) are gaps, and which are outliers."""
    y = np.asarray(y, np.float32)[None]
    return [x[0] for x in find_unknown(y, np.ones(y.shape, bool))]


def noisy(y=CAMERA, sigma=10):
    return y + RNG.normal(0, sigma / 255, y.shape)


def stars(width, side=256):
    """A night sky: 60 stars of a width in pixels at half maximum, with photons."""
    at = np.arange(side)
    sky = np.full((side, side), 100.0)
    for x, y, peak in zip(
        *RNG.uniform(5, side - 5, (2, 60)), np.geomspace(50, 6e4, 60)
    ):
        profiles = (np.exp(-4 * np.log(2) * ((at - c) / width) ** 2) for c in (y, x))
        sky += peak * np.outer(*profiles)
    return RNG.poisson(sky).clip(0, 65535) / 65535


def drawn(**how):
    """Text on white paper."""
    page = np.full((64, 128), 255, np.uint8)
    cv2.putText(page, "i. j; text", (4, 40), cv2.FONT_HERSHEY_PLAIN, 1.2, 0, 1, **how)
    return page / 255


def lines():
    page = np.full((64, 64), 0.5)
    page[::8, 4:50], page[4:50, 3::8] = 1, 0
    page[np.arange(50), np.arange(50)] = 0.9
    return page


def dithered():
    """Floyd and Steinberg's error diffusion."""
    x = CAMERA.copy()
    for i in range(len(x)):
        for j in range(len(x)):
            error = x[i, j] - (x[i, j] > 0.5)
            x[i, j] -= error
            for down, right, share in ((0, 1, 7), (1, -1, 3), (1, 0, 5), (1, 1, 1)):
                if i + down < len(x) and 0 <= j + right < len(x):
                    x[i + down, j + right] += error * share / 16
    return x


LEFT_ALONE = {
    "stars": lambda: stars(2),
    "wide stars": lambda: stars(3),
    "text": drawn,
    "smooth text": lambda: drawn(lineType=cv2.LINE_AA),
    "lines": lines,
    "noisy lines": lambda: noisy(lines(), 5),
    "checkerboard": lambda: np.indices((64, 64)).sum(0) % 2,
    "noisy checkerboard": lambda: noisy(np.indices((64, 64)).sum(0) % 2),
    "dithered": dithered,
    "letterbox": lambda: np.pad(CAMERA, ((32, 32), (0, 0))),
    "clipped sky": lambda: np.rint(255 * noisy(1.8 * CAMERA).clip(0, 1)) / 255,
    "few photons": lambda: RNG.poisson(0.3 * CAMERA),
}


@pytest.mark.parametrize("picture", LEFT_ALONE)
def test_what_is_a_picture_is_left_alone(picture):
    assert sum(x.sum() for x in found(LEFT_ALONE[picture]())) <= 1


@pytest.mark.parametrize("name", ["astronaut", "camera", "coins", "page", "coffee"])
def test_hardly_an_entry_of_noisy_pictures_is_taken_for_unknown(name):
    clean = getattr(skimage.data, name)() / 255
    clean = np.float32(clean[..., None] if clean.ndim == 2 else clean).transpose(
        2, 0, 1
    )
    cases = {None: 10, "photons 30": 10, "photons 5": 100}
    cases |= {10: 10, 25: 10, 50: 10}
    for noise, most in cases.items():
        if isinstance(noise, int):
            y = (clean + RNG.normal(0, noise / 255, clean.shape)).clip(0, 1)
        else:
            n = int(noise.split()[1]) if noise else 0
            y = RNG.poisson(clean * n) / n if n else clean
        gaps, outliers = find_unknown(y, np.ones(y.shape, bool))
        assert (gaps | outliers).sum() <= max(1, most * y.size / 1e6), noise


@pytest.mark.parametrize("share", [0.01, 0.05, 0.2])
@pytest.mark.parametrize("sigma", [0, 10])
def test_salt_and_pepper_are_outliers(share, sigma):
    draws, y = RNG.random(CAMERA.shape), noisy(sigma=sigma).clip(0.02, 0.98)
    y[draws < share / 2], y[draws > 1 - share / 2] = 0, 1
    wrong = (draws < share / 2) | (draws > 1 - share / 2)
    far = wrong & (np.abs(y - CAMERA) > 0.3)  # others hardly count
    gaps, outliers = found(y)
    assert not gaps.any()
    assert outliers[far].mean() > 0.95
    assert (outliers & ~wrong).sum() < 0.02 * wrong.sum() + 2


def test_hot_and_dead_pixels_are_outliers():
    y, wrong = noisy(), np.zeros(CAMERA.shape, bool)
    wrong[3::16, 5::16] = True
    y[wrong] = np.resize([3, -1, 9, 200], wrong.sum())
    gaps, outliers = found(y)
    assert not gaps.any()
    np.testing.assert_array_equal(outliers, wrong)


@pytest.mark.parametrize("value", [-9999, 2.0**32, -32768])
def test_values_far_beyond_all_others_are_gaps(value):
    y, gap = 500 * noisy(), np.zeros(CAMERA.shape, bool)
    gap[40:47], gap[:, 90:95], gap[:30, :30] = True, True, True
    y[gap], y[100, 30] = value, np.nan
    gaps, outliers = found(y)
    gap[100, 30] = True
    np.testing.assert_array_equal(gaps, gap)
    assert not outliers.any()


def test_nothing_is_guessed_of_a_picture_with_a_mask():
    y = noisy().astype(np.float32)[None]
    y[0, 5, 5], y[0, 9, 9], y[0, 20, 20] = 100, np.inf, np.nan
    gaps, outliers = find_unknown(y, np.ones(y.shape, bool), guess=False)
    assert not outliers.any() and np.argwhere(gaps[0]).tolist() == [[9, 9], [20, 20]]


def write_tiff(path, y, **more):
    tifffile.imwrite(path, y, photometric="minisblack", **more)


def read(name="a.tif"):
    (path,) = Path("images").rglob(f"{name}/*/*/restored.*")
    return tifffile.imread(path)


NODATA = [(42113, "s", 0, "-9999", True)]


def test_gaps_come_back_as_they_were_and_single_pixels_as_predicted(capsys):
    Path("in").mkdir()
    y = noisy(CAMERA[:48, :48]).astype(np.float32)
    y[:9, :9], y[30, 30], y[40, 41], y[20, 5] = -9999, -9999, np.nan, 77
    write_tiff("in/a.tif", y, extratags=NODATA)
    clean = np.float32(CAMERA[:48, :48])
    clean[11, 11] = np.nan
    write_tiff("clean.tif", clean)
    flags = "--path in/a.tif --observed --reference clean.tif"
    assert run("denoise", flags) == 0
    out = capsys.readouterr().out
    assert "83 not measured" in out and "1 far off all their neighbours" in out
    restored = read()
    gap = ~np.isfinite(y) | (y == -9999)
    np.testing.assert_array_equal(restored[gap], y[gap])
    assert np.abs(restored[~gap]).max() < 2
    with tifffile.TiffFile(next(Path("images").rglob("restored.tif"))) as tiff:
        assert tiff.pages[0].tags[42113].value == "-9999"
    scored = ~gap & np.isfinite(clean)
    squares = np.square(restored.clip(0, 1) - clean)[scored].mean()
    summary = Path("logs/denoise/log-summary.csv").read_text().splitlines()
    assert float(summary[1].split(",")[3]) == pytest.approx(
        -10 * np.log10(squares), abs=1e-3
    )


def test_transparent_pixels_are_not_learnt_from(capsys):
    Path("in").mkdir()
    picture = np.dstack(
        [np.uint8(255 * CAMERA[:48, :48])] * 3 + [np.full((48, 48), 255)]
    )
    picture[10:20, 10:20] = 0
    cv2.imwrite("in/a.png", picture.astype(np.uint8))
    assert run("denoise", "--path in/a.png --observed --noise_sigma 5") == 0
    assert "100 not measured" in capsys.readouterr().out
    (path,) = Path("images").rglob("restored.png")
    restored = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    np.testing.assert_array_equal(restored[10:20, 10:20], 0)


def test_the_range_and_the_noise_are_those_of_the_rest():
    y = noisy(sigma=25).astype(np.float32)[None]
    y[0, 60, 60] = -9999
    gaps, outliers = find_unknown(y, np.ones(y.shape, bool))
    known = ~(gaps | outliers)
    recipe = recipes.adapt("fast", np.where(known, y, np.nan), known)
    assert 0.8 < recipe.scale.span < 1.6
    assert recipe.fuse == "noise" and 15 < recipe.noise * recipe.scale.span < 35


@pytest.mark.parametrize("share", [0.05, 0.2])
def test_noise_is_found_beside_holes(share):
    camera = skimage.data.camera()[None, 128:384, 128:384] / 255
    for sigma in (5, 25):
        y = camera + RNG.normal(0, sigma / 255, camera.shape)
        known = RNG.random(y.shape) >= share
        found = find_noise(np.where(known, y, 0), known)
        assert found.is_white()
        assert found.sigma() == pytest.approx(sigma, rel=0.15)


def test_unknown_entries_count_for_nothing():
    y = random_image(1, 32, 32).numpy()
    known = np.ones_like(y)
    known[0, 5:9, 5:9] = 0
    recipe = recipes.adapt("fast", y, known, white(25), given={"iteration": 4})
    made = []
    for value in (0, np.nan, -9999):
        y[known == 0] = value
        learner = train(Self2Self(y, identity, known, recipe), 4)
        made.append(learner.fuse(learner.predict(2))[0])
    for other in made[1:]:
        np.testing.assert_array_equal(other, made[0])


def test_noisy_entries_beside_holes_are_not_put_back():
    y = random_image(1, 32, 32).numpy()
    known = np.ones_like(y)
    known[0, 5:9, 5:9] = 0
    for sigma, back in ((25, False), (0, True)):
        recipe = recipes.adapt("fast", y, known, white(sigma), given={"iteration": 4})
        assert recipe.fuse == ("holes" if back else "noise")
        learner = train(Self2Self(y, identity, known, recipe), 4)
        image, error = learner.fuse(learner.predict(2))
        at = known > 0
        assert np.allclose(image[at], y[at], atol=1e-5) == back
        assert (error[at] > 0).all() == (not back)


def test_a_clipped_entry_is_a_lower_bound():
    """It pulls a prediction below it up, and lets one above it be."""
    y = np.full((1, 32, 32), 0.5, np.float32)
    y[:, 8:24, 8:24] = 1
    clipped = at_white(y, np.ones((1, 32, 32)))
    assert clipped.sum() == 256
    recipe = recipes.adapt("paper", y, None, white(5), given={"drop_rate": 0.0})
    for offset, felt in ((-0.2, True), (0.2, False)):
        losses = []
        for shift in (offset, 2 * offset):
            learner = Self2Self(
                y,
                Shift(shift, clipped),
                None,
                recipe,
                clipped=clipped,
            )
            learner.network.eval()
            learner.train_step()
            losses.append(learner.mean_loss())
        assert (losses[0] != losses[1]) == felt


class Shift:
    """An operator that gives 0.5, and another value than 1 at clipped entries."""

    reach = 1

    def __init__(self, shift, clipped):
        import torch

        self.made = torch.from_numpy(
            np.where(clipped, np.float32(1 + shift), np.float32(0.5))
        )[None]

    def __call__(self, x):
        return self.made + 0 * x


def test_a_blurred_picture_with_lamps_is_no_jpeg(capsys):
    Path("in").mkdir()
    scene = 0.2 + 0.5 * CAMERA[:64, :64]
    scene[[10, 30, 50], [40, 12, 33]] = 30
    np.save("motion.npy", np.eye(7))
    psf = np.eye(7) / 7
    y = scipy.ndimage.convolve(scene, psf) + RNG.normal(0, 2 / 255, scene.shape)
    cv2.imwrite("in/a.png", np.rint(255 * y.clip(0, 1)))
    assert run("deblur", "--path in/a.png --observed --kernel motion.npy") == 0
    assert "JPEG" not in capsys.readouterr().out
