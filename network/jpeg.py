"""Finds the noise that a picture had before it was compressed as a JPEG.

A JPEG divides the cosine coefficients of its 8x8 blocks by steps and rounds them. The steps
are found as the spacing of the coefficients. A Gaussian that is rounded in this way is then
fitted to the coefficients of the flattest blocks: its standard deviation is that of the
noise before compression. Only luminance is used, since chroma is stored at half the size.
"""

import itertools
import math
from typing import NamedTuple

import numpy as np
import scipy.fft
import scipy.ndimage
import scipy.special

from network.scale import extremes

DCT_SIDE = 8  # pixels, side of a block
ORDER = np.add.outer(np.arange(DCT_SIDE), np.arange(DCT_SIDE)).ravel()  # u + v
LOW, MIDDLE, HIGH = (ORDER >= 1) & (ORDER <= 3), (ORDER >= 4) & (ORDER <= 6), ORDER >= 7
MAX_FILLED = 0.125  # share of a block's entries that may be filled
GRID_PART = 512  # pixels, side of the part in which the grid is sought
NOISE_PART = 1536  # pixels, side of the part in which the noise is measured
# A JPEG has more small coefficients on its own grid than on any other. The share must be
# larger by MIN_ZEROS, in small pictures by CHANCE / sqrt(number of coefficients).
MIN_ZEROS, CHANCE = 0.04, 2.0
LUMINANCE = np.array([0.299, 0.587, 0.114])  # weights of red, green, blue in a JPEG
STEPS = np.arange(3, 256)  # smaller steps are lost in the rounding of pixels
MIN_NONZERO = 1.5  # a smaller coefficient is a rounded zero
# A step is found from at least MIN_COUNT, at most about MAX_COUNT nonzero coefficients.
MIN_COUNT, MAX_COUNT = 4, 1000
MIN_FULL = 0.05  # if more coefficients are nonzero and no step fits, the step is small
MAX_OFF = 0.125  # median distance from a step's multiples over the step; 0.25 is chance
SIGMAS = np.geomspace(0.5, 100, 200)  # candidates, 0-255 scale
FLOOR = 1e-6  # likelihood of any coefficient, since texture may have made it
FLAT_SHARES = 0.01, 0.02, 0.04, 0.08, 0.16, 0.32  # shares of the blocks, the flattest
MIN_FLAT_BLOCKS = 12
MAX_RISE = 1.05  # of the variance from one share to the next; more is texture
MIN_DISTANCE = 1.5  # sigmas from a block's mean to black and white, else noise clips
# Sigma is certain if MIN_NUMBER coefficients are not 0 and either these are MIN_SHARE of all
# or sigma implies more than MIN_EXPECTED nonzero ones in the high frequencies.
MIN_NUMBER, MIN_SHARE, MIN_EXPECTED = 20, 0.08, 10
FALL = 0.25  # energy of texture in the high frequencies over that in the middle ones


class Compressed(NamedTuple):
    """The noise of a JPEG. Standard deviations are those of each channel, 0-255 scale."""

    sigma: float  # before compression
    is_certain: bool  # whether enough nonzero coefficients are left to measure sigma
    ratio: float  # variance in the middle frequencies over the high ones; 0: not known
    growth: float  # sigma in the brighter half of the blocks over that in the other
    least: float  # a lower estimate: after compression, or without what texture adds
    sharpness: float  # root mean square of the high frequencies in the whole picture


def blocks_of(x, step):
    """Return every step-th 8x8 block of x (C, H, W): (C, rows, columns, 8, 8)."""
    window = np.lib.stride_tricks.sliding_window_view(x, (DCT_SIDE, DCT_SIDE), (1, 2))
    return window[:, ::step, ::step]


