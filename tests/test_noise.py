"""What noise a picture has is told from the picture; growing noise is made even."""

import io

import numpy as np
import pytest
import skimage.data
from PIL import Image
from references import photograph
from scipy import ndimage, stats
from scripts import chosen
from tensors import identity, train

from network import Self2Self, recipes
from network.jpeg import LUMINANCE, _find_steps, _fit_sigma, _spectra, find_grid
from network.noise import MIN_DARKEST, bound_slope, find_noise, white
from network.scale import Scale, destabilise, find_scale, stabilise

ALL = np.ones((1, 1, 1))


def noise(shape, sigma, blur=0.0):
    drawn = ndimage.gaussian_filter(
        np.random.default_rng(0).normal(0, 1, shape), (0, blur, blur)
    )
    return drawn * (sigma / 255 / drawn.std())


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("sigma", [5, 10, 25, 50])
def test_white_noise_is_found_with_its_sigma(sigma, channels):
    clean = photograph(channels)
    found = find_noise(clean + noise(clean.shape, sigma), ALL)
    assert found.kind == "white" and found.is_even() and found.is_white()
    assert found.sigma() == pytest.approx(sigma, rel=0.05)
    assert found.describe() == f"white, sigma {found.sigma():.3g}"


@pytest.mark.parametrize(("gain", "own"), [(0.01, 0.01), (0.05, 0.02)])
@pytest.mark.parametrize(("times", "plus"), [(1, 0), (600, 30_000), (-2, 1)])
def test_noise_that_grows_is_found_with_its_gain(gain, own, times, plus):
    clean, rng = photograph(), np.random.default_rng(0)
    y = gain * rng.poisson(clean / gain) + rng.normal(0, own, clean.shape)
    found = find_noise(times * y + plus, ALL)
    if times < 0:  # a negative: noise is stronger where it is dark
        assert found.kind == "white"
        return
    assert found.kind == "growing" and found.is_white() and not found.is_even()
    for level in (0.3, 0.8):
        expected = 255 * times * np.sqrt(gain * level + own**2)
        assert found.sigma(times * level + plus) == pytest.approx(expected, rel=0.1)
    ((slope, _),) = found.lines
    assert slope == pytest.approx(times * gain, rel=0.2)


def test_a_line_leaves_some_noise_where_a_picture_is_darkest():
    """Else all that is darker would come out alike."""
    line, steep = (0.01, -0.002), (0.01, -0.005)  # which is 0 at the intensity 0.5
    assert bound_slope(line, 0.3, 0.8) == line
    gain, offset = bound_slope(steep, 0.3, 0.8)
    assert gain * 0.8 + offset == pytest.approx(0.003)
    assert gain * 0.3 + offset == pytest.approx(0.003 * MIN_DARKEST)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("blur", [0.6, 1.2])
def test_noise_that_neighbours_share_is_told_from_white(blur, channels):
    clean = photograph(channels)
    found = find_noise(clean + noise(clean.shape, 15, blur), ALL)
    assert found.kind == "correlated" and not found.is_white()
    assert found.sigma() is None


def jpeg(y, quality):
    """Compress a picture (C, H, W); its grid begins at row 5, column 3. And its steps."""
    pixels = np.rint(255 * y.clip(0, 1)).astype(np.uint8).transpose(1, 2, 0).squeeze()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    decoded = Image.open(file)
    made = np.atleast_3d(np.asarray(decoded))[3:, 5:].transpose(2, 0, 1) / 255
    return made, np.array(decoded.quantization[0])


@pytest.mark.parametrize(
    ("sigma", "quality", "channels"),
    [(5, 95, 1), (10, 75, 3), (15, 50, 3)],
)
def test_white_noise_under_a_jpeg_is_found_with_its_sigma(sigma, quality, channels):
    clean = photograph(channels)
    y, _ = jpeg(clean + noise(clean.shape, sigma), quality)
    found = find_noise(y, ALL)
    assert (found.kind, found.jpeg, len(found.lines)) == ("white", True, channels)
    assert found.sigma() == pytest.approx(sigma, rel=0.12)
    assert found.describe() == f"white under a JPEG, sigma {found.sigma():.3g}"


