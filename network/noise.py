"""What noise an observed picture has, told from the picture alone.

Blocks of 8x8 pixels are looked at in their cosine transform. The low frequencies say how
flat a block is, the high ones how much noise it has: of white noise the ones know nothing
of the others, so that the flattest blocks can be chosen, and the noise is as it is.
"""

import itertools
import math
from typing import NamedTuple

import numpy as np
import scipy.fft
import scipy.ndimage

from network.scale import extremes

SIDE = 8  # pixels, of a block
BLOCKS, LEAST = 2**16, 60  # how many are looked at, about; how many are needed
ORDER = np.add.outer(np.arange(SIDE), np.arange(SIDE)).ravel()  # of frequencies, u + v
LOW, MIDDLE = (ORDER >= 1) & (ORDER <= 3), (ORDER >= 4) & (ORDER <= 6)
HIGH, HIGHEST = ORDER >= 7, ORDER >= 9
ENOUGH, FILLED = 1000, 0.125  # blocks without filled entries; share of these elsewhere
FEW = 0.05  # share of a block's entries that may be clipped
BINS = 10  # of levels, with as many blocks each
SHARES = 0.02, 0.04, 0.08, 0.16, 0.32  # of a bin's blocks, the flattest
RISE = 1.05  # of the variance from a share to the next; more is texture
KEPT, KEPT_ENERGY = 0.95, 0.7588  # the least squares, and their mean: of a Gaussian's 1
ABOVE, BELOW = 0.1, 0.3  # share of a line that a bin may lie off it, to count half
FLOOR = 0.02  # of the mean variance: a line may go through 0 where it is dark
CLEANEST = 0.04  # variance of a channel, over the noisiest one's
DARKEST = 0.005  # variance where a picture is darkest, over that where it is bright
# Energy of the middle frequencies over the highest ones'. White noise has 1, noise blurred
# by 0.6 pixels 4; texture adds some where there is hardly any noise.
WHITE, CORRELATED = 1.4, 2.8
LEAST_SIGMA = 1  # where 255 is the picture's range: below it there is nothing to remove
SHARED = 0.3  # correlation of channels from which on they are not independent
GROWS = 1.2  # sigma where it is bright over sigma where it is dark, from which it grows
UNLIKE = 1.4  # variance of a channel over another's, from which they differ
# Share of small coefficients that a JPEG's grid has and no other has; times the root of
# their number, in small pictures.
ON_GRID, BY_CHANCE = 0.04, 2.0


class Noise(NamedTuple):
    """What noise a picture has."""

    # white: alike at every level; growing: white, and stronger where it is bright;
    # correlated: neighbours or channels share it; compressed: a JPEG's; none; unknown.
    kind: str
    # For every channel (gain, offset), in the picture's units: at a level the variance is
    # gain * level + offset. Empty where that cannot be known.
    lines: tuple = ()
    # Levels where the picture is dark, and bright: a tenth of it is beyond.
    ends: tuple = (0.0, 1.0)

    def is_white(self):
        """Tell whether it is, or is taken for it: then filters can be told its sigma.

        What cannot be told apart from texture has at most the sigma that was found; so
        little is taken away that nothing is lost.
        """
        return bool(self.lines)

    def is_even(self):
        """Tell whether it is alike at every level and in every channel."""
        return len(set(self.lines)) < 2 and not any(gain for gain, _ in self.lines)

    def sigma(self, level=None):
        """Return the standard deviation at a level, or halfway between the ends.

        Over all channels, on the 0-255 scale; None where it is not known.
        """
        if not self.lines:
            return None
        level = sum(self.ends) / 2 if level is None else level
        variances = [max(gain * level + offset, 0) for gain, offset in self.lines]
        return 255 * math.sqrt(sum(variances) / len(variances))

    def describe(self, peak=255):
        """Say it so that a person understands; 1 in the picture's units is `peak`."""

        def shown(x):
            return f"{float(f'{x * peak:.3g}'):g}"  # 1280, not 1.28e+03

        def sigma(level=None):
            at = "" if level is None else f" at {shown(level)}"
            return f"sigma {shown(self.sigma(level) / 255)}{at}"

        if self.kind == "growing":
            return f"white, grows with the signal: {', '.join(map(sigma, self.ends))}"
        bound = f", {sigma()} at most" if self.lines else ""
        return {
            "white": f"white{bound.removesuffix(' at most')}",
            "correlated": "shared by neighbours, as a camera's",
            "compressed": "a JPEG's, changed by its compression",
            "none": f"none to speak of{bound}",
            "unknown": f"of what kind cannot be told{bound}",
        }[self.kind]


CAMERA = Noise("correlated")


