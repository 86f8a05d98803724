"""Finds the noise of an observed picture from the picture alone, and simulates noise.

The picture is cut into blocks, and every block is transformed by a cosine transform. The
low frequencies show how flat a block is, the high ones how much noise it has. White noise
is independent across frequencies, so choosing the flattest blocks does not bias the noise
measured in them.
"""

import math
from typing import NamedTuple

import numpy as np
import scipy.fft
import scipy.ndimage

from network.jpeg import (
    DCT_SIDE,
    HIGH,
    LOW,
    MAX_FILLED,
    MIDDLE,
    ORDER,
    blocks_of,
    find_grid,
    measure_jpeg,
)

MAX_BLOCKS, MIN_BLOCKS = 2**16, 60  # used at most, about; needed at least
HIGHEST = ORDER >= 9
MIN_WHOLE = 1000  # blocks without filled entries; if fewer, others are used too
MAX_CLIPPED = 0.05  # share of a block's entries
INTENSITY_BINS = 10  # with equally many blocks each
FLAT_SHARES = 0.02, 0.04, 0.08, 0.16, 0.32  # shares of a bin's blocks, the flattest
MIN_FLAT = 25  # blocks that are used in a bin, at least
MAX_RISE = 1.05  # of the variance from one share to the next; more is texture
# Share of the squared coefficients that count, the smallest ones; their mean for a Gaussian of
# variance 1.
TRIMMED, TRIMMED_MEAN = 0.95, 0.7588
# A bin counts half if its variance is this share above or below that of the line.
HALF_ABOVE, HALF_BELOW = 0.1, 0.3
MIN_VARIANCE = 0.02  # of the mean variance: a line may cross 0 where it is dark
TINY = 1e-60  # of a variance that is divided by
MIN_CHANNEL = 0.04  # variance of a channel over the noisiest channel's
MIN_DARKEST = 0.005  # variance at the darkest intensity over that at a bright one
# Energy of the middle frequencies over that of the highest. White noise has 1, noise
# blurred by 0.6 pixels has 4. Texture adds to it where there is hardly any noise.
MAX_WHITE_RATIO, MIN_CORRELATED_RATIO = 1.4, 2.8
MIN_SIGMA = 1  # where 255 is the picture's range; less noise is not worth removing
MAX_CORRELATION = 0.3  # of the noise in two channels that counts as independent
MIN_GROWTH = 1.2  # sigma where it is bright over sigma where it is dark
MAX_STRENGTH = 1.4  # variance of one channel over another's that counts as equal
# Under a JPEG. Texture looks more like noise, since only aligned blocks can be used.
MAX_JPEG_RATIO, MAX_JPEG_GROWTH = 1.3, 1.3
MIN_JPEG_RATIO = 5.0  # of shared noise, beside fine detail; fur has 3, waves 4
# With more growth black hides the noise, so the flattest bright blocks decide.
MAX_KNOWN_GROWTH = 50.0
MIN_JPEG_SIGMA = 3  # white noise, where 255 is the picture's range; less may be grain
MIN_SHARPNESS = 3.0  # of a picture that a network alone would blur, 0-255 scale


class Noise(NamedTuple):
    """The noise of a picture."""

    # white: the same at every intensity; growing: white, stronger where it is bright;
    # correlated: shared by neighbours or channels; compressed: a JPEG's, of no certain
    # kind; none; unknown.
    kind: str
    # (gain, offset) of every channel, in the picture's units: the variance at an intensity
    # is gain * intensity + offset. Empty where it is not known.
    lines: tuple = ()
    # A tenth of the picture is darker than the first intensity, a tenth brighter than the
    # second.
    ends: tuple = (0.0, 1.0)
    # Whether the picture was a JPEG. Sigma is that before compression.
    jpeg: bool = False
    # Standard deviation of the middle frequencies in the flattest blocks, in the picture's
    # units. It measures shared noise: among the frequencies that hold much of it, these
    # have the least texture.
    strength: float = 0.0

    def is_white(self):
        """Tell whether the sigma is known that a filter for white noise needs.

        Sigma is known for noise that texture hides, too: it is measured where there is the least
        texture, so a filter removes little of the picture.
        """
        return bool(self.lines)

    def is_even(self):
        """Tell whether the variance is the same at every intensity and in every channel."""
        return len(set(self.lines)) < 2 and not any(gain for gain, _ in self.lines)

    def sigma(self, level=None):
        """Return the standard deviation over all channels on the 0-255 scale, or None.

        Args:
            level: an intensity, in the picture's units; None: halfway between the ends.
        """
        if not self.lines:
            return None
        level = sum(self.ends) / 2 if level is None else level
        variances = [max(gain * level + offset, 0) for gain, offset in self.lines]
        return 255 * math.sqrt(sum(variances) / len(variances))

    def describe(self, peak=255):
        """Describe the noise to a user, in units in which the picture's 1 is `peak`."""

        def shown(x):
            return f"{float(f'{x * peak:.3g}'):g}"  # 1280, not 1.28e+03

        def sigma(level=None):
            at = "" if level is None else f" at {shown(level)}"
            return f"sigma {shown(self.sigma(level) / 255)}{at}"

        if self.kind == "growing":
            return f"white, grows with the signal: {', '.join(map(sigma, self.ends))}"
        bound = f", {sigma()} at most" if self.lines else ""
        under = " under a JPEG" if self.jpeg else ""
        return {
            "white": f"white{under}{bound.removesuffix(' at most')}",
            "correlated": "shared by neighbours, as a camera's",
            "compressed": f"a JPEG's, changed by its compression{bound}",
            "none": f"none to speak of{bound}",
            "unknown": f"of unknown kind{bound}",
        }[self.kind]