def test_noise_under_a_jpeg_that_is_not_white_is_not_told():
    clean, rng = photograph(3), np.random.default_rng(0)
    for name, y in (
        ("shared", clean + noise(clean.shape, 15, 0.8)),
        ("growing", 0.03 * rng.poisson(clean / 0.03)),
    ):
        found = find_noise(jpeg(y, 90)[0], ALL)
        assert (found.kind, found.jpeg) == ("compressed", True), name
    other_units = 600 * jpeg(clean + noise(clean.shape, 10), 75)[0] + 3000
    found = find_noise(other_units, ALL)
    assert found.kind == "compressed" and not found.is_white()
    assert found.describe() == "a JPEG's, changed by its compression"


def test_a_clean_jpeg_is_hardly_changed():
    sharp = skimage.data.astronaut()[:256, 128:384].transpose(2, 0, 1) / 255
    found = find_noise(jpeg(sharp, 90)[0], ALL)
    assert found.kind == "compressed" and 0 < found.sigma() < 2.5
    assert found.describe().endswith(" at most")
    # Fur has much in its middle frequencies, as shared noise has.
    fur = skimage.data.chelsea()[86:214, 161:289].transpose(2, 0, 1) / 255
    assert recipes.adapt("fast", jpeg(fur, 90)[0]).fuse == "noise"


@pytest.mark.parametrize("sigma", [0, 5, 10])
def test_texture_under_a_jpeg_is_not_taken_for_noise(sigma):
    """Gravel is nowhere flat, and has more energy in the middle frequencies than above."""
    gravel = skimage.data.gravel()[None, 176:336, 176:336] / 255
    y, _ = jpeg(gravel + noise(gravel.shape, sigma), 95)
    found = find_noise(y, ALL)
    assert found.jpeg and found.sigma() == pytest.approx(sigma, rel=0.1, abs=1)
    assert recipes.adapt("fast", y).fuse == "noise"


def test_black_may_hide_the_noise_of_a_jpeg():
    """Black without noise, flat gray, and texture that is never flat."""
    clean = np.full((1, 160, 160), 2 / 255)
    clean[:, :, 48:80] = 0.1 + 0.03 * np.sin(np.arange(160) / 9)[:, None]
    signs = np.random.default_rng(1).choice((-1, 1), (160, 80))
    clean[:, :, 80:] = 0.5 + 0.3 * signs
    grainy = clean + noise(clean.shape, 8, blur=0.6) * (clean > 0.05)
    found = [find_noise(jpeg(y, 75)[0], ALL) for y in (clean, grainy)]
    assert all(one.jpeg for one in found)
    assert found[0].sigma() < 1.5 and found[1].sigma() is None


def test_half_of_a_picture_may_have_no_noise_at_all():
    clean = np.full((1, 128, 128), 2 / 255)
    stripes = np.arange(64) // 2 % 2
    clean[:, :, 64:] = 0.5 + 0.25 * stripes + np.linspace(0, 0.1, 64)
    found = find_noise(np.rint(255 * clean) / 255, ALL)  # told by the stripes alone
    assert found.sigma() is None or np.isfinite(found.sigma())
    assert np.isfinite(found.strength)


def test_the_steps_of_a_jpeg_are_those_of_its_file():
    clean = photograph(3)
    y, steps = jpeg(clean + noise(clean.shape, 15), 75)
    assert find_grid(y, y >= 0) == (5, 3)
    blocks = 255 * np.tensordot(LUMINANCE, y, 1)[5:253, 3:251]
    blocks = blocks.reshape(31, 8, 31, 8).swapaxes(1, 2)
    found = _find_steps(_spectra(blocks.reshape(-1, 8, 8)))
    told = found > 0
    assert told.sum() > 40
    np.testing.assert_array_equal(found[told], steps[told])


def test_a_rounded_gaussian_has_the_sigma_that_it_had():
    """Even where few numbers are not rounded to 0."""
    drawn = np.random.default_rng(0).normal(0, 6, (400, 64))
    steps = np.full(64, 20.0)
    rounded = 20 * np.rint(drawn / 20)
    found = _fit_sigma(rounded, steps, np.ones(64, bool))
    assert found == pytest.approx(6, rel=0.03)


