"""Make the restored picture from what a learner has learnt: predict, average and fuse.

The functions read a learner, a self2self.Self2Self, and change nothing in it.
"""

import itertools

import numpy as np
import torch

from network.cpu import keep_memory, tune_cpu
from network.ensemble import Ensemble, Restoration
from network.fusing import fuse
from network.masks import BernoulliMasks
from network.windows import tiles

# Pixels in one forward pass of the ensemble, at least one sample: enough to fill a GPU, few
# enough for a CPU's cache.
PREDICTION_PIXELS = {"cuda": 2**20, "cpu": 1, "mps": 2**18}
FULL_ENSEMBLE = 2**18  # pixels; an ensemble of a larger picture has fewer predictions
# If A(f) lies farther below a clipped entry, in the learner's units, the network has not
# learnt how bright a lamp is, and fusing ignores the entry.
MAX_BELOW = 0.1


def ensemble_size(learner, num_prediction):
    """Return how many predictions are averaged: fewer for a large picture.

    If training uses windows, the ensemble has so few predictions that it takes no longer
    than that of 512x512 pixels, but 10 at least. Training has made many more.
    """
    if learner.window.is_whole:
        return num_prediction
    affordable = int(num_prediction * FULL_ENSEMBLE / learner.y[0, 0].numel())
    return min(num_prediction, max(10, affordable))


@torch.inference_mode()
def predict(learner, num_prediction, advance):
    """Average the dropout ensemble (paper, equation 8): see Self2Self.predict."""
    scale, dtype = learner.recipe.scale, learner.observed_dtype
    if learner.recipe.iteration == 0:  # there is nothing to learn
        y = learner.y[0].cpu().numpy()
        image = scale.back(y, dtype)
        return Restoration(image, np.zeros_like(image), y)
    num_prediction = ensemble_size(learner, num_prediction)
    masks = BernoulliMasks(learner.device, learner.seed, learner.step)
    size = max(1, PREDICTION_PIXELS[learner.device.type] // learner.y[0, 0].numel())
    if learner.ensemble and learner.step:
        ensemble = learner.ensemble.divided(learner.weight_of(learner.step))
    else:
        ensemble = Ensemble(learner.y[0])
    for start in range(0, num_prediction, size):
        n = min(size, num_prediction - start)
        ensemble.add(predict_whole(learner, masks, n))
        advance(n)
    mean, variance = ensemble.mean_and_variance()
    mean, variance = mean.cpu().numpy(), variance.cpu().numpy()
    variance = variance * (scale.slope(mean) ** 2).mean(0)
    return Restoration(scale.back(mean, dtype), variance.astype(dtype), mean)


def predict_whole(learner, masks, n):
    """Predict the whole picture, tile by tile, from n Bernoulli samples: (n, C, H, W)."""
    rows, columns = map(tiles, learner.y.shape[2:])
    if len(rows) == len(columns) == 1:
        return learner.sample(masks, learner.y, learner.known, n)[0]
    whole = learner.y.new_zeros(n, *learner.y.shape[1:])
    for (top, bottom, down), (left, right, across) in itertools.product(rows, columns):
        y, known, part = (
            x[..., top:bottom, left:right] for x in (learner.y, learner.known, whole)
        )
        weight = (down[:, None] * across).to(y)
        part += learner.sample(masks, y, known, n)[0] * weight
    return whole


def fuse_restoration(learner, restored):
    """Fuse an ensemble with the observation: see Self2Self.fuse."""
    recipe, scale, dtype = learner.recipe, learner.recipe.scale, learner.observed_dtype
    if recipe.fuse == "none":
        return restored.image, None
    y, known = learner.y, learner.known
    if learner.clipped is not None:
        degraded = learner.forward_operator(torch.as_tensor(restored.mean)[None].to(y))
        believed = (y > degraded) & (y < degraded + MAX_BELOW)
        known = known * (~learner.clipped | believed)
    keep_memory(2**26, 2**28)  # fusing makes many tensors as large as the picture
    try:
        mean, variance = restored.mean, restored.variance
        variance = variance / (scale.slope(mean) ** 2).mean(0)
        fused, error = fuse(
            recipe.fuse,
            mean,
            variance,
            y[0],
            known[0],
            recipe.noise,
            learner.forward_operator,
        )
    finally:
        tune_cpu()
    error = error * scale.slope(fused) ** 2
    return scale.back(fused, dtype), error.astype(dtype)
