"""Bernoulli masks and flips."""

import pytest
import torch
from tensors import on_devices, random_image

from network.masks import BernoulliMasks, flip


def masks_of(device, *entropy):
    return BernoulliMasks(torch.device(device), *entropy)


@on_devices
@pytest.mark.parametrize("drop_rate", [0.3, 0.05])
def test_masks_keep_their_rate(device, drop_rate):
    mask = masks_of(device, 0)((1, 1, 1000, 1000), drop_rate)
    assert mask.shape == (1, 1, 1000, 1000)
    assert set(mask.unique().tolist()) == {0, 1}
    error = (drop_rate * (1 - drop_rate) / mask.numel()) ** 0.5
    assert abs(mask.double().mean() - (1 - drop_rate)) < 4 * error


@on_devices
def test_masks_drop_nothing_at_rate_zero(device):
    assert masks_of(device, 0)((2, 3, 33, 35), 0.0).all()


@on_devices
@pytest.mark.parametrize("drop_rate", [0.3, 0.05])
def test_masks_are_independent(device, drop_rate):
    mask = masks_of(device, 0)((2, 3, 400, 400), drop_rate).double().flatten().cpu()
    neighbours, row, channel, sample = range(1, 9), 400, 400**2, 3 * 400**2
    for lag in (*neighbours, row, channel, sample):
        pair = torch.stack((mask[lag:], mask[:-lag]))
        assert abs(torch.corrcoef(pair)[0, 1]) < 5 / pair.shape[1] ** 0.5, lag


@on_devices
def test_masks_are_named_by_their_entropy(device):
    shape = (1, 3, 32, 33)
    first = masks_of(device, 0, 5)(shape, 0.3)
    assert torch.equal(first, masks_of(device, 0, 5)(shape, 0.3))
    for other in ((0, 6), (1, 5), (5, 0)):
        assert not torch.equal(first, masks_of(device, *other)(shape, 0.3))


@on_devices
def test_masks_go_on_from_a_state(device):
    masks = masks_of(device, 0)
    first = masks((1, 1, 32, 33), 0.3)
    state = masks.state()
    expected = [masks((1, 1, 32, 33), 0.3) for _ in range(2)]
    assert not torch.equal(first, expected[0])
    resumed = masks_of(device, 1)
    resumed.load_state(state)
    for mask in expected:
        assert torch.equal(resumed((1, 1, 32, 33), 0.3), mask)


def test_flip_flips_each_sample_as_told_and_back():
    x = random_image(4, 3, 5, 6)
    flips = torch.tensor([[0, 0], [1, 0], [0, 1], [1, 1]]).view(4, 2, 1, 1)
    flipped = flip(x, flips)
    expected = (x[0], x[1].flip(-1), x[2].flip(-2), x[3].flip(-1, -2))
    assert torch.equal(flipped, torch.stack(expected))
    assert torch.equal(flip(flipped, flips), x)