def test_a_jpeg_is_fused_with_the_sigma_found_but_under_a_blur_with_none():
    clean = photograph()
    y, _ = jpeg(clean + noise(clean.shape, 10), 90)
    sharp, blurred = (recipes.adapt("fast", y, blurred=b) for b in (False, True))
    assert sharp.fuse == "noise" and sharp.noise > 8 and sharp.photons is None
    assert blurred.fuse == "noise" and blurred.noise is None and blurred.photons is None
    camera = noise(clean.shape, 15, 1.2) + ndimage.gaussian_filter(clean, (0, 2, 2))
    photons = recipes.adapt("fast", jpeg(camera, 90)[0])
    assert photons.fuse == "shared" and photons.photons


@pytest.mark.parametrize("side", [96, 256])
def test_a_scans_bars_and_holes_and_a_hot_pixel_are_no_jpegs_grid(side):
    y = photograph(1, side) + noise((1, side, side), 10)
    known = np.ones_like(y)
    frame, hot = y.copy(), y.copy()
    frame[:, :17] = frame[:, -17:] = frame[:, :, :20] = 0
    hot[:, 40, 30] = 30
    known[:, 20:45, 40:70] = 0
    for picture, seen in ((frame, ALL), (hot, ALL), (known * y, known)):
        assert find_noise(picture, seen).kind == "white"


def test_what_is_missing_or_burnt_out_or_flat_does_not_count():
    clean = photograph()
    y = clean + noise(clean.shape, 20)
    known = np.ones_like(y)
    y[:, :100, :100] = y.max() + 0.2  # burnt out
    y[:, 200:] = 0.3  # a frame
    known[:, 100:200, :90] = 0
    y[known == 0] = np.random.default_rng(1).random((known == 0).sum())
    assert find_noise(y, known).sigma() == pytest.approx(20, rel=0.06)


def test_clipping_does_not_lower_the_noise():
    clean = np.full((1, 128, 256), 0.05)
    clean[..., 160:] = 0.5
    y = (clean + noise(clean.shape, 50)).clip(0, 1)
    assert find_noise(y, ALL).sigma() == pytest.approx(50, rel=0.05)


def test_a_clean_picture_has_none_and_comes_back():
    found = find_noise(photograph(), ALL)
    assert found.kind == white(0).kind == "none" and 0 <= found.sigma() < 1
    assert found.describe().startswith("none to speak of, sigma ")
    recipe, _ = chosen("--observed", y=photograph(), eight_bits=False)
    assert (recipe.iteration, recipe.fuse, recipe.photons) == (0, "none", None)
    recipe, _ = chosen("--observed", "deblur", photograph())
    assert recipe.iteration == 500 and recipe.fuse == "noise" and 0 < recipe.noise < 2


def test_where_it_cannot_be_told_that_is_said():
    clean = photograph()
    texture = clean + 0.05 * ndimage.gaussian_filter(noise(clean.shape, 255), (0, 1, 1))
    found = find_noise(texture + noise(clean.shape, 5), ALL)
    assert found.kind == "unknown" and found.is_white() and found.sigma() > 4
    assert found.describe().startswith("of unknown kind, sigma ")
    known = np.random.default_rng(0).random(clean.shape) < 0.5
    found = find_noise(clean * known, known)
    assert found.kind == "unknown" and not found.is_white()
    assert found.describe() == "of unknown kind"


def integrated(x, gain, own):
    """Mean and variance of stabilised y = gain * Poisson(x / gain) + N(0, own^2)."""
    counts = np.arange(int(x / gain + 12 * np.sqrt(x / gain) + 30))
    points, weights = np.polynomial.hermite_e.hermegauss(60)
    y = gain * counts[:, None] + own * points
    share = stats.poisson(x / gain).pmf(counts)[:, None] * weights / weights.sum()
    made = stabilise(y[None], ((gain, own**2),))[0]
    mean = (share * made).sum()
    return mean, (share * (made - mean) ** 2).sum()


@pytest.mark.parametrize(("gain", "own"), [(0.02, 0.01), (0.1, 0.15), (3.0, 4.0)])
def test_stabilised_noise_is_even_and_comes_back_without_bias(gain, own):
    for counts in (0.5, 1, 4, 20, 100):
        mean, variance = integrated(gain * counts, gain, own)
        back = destabilise(np.full((1, 1, 1), mean), ((gain, own**2),)).item()
        assert back == pytest.approx(gain * counts, rel=0.02, abs=0.05 * gain)
        if counts >= 4:
            assert variance == pytest.approx(1, abs=0.1)


