"""The dropout ensemble: weighted sums of predictions, and what they come to."""

from typing import NamedTuple

import numpy as np
import torch


class Restoration(NamedTuple):
    """What predictions come to: arrays (C, H, W)."""

    image: np.ndarray  # the restored one, in the observation's units
    variance: (
        np.ndarray
    )  # of the predictions, by plane, likewise: see fusing.noisy.opponent
    mean: np.ndarray  # of the predictions, in the learner's units


class Ensemble:
    """Weighted sums of predictions, of their planes' squares, and of the weights.

    Args:
        like: an observation (C, H, W), of whose shape and on whose device they are.
        planes: the matrix that takes colours to planes, (C, C).
    """

    def __init__(self, like, planes):
        self.planes = planes
        self.total, self.squares = like.new_zeros(2, *like.shape)
        self.weights = like.new_zeros(like.shape[1:])

    def tensors(self):
        """The sums, which `add` changes in place."""
        return self.total, self.squares, self.weights

    def add(self, predictions, weight=1.0, place=(slice(None), slice(None))):
        """Add predictions (N, C, h, w) of a place: its rows and columns, as indices."""
        squares = self._by_plane(predictions) ** 2
        self.total[:, *place] += weight * predictions.sum(0)
        self.squares[:, *place] += weight * squares.sum(0)
        self.weights[*place] += weight * len(predictions)

    def divided(self, divisor):
        """Return another one, of weights that are divided by a number."""
        other = Ensemble(self.total, self.planes)
        for ours, its in zip(self.tensors(), other.tensors()):
            torch.div(ours, divisor, out=its)
        return other

    def mean_and_variance(self):
        """Return the predictions' mean and, by plane, their variance: (C, H, W) each."""
        mean = self.total / self.weights
        # The sum of squared distances from the mean, over one less than all.
        distance = self.squares - self.weights * self._by_plane(mean[None])[0].square_()
        return mean, (distance / (self.weights - 1).clamp(min=1)).clamp_(min=0)

    def _by_plane(self, images):
        return torch.einsum("pc,nchw->nphw", self.planes, images)