class Evidence(NamedTuple):
    """The measurements that decide which kind of noise a picture has."""

    lines: tuple  # (gain, offset) of every channel: see Noise
    ends: tuple  # dark and bright intensity: see Noise
    is_small: bool  # whether there is hardly any noise, even if texture counts as noise
    ratio: float  # energy of the middle frequencies over that of the highest
    highest: float  # energy of the highest frequencies over that of the lines
    strength: float  # see Noise
    correlation: float  # of the noise in two channels, the largest


CAMERA = Noise("correlated")


def white(sigma):
    """Return white noise of a standard deviation on the 0-255 scale; 0: none."""
    return Noise("white" if sigma else "none", ((0.0, (sigma / 255) ** 2),))


def gaussian_noise(shape, sigma, seed):
    """Return white Gaussian noise, float32, for pictures in [0, 1].

    The same shape, sigma and seed always give the same noise.

    Args:
        shape: (C, H, W).
        sigma: standard deviation on the 0-255 scale.
        seed: natural number.
    """
    generator, noise = np.random.default_rng(seed), np.empty(shape, np.float32)
    for channel in noise:  # saves memory: the draws are float64
        channel[:] = generator.standard_normal(shape[1:]) * (sigma / 255)
    return noise


def noise_of(y, known, sigma=None, camera=False):
    """Return a picture's noise: white if sigma is given, CAMERA if camera is true, or found."""
    if sigma is not None:
        return white(sigma)
    found = find_noise(y, known)
    return CAMERA._replace(strength=found.strength) if camera else found


def find_noise(y, known):
    """Find the noise of a picture.

    Args:
        y: the picture, (C, H, W), sides of 32 or more, in any units.
        known: 1 where an entry of y is known, else 0: (C, H, W) or (1, H, W).

    Returns:
        A Noise.
    """
    y = np.asarray(y, np.float64)
    known = np.broadcast_to(np.asarray(known) > 0, y.shape)
    varying = [at.any() and np.ptp(channel[at]) > 0 for channel, at in zip(y, known)]
    if any(varying) and not all(varying):  # red and blue of a slide in green
        noise = find_noise(y[varying], known[varying])
        own = iter(noise.lines)
        lines = (next(own) if varies else noise.lines[0] for varies in varying)
        return noise._replace(lines=tuple(lines) if noise.lines else ())
    y = fill_unknown(y, known)
    blocks = _usable_blocks(y, known)
    if blocks.shape[1] < MIN_BLOCKS:
        return Noise("unknown")
    evidence, grid = _measure(blocks), find_grid(y, known)
    if grid is None:
        found = _name(evidence)
    else:
        span = np.ptp(y[known])
        jpeg = measure_jpeg(y, known, grid)
        found = _name_compressed(jpeg, evidence.strength, span, len(y))
    return found._replace(strength=evidence.strength)


