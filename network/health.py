"""Detects a dead network: its output is constant, wild or not finite."""

import math

import torch

CHECK_EVERY = 100  # steps between two checks
EARLY = 1000  # up to this step a dead network starts over
ATTEMPTS = 4  # a network starts over at most this many times
SETTLED = 0.95  # decay of the running mean of the loss: about 20 steps


class Health:
    """Measures a training; a captured step writes the measurements in place.

    Args:
        y, known: the observation, and 1 where it is known, else 0: (1, C, H, W).
        bend: bend of the network's last sigmoid, see punet.bent_sigmoid. None: the
            network ends in no sigmoid that could be stuck.
    """

    def __init__(self, y, known, bend):
        self.bend = bend
        # The running mean of the loss; deviation and slope are of the last step.
        self.loss, self.deviation, self.slope = torch.zeros(3, device=y.device)
        known = known.expand_as(y)
        # The noise variance is at most half the mean square difference of known neighbours.
        pairs = known[..., 1:] * known[..., :-1]
        noise = (pairs * y.diff(dim=-1) ** 2).sum() / pairs.sum().clamp(min=1) / 2
        count = known.sum((2, 3), keepdim=True).clamp(min=1)
        mean = (known * y).sum((2, 3), keepdim=True) / count
        variance = (known * (y - mean) ** 2 / count).sum((2, 3)).max()
        self.noise, self.variance = noise, variance

    def tensors(self):
        """Return the tensors that `watch` changes."""
        return self.loss, self.deviation, self.slope

    def watch(self, loss, prediction):
        """Measure a step by its loss and its prediction (N, C, h, w)."""
        self.loss.lerp_(loss, 1 - SETTLED)
        self.deviation.copy_(prediction.std((2, 3)).max())
        if self.bend is not None:
            inner = prediction.clamp(self.bend, 1 - self.bend)
            self.slope.copy_((inner * (1 - inner)).mean())  # of the sigmoid

    def lives(self, step):
        """Tell whether the network still learns at a step. Waits for the device.

        A network is dead if its loss is not finite. From step CHECK_EVERY on it is also
        dead in two other cases:

        - It is stuck: the sigmoid is flat, so no gradient passes, and the loss is larger
          than the noise. (A black prediction for a black picture is alive.)
        - It is wild: the prediction varies more than the observation, and the loss is
          more than twice the observation's variance.
        """
        loss = self.loss.item() / (1 - SETTLED ** max(1, step))
        if not math.isfinite(loss) or step < CHECK_EVERY:
            return math.isfinite(loss)
        flat = self.bend is not None and self.slope.item() < 1e-5
        stuck = flat and loss > 1.1 * self.noise.item()
        variance, swing = self.variance.item(), self.deviation.item() ** 2
        wild = swing > max(variance, 0.01) and loss > 2 * variance
        return not stuck and not wild
