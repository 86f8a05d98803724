"""The second pass over similar patches against its definition, and what it may never do."""

import numpy as np
import pytest
import torch
from references import decibels, naive_filter, saved
from tensors import identity, random_image, seeded, without_pass, without_rounds

from network.ensemble import opponent
from network.fusing import noisy, similar
from network.fusing.similar import filter_groups


@pytest.mark.parametrize("shape", [(1, 32, 32), (3, 33, 61)])
def test_pass_is_its_definition(shape, monkeypatch):
    group = 5, 9, 1.5
    monkeypatch.setattr(similar, "GROUPS", {0: group})
    pilot = random_image(*shape)
    pilot[1:] = pilot[:1] * 0.7 + 0.1 * pilot[1:]
    y = pilot + 0.1 * torch.randn(shape, generator=seeded())
    # louder along one diagonal, as dividing by a blur's transfer function may leave it
    down, across = torch.fft.fftfreq(shape[1]), torch.fft.rfftfreq(shape[2])
    waves = torch.cos(2 * torch.pi * (down[:, None] + 2 * across))
    noise = (0.02 - 0.01 * waves).expand(shape[0], -1, -1)
    made, risk = filter_groups(pilot, y, noise)
    # patches are compared in the first plane, so one plane is filtered as if alone
    alone, observed = (x[0].double().numpy() for x in (pilot, y))
    alone, alone_risk = naive_filter(alone, observed, noise[0].numpy(), *group)
    np.testing.assert_allclose(made[0], alone, atol=1e-4)
    np.testing.assert_allclose(risk[0], alone_risk, atol=1e-4)
    if len(pilot) == 3:
        pair, _ = filter_groups(pilot[[0, 2]], y[[0, 2]], noise[:2])
        torch.testing.assert_close(made[[0, 2]], pair)
    monkeypatch.setattr(similar, "MAX_TILES", 1)
    for again, before in zip(filter_groups(pilot, y, noise), (made, risk)):
        torch.testing.assert_close(again, before)


def test_settings_go_by_the_noise_of_low_frequencies(monkeypatch):
    """A blur's inverse has loud noise where pictures have little."""
    few, many = (5, 9, 1), (6, 12, 2)
    y = random_image(1, 40, 40)
    noise = torch.full((1, 40, 21), (100 / 255) ** 2)
    noise[:, 0, 0] = (10 / 255) ** 2
    monkeypatch.setattr(similar, "GROUPS", {0: few})
    expected = filter_groups(y, y, noise)
    monkeypatch.setattr(similar, "GROUPS", {0: few, 20: many})
    torch.testing.assert_close(filter_groups(y, y, noise), expected)
    monkeypatch.setattr(similar, "GROUPS", {0: many})
    assert not torch.allclose(filter_groups(y, y, noise)[0], expected[0])


@pytest.mark.parametrize("sigma", [0.5, 10, 25, 50])
def test_flat_pictures_stay_flat(sigma):
    flat = torch.full((1, 40, 47), 0.3)
    result, _ = filter_groups(flat, flat, (sigma / 255) ** 2)
    torch.testing.assert_close(result, flat, atol=1e-3, rtol=0)
    assert result.std() < 1e-4


@pytest.mark.parametrize("gap", [1, 3, 16])
def test_black_and_white_checks_stay_with_hardly_any_noise(gap):
    """Gram matrices of few large eigenvalues, near to singular."""
    rows = torch.arange(64) // gap
    checks = ((rows + rows[:, None]) % 2).float()[None]
    result, _ = filter_groups(checks, checks, (noisy.MIN_SIGMA / 255) ** 2)
    torch.testing.assert_close(result, checks, atol=1e-2, rtol=0)


def test_pass_finds_a_detail_that_the_pilot_has_only_faintly():
    """Stripes repeat: many noisy copies make a good one."""
    rows = torch.arange(64)
    clean = 0.5 + 0.2 * torch.sin(rows * 1.1 + rows[:, None] * 0.4)[None]
    y = clean + 0.1 * torch.randn(clean.shape, generator=seeded())
    pilot = 0.5 + 0.5 * (clean - 0.5)
    result, _ = filter_groups(pilot, y, 0.01)
    assert (result - clean).square().mean() < 0.05 * (pilot - clean).square().mean()


@pytest.mark.parametrize("task", ["denoise", "deblur"])
def test_a_networks_result_gains_by_the_pass(task, monkeypatch):
    monkeypatch.setattr(noisy, "SECOND_SHARE", 0)
    clean, known = saved(task)
    result, predicted = noisy.fuse_noisy(*known)
    monkeypatch.setattr(noisy, "filter_groups", without_pass)
    monkeypatch.setattr(noisy, "refine", without_rounds)
    before, _ = noisy.fuse_noisy(*known)
    assert decibels(before, clean) > decibels(known[0], clean) + 0.1
    assert decibels(result, clean) > decibels(before, clean) + 0.25
    assert 0.7 < predicted.mean() / ((result - clean) ** 2).mean() < 1.4


@pytest.mark.parametrize("error", [0.02, 0.05])
def test_an_ensemble_that_errs_less_than_the_pass_is_kept(error):
    """White texture: no two patches are alike."""
    clean = random_image(1, 96, 96).numpy()
    draws = np.random.default_rng(0).standard_normal((2, *clean.shape), np.float32)
    f, y = clean + error * draws[0], clean + 0.2 * draws[1]
    variance = np.full_like(y, error**2 / noisy.SPREAD)
    result, _ = noisy.fuse_noisy(f, variance, y, np.ones(1), 51, identity)
    assert decibels(result, clean) > decibels(f, clean) - 0.6


def test_planes_of_a_colour_picture_keep_the_noise_white():
    matrix = opponent(torch.zeros(3, 1, 1))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(3))
    assert matrix[0].std() < 1e-6 and matrix[1:].sum(1).abs().max() < 1e-6
    torch.testing.assert_close(opponent(torch.zeros(1, 1, 1)), torch.eye(1))
