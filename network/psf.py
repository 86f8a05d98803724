"""The PSF of a blurred picture, estimated from the picture alone.

Two steps alternate, from the coarsest scale to the finest:

1. Estimate a latent picture with few, strong edges (L0 gradients: Xu, Lu, Xu, Jia 2011; Pan,
   Hu, Su, Yang 2014). Such a picture cannot contain the blur.
2. Estimate the PSF that turns the gradients of the latent picture into those of the blurred
   one (Cho, Lee 2009).

Scales at which blur and noise have left no detail are skipped. The last scale is repeated, and
then less of the PSF is cut away, which keeps its thin tails.
"""

import math

import numpy as np
import scipy.fft
import scipy.ndimage
from skimage.registration import phase_cross_correlation

from network.scale import find_scale

# A PSF has a camera's offset where its border's extremes differ by a factor of at most FLAT
# and the border's median is below LOW of the peak.
FLAT, LOW = 1.3, 0.2
MAX_MATCHED = 1024  # side of the central part that finds a shift, pixels
PATCH_SIDE = 512  # pixels; the PSF is estimated from the part with the strongest edges
# Weight of the number of gradients: its start, its divisor after each alternation, its least.
SPARSE, SPARSE_DIVISOR, MIN_SPARSE = 0.032, 1.1, 1e-4
# `doubt` compares two estimates. The second one's weight; and the correlation below which the
# PSF is uncertain.
SECOND_SPARSE, MIN_CORRELATION = 0.012, 0.7
# Alternations, and what _normalise cuts: at every scale; when the last one is repeated, from
# the weight SPARSE / FINE_DIVISOR on.
ROUGH, FINE, FINE_DIVISOR = (5, 0.05, 0.1), (30, 0.02, 0.02), 5
# Weight of the PSF's squares, as a share of the gradients' sum of squares.
RIDGE = 0.002
FISTA_STEPS = 150  # Beck, Teboulle 2009
MAX_CENTRE = 1 / 3  # share of a PSF at its centre; with more there is hardly any blur
DETAIL = 1.3  # least energy of a band with detail, in units of the noise's energy
MAX_EDGE = 0.02  # share of a PSF at its array's edge; with more the array is too small


