"""The loss, the network and the operator, replaced by somebody else's from outside."""

import copy

import numpy as np
import pytest
import torch
from tensors import Small, begun, random_image, train
from torch import nn


def test_another_loss():
    def absolute_loss(degraded, y, judged):
        return (judged * (degraded - y).abs()).sum() / judged.sum()

    y = random_image(1, 32, 33)
    learner = begun(y, loss=absolute_loss, network=lambda channels: Halving())
    loss = train(learner, 1).mean_loss()  # Halving predicts 0 at every dropped entry
    dropped = learner.network.masks[0] == 0
    seen = learner.network.inputs[0][~dropped]
    assert loss == pytest.approx(((y.sum() - seen.sum()) / dropped.sum()).item())


class Halving(nn.Module):
    """Predicts half of what it sees, and keeps it."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(0.5))
        self.inputs, self.masks = [], []

    def forward(self, x, mask, draw):
        self.inputs.append(x)
        self.masks.append(mask)
        return self.factor * x


RECIPES = [
    {"optimizer": "adam"},
    {"optimizer": "muon", "bend": 0.1, "start": "mean", "averaging_power": 2},
    {"optimizer": "muon", "precision": "bfloat16", "drop_rate": 0.2},
]


@pytest.mark.parametrize("recipe", RECIPES)
def test_another_network(recipe):
    made = []

    def network(channels):
        made.append(channels)
        return Small(channels)

    y = random_image(3, 32, 33)
    learner = begun(y, network=network, lr=3e-3, **recipe)
    first = train(learner, 2).mean_loss()
    assert train(learner, 98).alive() and learner.step == 100 and not learner.notes
    assert learner.mean_loss() < first
    state = copy.deepcopy(learner.state_dict())
    resumed = begun(y, network=network, lr=3e-3, **recipe)
    resumed.load_state_dict(state)
    for each in (learner, resumed):
        train(each, 2)
    np.testing.assert_array_equal(learner.predict(3), resumed.predict(3))
    norms = [each.network.norm.running_mean for each in (learner, resumed)]
    assert torch.equal(*norms) and norms[0].any()
    learner.restart()
    again = begun(y, network=network, lr=3e-3, **recipe)
    assert made == [3] * 4
    assert not torch.equal(learner.network.first.weight, again.network.first.weight)
    assert learner.network.norm.num_batches_tracked == 0


class Neighbours:
    """Another operator: the mean of each pixel and the one to its right."""

    reach = 1

    def __call__(self, x):
        return (x + x.roll(-1, -1)) / 2


class Known(nn.Module):
    """Predicts a picture, whatever it sees."""

    def __init__(self, picture):
        super().__init__()
        self.picture = nn.Parameter(picture)

    def forward(self, x, mask, draw):
        return self.picture.expand_as(x)


def test_another_operator():
    clean = random_image(1, 40, 40)
    clean = clean + clean.flip(-1)
    clean = clean + clean.flip(-2)  # symmetric: flips do not change it
    y = Neighbours()(clean)
    losses = [
        train(begun(y, operator, network=lambda _: Known(clean)), 1).mean_loss()
        for operator in (Neighbours(), lambda x: x)
    ]
    assert losses[0] == 0 and losses[1] > 0.01