def _measure(blocks):
    """Measure the noise in blocks (C, n, DCT_SIDE, DCT_SIDE); return Evidence."""
    spectra = scipy.fft.dctn(blocks, axes=(2, 3), norm="ortho")
    spectra = spectra.reshape(*blocks.shape[:2], DCT_SIDE**2)
    levels = spectra[..., 0] / DCT_SIDE
    lines, flatness = _fit_lines(levels, spectra**2)
    n = max(MIN_BLOCKS, int(FLAT_SHARES[0] * flatness.size))
    flattest = flatness.argpartition(n - 1)[:n]
    flat = spectra[:, flattest]
    scaled = flat / np.sqrt(_variances(lines, levels)[:, flattest, None])
    middle, highest = (_energy(scaled[..., part] ** 2) for part in (MIDDLE, HIGHEST))
    shared = np.corrcoef(scaled[..., HIGH].reshape(len(blocks), -1))
    lowest, *ends = np.quantile(levels, (0.001, 0.1, 0.9)).tolist()
    lines = [bound_slope(line, lowest, ends[1]) for line in lines]
    # A channel with next to no noise would outweigh all others once the noise is even.
    level = sum(ends) / 2
    least = MIN_CHANNEL * max(gain * level + offset for gain, offset in lines)
    lines = tuple((gain, max(offset, least - gain * level)) for gain, offset in lines)
    bright = Noise("growing", lines, tuple(ends)).sigma(ends[1])
    strength = math.sqrt(_energy(flat[..., MIDDLE] ** 2))
    most = max(255 * strength, bright / 2)
    return Evidence(
        lines,
        tuple(ends),
        is_small=most < MIN_SIGMA * np.ptp(levels),
        ratio=middle / highest if highest else math.inf if middle else math.nan,
        highest=highest,
        strength=strength,
        correlation=np.abs(np.triu(np.atleast_2d(shared), 1)).max(),
    )


def _name(evidence):
    """Return the Noise that Evidence supports."""
    lines, ends = evidence.lines, evidence.ends
    if evidence.ratio > MIN_CORRELATED_RATIO and not evidence.is_small:
        return CAMERA
    is_white = not (
        evidence.ratio > MAX_WHITE_RATIO or evidence.correlation > MAX_CORRELATION
    )
    growing = Noise("growing", lines, ends)
    dark, bright = map(growing.sigma, ends)
    if bright > MIN_GROWTH * dark and is_white and not evidence.is_small:
        return growing
    # The highest frequencies hold the least texture.
    share = 1 if is_white else min(evidence.highest, 1)
    level = sum(ends) / 2
    means = (share * max(gain * level + offset, 0) for gain, offset in lines)
    even = tuple((0.0, mean) for mean in means)
    kind = "none" if evidence.is_small else "white" if is_white else "unknown"
    return Noise(kind, even, ends)


def _name_compressed(found, strength, span, channels):
    """Return the Noise of a JPEG.

    Args:
        found: the measurements, a jpeg.Compressed or None.
        strength: see Noise.
        span: the range of the picture, in its units.
        channels: the number of channels.
    """
    if not found:
        return Noise("compressed", jpeg=True)

    def even(kind, sigma):
        return Noise(kind, ((0.0, (sigma / 255) ** 2),) * channels, jpeg=True)

    grows = found.growth > MAX_JPEG_GROWTH
    strong = found.is_certain and found.sigma >= MIN_JPEG_SIGMA * span
    if strong and found.ratio < MAX_JPEG_RATIO and not grows:
        return even("white", found.sigma)
    hidden = found.growth > MAX_KNOWN_GROWTH and 255 * strength > MIN_JPEG_SIGMA * span
    if hidden or found.ratio > MIN_JPEG_RATIO or found.sharpness < MIN_SHARPNESS:
        return Noise("compressed", jpeg=True)
    # To spare fine detail, we remove only what is certainly noise.
    return even("compressed", max(found.least, MIN_SIGMA * span))


def fill_unknown(y, known):
    """Fill the unknown entries of a picture (C, H, W) with the median of those nearby.

    Args:
        y: the picture; unknown entries may be NaN.
        known: where an entry is known, (C, H, W) or (1, H, W), bool.
    """
    filled = np.array(y)
    for plane, at in zip(filled, np.broadcast_to(known, y.shape)):
        if at.any() and not at.all():
            nearest = scipy.ndimage.distance_transform_edt(
                ~at, return_distances=False, return_indices=True
            )
            plane[:] = plane[tuple(nearest)]
            plane[~at] = scipy.ndimage.median_filter(plane, 5)[~at]
    return filled


def bound_slope(line, lowest, bright):
    """Reduce a line's gain so that some noise is left at the lowest intensity.

    Args:
        line: (gain, offset).
        lowest, bright: intensities. The variance at the bright one stays as it is.
    """
    gain, offset = line
    most = gain * bright + offset
    steepest = (1 - MIN_DARKEST) * most / max(bright - lowest, 1e-30)
    return line if gain <= steepest else (steepest, most - steepest * bright)


