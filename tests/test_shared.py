"""Noise that neighbours share is filtered at the variance of its low frequencies."""

import numpy as np
import pytest
import torch
from references import decibels, photograph
from scipy import ndimage
from tensors import begun, random_image, train

from network import recipes
from network.ensemble import opponent
from network.fusing import shared

KNOWN = np.ones((1, 1, 1), np.float32)


def shared_noise(shape, sigma, width, seed=0):
    """Noise blurred by a Gaussian, 0-255 scale; and its variance at low frequencies."""
    drawn = np.random.default_rng(seed).normal(0, 1, shape)
    drawn = ndimage.gaussian_filter(drawn, (0, width, width), mode="wrap")
    scale = sigma / 255 / drawn.std()
    spectrum = np.abs(np.fft.fft2(scale * drawn, norm="ortho")) ** 2
    frequency = np.hypot(*np.ix_(*(np.fft.fftfreq(n) for n in shape[1:])))
    low = (frequency > 1 / 16) & (frequency < 1 / 6)
    return np.float32(scale * drawn), spectrum[:, low].mean()


def planes_of(image):
    image = torch.as_tensor(image).float()
    return torch.tensordot(opponent(image), image, 1)


@pytest.mark.parametrize("width", [0.7, 1.0])
def test_the_variance_at_low_frequencies_is_found(width):
    clean = np.full((3, 128, 192), 0.4, np.float32)
    clean[..., 70:] = 0.6
    noise, expected = shared_noise(clean.shape, 10, width)
    y = clean + noise
    found = shared.shared_variance(*map(planes_of, (clean, y)))[0].flatten().numpy()
    assert (found > 3 * noise.var()).all()  # that of the pixels is too low
    np.testing.assert_allclose(found, expected, rtol=0.25)
    # f has kept most of it, so the residual has little.
    kept, *_ = shared.shared_variance(*map(planes_of, (clean + 0.8 * noise, y)))
    assert (kept[1:] > 0.7 * expected).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_fusing_removes_shared_noise(channels):
    clean = np.float32(photograph(channels, 128))
    noise, _ = shared_noise(clean.shape, 12, 1.0)
    smooth = ndimage.gaussian_filter(clean, (0, 1.0, 1.0))
    f, y = smooth + 0.3 * noise, clean + noise
    variance = np.full_like(f, 1e-4)
    result, error = shared.fuse_shared(f, variance, y, KNOWN)
    assert result.shape == error.shape == clean.shape
    assert decibels(result, clean) > max(decibels(x, clean) for x in (f, y)) + 0.8
    np.testing.assert_allclose(error, variance, rtol=1e-5)


def test_fusing_restores_detail_that_f_has_lost():
    clean = np.float32(photograph(1, 128))
    noise, _ = shared_noise(clean.shape, 6, 1.0)
    f = ndimage.gaussian_filter(clean, (0, 1.5, 1.5)) + 0.3 * noise
    of_y, of_f = (
        shared.fuse_shared(f, 0 * f + 1e-4, y, KNOWN)[0] for y in (clean + noise, f)
    )
    assert decibels(of_y, clean) > decibels(of_f, clean) + 0.5


def test_a_picture_with_hardly_any_noise_keeps_the_detail_of_y():
    """As a clean JPEG, of which the network has lost much."""
    clean = np.float32(photograph(1, 128))
    f = ndimage.gaussian_filter(clean, (0, 2.5, 2.5))
    y = clean + shared_noise(clean.shape, 2, 1.0)[0]
    result, _ = shared.fuse_shared(f, 0 * f + 1e-4, y, KNOWN)
    assert decibels(result, clean) > decibels(f, clean) + 4


