"""The dropout ensemble: weighted sums of predictions, and their mean and variance."""

from typing import NamedTuple

import numpy as np
import torch


class Restoration(NamedTuple):
    """The result of an ensemble: arrays (C, H, W)."""

    image: np.ndarray  # the restored picture, in the observation's units
    # Variance of the predictions, by plane (see fusing.noisy.opponent), same units.
    variance: np.ndarray
    mean: np.ndarray  # of the predictions, in the learner's units


class Ensemble:
    """Weighted sums of predictions and of their squares, and the sum of the weights.

    Args:
        like: an observation (C, H, W); the sums have its shape and its device.
        planes: matrix (C, C) that turns colours into planes; squares are summed by plane.
    """

    def __init__(self, like, planes):
        self.planes = planes
        self.total, self.squares = like.new_zeros(2, *like.shape)
        self.weights = like.new_zeros(like.shape[1:])

    def tensors(self):
        """Return the sums, which `add` changes in place."""
        return self.total, self.squares, self.weights

    def add(self, predictions, weight=1.0, place=(slice(None), slice(None))):
        """Add predictions (N, C, h, w) at a place, the indices of its rows and columns."""
        squares = self._by_plane(predictions) ** 2
        self.total[:, *place] += weight * predictions.sum(0)
        self.squares[:, *place] += weight * squares.sum(0)
        self.weights[*place] += weight * len(predictions)

    def divided(self, divisor):
        """Return a copy in which all weights are divided by a number."""
        other = Ensemble(self.total, self.planes)
        for ours, its in zip(self.tensors(), other.tensors()):
            torch.div(ours, divisor, out=its)
        return other

    def mean_and_variance(self):
        """Return the mean of the predictions and their variance by plane: (C, H, W) each."""
        mean = self.total / self.weights
        # The sum of squared distances from the mean, over the sum of weights less one.
        distance = self.squares - self.weights * self._by_plane(mean[None])[0].square_()
        return mean, (distance / (self.weights - 1).clamp(min=1)).clamp_(min=0)

    def _by_plane(self, images):
        return torch.einsum("pc,nchw->nphw", self.planes, images)
