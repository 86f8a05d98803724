"""The learner's units: a picture in whatever units of its own is brought to about [0, 1]."""

from typing import NamedTuple

import numpy as np

BLOCK = 4  # pixels a side: over so many noise averages out, and detail not yet
TAIL = 0.001  # share of the entries that may lie beyond either end: hot pixels, stars
MARGIN = 0.05  # of the range, left at either end
BLURRED = 0.1  # the same under a blur, which takes from a picture's range
FARTHEST = 32  # ranges from one end of the entries to the other, at most


class Scale(NamedTuple):
    """An affine map to the learner's units: 0 is `offset`, 1 is `offset + span`."""

    offset: float
    span: float

    def to(self, y):
        """Bring values to the learner's units, float32."""
        scaled = (np.asarray(y, np.float64) - self.offset) / self.span
        return scaled.astype(np.float32)

    def back(self, values, dtype=np.float32):
        """Bring values of the learner's units back to y's."""
        return (np.float64(values) * self.span + self.offset).astype(dtype)

    def slope(self):
        """How much of y a learner's unit is: standard deviations come back by it."""
        return self.span


UNIT = Scale(0.0, 1.0)  # pictures as they are


def find_scale(y, known, blurred=False):
    """Find the range that a picture fills, whatever its units, its noise and its outliers.

    Its ends are those of the means of blocks, in which noise hardly counts. a*y + b has
    the same learner's units as y, but for rounding.

    Args:
        y: observation, (C, H, W), sides of BLOCK or more; one range for all channels.
        known: 1 where an entry of y is known, else 0: (C, H, W) or (1, H, W).
        blurred: whether y is blurred, so that the restored picture's range is wider.
    """
    known = np.broadcast_to(np.asarray(known) > 0, np.shape(y))
    entries = np.asarray(y, np.float64)[known]
    least, most = entries.min(), entries.max()
    low, high = _ends(entries)
    counts = _block_sums(known)
    sums = _block_sums(np.where(known, np.clip(y, low, high), 0))
    low, high = _ends(sums[counts > 0] / counts[counts > 0])
    margin = BLURRED if blurred else MARGIN
    span = max((high - low) * (1 + 2 * margin), (most - least) / FARTHEST)
    if span == 0:  # a flat picture, in which any unit will do
        return Scale(low - 0.5, 1.0)
    return Scale((low + high - span) / 2, span)


def _ends(values):
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
