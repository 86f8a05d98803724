"""Plug and play's rounds against dense algebra, and what they come to."""

import numpy as np
import pytest
import torch
from tensors import random_image

from network.blur import CircularBlur
from network.fusing import plug

PSF = np.array([[0, 0.05, 0.0], [0.1, 0.6, 0.15], [0.0, 0.1, 0.0]])
SIZE = 9, 8


def transfer():
    impulse = torch.zeros(1, 1, *SIZE)
    impulse[..., 0, 0] = 1
    return torch.fft.rfft2(CircularBlur(PSF)(impulse)[0])


def dense():
    pixels = torch.eye(SIZE[0] * SIZE[1]).view(-1, 1, *SIZE)
    return CircularBlur(PSF)(pixels).flatten(1).T.double()


@pytest.mark.parametrize("planes", [1, 3])
@pytest.mark.parametrize("known", ["all", "some"])
def test_a_round_inverts_the_blur_as_a_dense_solve_does(known, planes, monkeypatch):
    """One round; the filter's place is taken by one that gives all it is told."""
    told = []

    def keep(z, x, noise, *_):
        told.append((z, x, noise))
        return x, torch.ones_like(x)

    monkeypatch.setattr(plug, "filter_groups", keep)
    monkeypatch.setattr(plug, "ROUNDS", 1)
    monkeypatch.setattr(plug, "MIN_ROUNDS", 1)
    start, y = random_image(planes, *SIZE, seed=1), random_image(planes, *SIZE)
    seen = torch.ones(1, *SIZE)
    if known == "some":
        seen[:, 2:4, 3:6] = 0
    noise, errors = 1e-4, torch.tensor([1e-3, 1e-4, 3e-3])[:planes, None, None]
    plug.refine(start, errors, y, seen, noise, transfer())
    ((_, inverted, variance),) = told
    matrix = dense()
    for plane in range(planes):
        z = start[plane].flatten().double()
        target = torch.where(
            seen.flatten() > 0, y[plane].flatten().double(), matrix @ z
        )
        ratio = noise / (plug.FIRST_DEVIATION**2 * errors[plane].item())
        system = matrix.T @ matrix + ratio * torch.eye(len(z))
        expected = torch.linalg.solve(system, matrix.T @ target + ratio * z)
        np.testing.assert_allclose(inverted[plane].flatten(), expected, atol=1e-5)
        # the filter is told the posterior's variance
        mean = torch.linalg.inv(system).trace().item() * noise / len(z)
        shared = torch.fft.irfft2(variance[plane], s=SIZE)[0, 0]
        assert shared.item() == pytest.approx(mean, rel=1e-4)


def test_large_pictures_have_fewer_rounds(monkeypatch):
    rounds = []

    def count(z, x, *_):
        rounds.append(1)
        return x, torch.ones_like(x)

    monkeypatch.setattr(plug, "filter_groups", count)
    z = random_image(1, *SIZE)
    for entries, expected in ((72 * 20, plug.ROUNDS), (72 * 5, 5), (1, 3)):
        monkeypatch.setattr(plug, "MAX_ENTRIES", entries)
        rounds.clear()
        plug.refine(z, torch.full((1, 1, 1), 1e-3), z, 1, 1e-4, transfer())
        assert len(rounds) == expected


def test_a_wiener_filters_error_is_that_of_the_pictures_spectrum():
    """The picture's spectrum is a power law; the blur is none, or a box with zeros."""
    size, noise = 128, 1e-3
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size))
    spectrum = 1e-4 * frequency.clip(1 / size) ** -2.5
    draws = np.random.default_rng(0).standard_normal((2, size, size))
    waves = np.fft.rfft2(draws, norm="ortho") * np.sqrt(spectrum)
    images = torch.from_numpy(np.fft.irfft2(waves, norm="ortho"))
    for width in (1, 9):
        box = np.zeros((size, size))
        box[:width, :width] = 1 / width**2
        power = np.abs(np.fft.rfft2(box)) ** 2
        expected = (spectrum * noise / (power * spectrum + noise)).mean()
        made = plug.wiener_error(images, torch.from_numpy(power)[None], noise)
        if width == 1:
            assert made.flatten().tolist() == pytest.approx([expected] * 2, rel=0.1)
        else:  # what the zeros have taken is told from its neighbours
            assert 0.4 * expected < made.mean() < 0.95 * expected
