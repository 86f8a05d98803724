"""The learner: its masks, loss, steps, ensemble and state."""

import contextlib
import copy
import types

import numpy as np
import pytest
import torch
from tensors import (
    begun,
    block_mask,
    identity,
    needs_cuda,
    on_devices,
    random_image,
    roll,
    seeded,
    train,
)
from torch import nn

from network.masks import BernoulliMasks, flip
from network.self2self import dropped_loss


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


def test_flip_flips_each_sample_as_told_and_back():
    x = random_image(4, 3, 5, 6)
    flips = torch.tensor([[0, 0], [1, 0], [0, 1], [1, 1]]).view(4, 2, 1, 1)
    flipped = flip(x, flips)
    expected = (x[0], x[1].flip(-1), x[2].flip(-2), x[3].flip(-1, -2))
    assert torch.equal(flipped, torch.stack(expected))
    assert torch.equal(flip(flipped, flips), x)


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

    learner = begun(y, operator, bs=2)
    learner.network = spy = Spy(clean_flipped_like_y)
    train(learner, 12)
    assert {flip_of(*sample, y) for sample in zip(spy.inputs, spy.masks)} == {*FLIPS}
    assert learner.mean_loss() == 0
    np.testing.assert_allclose(learner.predict(8).image, clean, atol=1e-6)


def test_entries_judged_are_those_not_seen():
    y = 1 + random_image(1, 32, 33)
    learner = begun(y)
    learner.network = spy = Spy(lambda x, mask: x)
    for _ in range(12):
        learner.train_step()
        dropped = (y**2).sum() - (spy.inputs[-1] ** 2).sum()
        expected = dropped / (1 - spy.masks[-1]).sum()
        assert learner.mean_loss() == pytest.approx(expected.item(), rel=1e-4)


def test_batch_is_several_samples_of_one_observation():
    y = random_image(1, 32, 33)
    learner = begun(y, bs=2)
    learner.network = spy = Spy(lambda x, mask: x)
    train(learner, 1)
    a, b = (
        m.flip(flip_of(x, m, y)) for x, m in zip(spy.inputs, spy.masks, strict=True)
    )
    assert not torch.equal(a, b)


def test_drop_rate_zero_judges_every_entry():
    y = random_image(1, 32, 33)
    learner = begun(y, drop_rate=0)
    learner.network = spy = Spy(lambda x, mask: torch.zeros_like(x))
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
    masks = masks_of("cpu", 5, 2)
    with torch.no_grad():
        samples = [learner._predict(masks, 1)[0] for _ in range(4)]
    assert not torch.equal(samples[0], samples[1])
    made = learner.predict(4)
    np.testing.assert_allclose(made.image, sum(samples) / 4, atol=1e-6)
    variance = np.var(samples, 0, ddof=1)
    np.testing.assert_allclose(made.variance, variance, atol=1e-6)


FAST = {"optimizer": "muon", "averaging_power": 3, "schedule": "linear", "bs": 2}


def lasting_tensors(learner):
    """Every tensor that is there before a step and after it, but for the gradients."""
    owners = learner, learner.health, learner.ensemble
    held = [x for owner in owners for x in vars(owner).values()]
    held = [x for x in held if isinstance(x, torch.Tensor)]
    states = [s for optimizer in learner.optimizers for s in optimizer.state.values()]
    held += [x for state in states for x in state.values()]
    return [*held, *learner.network.parameters(), *learner.network.buffers()]


def test_a_step_changes_only_what_the_state_saves():
    """So that a CUDA graph's warm-up leaves no trace."""
    learner = train(begun(random_image(3, 32, 33), **FAST), 2)
    saved = {x.data_ptr() for x in learner._tensors()}
    set_before = {learner.rate.data_ptr(), learner.prediction_weight.data_ptr()}
    tensors = lasting_tensors(learner)
    before = [x.detach().clone() for x in tensors]
    learner._train()
    changed = {
        x.data_ptr() for x, old in zip(tensors, before) if not torch.equal(x, old)
    }
    assert changed == saved
    assert not changed & set_before
    fresh = train(begun(random_image(3, 32, 33), **FAST), 2)
    state = copy.deepcopy(fresh.state_dict())
    for _ in range(3):
        fresh._train()
    fresh.load_state_dict(state)
    fresh._train()
    for ours, other in zip(tensors, lasting_tensors(fresh), strict=True):
        assert torch.equal(ours, other)


