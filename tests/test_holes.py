"""Fusing an observation without noise whose entries are partly missing."""

import numpy as np
import pytest
import torch
from references import decibels, saved
from scipy.ndimage import gaussian_filter
from scripts import chosen
from skimage.restoration import inpaint_biharmonic
from tensors import begun, random_image, train

from network.ensemble import opponent
from network.fusing import missing, noisy


def naive_spread(residual, known):
    """Entry by entry."""
    width = 0.7 / np.sqrt(known.mean())
    reach = int(np.ceil(3 * width))
    _, height, width_of_all = residual.shape
    result = residual.copy()
    for c, i, j in np.ndindex(residual.shape):
        if not known[c, i, j]:
            rows = np.arange(max(0, i - reach), min(height, i + reach + 1))
            columns = np.arange(max(0, j - reach), min(width_of_all, j + reach + 1))
            squares = (rows - i)[:, None] ** 2 + (columns - j) ** 2
            weights = np.exp(-squares / width**2 / 2) * known[c][np.ix_(rows, columns)]
            values = residual[c][np.ix_(rows, columns)]
            result[c, i, j] = (weights * values).sum() / max(weights.sum(), 1e-6)
    return result


@pytest.mark.parametrize("share", [0.2, 0.6])
def test_a_residual_is_spread_by_its_definition(share):
    residual = random_image(3, 20, 17)
    known = (random_image(3, 20, 17, seed=1) < share).float()
    expected = naive_spread(residual.double().numpy(), known.numpy())
    made = missing.spread_residual(residual, known)
    np.testing.assert_allclose(made, expected, atol=1e-4)


def holes(share, shape):
    return (np.random.default_rng(0).random(shape) >= share).astype(np.float32)


@pytest.mark.parametrize("share", [0.3, 0.7])
def test_what_is_missing_is_found_better_than_by_the_network_or_smoothly(share):
    clean, (f, variance, *_) = saved("denoise")
    known = holes(share, clean.shape)
    smooth = inpaint_biharmonic(clean[0].astype(float), known[0] == 0)[None]
    made = [
        np.where(
            known,
            clean,
            missing.fill_holes(f, variance, known * clean + (1 - known) * other, known)[
                0
            ],
        )
        for other in (0, 9)  # what stands at a missing entry is not looked at
    ]
    np.testing.assert_array_equal(*made)
    best = max(decibels(x, clean) for x in (np.where(known, clean, f), smooth))
    assert decibels(made[0], clean) > best + 0.3


def test_the_first_guess_is_the_network_with_its_residual_spread(monkeypatch):
    monkeypatch.setattr(missing, "ROUNDS", 0)
    y, f = (random_image(1, 40, 33, seed=seed) for seed in (0, 1))
    known = torch.from_numpy(holes(0.5, (1, 40, 33)))
    result, _ = missing.fill_holes(f, torch.ones_like(y), y, known)
    expected = torch.where(known > 0, y, f + missing.spread_residual(y - f, known))
    np.testing.assert_allclose(result, expected, atol=1e-6)


def test_channels_with_holes_of_their_own():
    gray = gaussian_filter(random_image(1, 48, 40).numpy(), (0, 1, 1))
    clean = np.concatenate([gray, 0.5 * gray, 1 - gray])
    f = clean + 0.05 * np.random.default_rng(0).standard_normal(clean.shape)
    # by plane: luminance and two differences, of which each channel has a share
    by_plane = np.float32([1, 2, 3])[:, None, None] * np.ones_like(clean)
    variance = by_plane * 0.05**2 / noisy.SPREAD
    shares = opponent(torch.zeros(3, 1, 1)).numpy().T ** 2
    known = holes(0.5, clean.shape)
    result, predicted = missing.fill_holes(
        np.float32(f), variance, clean * known, known
    )
    error = (result - clean) ** 2
    assert error[known == 0].mean() < 0.5 * 0.05**2
    expected = 0.05**2 * (shares @ [1, 2, 3])[:, None, None] * (1 - known)
    np.testing.assert_allclose(predicted, expected, rtol=1e-4)


def test_learner_fuses_what_it_knows(monkeypatch):
    y, known = random_image(1, 40, 33), torch.from_numpy(holes(0.5, (1, 40, 33)))
    learner = begun(y, known=known, fuse="holes")
    ensemble = train(learner, 2).predict(3)
    expected = missing.fill_holes(ensemble.mean, ensemble.variance, y, known)
    for made, other in zip(learner.fuse(ensemble), expected, strict=True):
        np.testing.assert_array_equal(made, other)


def test_incomplete_pictures_are_fused_where_the_noise_is_known():
    def fuses(task, flags):
        return chosen(flags, task)[0].fuse != "none"

    for flags, none in (
        ("--missing 0.5", "--sigma 0"),
        ("--mask m.png", "--sigma 0"),
        ("--mask m.png --observed", "--noise_sigma 0"),
    ):
        assert fuses("denoise", f"{flags} {none}")
        assert not fuses("deblur", f"{flags} {none}")
