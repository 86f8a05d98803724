"""The learner: its loss, steps, ensemble and state."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from tensors import (
    Small,
    begun,
    block_mask,
    identity,
    random_image,
    roll,
    seeded,
    train,
)
from torch import nn

from network import restoring
from network.ensemble import Restoration
from network.masks import BernoulliMasks
from network.recipes import RECIPES
from network.self2self import Self2Self, dropped_loss


def test_loss_is_the_mean_over_dropped_entries():
    prediction, y = random_image(2, 3, 5, 4), random_image(1, 3, 5, 4, seed=1)
    dropped = 1 - block_mask(2, 3, 5, 4).float()
    errors = [
        (prediction[index] - y[0][index[1:]]).item() ** 2
        for index in np.ndindex(*prediction.shape)
        if dropped[index]
    ]
    loss = dropped_loss(prediction, y, dropped).item()
    assert loss == pytest.approx(sum(errors) / len(errors))


def test_loss_is_blind_to_kept_entries():
    prediction = random_image(2, 3, 8, 8).requires_grad_()
    y = random_image(2, 3, 8, 8, seed=1)
    kept = block_mask(2, 3, 8, 8).float()
    loss = dropped_loss(prediction, y, 1 - kept)
    assert torch.equal(loss, dropped_loss(prediction + 9 * kept, y, 1 - kept))
    assert torch.equal(loss, dropped_loss(prediction, y - 9 * kept, 1 - kept))
    (grad,) = torch.autograd.grad(loss, prediction)
    assert torch.equal(grad != 0, kept == 0)


def test_loss_of_a_mask_that_drops_nothing_is_zero():
    prediction = torch.ones(1, 1, 4, 4, requires_grad=True)
    loss = dropped_loss(prediction, torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 4))
    (grad,) = torch.autograd.grad(loss, prediction)
    assert loss == 0 and (grad == 0).all()


class Spy(nn.Module):
    """Stands in for Punet: keeps what it is shown, answers `answer(x, mask)`."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer
        self.scale = nn.Parameter(torch.ones(()))
        self.inputs, self.masks = [], []

    def forward(self, x, mask, draw):
        self.inputs.extend(x)
        self.masks.extend(mask)
        return self.answer(x, mask) * self.scale


FLIPS = [(), (-1,), (-2,), (-1, -2)]


def flip_of(x, mask, y):
    """How y was flipped to give x under its mask."""
    (dims,) = [dims for dims in FLIPS if torch.equal(y.flip(dims) * mask, x)]
    return dims


@pytest.mark.parametrize("operator", [identity, roll])
def test_predictions_are_flipped_back_before_the_operator(operator):
    clean = random_image(3, 32, 33)
    y = operator(clean)

    def clean_flipped_like_y(x, mask):
        samples = zip(x, mask, strict=True)
        return torch.stack([clean.flip(flip_of(*sample, y)) for sample in samples])

    spy = Spy(clean_flipped_like_y)
    learner = begun(y, operator, bs=2, network=lambda _: spy)
    train(learner, 12)
    assert {flip_of(*sample, y) for sample in zip(spy.inputs, spy.masks)} == {*FLIPS}
    assert learner.mean_loss() == 0
    np.testing.assert_allclose(learner.predict(8).image, clean, atol=1e-6)


def test_entries_judged_are_those_not_seen():
    y = 1 + random_image(1, 32, 33)
    spy = Spy(lambda x, mask: x)
    learner = begun(y, network=lambda _: spy, lr=0.0)
    for _ in range(12):
        learner.train_step()
        dropped = (y**2).sum() - (spy.inputs[-1] ** 2).sum()
        expected = dropped / (1 - spy.masks[-1]).sum()
        assert learner.last_loss.item() == pytest.approx(expected.item(), rel=1e-4)


def test_batch_is_several_samples_of_one_observation():
    y = random_image(1, 32, 33)
    spy = Spy(lambda x, mask: x)
    learner = begun(y, bs=2, network=lambda _: spy)
    train(learner, 1)
    a, b = (
        m.flip(flip_of(x, m, y)) for x, m in zip(spy.inputs, spy.masks, strict=True)
    )
    assert not torch.equal(a, b)