def test_a_pedestal_and_units_do_not_change_what_is_stabilised():
    y, lines = photograph(3), ((0.02, 0.003), (0.01, 0.001), (0.0, 0.004))
    known, (a, b) = np.ones_like(y), (600.0, 30_000.0)
    other = tuple((a * g, a * a * o - a * g * b) for g, o in lines)
    scale, scaled = (
        find_scale(y, known, lines=lines),
        find_scale(a * y + b, known, lines=other),
    )
    np.testing.assert_allclose(scaled.to(a * y + b), scale.to(y), atol=1e-5)
    values = scale.to(y)
    made = (scaled.back(values, np.float64) - b) / a
    np.testing.assert_allclose(made, scale.back(values, np.float64), atol=1e-5)
    slope = (
        scale.back(values + 1e-3, np.float64) - scale.back(values, np.float64)
    ) / 1e-3
    np.testing.assert_allclose(scale.slope(values), slope, rtol=0.05)
    assert scale.sigma(None) == 255 / scale.span
    assert Scale(0.5, 2.0).sigma(25) == 12.5


def test_growing_noise_is_learnt_and_fused_where_it_is_even():
    rows, columns = np.mgrid[:64, :64] / 64
    clean, gain = 0.1 + 0.4 * (columns + (rows > columns))[None], 0.03
    y = gain * np.random.default_rng(0).poisson(clean / gain)
    given = {"iteration": 30, "precision": "float32"}
    recipe = recipes.adapt("fast", y, given=given)
    assert recipe.scale.lines and recipe.fuse == "noise" and recipe.photons is None
    learner = train(Self2Self(y, identity, None, recipe), 30)
    restored = learner.predict(10)
    fused, error = learner.fuse(restored)
    true = (fused - clean) ** 2
    assert true.mean() < 0.3 * ((y - clean) ** 2).mean()
    assert 0.2 < error.mean() / true.mean() < 5  # after so few steps
    # The noise of y where it is bright is stronger: so is the error that is expected.
    bright = clean > np.median(clean)
    assert error[bright].mean() > error[~bright].mean()
    assert abs(fused.mean() - y.mean()) < 0.01


def test_a_channel_without_noise_does_not_decide():
    clean = photograph(3)
    y = clean + noise(clean.shape, 20)
    y[2] = 0  # as of a slide in green
    found = find_noise(y, ALL)
    assert found.kind == "white" and len(found.lines) == 3
    assert found.sigma() == pytest.approx(20, rel=0.05)
    y[2] = np.rint(255 * clean[2]) / 255
    recipe = recipes.adapt("fast", y)
    assert (
        recipe.noise > 2 and recipe.fuse == "noise"
    )  # else red and green are next to nothing
    assert np.ptp(recipe.scale.to(y)[0]) > 0.1


def test_a_recipe_follows_from_the_noise():
    clean, rng = photograph(), np.random.default_rng(0)
    grown = 0.02 * rng.poisson(clean / 0.02)
    shared = clean + noise(clean.shape, 15, 1.0)
    even = clean + noise(clean.shape, 15)
    for y, flags, fuses, lines, photons in (
        (even, "", True, False, None),
        (even, "--recipe paper", False, False, None),
        (even, "--fuse off", False, False, None),
        (even, "--real_noise", True, False, 25),
        (grown, "", True, True, None),
        (grown, "--recipe paper", False, False, None),
        (grown, "--noise_sigma 20", True, False, None),
        (shared, "", True, False, 25),
        (shared, "--no-real_noise", False, False, None),
        (shared, "--noise_sigma 20", True, False, None),
        (shared, "--recipe paper --real_noise", False, False, 25),
    ):
        recipe, _ = chosen(f"--observed {flags}", y=y)
        assert (recipe.fuse != "none") == fuses, flags
        assert bool(recipe.scale.lines) == lines, flags
        assert recipe.photons == photons, flags
    for y, fuses in ((even, True), (grown, False), (shared, False)):
        recipe, _ = chosen("--observed", "deblur", y)
        assert (recipe.fuse != "none", recipe.photons) == (fuses, None)
        assert not recipe.scale.lines
