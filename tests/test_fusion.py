"""Fusing against its definition, and what it may never do."""

import numpy as np
import pytest
import scipy.fft
import torch
from scipy import ndimage
from tensors import (
    begun,
    identity,
    random_image,
    roll,
    seeded,
    train,
    without_pass,
    without_rounds,
)

from network.blur import CircularBlur, gaussian_psf
from network.fusing import noisy
from network.fusing.residual import BAND, PATCH, REACH, STRIDE, WINDOW, wiener


def naive_wiener(residual, noise):
    """Patch by patch, frequency by frequency."""
    size, stride, reach = PATCH, STRIDE, REACH
    _, height, width = residual.shape
    around = [(reach, reach + height % 2), (reach, reach + width % 2)]
    padded = np.pad(residual, [(0, 0), *around], mode="reflect").astype(float)
    places = [range(0, n - size + 1, stride) for n in padded.shape[1:]]
    waves = np.array(
        [
            [
                scipy.fft.dctn(
                    padded[:, i : i + size, j : j + size], axes=(1, 2), norm="ortho"
                )
                for j in places[1]
            ]
            for i in places[0]
        ]
    )
    total, count = np.zeros_like(padded), np.zeros(padded.shape[1:])
    edge = WINDOW // 2
    for a in range(edge, len(waves) - edge):
        for b in range(edge, len(waves[0]) - edge):
            near = waves[a - edge : a + edge + 1, b - edge : b + edge + 1]
            energy = np.stack([*(near**2).mean((0, 1)), np.ones((size, size))])
            energy = ndimage.uniform_filter(energy, (0, BAND, BAND), mode="constant")
            energy = energy[:-1] / energy[-1]
            kept = waves[a, b] * np.clip(1 - noise / energy, 0, 1)
            rows, columns = (slice(k * stride, k * stride + size) for k in (a, b))
            patch = scipy.fft.idctn(kept, axes=(1, 2), norm="ortho")
            total[:, rows, columns] += patch
            count[rows, columns] += 1
    inner = tuple(slice(reach, reach + n) for n in (height, width))
    return total[:, *inner] / count[inner]


@pytest.mark.parametrize("shape", [(1, 61, 36), (3, 32, 35)])
def test_residuals_filter_is_its_definition(shape, monkeypatch):
    residual = torch.randn(shape, generator=seeded()) + random_image(*shape)
    noise = 0.9
    expected = naive_wiener(residual.numpy(), noise)
    assert 0.1 < expected.std() < 0.8
    np.testing.assert_allclose(wiener(residual, noise), expected, atol=1e-5)
    monkeypatch.setattr("network.fusing.residual.SLAB", 2)
    np.testing.assert_allclose(wiener(residual, noise), expected, atol=1e-5)


def observed(error, noise, shape=(1, 128, 128)):
    """A clean image, an estimate of it and an observation, with white differences."""
    clean = random_image(*shape).numpy()
    draws = np.random.default_rng(0).standard_normal((2, *shape), np.float32)
    return clean, clean + error * draws[0], clean + noise * draws[1]


def fused(f, y, sigma, error, operator=identity):
    """Fuse, told that f's squared error is error**2."""
    variance = np.full_like(y, error**2 / noisy.SPREAD)
    return noisy.fuse_noisy(f, variance, y, np.ones(1), sigma, operator)


@pytest.mark.parametrize("error", [0.02, 0.05, 0.1])
def test_frequencies_of_white_errors_give_the_inverse_variance_mean(error, monkeypatch):
    monkeypatch.setattr(noisy, "SECOND_SHARE", 0)
    monkeypatch.setattr(noisy, "filter_groups", without_pass)
    noise = 0.05
    clean, f, y = observed(error, noise)
    best = error**2 / (error**2 + noise**2)
    result, _ = fused(f, y, 255 * noise, error)
    expected = best * noise**2
    assert ((result - clean) ** 2).mean() == pytest.approx(expected, rel=0.1)
    assert np.abs(result - f - best * (y - f)).mean() < 0.25 * error


@pytest.mark.parametrize("channels", [1, 3])
def test_fusing_without_noise_gives_y_and_with_much_the_ensemble(channels):
    _, f, y = observed(0.1, 0, (channels, 40, 33))
    np.testing.assert_allclose(fused(f, y, 0, 0.1)[0], y, atol=1e-5)
    np.testing.assert_allclose(fused(f, y, 1e4, 0.1)[0], f, atol=0.03)