def test_drop_rate_zero_judges_every_entry():
    y = random_image(1, 32, 33)
    spy = Spy(lambda x, mask: torch.zeros_like(x))
    learner = begun(y, drop_rate=0, network=lambda _: spy)
    train(learner, 1)
    assert spy.masks[0].all()
    assert learner.mean_loss() == pytest.approx((y**2).mean().item())


def test_same_seed_repeats_however_often_one_looks():
    y = random_image(1, 32, 33)
    watched = begun(y)
    for _ in range(4):
        watched.predict(2)
        torch.rand(1)  # PyTorch's own random state is not the learner's
        watched.train_step()
    unwatched = train(begun(y), 4)
    assert watched.mean_loss() == unwatched.mean_loss()
    np.testing.assert_array_equal(watched.predict(3), unwatched.predict(3))
    assert not np.array_equal(
        unwatched.predict(3), train(begun(y, seed=1), 4).predict(3)
    )


@pytest.mark.parametrize(
    "optimizer, power", [("adam", None), ("adamw", None), ("muon", 2)]
)
def test_learner_goes_on_from_a_state(optimizer, power):
    y = random_image(1, 32, 33)
    learner = begun(y, optimizer=optimizer, averaging_power=power)
    learner.restart()
    train(learner, 3)
    state = copy.deepcopy(learner.state_dict())
    train(learner, 3)
    resumed = begun(y, optimizer=optimizer, averaging_power=power)
    resumed.load_state_dict(state)
    train(resumed, 3)
    assert resumed.step == learner.step == 6
    assert resumed.mean_loss() == learner.mean_loss()
    np.testing.assert_array_equal(resumed.predict(2), learner.predict(2))


def test_prediction_makes_no_graph():
    learner = begun(random_image(3, 32, 33))
    graphs = []
    learner.network.register_forward_hook(
        lambda network, inputs, output: graphs.append(output.requires_grad)
    )
    restored = learner.predict(3).image
    assert graphs == [False] * 3
    assert restored.shape == (3, 32, 33) and restored.dtype == np.float32


def test_prediction_is_the_mean_of_the_ensemble():
    learner = train(begun(random_image(1, 32, 33), seed=5), 2)
    masks = BernoulliMasks(torch.device("cpu"), 5, 2)
    with torch.no_grad():
        samples = [restoring.predict_whole(learner, masks, 1)[0] for _ in range(4)]
    assert not torch.equal(samples[0], samples[1])
    made = learner.predict(4)
    np.testing.assert_allclose(made.image, sum(samples) / 4, atol=1e-6)
    variance = np.var(samples, 0, ddof=1)
    np.testing.assert_allclose(made.variance, variance, atol=1e-6)


def test_the_trainings_own_predictions_join_the_ensemble():
    learner = begun(random_image(3, 32, 33), averaging_power=2, bs=2, seed=5)
    sampled, sample = [], learner.sample

    def watched_sample(*arguments):
        prediction, mask = sample(*arguments)
        sampled.extend(prediction.detach().numpy().astype(float))
        return prediction, mask

    learner.sample = watched_sample
    restored = train(learner, 4).predict(3)
    weights = np.array([1, 1, 4, 4, 9, 9, 16, 16] + [16] * 3) / 16
    mean = np.average(sampled, 0, weights)
    np.testing.assert_allclose(restored.image, mean, atol=1e-6)
    luminance = (sampled - mean).sum(1) / 3**0.5
    red_to_blue = (sampled - mean)[:, 0] / 2**0.5 - (sampled - mean)[:, 2] / 2**0.5
    for plane, errors in enumerate((luminance, red_to_blue)):
        errors = np.tensordot(weights, errors**2, 1) / (weights.sum() - 1)
        np.testing.assert_allclose(restored.variance[plane], errors, atol=1e-6)
    learner.sample = sample
    np.testing.assert_array_equal(learner.predict(3), restored)


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_linear_learning_rate_rises_and_falls(optimizer):
    settings = {"lr": 0.1, "iteration": 40, "schedule": "linear"}
    settings |= {"optimizer": optimizer, "network": Small}
    learner = begun(random_image(1, 32, 33), **settings)
    rates = []
    for _ in range(40):
        learner.train_step()
        rates.append(float(learner.optimizers[-1].param_groups[0]["lr"]))
    assert rates[0] == pytest.approx(0.05, rel=0.01)
    assert max(rates) == rates[1]
    assert rates[20] == pytest.approx(0.05)
    assert rates[-1] == pytest.approx(0.1 / 40)
    assert rates[1:] == sorted(rates[1:], reverse=True)


