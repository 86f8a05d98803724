"""Which entries of an observed picture cannot be the picture's: they become holes."""

import math
import warnings

import numpy as np
from scipy import ndimage

# A gap: SHARED entries have its value, WIDE ranges beyond all others, TAIL of these at
# either end aside; BELOW ranges where it is negative, and so no black.
WIDE, BELOW, SHARED, TAIL = 12, 2, 4, 0.001
# An outlier is farther from its neighbours than ALONE times what they span (noise: 1 in
# 10^5; a star of two pixels reaches 2), and FAR times the median of local extremes, which
# is their COMMON quantile in noise (clean photographs: 2 in 10^5).
ALONE, FAR, COMMON = 3, 16, 0.89
# Where hardly any entry is a local extreme, HALF of the range is far. A share FREE of
# entries without clipped neighbours is enough to tell what neighbours span.
HALF, FREE = 0.5, 0.05
# Salt or pepper: a share IMPULSES of an end's entries are outliers, at least MANY; up to
# CROWDED such neighbours; off the median of NEAR x NEAR pixels, as SAMPLE entries tell.
IMPULSES, MANY, CROWDED, NEAR, SAMPLE = 0.03, 8, 3, 5, 2**16
RING = np.arange(9).reshape(3, 3) != 4


def find_unknown(y, known, guess=True):
    """Find gaps and outliers, both (C, H, W), bool.

    Gaps were never measured: NaN, infinite numbers, and values shared by many entries far
    beyond all others. Outliers are single wrong numbers, far beyond noise and texture:
    hot and dead pixels, salt and pepper. Stars, lines and text are neither.

    Args:
        y: the picture, (C, H, W), in any units.
        known: where an entry is known, (C, H, W) or (1, H, W), bool.
        guess: whether to look for more than NaN and infinite numbers.
    """
    gaps = ~np.isfinite(y)
    outliers = np.zeros_like(gaps)
    for plane, use, gap, outlier in zip(y, known & ~gaps, gaps, outliers):
        if guess:
            wide = _far_values(plane, use)
            outlier |= wide & ~ndimage.binary_dilation(wide, RING)
            outlier |= _outliers(plane, use & ~wide)
            gap |= wide & ~outlier
    return gaps, outliers


def _far_values(plane, use):
    """Tell which entries (H, W) have a gap's value."""
    values = plane[use].astype(float)
    for end in (values.min(), values.max()) if values.size else ():
        rest = values[values != end]
        if rest.size and values.size - rest.size >= SHARED:
            low, high = np.quantile(rest, (TAIL, 1 - TAIL))
            wide = (BELOW if end < 0 <= low else WIDE) * (high - low)
            if max(low - end, end - high) > wide > 0:
                found = use & (plane == end)
                return found | _far_values(plane, use & ~found)
    return np.zeros_like(use)


def _outliers(plane, use):
    """Tell which entries (H, W) are outliers of those in use."""
    kind = {"footprint": RING, "mode": "mirror"}
    low = ndimage.minimum_filter(np.where(use, plane, np.inf), **kind)
    high = ndimage.maximum_filter(np.where(use, plane, -np.inf), **kind)
    use = use & (low <= high)  # there are neighbours
    plane, low, high = (np.where(use, x, 0) for x in (plane, low, high))
    excess, span = np.maximum(plane - high, low - plane).clip(0), high - low
    if not excess.any():
        return np.zeros_like(use)
    least, most = plane[use].min(), plane[use].max()
    # Clipped neighbours do not show their noise.
    free = use & (low > least) & (high < most)
    usual = span[free] if free.mean() > FREE else span[use & (span > 0)]
    span = np.where(free, span, np.maximum(span, np.median(usual) if usual.size else 0))
    first, last = np.quantile(plane[use], (TAIL, 1 - TAIL))
    far = min(FAR * np.median(excess[excess > 0]), HALF * (last - first))
    far = max(far, FAR * np.quantile(excess[use], COMMON))
    found = use & (excess > ALONE * span) & (excess > far)
    pepper, salt = (_impulses(plane, use, found, end) for end in (least, most))
    return found | pepper | salt


def _impulses(plane, use, found, end):
    """Tell which entries of the value `end` are salt or pepper, where there is any."""
    at_end = use & (plane == end)
    crowd = ndimage.convolve(at_end.astype(np.uint8), RING.astype(np.uint8))
    suspects = at_end & (crowd <= CROWDED)
    if (found & suspects).sum() < max(MANY, IMPULSES * suspects.sum()):
        return np.zeros_like(use)
    near = np.where(at_end | ~use, np.nan, plane)
    near = np.pad(near, NEAR // 2, constant_values=np.nan)
    near = np.lib.stride_tricks.sliding_window_view(near, (NEAR, NEAR))
    every, some = math.ceil(math.sqrt(plane.size / SAMPLE)), np.zeros_like(use)
    some[::every, ::every] = (use & ~at_end)[::every, ::every]

    def off(at):
        return np.abs(plane[at] - np.nanmedian(near[at], (1, 2)))

    with warnings.catch_warnings(action="ignore"):  # where nothing near is known
        usual = 1.4826 * np.nanmedian(off(some))
        suspects[suspects] = ~(off(suspects) <= 3 * usual)
    return suspects
