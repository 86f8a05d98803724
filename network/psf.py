"""The PSF of a blurred picture, estimated from the picture alone.

From coarse to fine two steps alternate: a latent picture of few, strong edges (L0
gradients: Xu, Lu, Xu, Jia 2011; Pan, Hu, Su, Yang 2014), which cannot explain the blur, and
the PSF that brings its gradients to the blurred picture's (Cho, Lee 2009). Scales at which
blur and noise have left nothing are not gone to. At the last scale, once more, less of the
PSF is cut, and its thin tails are found.
"""

import math

import numpy as np
import scipy.fft
import scipy.ndimage

from network.scale import find_scale

SIDE = 512  # pixels: of a larger picture the part with the strongest edges is looked at
# Weight of the number of gradients; from one alternation to the next it is divided.
SPARSE, LESS, LEAST = 0.032, 1.1, 1e-4
SECOND, ALIKE = 0.012, 0.7  # a second estimate's, and how the two correlate: see doubt
# Alternations, and what is cut, see _normal: at every scale; at the last once more, from
# an AGAIN-th of the weight on.
ROUGH, FINE, AGAIN = (5, 0.05, 0.1), (30, 0.02, 0.02), 5
RIDGE = 0.002  # weight of the PSF's squares, times the gradients' sum of squares
STEPS = 150  # of FISTA (Beck, Teboulle 2009)
POINT = 1 / 3  # share of a PSF at its centre from which there is hardly any blur
DETAIL = 1.3  # times the energy of noise, from which there is detail
EDGE = 0.02  # share of a PSF at its edge: see doubt