def test_losses_are_those_of_every_tenth_step():
    y = random_image(1, 32, 32)
    learner, expected = begun(y), []
    for step in range(1, 126):
        train(learner, 1)
        loss = learner.last_loss.item()
        expected += [loss] if step % 10 == 0 else []
    assert len(learner.losses) == 10  # read when the network's life was looked at
    assert learner.read_losses() == expected
    resumed = begun(y)
    state = copy.deepcopy(learner.state_dict())
    resumed.load_state_dict(state)
    train(resumed, 5)
    assert resumed.read_losses()[:12] == expected and len(resumed.losses) == 13
    assert len(state["losses"]) == 12
    resumed.restart()
    assert resumed.read_losses() == []


def test_start_at_the_mean():
    y = random_image(3, 32, 33) * torch.tensor([0.1, 0.5, 1.0])[:, None, None]
    restored = begun(y, start="mean").predict(4).image
    np.testing.assert_allclose(restored.mean((1, 2)), y.mean((1, 2)), atol=0.02)


class Constant(nn.Module):
    """Predicts one value: sigmoid of a bias, which is flat at first."""

    bend = 0.0

    def __init__(self, channels):
        super().__init__()
        self.bias = nn.Parameter(torch.full((channels, 1, 1), 30.0))

    def forward(self, x, mask, draw):
        return torch.sigmoid(self.bias).expand_as(x)

    def start_at(self, mean):
        self.bias.copy_(torch.logit(mean).view(-1, 1, 1))


def test_a_network_that_dies_lives_at_the_second_start():
    learner = begun(0.02 + 0.15 * random_image(1, 32, 32), lr=1e-4, network=Constant)
    notes = learner.notes
    assert train(learner, 99).step == 99 and not notes
    assert train(learner, 1).step == 0
    assert notes and "by step 100" in notes[0] and "5e-05" in notes[0]
    assert train(learner, 100).alive() and len(notes) == 1
    assert learner.health.loss < 0.004


def test_a_flat_images_flat_prediction_is_alive_and_a_saturated_one_dead():
    noise = 0.1 * torch.randn(1, 32, 32, generator=seeded())
    ramp = torch.linspace(0, 1, 32).expand(1, 32, 32)
    for clean, value, alive in ((0.3, 0.3, True), (0.0, 0.0, True), (ramp, 0, False)):
        spy = Spy(lambda x, mask, value=value: x * 0 + value)
        spy.bend = 0.0  # it ends in a sigmoid
        learner = begun(clean + noise, network=lambda _: spy)  # noqa: B023 - called here
        restarts = []
        learner.restart = lambda: restarts.append(None)  # noqa: B023 - called here
        assert train(learner, 100).alive() is alive
        assert len(restarts) == 1 - alive


def test_fusing_believes_a_clipped_entry_only_a_little_above_the_prediction(
    monkeypatch,
):
    """The network has not learnt how bright a lamp is."""
    seen = []

    def fuse(what, mean, variance, observation, known, *_):
        seen.append(known)
        return mean, variance

    monkeypatch.setattr(restoring, "fuse", fuse)
    y, clipped = np.ones((1, 32, 32), np.float32), np.ones((1, 32, 32), bool)
    clipped[..., 8:] = False
    recipe = replace(RECIPES["paper"], fuse="noise", noise=25.0, photons=None)
    learner = Self2Self(y, identity, None, recipe, clipped=clipped)
    mean = np.full((1, 32, 32), 0.3, np.float32)
    mean[..., :3] = 0.95, 0.85, 1.05
    learner.fuse(Restoration(mean, mean, mean))
    expected = torch.ones(1, 32, 32)
    expected[..., 1:8] = 0
    assert torch.equal(seen[0], expected)
