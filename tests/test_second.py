"""The second estimate against its equations, and that it takes no more memory than it may."""

import numpy as np
import pytest
import torch
from references import by_groups, decibels, naive_filter, saved
from skimage import data
from tensors import random_image, seeded, without_rounds

from network.blur import CircularBlur
from network.fusing import noisy as fusing_noisy
from network.fusing import second, similar
from network.fusing.second import second_estimate


def noisy(channels, height, width, sigma=0.1):
    """A picture of stripes and texture, and what is observed of it."""
    down, across = torch.arange(height), torch.arange(width)
    stripes = torch.sin(0.9 * across + 0.4 * down[:, None])
    clean = 0.5 + 0.2 * stripes + 0.1 * random_image(channels, height, width)
    return clean, clean + sigma * torch.randn(clean.shape, generator=seeded())


def naive_estimate(y, noise, rounds):
    """The first step and the rounds of a plane, by their equations."""
    a = second.NOISIER

    def first_step(_, z):
        k, n = z.shape
        gram, i = z @ z.T, np.eye(k)
        t = np.linalg.inv(gram + n * a**2 * noise * i) @ (gram - n * noise * i)
        return t @ z, np.maximum((t**2).sum(1), 1 / k), np.zeros(k)

    x, _ = by_groups(y, y, *second.FIRST_GROUP, first_step)
    for m in range(1, rounds + 1):
        t = second.GIVEN_BACK * (1 - (m - 1) / rounds) if m > 1 else 1
        variance = noise * (t**2 + second.DOUBT * (1 - t))
        white = np.full((len(y), y.shape[1] // 2 + 1), variance)
        group = second.GROUPS[(m - 1) % 2]
        x, _ = naive_filter(x, x + t * (y - x), white, *group, boost=1)
    return x


def test_second_estimate_is_its_equations(monkeypatch):
    for module in (second, similar):  # rounding decides which patches are nearest
        monkeypatch.setattr(module, "ROUNDING", 0)
    monkeypatch.setattr(second, "FIRST_GROUP", (5, 8))
    monkeypatch.setattr(second, "GROUPS", ((4, 9), (3, 7)))
    _, y = noisy(1, 32, 35)
    y = y.double()
    expected = naive_estimate(y[0].numpy(), 0.01, 3)
    np.testing.assert_allclose(second_estimate(y, 0.01, 3)[0], expected, atol=1e-5)


def test_planes_share_the_groups_of_the_first():
    _, y = noisy(3, 40, 33)
    together = second_estimate(y, 0.01, 1)
    pair = second_estimate(y[[0, 2]], 0.01, 1)
    torch.testing.assert_close(together[[0, 2]], pair)


def test_few_groups_are_in_memory_at_a_time(monkeypatch):
    """However large the picture; how many makes no difference to the result."""
    _, y = noisy(1, 90, 40)
    whole = second_estimate(y, 0.01, 1)
    monkeypatch.setattr(similar, "MAX_TILES", 2)
    most, find = [], similar._most_similar

    def counted(guide, references, candidates, *others):
        most.append(len(references))
        return find(guide, references, candidates, *others)

    monkeypatch.setattr(similar, "_most_similar", counted)
    made = second_estimate(y, 0.01, 1)
    assert max(most) == 2 and len(most) > 20
    torch.testing.assert_close(made, whole, atol=1e-4, rtol=1e-4)


def test_a_large_picture_has_fewer_rounds(monkeypatch):
    _, y = noisy(1, 40, 40)
    for pixels, rounds in ((1600, 4), (800, 2), (10, 1)):
        monkeypatch.setattr(second, "FULL_ROUNDS", pixels)
        made, expected = (second_estimate(y, 0.01, m) for m in (None, rounds))
        torch.testing.assert_close(made, expected, atol=0, rtol=0)


def test_rounds_bring_more_than_the_first_step():
    clean = data.camera()[None, 100:196, 200:296].astype(np.float32) / 255
    draws = np.random.default_rng(0).standard_normal(clean.shape, np.float32)
    y, noise = clean + 25 / 255 * draws, (25 / 255) ** 2
    first, last = (second_estimate(torch.from_numpy(y), noise, m) for m in (0, 4))
    first, last = (decibels(x.numpy(), clean) for x in (first, last))
    assert first > decibels(y, clean) + 6
    assert last > first + 0.8


@pytest.mark.parametrize("script, gain", [("denoise", 0.1), ("deblur", 0.02)])
def test_a_networks_result_gains_by_it(script, gain, monkeypatch):
    clean, known = saved(script)
    result, _ = fusing_noisy.fuse_noisy(*known)
    monkeypatch.setattr(fusing_noisy, "SECOND_SHARE", 0)
    without, _ = fusing_noisy.fuse_noisy(*known)
    assert decibels(result, clean) > decibels(without, clean) + gain


def test_under_a_blur_its_difference_is_inverted(monkeypatch):
    """Its place is taken by the clean picture, blurred."""
    clean = random_image(1, 33, 32)
    psf = np.array([[0, 0.05, 0], [0.1, 0.7, 0.1], [0, 0.05, 0]])
    blur = CircularBlur(psf)
    blurred, f = blur(clean[None])[0], clean + 0.1 * random_image(1, 33, 32, seed=1)
    given = f, torch.full_like(f, 0.01), blurred, torch.ones(1), 1, blur
    monkeypatch.setattr(fusing_noisy, "refine", without_rounds)
    monkeypatch.setattr(fusing_noisy, "second_estimate", lambda *_: blurred)
    result, _ = fusing_noisy.fuse_noisy(*given)
    monkeypatch.setattr(fusing_noisy, "SECOND_SHARE", 0)
    start, _ = fusing_noisy.fuse_noisy(*given)
    share = 0.5 * (1 + (psf**2).sum())  # the mean power, by Parseval
    expected = start + share * (clean.numpy() - start)
    np.testing.assert_allclose(result, expected, atol=1e-4)


@pytest.mark.parametrize("sigma", [0.5, 50])
def test_flat_pictures_stay_flat(sigma):
    flat = torch.full((1, 40, 47), 0.3)
    result = second_estimate(flat, (sigma / 255) ** 2)
    torch.testing.assert_close(result, flat, atol=2e-3, rtol=0)


def test_checks_stay_with_hardly_any_noise():
    """Gram matrices of few large eigenvalues, near to singular."""
    rows = torch.arange(64) // 3
    checks = ((rows + rows[:, None]) % 2).float()[None]
    result = second_estimate(checks, (fusing_noisy.MIN_SIGMA / 255) ** 2)
    torch.testing.assert_close(result, checks, atol=1e-2, rtol=0)
