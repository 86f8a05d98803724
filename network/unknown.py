"""Finds the entries of an observed picture that cannot belong to it: they become unknown."""

import math
import warnings

import numpy as np
from scipy import ndimage

# A gap's value is shared by MIN_SHARED entries. It lies MIN_GAP ranges beyond all others
# (their range without TAIL at either end), or MIN_GAP_BELOW if it alone is negative.
MIN_SHARED, MIN_GAP, MIN_GAP_BELOW, TAIL = 4, 12, 2, 0.001
# An outlier exceeds its eight neighbours by OVER_SPAN times their span (in noise 1 entry in
# 10^5 does; a star of two pixels reaches 2) and by OVER_MEDIAN times the median excess of
# local extremes (clean photographs: 2 in 10^5). In noise that median is the MEDIAN_EXCESS
# quantile of all entries. If hardly any entry is an extreme, ENOUGH of the range is enough.
OVER_SPAN, OVER_MEDIAN, MEDIAN_EXCESS, ENOUGH = 3, 16, 0.89, 0.5
MIN_FREE = 0.05  # share of entries without clipped neighbours that tell the usual span
# Entries of the largest value with up to MAX_CROWD equal neighbours may be salt. They are if
# MIN_IMPULSES of them, and a share of IMPULSE_SHARE, are outliers. Those as close to a median
# of MEDIAN_SIDE x MEDIAN_SIDE pixels as MAX_SAMPLE others are not. Pepper has the least value.
IMPULSE_SHARE, MIN_IMPULSES, MAX_CROWD, MEDIAN_SIDE, MAX_SAMPLE = 0.03, 8, 3, 5, 2**16
NEIGHBOURS = np.arange(9).reshape(3, 3) != 4
LAMP = 0.75  # of the range; a darker neighbour of a clipped entry is beside a lamp


def find_unknown(y, known, guess=True):
    """Find gaps and outliers, both (C, H, W), bool.

    Gaps hold no measurement: NaN, infinite numbers, and values far beyond all others that
    many entries share. Outliers are single wrong numbers, far beyond noise and texture:
    hot and dead pixels, salt and pepper. Stars, lines and text are neither.

    Args:
        y: the picture, (C, H, W), in any units.
        known: where an entry is known, (C, H, W) or (1, H, W), bool.
        guess: False: only NaN and infinite numbers are found.
    """
    gaps = ~np.isfinite(y)
    outliers = np.zeros_like(gaps)
    for plane, use, gap, outlier in zip(y, known & ~gaps, gaps, outliers):
        if guess:
            far = _far_values(plane, use)
            outlier |= far & ~ndimage.binary_dilation(far, NEIGHBOURS)
            outlier |= _outliers(plane, use & ~far)
            gap |= far & ~outlier
    return gaps, outliers


def _far_values(plane, use):
    """Return which of the entries (H, W) in use have the value of a gap."""
    values = plane[use].astype(float)
    for end in (values.min(), values.max()) if values.size else ():
        rest = values[values != end]
        if rest.size and values.size - rest.size >= MIN_SHARED:
            low, high = np.quantile(rest, (TAIL, 1 - TAIL))
            wide = (MIN_GAP_BELOW if end < 0 <= low else MIN_GAP) * (high - low)
            if max(low - end, end - high) > wide > 0:
                found = use & (plane == end)
                return found | _far_values(plane, use & ~found)
    return np.zeros_like(use)


def _outliers(plane, use):
    """Return which of the entries (H, W) in use are outliers."""
    kind = {"footprint": NEIGHBOURS, "mode": "mirror"}
    low = ndimage.minimum_filter(np.where(use, plane, np.inf), **kind)
    high = ndimage.maximum_filter(np.where(use, plane, -np.inf), **kind)
    use = use & (low <= high)  # a neighbour is in use
    plane, low, high = (np.where(use, x, 0) for x in (plane, low, high))
    excess, span = np.maximum(plane - high, low - plane).clip(0), high - low
    if not excess.any():
        return np.zeros_like(use)
    least, most = plane[use].min(), plane[use].max()
    free = use & (low > least) & (high < most)  # clipping hides the neighbours' noise
    usual = span[free] if free.mean() > MIN_FREE else span[use & (span > 0)]
    span = np.where(free, span, np.maximum(span, np.median(usual) if usual.size else 0))
    first, last = np.quantile(plane[use], (TAIL, 1 - TAIL))
    far = min(OVER_MEDIAN * np.median(excess[excess > 0]), ENOUGH * (last - first))
    far = max(far, OVER_MEDIAN * np.quantile(excess[use], MEDIAN_EXCESS))
    found = use & (excess > OVER_SPAN * span) & (excess > far)
    pepper, salt = (_impulses(plane, use, found, end) for end in (least, most))
    return found | pepper | salt


def _impulses(plane, use, found, end):
    """Return which entries of the value `end` are salt or pepper, given the outliers found."""
    at_end = use & (plane == end)
    crowd = ndimage.convolve(at_end.astype(np.uint8), NEIGHBOURS.astype(np.uint8))
    suspects = at_end & (crowd <= MAX_CROWD)
    if (found & suspects).sum() < max(MIN_IMPULSES, IMPULSE_SHARE * suspects.sum()):
        return np.zeros_like(use)
    near = np.where(at_end | ~use, np.nan, plane)
    near = np.pad(near, MEDIAN_SIDE // 2, constant_values=np.nan)
    near = np.lib.stride_tricks.sliding_window_view(near, (MEDIAN_SIDE, MEDIAN_SIDE))
    every, some = math.ceil(math.sqrt(plane.size / MAX_SAMPLE)), np.zeros_like(use)
    some[::every, ::every] = (use & ~at_end)[::every, ::every]
    either = suspects | some
    with warnings.catch_warnings(action="ignore"):  # a median may lack known pixels
        off = np.abs(plane[either] - np.nanmedian(near[either], (1, 2)))
        suspects[either] &= ~(off <= 3 * (1.4826 * np.nanmedian(off[some[either]])))
    return suspects


def at_white(y, known):
    """Return where y (C, H, W) has the largest known value of its channel.

    There the scene, such as a lamp or a white sky, may be brighter than the sensor's white.
    """
    known = np.broadcast_to(known > 0, y.shape)
    white = y.max((1, 2), keepdims=True, where=known, initial=-np.inf)
    return known & (y == white)


def beside_lamps(y, clipped):
    """Return where y (C, H, W) is much darker than a clipped neighbour.

    The blur has spread a lamp's light there. The network cannot predict a lamp many times
    brighter than white, so these entries would mislead it.
    """
    low, white = y.min((1, 2), keepdims=True), y.max((1, 2), keepdims=True)
    near = ndimage.binary_dilation(clipped, np.ones((1, 3, 3)))
    return near & (y < low + LAMP * (white - low))