def white(sigma):
    """Return white noise of a standard deviation on the 0-255 scale; 0: none."""
    return Noise("white" if sigma else "none", ((0.0, (sigma / 255) ** 2),))


def noise_of(y, known, sigma=None, camera=False):
    """Return a picture's noise: white of a sigma that is known, a camera's, or found."""
    if sigma is not None:
        return white(sigma)
    return CAMERA if camera else find_noise(y, known)


def find_noise(y, known):
    """Find out what noise a picture has.

    Args:
        y: the picture, (C, H, W), sides of 32 or more, in any units.
        known: 1 where an entry of y is known, else 0: (C, H, W) or (1, H, W).
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
    blocks = _whole_blocks(y, known)
    if blocks.shape[1] < LEAST:
        return Noise("unknown")
    spectra = scipy.fft.dctn(blocks, axes=(2, 3), norm="ortho")
    spectra = spectra.reshape(*blocks.shape[:2], SIDE**2)
    levels = spectra[..., 0] / SIDE
    lines, flatness = _fit_lines(levels, spectra**2)
    n = max(LEAST, int(SHARES[0] * flatness.size))
    flattest = flatness.argpartition(n - 1)[:n]
    flat = spectra[:, flattest]
    scaled = flat / np.sqrt(_variances(lines, levels)[:, flattest, None])
    middle, highest = (_energy(scaled[..., part] ** 2) for part in (MIDDLE, HIGHEST))
    shared = np.triu(
        np.atleast_2d(np.corrcoef(scaled[..., HIGH].reshape(len(y), -1))), 1
    )
    lowest, *ends = np.quantile(levels, (0.001, 0.1, 0.9)).tolist()
    lines, level = [lowered(line, lowest, ends[1]) for line in lines], sum(ends) / 2
    # A channel with next to no noise, made even, would be all that counts.
    least = CLEANEST * max(gain * level + offset for gain, offset in lines)
    lines = tuple((gain, max(offset, least - gain * level)) for gain, offset in lines)
    ends = tuple(ends)
    growing = Noise("growing", lines, ends)
    dark, bright = map(growing.sigma, ends)
    most = max(255 * math.sqrt(_energy(flat[..., MIDDLE] ** 2)), bright / 2)
    if _is_on_grid(y, known):
        return Noise("compressed")
    little = most < LEAST_SIGMA * np.ptp(levels)
    if middle > CORRELATED * highest and not little:
        return CAMERA
    unknown = middle > WHITE * highest or np.abs(shared).max() > SHARED
    if bright > GROWS * dark and not unknown and not little:
        return growing
    # Of texture the highest frequencies have the least.
    share = min(highest, 1) if unknown else 1
    means = (share * max(gain * level + offset, 0) for gain, offset in lines)
    even = tuple((0.0, mean) for mean in means)
    return Noise("none" if little else "unknown" if unknown else "white", even, ends)


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


def _blocks(x, step):
    """Return the blocks (C, rows, columns, SIDE, SIDE) of x (C, H, W), each step-th."""
    window = np.lib.stride_tricks.sliding_window_view(x, (SIDE, SIDE), (1, 2))
    return window[:, ::step, ::step]


def _whole_blocks(y, known):
    """Return blocks (C, n, SIDE, SIDE) that vary, are known and are not clipped.

    Where few are, some of a block's entries may be filled.
    """
    clipped = np.zeros(y.shape, bool)
    for channel, at in zip(y, clipped):
        for end in (channel.min(), channel.max()):
            at |= channel == end
    step = max(2, math.ceil(math.sqrt(y[0].size / BLOCKS)))
    blocks, known, clipped = (_blocks(x, step) for x in (y, known, clipped))
    missing = (~known).mean((0, 3, 4))
    most = 0 if (missing == 0).sum() >= ENOUGH else FILLED
    usable = (missing <= most) & (np.ptp(blocks, (3, 4)) > 0).all(0)
    clipped = clipped.mean((0, 3, 4))
    return blocks[:, usable & (clipped <= min(np.quantile(clipped, FEW), FEW))]


def _fit_lines(levels, energy):
    """Return each channel's (gain, offset), and of each block how flat it is: 0 most.

    By the blocks' levels, (C, n), and the energy of their frequencies, (C, n, SIDE**2).
    """
    low, high = energy[..., LOW].mean(-1), energy[..., HIGH]
    lines = [(0.0, x) for x in np.quantile(high.mean(-1), SHARES[0], axis=1)]
    bins = [np.array_split(order, BINS) for order in levels.argsort(1)]
    for _ in range(5):
        flatness = (low / _variances(lines, levels)).sum(0)
        points = [
            [_measure(x[b], e[b], flatness[b] / len(low)) for b in own]
            for x, e, own in zip(levels, high, bins)
        ]
        lines = _fit_line(*np.array(points).transpose(2, 0, 1))
    return lines, flatness


def lowered(line, lowest, bright):
    """Lower a line's gain, so that there is noise even where a picture is darkest."""
    gain, offset = line
    most = gain * bright + offset
    steepest = (1 - DARKEST) * most / max(bright - lowest, 1e-30)
    return line if gain <= steepest else (steepest, most - steepest * bright)


