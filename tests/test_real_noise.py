"""The observation drawn anew, as photons, for steps but not for predictions."""

import copy

import numpy as np
import pytest
import torch
from scipy import stats
from tensors import begun, on_devices, random_image, train

from network import self2self
from network.masks import BernoulliMasks
from network.scale import Scale


@on_devices
def test_counts_are_poisson_numbers_of_their_seed(device):
    def draw(seed, mean):
        return BernoulliMasks(torch.device(device), seed).poisson(mean)

    mean = torch.tensor([0.3, 7.0, 60.0], device=device).expand(20_000, 3)
    drawn = draw(1, mean)
    assert drawn.dtype == torch.float32
    for column, rate in zip(drawn.T.cpu().numpy(), (0.3, 7, 60)):
        values, seen = np.unique(column, return_counts=True)
        expected = 20_000 * stats.poisson(rate).pmf(values)
        common = expected > 5
        assert (
            stats.chi2(common.sum()).cdf(
                ((seen - expected)[common] ** 2 / expected[common]).sum()
            )
            < 0.9999
        )
    assert torch.equal(drawn, draw(1, mean)) and not torch.equal(drawn, draw(2, mean))
    assert (draw(1, -mean) == 0).all()


def test_steps_see_counts_and_are_judged_by_the_observation(monkeypatch):
    y, seen, judged = random_image(3, 32, 33), [], []
    sample, loss = self2self.Self2Self.sample, self2self.dropped_loss

    def look(learner, masks, image, known, n):
        seen.append(image)
        return sample(learner, masks, image, known, n)

    def listen(degraded, observation, weights):
        judged.append(observation)
        return loss(degraded, observation, weights)

    monkeypatch.setattr(self2self.Self2Self, "sample", look)
    monkeypatch.setattr(self2self, "dropped_loss", listen)
    learner = train(begun(y, photons=25, bs=2), 2)
    learner.predict(1)
    for image in seen[:2]:
        counts = 25 * image.double()
        torch.testing.assert_close(counts, counts.round(), atol=1e-4, rtol=0)
        assert len(image) == 2 and not torch.equal(image[0], image[1])
        assert ((image - y).mean()).abs() < 0.02
        spread = ((image - y) ** 2).mean() / (y / 25).mean()
        assert spread == pytest.approx(1, abs=0.1)
    assert torch.equal(seen[2][0], y)
    assert all(torch.equal(observation[0], y) for observation in judged)


def test_resumed_learner_draws_the_counts_that_it_would_have_drawn():
    y = random_image(1, 32, 33)
    learner, resumed = train(begun(y, photons=100), 2), begun(y, photons=100)
    resumed.load_state_dict(copy.deepcopy(learner.state_dict()))
    for other in (learner, resumed):
        train(other, 2)
    np.testing.assert_array_equal(learner.predict(2), resumed.predict(2))


def test_photons_of_a_file_of_8_bits_are_counted_in_its_units():
    y = random_image(1, 200, 200) * 0.5 + 0.25
    for absolute, unit in ((False, 1.0), (True, 0.5)):
        scale = Scale(0.25, 0.5)
        learner = begun(y, photons=100, scale=scale, absolute=absolute, iteration=1)
        seen = []
        learner.sample = lambda masks, image, *_, seen=seen: seen.append(image)
        with pytest.raises(TypeError):  # what it saw is enough
            learner._train()
        noise = scale.back(seen[0].numpy()[0], np.float64) - y.numpy()
        expected = (y if absolute else (y - 0.25) * unit * 0.5).mean() / 100
        assert noise.var() == pytest.approx(expected.item(), rel=0.05)
