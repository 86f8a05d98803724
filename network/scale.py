"""The learner's units: a picture in any units is mapped to about [0, 1]."""

import math
from typing import NamedTuple

import numpy as np

BLOCK_SIDE = 4  # pixels; the mean of a block has little noise and still has detail
MAX_BEYOND = 0.001  # share of the entries beyond either end: hot pixels, stars
RANGE_MARGIN = 0.05  # of the range, added at either end
BLURRED_MARGIN = 0.1  # likewise under a blur, which narrows a picture's range
MAX_SPREAD = 32  # learner's units from the lowest entry to the highest
MIN_STABLE = 2 * math.sqrt(3 / 8)  # T, see stabilise, where y + offset / gain is 0


class Scale(NamedTuple):
    """A map to the learner's units, (y - offset) / span.

    With lines, y is stabilised first: noise whose variance is gain * intensity + offset
    then has the standard deviation 1 at every intensity. See `stabilise`.
    """

    offset: float | tuple  # maps to 0; with lines one number for every channel
    span: float  # maps to 1
    lines: tuple = ()  # (gain, offset) of every channel, or none: see noise.Noise

    def to(self, y):
        """Map values (C, H, W) to the learner's units, float32."""
        scaled = (stabilise(y, self.lines) - self._offsets()) / self.span
        return scaled.astype(np.float32)

    def back(self, values, dtype=np.float32):
        """Map estimates (C, H, W) from the learner's units back to y's.

        The inverse transform is unbiased: see `destabilise`.
        """
        values = np.float64(values) * self.span + self._offsets()
        return destabilise(values, self.lines).astype(dtype)

    def slope(self, values):
        """Return the derivative of `back` at values (C, H, W) in the learner's units.

        Standard deviations are mapped back by it. (C, H, W), or (C, 1, 1) without lines.
        """
        if not self.lines:
            return np.full((len(values), 1, 1), self.span)
        values = np.float64(values) * self.span + self._offsets()
        parts = [
            gain / 2 * np.maximum(value, MIN_STABLE)
            if gain
            else np.full_like(value, offset**0.5)
            for value, (gain, offset) in zip(values, self.lines)
        ]
        return self.span * np.stack(parts)

    def _offsets(self):
        return np.reshape(self.offset, (-1, 1, 1)) if self.lines else self.offset

    def sigma(self, sigma):
        """Map a standard deviation to the learner's units, both on the 0-255 scale.

        Args:
            sigma: of even noise, where 255 is 1 in y's units. With lines it has no effect:
                stabilised noise has the standard deviation 1.
        """
        return (255 if self.lines else sigma) / self.span


UNIT = Scale(0.0, 1.0)  # changes nothing


def stabilise(y, lines):
    """Make the variance of the noise 1 at every intensity of y (C, H, W), float64.

    The generalised Anscombe transform for y = gain * Poisson(x / gain) + N(0, offset):
    T(y) = 2 sqrt(y / gain + offset / gain^2 + 3/8), or y / sqrt(offset) without a gain.
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
    """Return the mean of y, (C, H, W), given the mean of stabilised y.

    The unbiased inverse of `stabilise`, in closed form: Makitalo and Foi (IEEE
    Transactions on Image Processing 2013).
    """
    if not lines:
        return mean
    parts = []
    for d, (gain, offset) in zip(mean, lines):
        if not gain:
            parts.append(d * math.sqrt(offset))
            continue
        d, root = np.maximum(d, MIN_STABLE), math.sqrt(3 / 2)
        counts = (
            d**2 / 4 + root / (4 * d) - 11 / (8 * d**2) + 5 * root / (8 * d**3) - 1 / 8
        )
        parts.append(gain * counts - offset / gain)
    return np.stack(parts)


def find_scale(y, known, blurred=False, lines=()):
    """Find the range that a picture fills, despite noise and outliers.

    The ends of the range are those of block means, which have little noise. y and a*y + b
    become the same in the learner's units, except for rounding.

    Args:
        y: observation, (C, H, W), sides of BLOCK_SIDE or more, in any units.
        known: 1 where an entry of y is known, else 0: (C, H, W) or (1, H, W).
        blurred: whether y is blurred, so that the restored picture's range is wider.
        lines: (gain, offset) of every channel, to stabilise y by; none: y stays as it is.

    Returns:
        A Scale. Without lines all channels have one offset; with lines each has its own,
        and all have one span.
    """
    y, margin = stabilise(y, lines), BLURRED_MARGIN if blurred else RANGE_MARGIN
    known = np.broadcast_to(np.asarray(known) > 0, y.shape)
    if not lines:
        centre, span = _range(y, known, margin)
        return Scale(centre - span / 2, span)
    ranges = [_range(y[[c]], known[[c]], margin) for c in range(len(y))]
    span = max(span for _, span in ranges)
    return Scale(tuple(centre - span / 2 for centre, _ in ranges), span, lines)


def _range(y, known, margin):
    """Return the centre and the length of the range that known entries (C, H, W) fill."""
    entries = y[known]
    if not entries.size:  # nothing of a channel is known
        return 0.0, 1.0
    least, most = entries.min(), entries.max()
    low, high = extremes(entries)
    counts = _block_sums(known)
    sums = _block_sums(np.where(known, np.clip(y, low, high), 0))
    whole = counts > 0  # none if all known entries lie beyond the last whole block
    low, high = extremes(sums[whole] / counts[whole] if whole.any() else entries)
    span = max((high - low) * (1 + 2 * margin), (most - least) / MAX_SPREAD)
    # A flat picture has the span 0. Any positive number replaces it.
    return float(low + high) / 2, float(span) or 1.0


def extremes(values):
    """Return two values: a share of MAX_BEYOND lies below the first, above the second."""
    k = int(MAX_BEYOND * len(values))
    ends = k, len(values) - 1 - k
    return np.partition(values, ends)[[*ends]]


def _block_sums(x):
    """Sum x (C, H, W) over whole blocks: (C, H // BLOCK_SIDE, W // BLOCK_SIDE), float64."""
    c, h, w = x.shape
    n = BLOCK_SIDE
    blocks = x[:, : h // n * n, : w // n * n].reshape(c, h // n, n, w // n, n)
    return blocks.sum((2, 4), dtype=np.float64)