def _variances(lines, levels):
    """Return the noise's variance at levels (C, n): nowhere next to nothing."""
    gain, offset = np.array(lines).T[..., None]
    variances = gain * levels + offset
    floor = FLOOR * variances.clip(0).mean(1, keepdims=True)
    return np.maximum(variances, floor + np.finfo(float).tiny)


def _measure(levels, energy, flatness):
    """Return some blocks' level, variance of noise, and weight, by the flattest of them."""
    order, found = flatness.argsort(), None
    for share in SHARES:
        flattest = order[: max(int(share * order.size), min(25, order.size))]
        variance = _energy(energy[flattest])
        if found and variance > RISE * found[1]:
            break
        least = min(variance, found[1]) if found else variance
        weight = 1 / max(1.0, flatness[flattest].mean())
        found = levels[flattest].mean(), least, weight
    return found


def _fit_line(level, variance, weight):
    """Fit one line to all channels' points (C, BINS), robustly; return each channel's.

    A channel whose noise is stronger has the line times a number.
    """
    strength, trust = np.ones((len(level), 1)), np.ones(level.shape)
    line = expected = np.full(level.shape, np.median(variance))
    for looseness in (20, 10, 7, 5, 3, 2, 1, 1, 1):  # or some bins would decide
        # Errors are a share of the variance; but dark levels have their own, of reading.
        root = trust * weight / np.sqrt(expected)
        columns = np.stack((level * root, root), -1) * strength[..., None]
        gain, offset = np.linalg.lstsq(
            columns.reshape(-1, 2), (variance * root).ravel(), rcond=None
        )[0]
        if gain < 0:
            gain, offset = 0.0, np.average(variance / strength, weights=root**2)
        line = gain * level + offset
        line = np.maximum(line, FLOOR * np.median(variance))
        strength = np.median(variance / line, 1, keepdims=True)
        if strength.max() < UNLIKE * strength.min():
            strength = np.ones_like(strength)
        expected = strength * line
        off = variance / expected - 1
        off = off / (looseness * np.where(off > 0, ABOVE, BELOW))
        trust = 1 / (1 + off**2)
    return tuple((float(gain * s), float(offset * s)) for s in strength[:, 0])


def _energy(squares):
    """Return the mean of white noise's squared coefficients, without the largest."""
    n = int(KEPT * squares.size)
    return np.partition(squares, n, None)[:n].mean() / KEPT_ENERGY


def _is_on_grid(y, known):
    """Tell whether a picture has been a JPEG: whose 8x8 blocks have many zeros.

    Black and white areas, as bars at a scan's edge, have zeros, too: they are left out.
    """
    top, left = (max(0, n // 2 - 256) for n in y.shape[1:])  # a part says enough
    y, known = (x[:, top : top + 512, left : left + 512] for x in (y, known))
    gray = y.mean(0, np.float32, keepdims=True)
    ends = extremes(gray.ravel())  # hot pixels lie beyond
    gray = gray.clip(*ends)
    full = scipy.ndimage.binary_opening(np.isin(gray, ends), np.ones((1, 3, 3)))
    holes = ~known.all(0, keepdims=True)
    blocks, full, holes = (_blocks(x, 1)[0] for x in (gray, full, holes))
    usable = holes.mean((2, 3)) <= FILLED
    if usable.sum() < (holes.mean((2, 3)) < 1).sum() / 2:  # too few to tell
        return False
    usable &= ~full.any((2, 3)) & (np.ptp(blocks, (2, 3)) > 0)
    spectra = scipy.fft.dctn(blocks, axes=(2, 3), norm="ortho")
    high, shares = spectra.reshape(*spectra.shape[:2], SIDE**2)[..., ORDER >= 5], []
    for i, j in itertools.product(range(SIDE), repeat=2):
        part = np.abs(high[i::SIDE, j::SIDE][usable[i::SIDE, j::SIDE]])
        if not part.size:
            return False
        shares.append((part < 0.1 * math.sqrt((part**2).mean())).mean())
    least = max(ON_GRID, BY_CHANCE / math.sqrt(part.size))
    return max(shares) > np.median(shares) + least