def _usable_blocks(y, known):
    """Return the blocks (C, n, 8, 8) that vary, are known and are not clipped."""
    clipped = np.zeros(y.shape, bool)
    for channel, at in zip(y, clipped):
        for end in (channel.min(), channel.max()):
            at |= channel == end
    step = max(2, math.ceil(math.sqrt(y[0].size / MAX_BLOCKS)))
    blocks, known, clipped = (blocks_of(x, step) for x in (y, known, clipped))
    filled = (~known).mean((0, 3, 4))
    most = 0 if (filled == 0).sum() >= MIN_WHOLE else MAX_FILLED
    usable = (filled <= most) & (np.ptp(blocks, (3, 4)) > 0).all(0)
    clipped = clipped.mean((0, 3, 4))
    most = min(np.quantile(clipped, MAX_CLIPPED), MAX_CLIPPED)
    return blocks[:, usable & (clipped <= most)]


def _fit_lines(levels, energy):
    """Fit the noise's variance against intensity.

    Args:
        levels: mean intensity of the blocks, (C, n).
        energy: squared coefficients of the blocks, (C, n, DCT_SIDE**2).

    Returns:
        (gain, offset) of each channel, and each block's energy of the low frequencies over
        the noise's variance, (n,): flat blocks have little.
    """
    low, high = energy[..., LOW].mean(-1), energy[..., HIGH]
    lines = [(0.0, x) for x in np.quantile(high.mean(-1), FLAT_SHARES[0], axis=1)]
    bins = [np.array_split(order, INTENSITY_BINS) for order in levels.argsort(1)]
    for _ in range(5):
        flatness = (low / _variances(lines, levels)).sum(0)
        points = [
            [_measure_bin(x[b], e[b], flatness[b] / len(low)) for b in own]
            for x, e, own in zip(levels, high, bins)
        ]
        lines = _fit_line(*np.array(points).transpose(2, 0, 1))
    return lines, flatness


def _variances(lines, levels):
    """Return the noise's variance at intensities (C, n), bounded well above 0."""
    gain, offset = np.array(lines).T[..., None]
    variances = gain * levels + offset
    least = MIN_VARIANCE * variances.clip(0).mean(1, keepdims=True)
    return np.maximum(variances, least + TINY)


def _measure_bin(levels, energy, flatness):
    """Return the mean intensity, the noise's variance and the weight of a bin's blocks."""
    order, found = flatness.argsort(), None
    for share in FLAT_SHARES:
        flattest = order[: max(int(share * order.size), min(MIN_FLAT, order.size))]
        variance = _energy(energy[flattest])
        if found and variance > MAX_RISE * found[1]:
            break
        least = min(variance, found[1]) if found else variance
        weight = 1 / max(1.0, flatness[flattest].mean())
        found = levels[flattest].mean(), least, weight
    return found


def _fit_line(level, variance, weight):
    """Fit one line robustly to the points (C, INTENSITY_BINS) of all channels.

    Returns each channel's (gain, offset). For a channel with stronger noise the line is
    multiplied by a number.
    """
    strength, trust = np.ones((len(level), 1)), np.ones(level.shape)
    typical = max(np.median(variance), MIN_VARIANCE * variance.mean(), TINY)
    least = MIN_VARIANCE * typical
    line = expected = np.full(level.shape, typical)
    # A strict start would let few bins decide.
    for looseness in (20, 10, 7, 5, 3, 2, 1, 1, 1):
        # The errors are about proportional to the variance. The weight is its inverse, not
        # the inverse square, since dark bins have mostly read noise.
        root = trust * weight / np.sqrt(expected)
        columns = np.stack((level * root, root), -1) * strength[..., None]
        gain, offset = np.linalg.lstsq(
            columns.reshape(-1, 2), (variance * root).ravel(), rcond=None
        )[0]
        if gain < 0:
            gain, offset = 0.0, np.average(variance / strength, weights=root**2)
        line = np.maximum(gain * level + offset, least)
        strength = np.median(variance / line, 1, keepdims=True).clip(1e-6)
        if strength.max() < MAX_STRENGTH * strength.min():
            strength = np.ones_like(strength)
        expected = strength * line
        off = variance / expected - 1
        off = off / (looseness * np.where(off > 0, HALF_ABOVE, HALF_BELOW))
        trust = 1 / (1 + off**2)
    return tuple((float(gain * s), float(offset * s)) for s in strength[:, 0])


def _energy(squares):
    """Return the mean of white noise's squared coefficients, robust to the largest."""
    n = int(TRIMMED * squares.size)
    return np.partition(squares, n, None)[:n].mean() / TRIMMED_MEAN