def estimate_psf(y, size, sparse=SPARSE):
    """Estimate the PSF of a picture that has the same blur everywhere.

    Args:
        y: the blurred picture, (C, H, W), in any units, at least twice as large as the PSF.
        size: side of the PSF's array in pixels, odd.
        sparse: weight of the number of gradients at first.

    Returns:
        The PSF k, (size, size), non-negative, with the sum 1, centred. It is a point if
        the blur is half a pixel or less.
    """
    gray = _sharpest_part(find_scale(y, np.ones((1, 1, 1))).to(y).mean(0))
    first = max(0, math.ceil(2 * math.log2(size / 3)))  # the coarsest of the scales
    last, psf = min(_finest_scale(gray), first), point(3)
    weights = [
        sparse / SPARSE_DIVISOR ** (ROUGH[0] * i) for i in range(1 + first - last)
    ]
    rounds = [(first - i, weight, ROUGH) for i, weight in enumerate(weights)]
    rounds.append((last, sparse / FINE_DIVISOR, FINE))
    for scale, weight, (alternations, *cuts) in rounds:
        factor = 2 ** (-scale / 2)
        blurred = _resize(gray, [round(length * factor) for length in gray.shape])
        side = min(max(3, math.ceil(size * factor) // 2 * 2 + 1), size)
        psf = _normalise(_resize(psf, (side, side)), *cuts)
        periodic, inside = _make_periodic(blurred, side)
        for i in range(alternations):
            latent = _estimate_latent(
                periodic, psf, max(weight / SPARSE_DIVISOR**i, MIN_SPARSE)
            )
            if np.ptp(latent) > 0:  # else no edge is strong enough
                psf = _normalise(_fit_psf(latent, periodic, inside, side), *cuts)
    if psf[side // 2, side // 2] > MAX_CENTRE:
        return point(size)
    shrunk = np.divide(blurred.shape, gray.shape)
    start = side // 2 - shrunk * (size // 2)
    psf = scipy.ndimage.affine_transform(psf, shrunk, start, (size, size), order=1)
    return _normalise(psf, *FINE[1:])


def _finest_scale(gray):
    """Return the finest scale at which a picture (H, W) shows detail in some direction.

    Scale s halves the picture s / 2 times.
    """
    window = np.outer(*map(np.hanning, gray.shape))
    power = np.abs(scipy.fft.fft2((gray - gray.mean()) * window)) ** 2
    down, right = np.meshgrid(*map(scipy.fft.fftfreq, gray.shape), indexing="ij")
    scales = 2 * np.log2(0.5 / np.maximum(np.hypot(down, right), 1e-9)) // 1
    parts = 8 * scales + np.arctan2(down, right) % np.pi // (np.pi / 8)
    most = scipy.ndimage.mean(power, parts, np.arange(32)).reshape(4, 8).max(1)
    return np.argmax([*(most > DETAIL * power[scales < 0].mean()), True])


def doubt(psf, second):
    """Return a sentence on how far to trust an estimated PSF.

    Args:
        psf: the estimate, (h, w).
        second: another one, made with the weight SECOND_SPARSE; a sure PSF hardly depends on it.
    """
    if psf.max() == 1:
        return "hardly any blur is found; nothing is deblurred"
    if psf.sum() - psf[1:-1, 1:-1].sum() > MAX_EDGE:
        return "the PSF fills its array; a larger --kernel_size may be better"
    size = [2 * n for n in psf.shape]
    both = scipy.fft.rfft2(psf, size) * scipy.fft.rfft2(second, size).conj()
    alike = scipy.fft.irfft2(both, size).max()
    if alike < MIN_CORRELATION * np.sqrt((psf**2).sum() * (second**2).sum()):
        return "the PSF is uncertain: two estimates differ; kernel.png shows one"
    return "the PSF is estimated; kernel.png shows it"


def off_centre(psf):
    """Return a line that says how far a PSF (h, w) moves the picture; "" if by 1 pixel or less."""
    down, right = (
        (psf.sum(1 - axis) * np.arange(size)).sum() - size // 2
        for axis, size in enumerate(psf.shape)
    )
    if np.hypot(down, right) <= 1:
        return ""
    return (
        f"The PSF's mass lies {abs(right):.1f} pixels {'right' if right > 0 else 'left'} "
        f"of its array's centre and {abs(down):.1f} {'below' if down > 0 else 'above'}: "
        "the restored picture is moved as far the other way.\n"
    )


def without_offset(psf):
    """Return a PSF (h, w) without the offset that a camera adds to a picture of it.

    A PSF whose border is not flat, or not dark, is returned as it is.
    """
    border = np.concatenate([psf[0], psf[-1], psf[1:-1, 0], psf[1:-1, -1]])
    offset = np.median(border)
    if border.max() > FLAT * border.min() or not 0 < offset < LOW * psf.max():
        return psf
    psf = (psf - offset).clip(0)
    return psf / psf.sum()


def find_shift(image, clean):
    """Return how far an image lies (down, right) of the clean one, in pixels; None: not found.

    An estimated PSF, or one whose mass lies off its centre, moves the result, and the
    result's plain PSNR means little. The shift, to 1/20 of a pixel, maximises the
    cross-correlation (Guizar-Sicairos et al. 2008). Images (C, H, W).
    """
    size = clean.shape[1:]
    middle = (slice(max(0, n - MAX_MATCHED) // 2, (n + MAX_MATCHED) // 2) for n in size)
    middle = (slice(None), *middle)
    fixed, gray = (x[middle].mean(0, dtype=np.float64) for x in (clean, image))
    if not np.isfinite(fixed).all() or min(np.ptp(fixed), np.ptp(gray)) == 0:
        return None
    window = np.outer(*map(np.hanning, fixed.shape))
    shift = np.zeros(2)
    # The window pulls the first shift towards 0, and the later ones less.
    for _ in range(3):
        moved = scipy.ndimage.shift(fixed, shift, mode="nearest")
        pair = [(x - x.mean()) * window for x in (gray, moved)]
        settings = {"upsample_factor": 20, "normalization": None}
        shift = shift + phase_cross_correlation(*pair, **settings)[0]
        if (np.abs(shift) > np.array(fixed.shape) / 4).any():
            return None
    return shift


def _sharpest_part(gray):
    """Return the part of a picture (H, W) with the strongest edges, PATCH_SIDE pixels a side."""
    edges = scipy.ndimage.gaussian_gradient_magnitude(gray, 2)
    h, w = np.minimum(gray.shape, PATCH_SIDE)
    sums = scipy.ndimage.uniform_filter(edges, (h, w), origin=(-(h // 2), -(w // 2)))
    sums = sums[: len(gray) - h + 1, : gray.shape[1] - w + 1]
    top, left = np.unravel_index(sums.argmax(), sums.shape)
    return gray[top : top + PATCH_SIDE, left : left + PATCH_SIDE]


def point(side):
    """Return the PSF that blurs nothing, (side, side)."""
    psf = np.zeros((side, side))
    psf[side // 2, side // 2] = 1
    return psf


def _resize(x, size):
    """Resize an image (H, W) to size = (H', W')."""
    import torch  # late: see network/__init__.py

    x = torch.from_numpy(np.float64(x))[None, None]
    made = torch.nn.functional.interpolate(
        x, tuple(size), mode="bilinear", antialias=True
    )
    return made[0, 0].numpy()


def _make_periodic(blurred, margin):
    """Extend a picture (H, W) to a periodic one, with ramps from edge to opposite edge.

    Args:
        margin: pixels added on each side, at least.

    Returns:
        The periodic picture (H', W'), and a mask (H', W'): 1 where its gradients are those
        of the picture, else 0.
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
    """Put a PSF into a larger periodic array of a size, with its centre at entry (0, 0)."""
    h, w = psf.shape
    padded = np.pad(psf, ((0, size[0] - h), (0, size[1] - w)))
    return np.roll(padded, (-(h // 2), -(w // 2)), (0, 1))


def _gradients(x):
    """Return the periodic differences of x (H, W), down and to the right: (2, H, W)."""
    return np.stack([np.roll(x, -1, axis) - x for axis in (0, 1)])


def _estimate_latent(blurred, psf, sparse):
    """Estimate a picture with few gradients that, blurred by a PSF, gives the blurred one.

    Half-quadratic splitting: set gradients whose square is below sparse / b to 0, find the
    picture with about these gradients, double b, repeat. In float32, for speed.

    Args:
        blurred: (H, W), periodic.
        psf: (h, w).
        sparse: weight of the number of gradients.
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


def _fit_psf(latent, blurred, inside, side):
    """Fit the PSF (side, side) that turns latent gradients into blurred ones.

    Non-negative least squares with a ridge, by FISTA. The matrix of the normal equations is
    the autocorrelation of the gradients, applied by FFT.

    Args:
        latent, blurred: pictures (H, W), periodic.
        inside: 1 where gradients count, else 0, (H, W).
    """
    made, given = inside * _gradients(latent), inside * _gradients(blurred)
    spectrum = scipy.fft.rfft2(made)
    place = np.arange(side) - side // 2
    lags = np.arange(-2 * (side // 2), 2 * (side // 2) + 1)
    shared = scipy.fft.irfft2((np.abs(spectrum) ** 2).sum(0), blurred.shape)
    wanted = (spectrum.conj() * scipy.fft.rfft2(given)).sum(0)
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
    """Cut away a PSF's weak parts, centre it, and scale it to the sum 1.

    Args:
        psf: (side, side).
        smallest: entries below this share of the maximum become 0.
        island: so do connected parts with less than this share of the sum.
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
