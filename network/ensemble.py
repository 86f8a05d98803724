"""The dropout ensemble: weighted sums of predictions, and their mean and variance."""

from typing import NamedTuple

import numpy as np
import torch


def opponent(like):
    """Return the matrix that takes colours to luminance and two colour differences.

    We call these three, or the one channel of a gray image, planes. The matrix is
    orthonormal, so white noise stays white. For a gray image it is the identity.

    Args:
        like: an image (C, H, W); the matrix has its type and its device.
    """
    matrix = torch.eye(len(like))
    if len(like) == 3:
        matrix = torch.tensor([[1.0, 1, 1], [1, 0, -1], [1, -2, 1]])
    return (matrix / matrix.norm(dim=1, keepdim=True)).to(like)


class Restoration(NamedTuple):
    """The result of an ensemble: arrays (C, H, W)."""

    image: np.ndarray  # the restored picture, in the observation's units
    # Variance of the predictions, by plane (see opponent), same units.
    variance: np.ndarray
    mean: np.ndarray  # of the predictions, in the learner's units


class Ensemble:
    """Weighted sums of predictions and of their squares, and the sum of the weights.

    Args:
        like: an observation (C, H, W); the sums have its shape and its device. Squares are
            summed by plane: see opponent.
    """

    def __init__(self, like):
        self.planes = opponent(like)
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
        other = Ensemble(self.total)
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
