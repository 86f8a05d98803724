"""Windows that steps are trained on, tiles that are predicted, entries that are known."""

import copy

import numpy as np
import pytest
import torch
from tensors import begun, block_mask, random_image, train

from network import self2self, windows
from network.blur import CircularBlur
from network.self2self import dropped_loss
from network.windows import choose_corner, tiles


@pytest.mark.parametrize("periodic", [False, True])
def test_windows_lie_everywhere_alike(periodic):
    counts = np.zeros((60, 50))
    for step in range(3000):
        top, left = choose_corner((60, 50), (20, 50), periodic, 0, step)
        assert left == 0 and (periodic or top <= 40)
        counts[np.arange(top, top + 20) % 60] += 1
    assert (counts == counts[:, :1]).all()
    expected = 3000 * 20 / 60
    assert abs(counts.mean() - expected) < 1e-9
    assert abs(counts[:, 0] / expected - 1).max() < (0.15 if periodic else 0.6)
    same, other = (choose_corner((60, 50), (20, 20), periodic, 0, s) for s in (5, 6))
    assert same == choose_corner((60, 50), (20, 20), periodic, 0, 5) != other


@pytest.mark.parametrize("size", [32, 768, 769, 1300, 2048, 6000])
def test_tiles_share_every_pixel_out(size):
    total = torch.zeros(size)
    for first, last, weights in tiles(size):
        assert 32 <= last - first <= windows.TILE_SIDE and first % windows.GRID == 0
        total[first:last] += weights
        used = weights.nonzero()
        assert first == 0 or used.min() >= 96
        assert last == size or used.max() < last - first - 96
    torch.testing.assert_close(total, torch.ones(size))


def test_a_prediction_by_tiles_is_that_of_the_whole(monkeypatch):
    """Without dropout and flips; of the receptive field little lies beyond a tile."""
    monkeypatch.setattr(self2self, "flip", lambda x, flips: x)
    learner = train(begun(random_image(1, 450, 40), drop_rate=0, lr=1e-3), 2)
    whole = learner.predict(1).image
    monkeypatch.setattr(windows, "TILE_SIDE", 320)
    assert len(windows.tiles(450)) > 2
    by_tiles = learner.predict(1).image
    assert 0 < np.abs(by_tiles - whole).max() < 1e-4 * whole.std()


def test_a_window_alone_is_learnt_and_joins_the_ensemble():
    y = random_image(1, 64, 70)
    learner = begun(y, window=32, averaging_power=3)
    reached = torch.zeros(64, 70, dtype=torch.bool)
    for step in range(1, 4):
        train(learner, 1)
        rows, columns = learner.window.place()
        assert rows.max() - rows.min() == columns.max() - columns.min() == 31
        reached[rows, columns] = True
        assert torch.equal(learner.ensemble.weights > 0, reached)
    assert not reached.all()
    assert np.isfinite(learner.predict(2)).all()
    resumed = begun(y, window=32, averaging_power=3)
    resumed.load_state_dict(copy.deepcopy(learner.state_dict()))
    for other in (learner, resumed):
        train(other, 2)
    np.testing.assert_array_equal(learner.predict(2), resumed.predict(2))


def test_a_window_of_the_whole_is_the_whole():
    y = random_image(1, 32, 33)
    whole, windowed = (train(begun(y, window=side), 3) for side in (0, 64))
    np.testing.assert_array_equal(whole.predict(2), windowed.predict(2))


@pytest.mark.parametrize("shape", [(3, 3), (4, 7)])
def test_a_blur_holds_on_all_that_is_judged_of_a_window(shape):
    psf = np.random.default_rng(0).random(shape)
    blur = CircularBlur(psf / psf.sum())
    clean = random_image(1, 1, 100, 64)
    learner = begun(blur(clean)[0], blur, window=32)
    assert learner.window.size == (64, 64)
    judged = learner.window.inner.bool()
    assert judged.sum() == (64 - 2 * blur.reach) * 64  # the columns are all there
    for _ in range(5):
        train(learner, 1)
        place = slice(None), slice(None), *learner.window.place()
        error = (blur(clean[place]) - learner.y[place]).abs()
        assert error[judged].max() < 1e-6
        assert error[~judged].max() > 1e-3


@pytest.mark.parametrize("window", [0, 32])
def test_unknown_entries_are_neither_seen_nor_judged(window):
    y, known = random_image(3, 48, 40), block_mask(1, 48, 40).float()
    learners = []
    for value in (0, 9):
        filled = y * known + value * (1 - known)
        learners.append(train(begun(filled, known=known, window=window), 3))
    assert learners[0].mean_loss() == learners[1].mean_loss() > 0
    results = [learner.predict(2) for learner in learners]
    np.testing.assert_array_equal(*results)


def test_holes_do_not_hide_that_a_network_has_died():
    """A bright flat picture, black where it is unknown, and a prediction that swings."""
    y, known = 0.9 + 0.02 * random_image(1, 32, 32), block_mask(1, 32, 32).float()
    swinging = 0.2 + 0.7 * (torch.arange(32) % 2).expand(1, 1, 32, 32)
    for value, alive in ((swinging, False), (torch.full((1, 1, 32, 32), 0.9), True)):
        learner = train(begun(y * known, known=known), 1)
        learner.step, learner.health.loss = 100, ((value - y) ** 2).mean()
        learner.health.deviation.copy_(value.std())
        learner.health.slope.copy_((value * (1 - value)).mean())
        assert learner.alive() is alive


def test_the_loss_of_known_entries_alone():
    y, known = random_image(1, 32, 33), block_mask(1, 32, 33).float()
    seen = []

    def loss(degraded, y, judged):
        seen.append(judged)
        return dropped_loss(degraded, y, judged)

    train(begun(y, known=known, loss=loss), 1)
    assert (seen[0] <= known).all()
    share = seen[0].sum() / known.sum()
    assert share == pytest.approx(0.3, abs=0.08)