def test_a_capture_that_fails_leaves_no_graph(monkeypatch):
    """Or the next picture of that size would replay nothing."""
    learner = begun(random_image(1, 32, 32))

    class Graph:
        """A graph that says nothing."""

        def register_generator_state(self, _):
            pass

    @contextlib.contextmanager
    def out_of_memory(*_, **__):
        yield
        raise torch.OutOfMemoryError

    monkeypatch.setattr(
        "torch.cuda.Stream", lambda _: types.SimpleNamespace(wait_stream=id)
    )
    monkeypatch.setattr("torch.cuda.current_stream", torch.cuda.Stream)
    monkeypatch.setattr("torch.cuda.stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr("torch.cuda.CUDAGraph", Graph)
    monkeypatch.setattr("torch.cuda.graph", out_of_memory)
    monkeypatch.setattr(learner.masks, "generator", None, raising=False)
    with pytest.raises(torch.OutOfMemoryError):
        learner._capture()
    assert learner.graph is None


def test_a_step_reallocates_nothing():
    """A CUDA graph has addresses by heart."""
    learner = train(begun(random_image(3, 32, 33), **FAST), 1)
    before = [x.data_ptr() for x in lasting_tensors(learner)]
    train(learner, 2).predict(2)
    learner.load_state_dict(learner.state_dict())
    learner.restart()
    assert [x.data_ptr() for x in lasting_tensors(learner)] == before


def test_a_step_reads_rate_and_decay_from_tensors():
    learner = train(begun(random_image(1, 32, 33), **FAST), 2)
    weights = [x.detach().clone() for x in learner.network.parameters()]
    learner.rate.zero_()
    learner._train()
    for now, before in zip(learner.network.parameters(), weights, strict=True):
        assert torch.equal(now, before)
    learner.rate.fill_(0.01)
    learner.prediction_weight.zero_()
    sums = [x.clone() for x in learner.ensemble.tensors()]
    learner._train()
    for now, before in zip(learner.network.parameters(), weights, strict=True):
        assert not torch.equal(now, before)
    for now, before in zip(learner.ensemble.tensors(), sums, strict=True):
        assert torch.equal(now, before)


def distance(a, b):
    """Mean absolute difference of two learners' predictions."""
    return np.abs(a.predict(64).image - b.predict(64).image).mean()


@needs_cuda
def test_replays_draw_new_masks():
    learner = begun(random_image(1, 64, 64), lr=0.0, device="cuda")
    losses = [train(learner, 1).mean_loss() for _ in range(4)]
    assert len(set(losses)) == 4


@needs_cuda
@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_captured_steps_are_eager_steps(optimizer):
    y, settings = random_image(3, 64, 64), {"optimizer": optimizer, "device": "cuda"}
    captured, eager = begun(y, roll, **settings), begun(y, roll, **settings)
    for _ in range(5):
        captured.train_step()
        eager._train()
        losses = [x.loss_sum.item() for x in (captured, eager)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@needs_cuda
def test_same_seed_repeats_on_cuda():
    y = random_image(1, 64, 64)
    a, b = (train(begun(y, device="cuda"), 5) for _ in range(2))
    assert distance(a, b) < 1e-3
    assert distance(a, begun(y, device="cuda")) > 5e-3


@needs_cuda
def test_learner_goes_on_from_a_state_on_cuda():
    y = random_image(1, 64, 64)
    learner = train(begun(y, device="cuda", averaging_power=2), 3)
    state = copy.deepcopy(learner.state_dict())
    train(learner, 3)
    resumed = begun(y, device="cuda", averaging_power=2)
    resumed.load_state_dict(state)
    train(resumed, 3)
    assert resumed.mean_loss() == pytest.approx(learner.mean_loss(), rel=1e-3)
    assert distance(resumed, learner) < 1e-3


def test_the_trainings_own_predictions_join_the_ensemble():
    learner = begun(random_image(3, 32, 33), averaging_power=2, bs=2, seed=5)
    sampled, sample = [], learner._sample

    def watched_sample(*arguments):
        prediction, mask = sample(*arguments)
        sampled.extend(prediction.detach().numpy().astype(float))
        return prediction, mask

    learner._sample = watched_sample
    restored = train(learner, 4).predict(3)
    weights = np.array([1, 1, 4, 4, 9, 9, 16, 16] + [16] * 3) / 16
    mean = np.average(sampled, 0, weights)
    np.testing.assert_allclose(restored.image, mean, atol=1e-6)
    luminance = (sampled - mean).sum(1) / 3**0.5
    red_to_blue = (sampled - mean)[:, 0] / 2**0.5 - (sampled - mean)[:, 2] / 2**0.5
    for plane, errors in enumerate((luminance, red_to_blue)):
        errors = np.tensordot(weights, errors**2, 1) / (weights.sum() - 1)
        np.testing.assert_allclose(restored.variance[plane], errors, atol=1e-6)
    learner._sample = sample
    np.testing.assert_array_equal(learner.predict(3), restored)


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_linear_learning_rate_rises_and_falls(optimizer):
    settings = {"lr": 0.1, "iteration": 40, "schedule": "linear"}
    learner = begun(random_image(1, 32, 33), optimizer=optimizer, **settings)
    rates = []
    for _ in range(40):
        learner.train_step()
        rates.append(float(learner.optimizers[-1].param_groups[0]["lr"]))
    assert rates[0] == pytest.approx(0.05, rel=0.01)
    assert max(rates) == rates[1]
    assert rates[20] == pytest.approx(0.05)
    assert rates[-1] == pytest.approx(0.1 / 40)
    assert rates[1:] == sorted(rates[1:], reverse=True)


def test_start_at_the_mean():
    y = random_image(3, 32, 33) * torch.tensor([0.1, 0.5, 1.0])[:, None, None]
    restored = begun(y, start="mean").predict(4).image
    np.testing.assert_allclose(restored.mean((1, 2)), y.mean((1, 2)), atol=0.02)


def test_a_network_that_a_dark_picture_kills_lives_at_the_second_start():
    learner = begun(0.02 + 0.15 * random_image(1, 32, 32), lr=1e-4)
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
        learner = begun(clean + noise)
        learner.network = Spy(lambda x, mask, value=value: x * 0 + value)
        restarts = []
        learner.restart = lambda: restarts.append(None)  # noqa: B023 - called here
        assert train(learner, 100).alive() is alive
        assert len(restarts) == 1 - alive