def test_detail_far_above_the_noise_is_that_of_y_and_dark_parts_set_no_standard():
    plain = np.full((1, 96, 192), 0.2, np.float32)
    plain[..., 64:] = 0.6
    noise = shared_noise(plain.shape, 4, 1.0)[0] * np.where(plain > 0.4, 1, 0.1)
    clean, inside = plain.copy(), np.s_[:, 40:60, 140:170]
    clean[inside] += 0.1 * np.random.default_rng(1).choice((-1, 1), (20, 30))
    y, f = np.float32(clean + noise), np.float32(plain + 0.3 * noise)
    result, _ = shared.fuse_shared(f, 0 * f + 1e-5, y, KNOWN)
    assert (result - y)[inside].std() < 0.3 * (f - y)[inside].std()
    smooth = np.s_[:, :, 72:124]
    assert (result - clean)[smooth].std() < 0.5 * noise[smooth].std()


def test_fine_colours_are_those_of_the_ensemble():
    clean = np.float32(photograph(3, 64))
    y = clean + shared_noise(clean.shape, 10, 1.0)[0]
    other, planes = planes_of(y), opponent(torch.as_tensor(y))
    other[1:] = other[1:].flip(1)  # the same noise and picture elsewhere
    other = torch.tensordot(planes.T, other, 1).numpy()
    results = [
        planes_of(shared.fuse_shared(clean, 0 * clean + 1e-4, x, KNOWN)[0])
        for x in (y, other)
    ]
    torch.testing.assert_close(results[0][0], results[1][0], atol=1e-3, rtol=0)
    apart = (planes_of(y) - planes_of(other))[1:].std()
    between = (results[0] - results[1])[1:].numpy()
    assert (between - wide(between)).std() < 0.2 * apart


def wide(planes):
    return ndimage.gaussian_filter(planes, (0, shared.WIDE, shared.WIDE))


def test_the_colours_of_large_areas_are_those_of_y():
    """The network errs there: a white wall became pink."""
    clean = np.float32(photograph(3, 192))
    y = clean + shared_noise(clean.shape, 8, 1.0)[0]
    pink = np.float32([0.04, -0.04, 0.04])[:, None, None]
    f = clean + pink * (np.arange(192) > 96)
    result, _ = shared.fuse_shared(f, 0 * f + 1e-4, y, KNOWN)
    before, after = (
        np.abs(planes_of(x - clean)[1:, 60:130, 130:].mean((1, 2)).numpy())
        for x in (f, result)
    )
    assert (after < 0.2 * before.max()).all()


def test_unknown_entries_do_not_count():
    clean = np.float32(photograph(1, 64))
    y = clean + shared_noise(clean.shape, 10, 1.0)[0]
    known = np.ones_like(y)
    known[:, 20:24, 30:34] = 0
    given = clean, 0 * clean + 1e-4
    results = [
        shared.fuse_shared(*given, np.where(known, y, other), known)[0]
        for other in (0, 50)
    ]
    np.testing.assert_array_equal(*results)


def test_a_black_picture_stays_black():
    black = np.zeros((3, 40, 48), np.float32)
    assert not shared.fuse_shared(black, black, black, KNOWN)[0].any()


def test_learner_fuses_its_own_observation():
    y = random_image(3, 40, 33)
    learner = train(begun(y, fuse="shared"), 2)
    ensemble = learner.predict(4)
    given = ensemble.mean, ensemble.variance, y, torch.ones(1)
    for made, other in zip(learner.fuse(ensemble), shared.fuse_shared(*given)):
        np.testing.assert_array_equal(made, other)


def test_the_stronger_the_shared_noise_the_fewer_photons():
    clean = 0.3 + 0.3 * np.float32(photograph(3, 128))
    photons = [
        recipes.adapt(
            "fast", clean + shared_noise(clean.shape, sigma, 1.0)[0], eight_bits=True
        ).photons
        for sigma in (4, 8, 30)
    ]
    assert photons[0] == 100 and 25 < photons[1] < 100 and photons[2] == 25
    # Of a float picture they are counted in its own range.
    y = clean + shared_noise(clean.shape, 2, 1.0)[0]
    photons = [recipes.adapt("fast", unit * y).photons for unit in (1, 1000)]
    assert 25 < photons[0] == photons[1] < 100
