"""Estimates the PSF of a blurred picture from the picture alone.

Two steps alternate, from a coarse scale to a fine one. The first finds a latent picture
with few, strong edges (L0 gradients: Xu, Lu, Xu, Jia 2011; Pan, Hu, Su, Yang 2014), so that
the picture itself cannot explain the blur. The second finds the PSF that maps its gradients
to those of the blurred picture (Cho, Lee 2009). Fine scales without any detail left by blur
and noise are skipped. The last scale is repeated with a lower threshold, which keeps the
PSF's thin tails.
"""

import math

import numpy as np
import scipy.fft
import scipy.ndimage

from network.scale import find_scale

PART_SIDE = 512  # pixels; only the part of a larger picture with the most edges is used
# Weight of the number of gradients: at first, its divisor per alternation, its minimum.
SPARSITY, DECAY, MIN_SPARSITY = 0.032, 1.1, 1e-4
# Weight for a second estimate, and the least correlation of two that agree: see doubt.
SECOND_SPARSITY, MIN_AGREEMENT = 0.012, 0.7
# Alternations and the two thresholds of _normalise: at every scale, then at the last scale
# once more, with the weight divided by FINE_DIVISOR.
ROUGH, FINE, FINE_DIVISOR = (5, 0.05, 0.1), (30, 0.02, 0.02), 5
RIDGE = 0.002  # weight of the PSF's squares, over the gradients' sum of squares
FISTA_STEPS = 150
MAX_CENTRE = 1 / 3  # share of a PSF at its centre; above it there is hardly any blur
MIN_DETAIL = 1.3  # energy of a frequency band with detail, over that of noise
MAX_EDGE = 0.02  # share of a PSF at the edge of its array: see doubt


