"""The learner's units: a picture in whatever units of its own is brought to about [0, 1]."""

import math
from typing import NamedTuple

import numpy as np

BLOCK = 4  # pixels a side: over so many noise averages out, and detail not yet
TAIL = 0.001  # share of the entries that may lie beyond either end: hot pixels, stars
MARGIN = 0.05  # of the range, left at either end
BLURRED = 0.1  # the same under a blur, which takes from a picture's range
FARTHEST = 32  # ranges from one end of the entries to the other, at most


class Scale(NamedTuple):
    """A map to the learner's units: affine, or of stabilised values: 0 is `offset`.

    With lines, noise whose variance is gain * level + offset is made even first: it has
    the standard deviation 1 at every level (generalised Anscombe transform, of y = gain *
    Poisson(x / gain) + white noise).
    """

    offset: float | tuple  # of all channels, or where there are lines of each
    span: float
    lines: tuple = ()  # each channel's (gain, offset), or none: see noise.Noise

    def to(self, y):
        """Bring values (C, H, W) to the learner's units, float32."""
        scaled = (stabilise(y, self.lines) - self._offsets()) / self.span
        return scaled.astype(np.float32)

    def back(self, values, dtype=np.float32):
        """Bring estimates (C, H, W) in the learner's units back to y's.

        What is stabilised comes back without bias: of the mean of stabilised noisy values
        the mean of the noisy values is made.
        """
        values = np.float64(values) * self.span + self._offsets()
        return destabilise(values, self.lines).astype(dtype)

    def slope(self, values):
        """Return how much of y a learner's unit is at values (C, H, W) in those units.

        Standard deviations come back by it; (C, H, W), or (C, 1, 1) where it is one number.
        """
        if not self.lines:
            return np.full((len(values), 1, 1), self.span)
        values = np.float64(values) * self.span + self._offsets()
        parts = [
            gain / 2 * np.maximum(value, LEAST)
            if gain
            else np.full_like(value, offset**0.5)
            for value, (gain, offset) in zip(values, self.lines)
        ]
        return self.span * np.stack(parts)

    def _offsets(self):
        return np.reshape(self.offset, (-1, 1, 1)) if self.lines else self.offset

    def level(self, sigma):
        """Return the standard deviation of noise in the learner's units, 0-255 scale.

        Args:
            sigma: of even noise, 0-255 scale, where 255 stands for 1 in y's units.
        """
        return (255 if self.lines else sigma) / self.span


UNIT = Scale(0.0, 1.0)  # pictures as they are
LEAST = 2 * math.sqrt(3 / 8)  # stabilised: where the inverse, less the offset, is 0


def stabilise(y, lines):
    """Make the variance of noise 1 at every level of y (C, H, W), float64.

    T(y) = 2 sqrt(y / gain + offset / gain^2 + 3/8), and y / sqrt(offset) without a gain.
    """
    y = np.asarray(y, np.float64)
    if not lines:
        return y
    parts = [
        2 * np.sqrt(np.maximum(x / gain + offset / gain**2 + 3 / 8, 0))
        if gain
        else x / math.sqrt(offset)
        for x, (gain, offset) in zip(y, lines)
    ]
    return np.stack(parts)


def destabilise(mean, lines):
    """Return the y, (C, H, W), of which noise makes stabilised values with that mean.

    Makitalo and Foi (IEEE Transactions on Image Processing 2013), the closed form.
    """
    if not lines:
        return mean
    parts = []
    for d, (gain, offset) in zip(mean, lines):
        if not gain:
            parts.append(d * math.sqrt(offset))
            continue
        d, root = np.maximum(d, LEAST), math.sqrt(3 / 2)
        counts = (
            d**2 / 4 + root / (4 * d) - 11 / (8 * d**2) + 5 * root / (8 * d**3) - 1 / 8
        )
        parts.append(gain * counts - offset / gain)
    return np.stack(parts)


def find_scale(y, known, blurred=False, lines=()):
    """Find the range that a picture fills, whatever its units, its noise and its outliers.

    Its ends are those of the means of blocks, in which noise hardly counts. a*y + b has
    the same learner's units as y, but for rounding. Noise that is made even leaves channels
    in units of their own, which have one length.

    Args:
        y: observation, (C, H, W), sides of BLOCK or more; one range for all channels.
        known: 1 where an entry of y is known, else 0: (C, H, W) or (1, H, W).
        blurred: whether y is blurred, so that the restored picture's range is wider.
        lines: of the noise that is to be made even: see Scale.
    """
    y, margin = stabilise(y, lines), BLURRED if blurred else MARGIN
    known = np.broadcast_to(np.asarray(known) > 0, y.shape)
    if not lines:
        centre, span = _range(y, known, margin)
        return Scale(centre - span / 2, span)
    ranges = [_range(y[[c]], known[[c]], margin) for c in range(len(y))]
    span = max(span for _, span in ranges)
    return Scale(tuple(centre - span / 2 for centre, _ in ranges), span, lines)


def _range(y, known, margin):
    """Return the middle and the length of the range that known entries (C, H, W) fill."""
    entries = y[known]
    if not entries.size:  # a channel of which nothing is known
        return 0.0, 1.0
    least, most = entries.min(), entries.max()
    low, high = extremes(entries)
    counts = _block_sums(known)
    sums = _block_sums(np.where(known, np.clip(y, low, high), 0))
    whole = counts > 0  # a mask may leave no block any
    low, high = extremes(sums[whole] / counts[whole] if whole.any() else entries)
    span = max((high - low) * (1 + 2 * margin), (most - least) / FARTHEST)
    # In a flat picture any unit will do.
    return float(low + high) / 2, float(span) or 1.0


def extremes(values):
    """Return the values that a share of TAIL lies below, and above."""
    k = int(TAIL * len(values))
    ends = k, len(values) - 1 - k
    return np.partition(values, ends)[[*ends]]


def _block_sums(x):
    """Sum (C, H, W) over whole blocks: (C, H // BLOCK, W // BLOCK), float64."""
    c, h, w = x.shape
    blocks = x[:, : h // BLOCK * BLOCK, : w // BLOCK * BLOCK]
    blocks = blocks.reshape(c, h // BLOCK, BLOCK, w // BLOCK, BLOCK)
    return blocks.sum((2, 4), dtype=np.float64)
