"""Whether a network lives: a large learning rate can drive it to a useless output."""

import math

import torch

CHECK_EVERY = 100  # steps between two looks
EARLY = 1000  # steps within which a network that died is started over
ATTEMPTS = 4  # how often it is started over, at most
SETTLED = 0.95  # decay of the loss's running mean: over about 20 steps


class Health:
    """What tells how the training goes; a captured step writes it in place.

    Args:
        y, known: observation, and 1 where it is known, else 0: (1, C, H, W).
        bend: of the network's last sigmoid: see Punet.
    """

    def __init__(self, y, known, bend):
        self.bend = bend
        values = torch.zeros(3, device=y.device)
        self.loss, self.deviation, self.slope = values  # running mean; of the last step
        known = known.expand_as(y)
        # Known neighbours' differences bound the noise.
        pairs = known[..., 1:] * known[..., :-1]
        noise = (pairs * y.diff(dim=-1) ** 2).sum() / pairs.sum().clamp(min=1) / 2
        count = known.sum((2, 3), keepdim=True).clamp(min=1)
        mean = (known * y).sum((2, 3), keepdim=True) / count
        variance = (known * (y - mean) ** 2 / count).sum((2, 3)).max()
        self.noise, self.variance = noise, variance

    def tensors(self):
        """The tensors that `watch` changes."""
        return self.loss, self.deviation, self.slope

    def watch(self, loss, prediction):
        """Take a step's loss and its prediction (N, C, h, w) into account."""
        self.loss.lerp_(loss, 1 - SETTLED)
        self.deviation.copy_(prediction.std((2, 3)).max())
        inner = prediction.clamp(self.bend, 1 - self.bend)
        self.slope.copy_((inner * (1 - inner)).mean())  # the sigmoid's

    def lives(self, step):
        """Tell whether the network still learns at a step. Reads the device.

        Dead are a loss that is not finite; and, from step CHECK_EVERY on, a prediction on
        the sigmoid's flat ends, where no gradient passes, that errs by more than the
        noise (a black picture's black prediction is alive); and one that swings by more
        than the observation and errs by twice its variance.
        """
        loss = self.loss.item() / (1 - SETTLED ** max(1, step))
        if not math.isfinite(loss) or step < CHECK_EVERY:
            return math.isfinite(loss)
        variance, swing = self.variance.item(), self.deviation.item() ** 2
        stuck = self.slope.item() < 1e-5 and loss > 1.1 * self.noise.item()
        wild = swing > max(variance, 0.01) and loss > 2 * variance
        return not stuck and not wild