def estimate_psf(y, size, sparsity=SPARSITY):
    """Estimate the PSF of a picture that is blurred equally everywhere.

    Args:
        y: the blurred picture, (C, H, W), in any units, sides of twice `size` or more.
        size: side of the PSF's array, pixels, odd.
        sparsity: initial weight of the number of gradients.

    Returns:
        k, (size, size), non-negative, sum 1, centred; a point for a blur of half a pixel
        or less.
    """
    gray = _part(find_scale(y, np.ones((1, 1, 1))).to(y).mean(0))
    first = max(0, math.ceil(2 * math.log2(size / 3)))  # the coarsest scale
    last, psf = min(_finest(gray), first), point(3)
    weights = [sparsity / DECAY ** (ROUGH[0] * i) for i in range(1 + first - last)]
    rounds = [(first - i, weight, ROUGH) for i, weight in enumerate(weights)]
    rounds.append((last, sparsity / FINE_DIVISOR, FINE))
    for scale, weight, (alternations, *thresholds) in rounds:
        factor = 2 ** (-scale / 2)
        blurred = _resized(gray, [round(length * factor) for length in gray.shape])
        side = min(max(3, math.ceil(size * factor) // 2 * 2 + 1), size)
        psf = _normalise(_resized(psf, (side, side)), *thresholds)
        periodic, inside = _periodic(blurred, side)
        for i in range(alternations):
            lowered = max(weight / DECAY**i, MIN_SPARSITY)
            latent = _sharpened(periodic, psf, lowered)
            if np.ptp(latent) > 0:  # else no gradient is strong enough
                psf = _normalise(_fit(latent, periodic, inside, side), *thresholds)
    if psf[side // 2, side // 2] > MAX_CENTRE:
        return point(size)
    shrunk = np.divide(blurred.shape, gray.shape)
    start = side // 2 - shrunk * (size // 2)
    psf = scipy.ndimage.affine_transform(psf, shrunk, start, (size, size), order=1)
    return _normalise(psf, *FINE[1:])


def _finest(gray):
    """Return the finest scale at which a picture (H, W) has detail in some direction.

    Scale s is the picture shrunk by 2^(-s / 2).
    """
    window = np.outer(*map(np.hanning, gray.shape))
    power = np.abs(scipy.fft.fft2((gray - gray.mean()) * window)) ** 2
    down, right = np.meshgrid(*map(scipy.fft.fftfreq, gray.shape), indexing="ij")
    scales = 2 * np.log2(0.5 / np.maximum(np.hypot(down, right), 1e-9)) // 1
    parts = 8 * scales + np.arctan2(down, right) % np.pi // (np.pi / 8)
    most = scipy.ndimage.mean(power, parts, np.arange(32)).reshape(4, 8).max(1)
    return np.argmax([*(most > MIN_DETAIL * power[scales < 0].mean()), True])


def doubt(psf, second):
    """Return a sentence on how reliable an estimated PSF is.

    Args:
        psf: the estimate, (h, w).
        second: the estimate with SECOND_SPARSITY, (h, w). A reliable PSF hardly changes.
    """
    if psf.max() == 1:
        return "hardly any blur is found; nothing is deblurred"
    if psf.sum() - psf[1:-1, 1:-1].sum() > MAX_EDGE:
        return "the PSF fills its array; a larger --kernel_size may be better"
    size = [2 * n for n in psf.shape]
    both = scipy.fft.rfft2(psf, size) * scipy.fft.rfft2(second, size).conj()
    agreement = scipy.fft.irfft2(both, size).max()
    if agreement < MIN_AGREEMENT * np.sqrt((psf**2).sum() * (second**2).sum()):
        return "the PSF is uncertain: two estimates differ; kernel.png shows one"
    return "the PSF is estimated; kernel.png shows it"


def _part(gray):
    """Return the PART_SIDE x PART_SIDE part of a picture (H, W) with the most edges."""
    edges = scipy.ndimage.gaussian_gradient_magnitude(gray, 2)
    h, w = np.minimum(gray.shape, PART_SIDE)
    sums = scipy.ndimage.uniform_filter(edges, (h, w), origin=(-(h // 2), -(w // 2)))
    sums = sums[: len(gray) - h + 1, : gray.shape[1] - w + 1]
    top, left = np.unravel_index(sums.argmax(), sums.shape)
    return gray[top : top + PART_SIDE, left : left + PART_SIDE]


def point(side):
    """Return the PSF (side, side) of no blur."""
    psf = np.zeros((side, side))
    psf[side // 2, side // 2] = 1
    return psf


def _resized(x, size):
    """Resize an image (H, W) to `size`, antialiased."""
    import torch  # late: see network/__init__.py

    x = torch.from_numpy(np.float64(x))[None, None]
    made = torch.nn.functional.interpolate(
        x, tuple(size), mode="bilinear", antialias=True
    )
    return made[0, 0].numpy()


def _periodic(blurred, margin):
    """Pad a picture (H, W) with a ramp from edge to edge, which makes it periodic.

    Returns the padded picture, and a mask: 1 where its gradients are the picture's, else 0.
    """
    size = [scipy.fft.next_fast_len(n + 2 * margin, True) for n in blurred.shape]
    padded = blurred
    for axis, (n, m) in enumerate(zip(blurred.shape, size)):
        ramp = np.linspace(0, 1, m - n + 2)[1:-1]
        first, last = padded.take([0], axis), padded.take([-1], axis)
        ramp = ramp[:, None] if axis == 0 else ramp
        padded = np.concatenate((padded, last + (first - last) * ramp), axis)
    inside = np.zeros(size)
    inside[1 : blurred.shape[0] - 1, 1 : blurred.shape[1] - 1] = 1
    return padded, inside


def _place(psf, size):
    """Put a PSF into a larger periodic array, its centre at the first entry."""
    h, w = psf.shape
    padded = np.pad(psf, ((0, size[0] - h), (0, size[1] - w)))
    return np.roll(padded, (-(h // 2), -(w // 2)), (0, 1))


def _gradients(x):
    """Return the periodic differences of x (H, W) downwards and to the right."""
    return np.stack([np.roll(x, -1, axis) - x for axis in (0, 1)])


def _sharpened(blurred, psf, sparsity):
    """Return the latent picture z, which minimises |k*z - y|^2 + sparsity |gradients z|_0.

    Half-quadratic splitting: gradients whose square is below sparsity / b become 0, z is
    fitted to the rest with the weight b, and b doubles. In float32, for speed.
    """
    size, blurred = blurred.shape, np.float32(blurred)
    transfer = np.complex64(scipy.fft.rfft2(_place(psf, size)))
    differences = scipy.fft.rfft2(_gradients(np.float32(_place(np.ones((1, 1)), size))))
    power, smooth = np.abs(transfer) ** 2, (np.abs(differences) ** 2).sum(0)
    given = transfer.conj() * scipy.fft.rfft2(blurred)
    latent, b = blurred, 2 * sparsity
    while b < 1e5:
        kept = _gradients(latent)
        kept[:, (kept**2).sum(0) < sparsity / b] = 0
        down, right = (np.roll(kept[axis], 1, axis) - kept[axis] for axis in (0, 1))
        wanted = scipy.fft.rfft2(down + right)
        latent = scipy.fft.irfft2((given + b * wanted) / (power + b * smooth), size)
        b *= 2
    return latent


def _fit(latent, blurred, inside, side):
    """Return the PSF that maps the latent gradients to the blurred ones.

    Least squares with a ridge, by FISTA (Beck, Teboulle 2009). Its matrix is a convolution
    with the autocorrelation of the gradients.

    Args:
        latent, blurred: periodic pictures (H, W).
        inside: 1 where gradients count, else 0.
        side: of the PSF, pixels.

    Returns:
        (side, side), non-negative.
    """
    made, seen = inside * _gradients(latent), inside * _gradients(blurred)
    spectrum = scipy.fft.rfft2(made)
    place = np.arange(side) - side // 2
    lags = np.arange(-2 * (side // 2), 2 * (side // 2) + 1)
    shared = scipy.fft.irfft2((np.abs(spectrum) ** 2).sum(0), blurred.shape)
    wanted = (spectrum.conj() * scipy.fft.rfft2(seen)).sum(0)
    wanted = scipy.fft.irfft2(wanted, blurred.shape)[np.ix_(place, place)]
    size = [scipy.fft.next_fast_len(3 * side, True)] * 2
    shared = scipy.fft.rfft2(_place(shared[np.ix_(lags, lags)], size))
    ridge = RIDGE * (made**2).sum()
    step = 1 / (np.abs(shared).max() + ridge)
    psf = ahead = np.full((side, side), 1 / side**2)
    t = 1.0
    for _ in range(FISTA_STEPS):
        product = scipy.fft.irfft2(shared * scipy.fft.rfft2(ahead, size), size)
        slope = product[:side, :side] + ridge * ahead - wanted
        before, psf = psf, np.maximum(ahead - step * slope, 0)
        t, last = (1 + math.sqrt(1 + 4 * t**2)) / 2, t
        ahead = psf + (last - 1) / t * (psf - before)
    return psf


def _normalise(psf, smallest, island):
    """Clean and centre a PSF, and make its sum 1.

    Args:
        psf: (side, side).
        smallest: share of the maximum; lower entries become 0.
        island: share of the sum; connected parts with less become 0.
    """
    psf = np.where(psf < smallest * psf.max(), 0, psf)
    labels, count = scipy.ndimage.label(psf, np.ones((3, 3)))
    sums = scipy.ndimage.sum_labels(psf, labels, np.arange(1, count + 1))
    psf = psf * np.isin(labels, 1 + np.flatnonzero(sums >= island * psf.sum()))
    if not psf.sum() > 0:
        return point(len(psf))
    centre = scipy.ndimage.center_of_mass(psf)
    shift = [round((n - 1) / 2 - c) for n, c in zip(psf.shape, centre)]
    psf = scipy.ndimage.shift(psf, shift, order=0)
    return psf / psf.sum()
