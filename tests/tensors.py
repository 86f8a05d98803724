"""Tiny tensors and learners that the tests of the network share."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from network.recipes import RECIPES
from network.self2self import Self2Self

DOUBLE = {"dtype": torch.float64}
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
on_devices = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=needs_cuda)]
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random_image(*shape, seed=0):
    return torch.rand(shape, generator=seeded(seed))


def block_mask(*shape, seed=0):
    """A Bernoulli mask, half dropped, with a missing block at the top left."""
    mask = (torch.rand(shape, generator=seeded(seed), **DOUBLE) < 0.5).double()
    mask[..., : shape[-2] * 2 // 3, : shape[-1] * 2 // 3] = 0
    return mask


def sparse_mask(*shape):
    """A Bernoulli mask with 95 % dropped."""
    return (torch.rand(shape, generator=seeded(), **DOUBLE) < 0.05).double()


def identity(x):
    return x


def roll(x):
    """An operator that a flip on its wrong side gives away."""
    return x.roll(1, -1)


roll.reach = 1


def without_pass(pilot, *_):
    """In the place of similar.filter_groups: the pilot, without a risk."""
    return pilot, torch.zeros_like(pilot)


def without_rounds(start, *_):
    """In the place of plug.refine: the start, without an error."""
    return start, torch.zeros_like(start)


class Small(nn.Module):
    """Another network: no sigmoid, no last bias, normalisation, a weight without use."""

    def __init__(self, channels):
        super().__init__()
        self.first = nn.Conv2d(2 * channels, 16, 3, padding=1)
        self.middle = nn.Conv2d(16, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.last = nn.Conv2d(16, channels, 1, bias=False)
        self.unused = nn.Parameter(torch.ones(16, 16, 1, 1))
        self.frozen = nn.Parameter(torch.ones(()), requires_grad=False)

    def forward(self, x, mask, draw):
        x = torch.relu(self.first(torch.cat((x, mask), 1)))
        x = torch.relu(self.norm(self.middle(x))) * draw(x.shape, 0.3)
        return self.last(x)


def begun(y, operator=identity, known=None, seed=0, device="cpu", **to):
    """Return a learner of y, in y's own units.

    `to` changes its recipe, `paper`; `network`, `loss` and `capture` go to Self2Self.
    """
    outer = "network", "loss", "capture"
    own = {name: to.pop(name) for name in outer if name in to}
    recipe = replace(RECIPES["paper"], **{"lr": 1e-3, "photons": None} | to)
    return Self2Self(y, operator, known, recipe, seed, device, **own)


def train(learner, steps):
    for _ in range(steps):
        learner.train_step()
    return learner
