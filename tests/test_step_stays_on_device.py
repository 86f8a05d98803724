"""A training step copies and reads nothing of the host, so a CUDA graph can capture it.

The tests need no GPU. A step runs on meta tensors, which have a device but no values. An
operation that mixes them with the host's tensors is noticed, and reading one is an error.
"""

import math
import traceback
from dataclasses import replace

import pytest
import torch
from tensors import random_image
from torch.utils._python_dispatch import TorchDispatchMode

from network import Self2Self, blur, fast_punet, muon, recipes, self2self

META = torch.device("meta")
pytestmark = pytest.mark.filterwarnings("ignore:.*which is a no-op")


class Masks(self2self.BernoulliMasks):
    """Draws as BernoulliMasks does on CUDA, on a device without a generator."""

    def seed(self, *entropy):
        pass

    def __call__(self, shape, drop_rate):
        bits = torch.empty((math.prod(shape) + 3) // 4, dtype=torch.int64, device=META)
        kept = bits.random_().view(torch.int16)[: math.prod(shape)] >= 0
        n, c, h, w = shape
        return kept.view(n, h, w, c).permute(0, 3, 1, 2)

    def poisson(self, mean):
        return torch.poisson(mean)


class Adam(torch.optim.Optimizer):
    """In the place of PyTorch's Adam, which cannot run on meta tensors."""

    def __init__(self, params, lr, **_):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for weight in self.param_groups[0]["params"]:
            weight -= weight.grad * self.param_groups[0]["lr"]


class Transfers(TorchDispatchMode):
    """Records the lines of this project that bring tensors of the host into a step."""

    def __init__(self):
        super().__init__()
        self.found, self.operations = [], 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        made = operation(*args, **(kwargs or {}))
        given = torch.utils._pytree.tree_leaves((args, kwargs, made))
        tensors = [x for x in given if isinstance(x, torch.Tensor)]
        kinds = {(x.device.type, x.ndim > 0) for x in tensors}
        # A scalar of the host may be the argument of a kernel; a copy of it may not.
        mixed = ("cpu", True) in kinds or "copy" in str(operation)
        if mixed and len({x.device.type for x in tensors}) > 1:
            lines = [x for x in traceback.extract_stack() if "/network/" in x.filename]
            self.found.append(f"{lines[-1].filename}:{lines[-1].lineno} {operation}")
        self.operations += 1
        return made


@pytest.fixture
def on_meta(monkeypatch):
    """Let the learner run on meta tensors."""
    made = torch.tensor

    def tensor(data, dtype=None, device=None):
        return made(data, dtype=dtype).to(device)

    def to(module, device, memory_format):
        return module.to_empty(device=device)

    monkeypatch.setattr(torch, "tensor", tensor)
    monkeypatch.setattr(torch.nn.Module, "to", to)
    monkeypatch.setattr(torch.optim, "Adam", Adam)
    monkeypatch.setattr(self2self, "BernoulliMasks", Masks)
    monkeypatch.setattr(fast_punet, "triton_punet", None)
    monkeypatch.setattr(fast_punet, "agrees", lambda *_: True)  # it reads values


def transfers(recipe, channels, operator, **changes):
    """Return the lines by which a step of a recipe brings in tensors of the host."""
    settings = {"drop_rate": 0.2, "averaging_power": 3, "precision": "float32"}
    settings |= {"start": "default", "photons": None} | changes
    settings = {} if recipe == "paper" else settings
    recipe = replace(recipes.RECIPES[recipe], **settings)
    y = random_image(channels, 40, 45)
    learner = Self2Self(y, operator, None, recipe, device=META)
    learner._train()  # the first step makes the tensors that last
    with Transfers() as mode:
        learner._train()
    assert mode.operations > 500
    return mode.found


CASES = [
    ("paper", 1, lambda x: x, {}),
    ("fast", 3, lambda x: x, {"photons": 100}),
    ("fast", 1, blur.CircularBlur(blur.gaussian_psf(5, 1.0)), {"window": 32}),
]


@pytest.mark.parametrize(("recipe", "channels", "operator", "changes"), CASES)
def test_a_step_copies_nothing_from_the_host(
    recipe, channels, operator, changes, on_meta
):
    assert transfers(recipe, channels, operator, **changes) == []


def test_a_copy_is_found(on_meta, monkeypatch):
    inverse_roots = muon.inverse_roots

    def copying(x):
        return inverse_roots(torch.eye(x.shape[-2]).to(x) @ x)

    monkeypatch.setattr(muon, "inverse_roots", copying)
    assert "muon.py" in transfers("fast", 1, lambda x: x)[0]