def estimate_psf(y, size, sparse=SPARSE):
    """Estimate the PSF of a picture that is blurred alike everywhere.

    Args:
        y: the blurred picture, (C, H, W), in any units, twice as large as the PSF.
        size: side of the PSF's array, pixels, odd.
        sparse: weight of the number of gradients, to begin with.

    Returns:
        k, (size, size), not below 0, of sum 1, centred; a point for half a pixel or less.
    """
    gray = _part(find_scale(y, np.ones((1, 1, 1))).to(y).mean(0))
    first = max(0, math.ceil(2 * math.log2(size / 3)))  # the coarsest of the scales
    last, psf = min(_finest(gray), first), point(3)
    weights = [sparse / LESS ** (ROUGH[0] * i) for i in range(1 + first - last)]
    rounds = [(first - i, weight, ROUGH) for i, weight in enumerate(weights)]
    for scale, weight, (alternations, *cuts) in [*rounds, (last, sparse / AGAIN, FINE)]:
        factor = 2 ** (-scale / 2)
        blurred = _resized(gray, [round(length * factor) for length in gray.shape])
        side = min(max(3, math.ceil(size * factor) // 2 * 2 + 1), size)
        psf = _normal(_resized(psf, (side, side)), *cuts)
        periodic, inside = _periodic(blurred, side)
        for i in range(alternations):
            latent = _sharpened(periodic, psf, max(weight / LESS**i, LEAST))
            if np.ptp(latent) > 0:  # else nothing of it is strong enough to tell
                psf = _normal(_fit(latent, periodic, inside, side), *cuts)
    if psf[side // 2, side // 2] > POINT:
        return point(size)
    shrunk = np.divide(blurred.shape, gray.shape)
    start = side // 2 - shrunk * (size // 2)
    psf = scipy.ndimage.affine_transform(psf, shrunk, start, (size, size), order=1)
    return _normal(psf, *FINE[1:])


def _finest(gray):
    """Return the last scale at which a picture (H, W) shows detail in some direction."""
    window = np.outer(*map(np.hanning, gray.shape))
    power = np.abs(scipy.fft.fft2((gray - gray.mean()) * window)) ** 2
    down, right = np.meshgrid(*map(scipy.fft.fftfreq, gray.shape), indexing="ij")
    scales = 2 * np.log2(0.5 / np.maximum(np.hypot(down, right), 1e-9)) // 1
    parts = 8 * scales + np.arctan2(down, right) % np.pi // (np.pi / 8)
    most = scipy.ndimage.mean(power, parts, np.arange(32)).reshape(4, 8).max(1)
    return np.argmax([*(most > DETAIL * power[scales < 0].mean()), True])


def doubt(psf, second):
    """Say what to think of an estimated PSF (h, w); another weight hardly changes a sure one."""
    if psf.max() == 1:
        return "hardly any blur is found; nothing is deblurred"
    if psf.sum() - psf[1:-1, 1:-1].sum() > EDGE:
        return "the PSF fills its array; a larger --kernel_size may be better"
    size = [2 * n for n in psf.shape]
    both = scipy.fft.rfft2(psf, size) * scipy.fft.rfft2(second, size).conj()
    alike = scipy.fft.irfft2(both, size).max()
    if alike < ALIKE * np.sqrt((psf**2).sum() * (second**2).sum()):
        return "the PSF is uncertain: two estimates differ; kernel.png shows one"
    return "the PSF is estimated; kernel.png shows it"


def _part(gray):
    """Return the part of a picture (H, W), SIDE pixels a side, that has the most edges."""
    edges = scipy.ndimage.gaussian_gradient_magnitude(gray, 2)
    h, w = np.minimum(gray.shape, SIDE)
    sums = scipy.ndimage.uniform_filter(edges, (h, w), origin=(-(h // 2), -(w // 2)))
    sums = sums[: len(gray) - h + 1, : gray.shape[1] - w + 1]
    top, left = np.unravel_index(sums.argmax(), sums.shape)
    return gray[top : top + SIDE, left : left + SIDE]


def point(side):
    """Return the PSF (side, side) of no blur."""
    psf = np.zeros((side, side))
    psf[side // 2, side // 2] = 1
    return psf


def _resized(x, size):
    """Bring an image (H, W) to another size."""
    import torch  # late: see network/__init__.py

    x = torch.from_numpy(np.float64(x))[None, None]
    made = torch.nn.functional.interpolate(
        x, tuple(size), mode="bilinear", antialias=True
    )
    return made[0, 0].numpy()


def _periodic(blurred, margin):
    """Continue a picture (H, W) so that it is periodic: a ramp from edge to edge.

    Returns it, and 1 where its gradients are the picture's, else 0.
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
    """Put a PSF into a larger array, periodic, its middle at the first entry."""
    h, w = psf.shape
    padded = np.pad(psf, ((0, size[0] - h), (0, size[1] - w)))
    return np.roll(padded, (-(h // 2), -(w // 2)), (0, 1))


def _gradients(x):
    """Return the periodic differences of x (H, W) downwards and to the right."""
    return np.stack([np.roll(x, -1, axis) - x for axis in (0, 1)])


def _sharpened(blurred, psf, sparse):
    """Return the latent picture: of few gradients, and blurred it is the blurred one.

    By half-quadratic splitting: gradients whose squares are below sparse / b are 0, the
    picture has nearly those, and b is doubled. In float32, for speed.
    """
    size, blurred = blurred.shape, np.float32(blurred)
    transfer = np.complex64(scipy.fft.rfft2(_place(psf, size)))
    differences = scipy.fft.rfft2(_gradients(np.float32(_place(np.ones((1, 1)), size))))
    power, smooth = np.abs(transfer) ** 2, (np.abs(differences) ** 2).sum(0)
    given = transfer.conj() * scipy.fft.rfft2(blurred)
    latent, b = blurred, 2 * sparse
    while b < 1e5:
        kept = _gradients(latent)
        kept[:, (kept**2).sum(0) < sparse / b] = 0
        down, right = (np.roll(kept[axis], 1, axis) - kept[axis] for axis in (0, 1))
        wanted = scipy.fft.rfft2(down + right)
        latent = scipy.fft.irfft2((given + b * wanted) / (power + b * smooth), size)
        b *= 2
    return latent


def _fit(latent, blurred, inside, side):
    """Return the PSF (side, side), not below 0, that brings gradients to the blurred ones.

    Least squares with a ridge, by FISTA; what it multiplies by is the gradients'
    autocorrelation.
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
    for _ in range(STEPS):
        product = scipy.fft.irfft2(shared * scipy.fft.rfft2(ahead, size), size)
        slope = product[:side, :side] + ridge * ahead - wanted
        before, psf = psf, np.maximum(ahead - step * slope, 0)
        t, last = (1 + math.sqrt(1 + 4 * t**2)) / 2, t
        ahead = psf + (last - 1) / t * (psf - before)
    return psf


def _normal(psf, smallest, island):
    """Cut a PSF; centre it, and make its sum 1.

    What is cut is below a share of its maximum, or is a part with less of its sum.
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