def find_grid(y, known):
    """Find the grid of a JPEG by the zero coefficients of its blocks.

    Black and white areas, such as bars at a scan's edge, have zeros too and are left out.

    Args:
        y: the picture, (C, H, W), in any units.
        known: where an entry is known, (C, H, W), bool.

    Returns:
        Row and column of the first whole block, or None if the picture was no JPEG.
    """
    top, left = (max(0, (n - GRID_PART) // 2) for n in y.shape[1:])
    part = np.s_[:, top : top + GRID_PART, left : left + GRID_PART]
    y, known = y[part], known[part]
    gray = y.mean(0, np.float32, keepdims=True)
    ends = extremes(gray.ravel())  # hot pixels lie beyond
    gray = gray.clip(*ends)
    full = scipy.ndimage.binary_opening(np.isin(gray, ends), np.ones((1, 3, 3)))
    holes = ~known.all(0, keepdims=True)
    blocks, full, holes = (blocks_of(x, 1)[0] for x in (gray, full, holes))
    usable = holes.mean((2, 3)) <= MAX_FILLED
    if usable.sum() < (holes.mean((2, 3)) < 1).sum() / 2:  # too few to tell
        return None
    usable &= ~full.any((2, 3)) & (np.ptp(blocks, (2, 3)) > 0)
    high, shares = _spectra(blocks)[..., ORDER >= 5], {}
    for i, j in itertools.product(range(DCT_SIDE), repeat=2):
        on_grid = np.s_[i::DCT_SIDE, j::DCT_SIDE]
        part = np.abs(high[on_grid][usable[on_grid]])
        if not part.size:
            return None
        zeros = (part < 0.1 * math.sqrt((part**2).mean())).mean()
        shares[(top + i) % DCT_SIDE, (left + j) % DCT_SIDE] = zeros
    least = max(MIN_ZEROS, CHANCE / math.sqrt(part.size))
    grid = max(shares, key=shares.get)
    return grid if shares[grid] > np.median([*shares.values()]) + least else None


def measure_jpeg(y, known, grid):
    """Measure the noise of a JPEG.

    Args:
        y: the picture, (C, H, W), multiples of 1/255 from 0 to 1.
        known: where an entry is known, (C, H, W), bool.
        grid: row and column of the first whole block.

    Returns:
        Compressed, or None if the picture has other units or channels, or too few blocks
        without clipped and unknown entries.
    """
    starts = [
        i + max(0, n - NOISE_PART) // (2 * DCT_SIDE) * DCT_SIDE
        for i, n in zip(grid, y.shape[1:])
    ]
    own = [slice(start, start + NOISE_PART) for start in starts]
    y, known = 255 * y[:, *own], known[:, *own]
    if np.ptp(y, 0).max() == 0:
        y, known = y[:1], known[:1]
    if len(y) not in (1, 3) or (np.abs(y - np.rint(y)) > 1e-3)[known].any():
        return None
    weights = LUMINANCE if len(y) == 3 else np.ones(1)
    spoilt = (~known | (y <= 0) | (y >= 255)).any(0, keepdims=True)
    whole = ~blocks_of(spoilt, DCT_SIDE)[0].any((2, 3))
    means = blocks_of(y, DCT_SIDE)[:, whole].mean((2, 3))
    luminance = np.tensordot(weights, y, 1)[None]
    spectra = _spectra(blocks_of(luminance, DCT_SIDE)[0, whole])
    if len(spectra) < 2 * MIN_FLAT_BLOCKS:
        return None
    steps = _find_steps(spectra)
    if not (steps[HIGH] > 0).any():
        return None
    each = math.sqrt((weights**2).sum())  # sigma of luminance over that of a channel
    distance = np.minimum(means, 255 - means).min(0)
    flat, sigma = _flat_blocks(spectra, steps, distance, each)
    middle, high = (_fit_sigma(flat, steps, part) for part in (MIDDLE, HIGH))
    expected = _expected(flat, steps, middle)
    part = (ORDER >= 4) & (steps > 0)
    nonzero = np.abs(flat[:, part]) > steps[part] / 2
    is_certain = nonzero.sum() >= MIN_NUMBER and (
        nonzero.mean() >= MIN_SHARE or expected > MIN_EXPECTED
    )
    least = [(flat[:, ORDER >= 4] ** 2).mean()]  # texture is mostly lower
    if expected > MIN_EXPECTED:
        least.append(max(high**2 - FALL * middle**2, 0) / (1 - FALL))
    halves = np.array_split(spectra[:, 0].argsort(), 2)
    dark, bright = (
        _flat_blocks(spectra[half], steps, distance[half], each)[1] for half in halves
    )
    return Compressed(
        sigma=sigma / each,
        is_certain=bool(is_certain),
        ratio=(middle / high) ** 2 if expected > MIN_EXPECTED else 0.0,
        growth=bright / dark,
        least=math.sqrt(min(least)) / each,
        sharpness=math.sqrt((spectra[:, HIGH] ** 2).mean()),
    )


def _spectra(blocks):
    """Return the cosine coefficients (..., 64) of blocks (..., 8, 8)."""
    spectra = scipy.fft.dctn(blocks, axes=(-2, -1), norm="ortho")
    return spectra.reshape(*blocks.shape[:-2], DCT_SIDE**2)


def _find_steps(spectra):
    """Return the quantisation step of every frequency of blocks (n, 64); 0: not known."""
    found = np.zeros(DCT_SIDE**2)
    for f, size in enumerate(np.abs(spectra.T)):
        size = size[size > MIN_NONZERO]
        if size.size < MIN_COUNT:
            continue
        is_full = size.size > MIN_FULL * len(spectra)
        size = size[:: math.ceil(size.size / MAX_COUNT)]
        steps = STEPS[STEPS <= np.median(size) + 1]
        off = np.abs(size - steps[:, None] * np.rint(size / steps[:, None]))
        off = np.median(off, 1) / steps
        if off.size and off.min() < MAX_OFF:
            found[f] = steps[off.argmin()]
        elif is_full:
            found[f] = 1
    return found


def _flat_blocks(spectra, steps, distance, each):
    """Choose the flattest blocks, as many as possible before texture adds to the noise.

    Args:
        spectra: cosine coefficients of blocks, (n, 64).
        steps: the quantisation step of every frequency, (64,).
        distance: distance of the blocks' means from black and white, (n,), 0-255 scale.
        each: sigma of luminance over that of a channel.

    Returns:
        Their coefficients, (m, 64), and their sigma before compression.
    """
    order, sigma = (spectra[:, LOW] ** 2).sum(1).argsort(), 0.0
    for _ in range(4):
        inside = order[distance[order] >= MIN_DISTANCE * sigma / each]
        if len(inside) < MIN_FLAT_BLOCKS:
            break
        before, sigma = sigma, 0.0
        for share in FLAT_SHARES:
            chosen = spectra[inside[: max(MIN_FLAT_BLOCKS, int(share * len(inside)))]]
            own = _fit_sigma(chosen, steps, ORDER >= 4)
            if sigma and own**2 > MAX_RISE * sigma**2:
                break
            flat, sigma = chosen, min(own, sigma or own)
        if sigma <= before:
            break
    return flat, sigma


def _fit_sigma(spectra, steps, part):
    """Fit a rounded Gaussian to some frequencies of blocks (n, 64); return its sigma.

    The likelihood of a coefficient k * step is the Gaussian's integral from
    (k - 1/2) * step to (k + 1/2) * step.
    """
    part = part & (steps > 0)
    size = np.abs(np.rint(spectra[:, part] / steps[part]))
    pairs, count = np.unique(size + 1j * steps[part], return_counts=True)
    size, step = pairs.real, pairs.imag
    upper, lower = (
        scipy.special.ndtr((size + half) * step / SIGMAS[:, None])
        for half in (0.5, -0.5)
    )
    return SIGMAS[(count * np.log(upper - lower + FLOOR)).sum(1).argmax()]


def _expected(spectra, steps, sigma):
    """Return how many high coefficients of blocks (n, 64) should not be 0, given sigma."""
    steps = steps[HIGH & (steps > 0)]
    return 2 * len(spectra) * scipy.special.ndtr(-steps / 2 / sigma).sum()
