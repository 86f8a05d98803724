"""A CUDA graph can replay a step: its tensors stay in place, and the state saves them."""

import contextlib
import copy
import gc
import types

import numpy as np
import pytest
import torch
from tensors import begun, needs_cuda, random_image, roll, train

FAST = {"optimizer": "muon", "averaging_power": 3, "schedule": "linear", "bs": 2}


def lasting_tensors(learner):
    """Return all tensors that outlive a step, except the gradients."""
    owners = learner, learner.health, learner.ensemble
    held = [x for owner in owners for x in vars(owner).values()]
    held = [x for x in held if isinstance(x, torch.Tensor)]
    states = [s for optimizer in learner.optimizers for s in optimizer.state.values()]
    held += [x for state in states for x in state.values()]
    return [*held, *learner.network.parameters(), *learner.network.buffers()]


def test_a_step_changes_only_what_the_state_saves():
    """Otherwise the warm-up before a capture would leave a trace."""
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
    """A learner with a graph that holds no step would train nothing."""
    learner = begun(random_image(1, 32, 32))
    learner.captures = True

    class Graph:
        """In the place of CUDA's graph."""

        def register_generator_state(self, _):
            pass

    @contextlib.contextmanager
    def out_of_memory(*_, **__):
        yield
        raise torch.OutOfMemoryError

    monkeypatch.setattr(
        "torch.cuda.Stream", lambda _: types.SimpleNamespace(wait_stream=id)
    )
    monkeypatch.setattr("network.capture.capture_stream", torch.cuda.Stream)
    monkeypatch.setattr("torch.cuda.current_stream", torch.cuda.Stream)
    monkeypatch.setattr("torch.cuda.stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr("torch.cuda.CUDAGraph", Graph)
    monkeypatch.setattr("torch.cuda.graph", out_of_memory)
    monkeypatch.setattr(learner.masks, "generator", None, raising=False)
    with pytest.raises(torch.OutOfMemoryError):
        learner.train_step()
    assert learner.graph is None


def test_a_step_reallocates_nothing():
    """A CUDA graph reads and writes fixed addresses."""
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
    """Return the mean absolute difference of two learners' predictions."""
    return np.abs(a.predict(64).image - b.predict(64).image).mean()


@needs_cuda
def test_one_learner_after_the_other_needs_no_more_memory():
    """Each stream that multiplies matrices keeps a work space."""
    held = []
    for _ in range(3):
        train(begun(random_image(1, 64, 64), device="cuda", **FAST), 1)
        gc.collect()
        held.append(torch.cuda.memory_allocated())
    assert held[1] == held[2]


@needs_cuda
def test_replays_draw_new_masks():
    learner = begun(random_image(1, 64, 64), lr=0.0, device="cuda")
    losses = [train(learner, 1).loss.item() for _ in range(4)]
    assert len(set(losses)) == 4


@needs_cuda
@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_captured_steps_are_eager_steps(optimizer):
    y, settings = random_image(3, 64, 64), {"optimizer": optimizer, "device": "cuda"}
    captured, eager = (begun(y, roll, capture=c, **settings) for c in (True, False))
    for _ in range(5):
        captured.train_step()
        eager.train_step()
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
