"""Muon against PyTorch's, and which weights it steps."""

import pytest
import torch
from tensors import (
    begun,
    random_image,
    seeded,
)
from torch import nn

from network.muon import Muon, orthogonalise


def test_orthogonalising_keeps_the_singular_vectors():
    left = torch.linalg.qr(torch.randn(2, 24, 24, generator=seeded()))[0]
    right = torch.linalg.qr(torch.randn(2, 60, 24, generator=seeded(1)))[0]
    values = torch.logspace(0, 1.7, 24)
    matrices = [*(left * values @ right.mT), *(3 * left * values @ right.mT)[:, :9]]
    size = 60**-0.5  # makes the singular values 1
    both = [orthogonalise(matrices, size, together) for together in (False, True)]
    for separate, joined in zip(*both, strict=True):
        torch.testing.assert_close(separate, joined, rtol=0, atol=1e-4)
    made = torch.stack(both[0][:2])
    # of nine rows
    values = torch.linalg.svdvals(torch.stack(both[0][2:]))
    assert 0.65 < values.min() and values.max() < 1.25
    values = left.mT @ made @ right
    kept = values.diagonal(dim1=-2, dim2=-1)
    assert 0.65 < kept.min() and kept.max() < 1.25
    assert (values - torch.diag_embed(kept)).abs().max() < 1e-4


@pytest.mark.parametrize(
    "layout", [torch.contiguous_format, torch.channels_last], ids=str
)
def test_muon_is_pytorchs(layout):
    """PyTorch's takes matrices and works in bfloat16."""
    shapes = (40, 36, 3, 3), (33, 32, 3, 3), (40, 36, 3, 3)
    weights = [random_image(*shape, seed=i) for i, shape in enumerate(shapes)]
    matrices = [nn.Parameter(weight.flatten(1).clone()) for weight in weights]
    ours = [nn.Parameter(weight.clone(memory_format=layout)) for weight in weights]
    settings = {"weight_decay": 0, "adjust_lr_fn": "match_rms_adamw"}
    theirs = torch.optim.Muon(matrices, lr=0.5, **settings)
    optimizer = Muon(ours, torch.tensor(0.5))
    for step in range(4):
        for i, (weight, matrix) in enumerate(zip(ours, matrices)):
            weight.grad = random_image(*weight.shape, seed=9 * step + i) - 0.5
            matrix.grad = weight.grad.flatten(1)
        optimizer.step()
        theirs.step()
    for weight, matrix, start in zip(ours, matrices, weights):
        moved = weight - start
        assert 0.05 < moved.std() < 0.4
        difference = moved.flatten(1) - (matrix - start.flatten(1))
        assert difference.std() < 0.03 * moved.std()


def test_one_batch_steps_as_several_do():
    shapes = (40, 36, 3, 3), (33, 32, 3, 3), (40, 80, 2, 2)
    made = []
    for together in (False, True):
        weights = [nn.Parameter(random_image(*shape)) for shape in shapes]
        optimizer = Muon(weights, torch.tensor(0.5), together)
        for seed in range(3):
            for weight in weights:
                weight.grad = random_image(*weight.shape, seed=seed) - 0.5
            optimizer.step()
        made.append(weights)
    for separate, joined in zip(*made):
        torch.testing.assert_close(separate, joined, rtol=0, atol=2e-6)


def test_muon_steps_the_wide_convolutions_and_adam_the_rest():
    adam, muon = begun(random_image(3, 32, 33), optimizer="muon").optimizers
    sizes = [[w.shape for w in o.param_groups[0]["params"]] for o in (adam, muon)]
    assert {len(shape) for shape in sizes[0]} == {1, 4}
    assert (48, 3, 3, 3) in sizes[0] and (3, 32, 3, 3) in sizes[0]
    assert (32, 64, 3, 3) in sizes[1] and (48, 48, 3, 3) in sizes[1]
    assert sum(map(len, sizes)) == 36