@pytest.mark.parametrize("operator", [identity, CircularBlur(gaussian_psf(15, 1.0))])
def test_fusing_does_not_believe_a_sigma_far_too_low(operator, monkeypatch):
    """White textures have no similar patches: frequencies alone."""
    monkeypatch.setattr(noisy, "SECOND_SHARE", 0)
    monkeypatch.setattr(noisy, "filter_groups", without_pass)
    clean, f, _ = observed(0.03, 0)
    noise = 0.1 * torch.randn(1, 128, 128, generator=seeded())
    y = (operator(torch.from_numpy(clean)[None])[0] + noise).numpy()
    right, _ = fused(f, y, 25.5, 0.03, operator)
    low, _ = fused(f, y, 5, 0.03, operator)
    errors = [((x - clean) ** 2).mean() for x in (f, right, low)]
    assert errors[1] < errors[0] * 1.12
    assert errors[2] < errors[0] * 1.15


def test_an_unknown_sigma_is_that_of_the_residual():
    blur = CircularBlur(gaussian_psf(15, 1.0))
    _, f, y = observed(0.05, 0.1)
    residual = y - blur(torch.from_numpy(f)[None])[0].numpy()
    sigma = 255 * np.sqrt((residual**2).mean())
    for made, told in zip(*(fused(f, y, s, 0.05, blur) for s in (None, sigma))):
        assert np.abs(made - told).mean() < 1e-3


def test_quiet_quarter_of_a_spectrum_is_its_definition():
    residual = random_image(3, 48, 46).numpy() - 0.5
    energy = np.abs(np.fft.rfft2(residual)) ** 2 / (48 * 46)
    rows = np.array_split(energy, noisy.BINS, axis=1)
    parts = [x.mean() for part in rows for x in np.array_split(part, noisy.BINS, 2)]
    expected = np.quantile(parts, 0.25)
    assert noisy.quiet_energy(torch.from_numpy(residual)) == pytest.approx(
        expected, rel=1e-4
    )


def test_fusing_inverts_the_operator():
    """Without noise the dense system's solution."""
    psf = np.array([[0, 0.05, 0.0], [0.1, 0.6, 0.15], [0.0, 0.1, 0.0]])
    clean, f, _ = observed(0.1, 0, (1, 32, 33))
    blur = CircularBlur(psf)
    pixels = torch.eye(32 * 33).view(-1, 1, 32, 33)
    matrix = blur(pixels).reshape(32 * 33, -1).numpy().T
    y = (matrix @ clean.ravel()).reshape(clean.shape)
    result, _ = fused(f, y, 0, 0.1, blur)
    np.testing.assert_allclose(result, clean, atol=1e-4)


@pytest.mark.parametrize("moved", [0, 1])
def test_fusing_under_a_blur_of_one_pixel_is_the_pointwise_form(moved):
    """The pixel may be beside the centre: then y is moved."""
    psf = np.zeros((3, 3))
    psf[1 + moved, 1] = 1
    _, f, y = observed(0.05, 0.1, (3, 40, 36))
    result, error = fused(f, np.roll(y, moved, 1), 25.5, 0.05, CircularBlur(psf))
    expected, expected_error = fused(f, y, 25.5, 0.05)
    # Patches of the residual begin elsewhere.
    np.testing.assert_allclose(result, expected, atol=0.01 if moved else 1e-4)
    np.testing.assert_allclose(error, expected_error, atol=1e-6)


def test_frequencies_do_not_blow_up_what_a_blur_has_taken(monkeypatch):
    monkeypatch.setattr(noisy, "refine", without_rounds)
    clean = ndimage.gaussian_filter(random_image(1, 64, 64).numpy(), (0, 1.5, 1.5))
    blur = CircularBlur(gaussian_psf(15, 2.0))
    noise = 0.01 * torch.randn(1, 64, 64, generator=seeded())
    y = blur(torch.from_numpy(clean)[None])[0] + noise
    f = ndimage.gaussian_filter(clean, (0, 1, 1))
    error = np.sqrt(((f - clean) ** 2).mean())
    result, _ = fused(f, y, 2.55, error, blur)
    assert np.sqrt(((result - clean) ** 2).mean()) < 0.98 * error


def test_learner_fuses_its_own_observation_and_variance():
    y = random_image(1, 32, 33)
    learner = train(begun(y, roll, fuse="noise", noise=20), 2)
    ensemble = learner.predict(4)
    given = ensemble.mean, ensemble.variance, y, torch.ones(1), 20, roll
    expected = noisy.fuse_noisy(*given)
    for made, other in zip(learner.fuse(ensemble), expected, strict=True):
        np.testing.assert_array_equal(made, other)
