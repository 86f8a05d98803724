"""Fusing the ensemble with the observation, which still shows what the network missed."""

import torch
from torch.nn import functional as F

from network.fusing.plug import convolve, refine
from network.fusing.residual import wiener
from network.fusing.second import second_estimate
from network.fusing.similar import filter_slabs

BINS = 8  # of the residual's spectrum, along either side
QUIET_SHARE = 0.25  # share of its bins taken to hold hardly anything but noise

# A frequency of which a blur has left less power than this is not regained, whatever the
# noise: rounding would be multiplied.
LEAST_POWER = 1e-4
# Dividing by the blur's transfer function makes noise stronger: by no more than brings it
# to this many times the ensemble's error.
AMPLIFICATION = 12

UNBLURRED = 0.999  # power that every frequency keeps where nothing is blurred
# Noise, 0-255 scale, up to which there is no second pass; and under a blur.
LEAST_SIGMA, LEAST_BLURRED = 0.5, 0.1
AROUND = 25  # pixels a side, over which the residual's energy tells what f missed

# Measured on crops of House, Peppers and kodim01, sigma 10 to 50. With e the ensemble's
# squared error, s^2 the noise's variance and q = s^2 / e:
SPREAD = 2.2  # e = SPREAD * the predictions' variance
CAUTION = 0.001  # energy taken for noise = s^2 * (1 + min(1, CAUTION * q^2))
SECOND = 0.5  # share of the second estimate in its mean with the second pass's
GAIN = 0.3  # of a share l of e that is left, the second pass leaves l * (1 - GAIN * (1 - l))


def opponent(like):
    """Return the matrix that takes colours to luminance and two colour differences.

    It is orthonormal: white noise stays white. Of a gray image it is the identity.

    Args:
        like: an image (C, H, W), of whose type and on whose device it is.
    """
    matrix = torch.eye(len(like))
    if len(like) == 3:
        matrix = torch.tensor([[1.0, 1, 1], [1, 0, -1], [1, -2, 1]])
    return (matrix / matrix.norm(dim=1, keepdim=True)).to(like)


def fuse_noisy(ensemble, variance, observation, known, sigma, forward_operator):
    """Give the ensemble's mean back what its residual holds besides noise.

    All is done by plane: see `opponent`. The residual r = y - A(f) is noise, and the
    error of f under A. In overlapping patches its energy in a frequency, averaged over a
    window and the frequencies beside it, is E = s^2 + e, with s^2 the noise's and e the
    error's, which so is known without a clean image; r e / E is the best linear estimate
    of A(x - f), and divided by A's transfer function of x - f. For A = identity and flat
    energies that is the inverse-variance mean of f and y; but a network errs in some
    frequencies and places. The noise's energy varies: the less error there is to find,
    by the predictions' variance, the more of E is taken for noise. Nor is a sigma
    believed that is lower than what the quiet quarter of the residual's spectrum holds,
    less the error.

    A second pass over similar patches follows: see `similar.filter_slabs`. Its
    observation is y, or under a blur f + r / A's transfer function, and with the result
    in f's place once more. Where nothing is blurred, its mean with `second_estimate` is
    taken, which knows y alone and so errs differently. Where the pass risks more than f
    errs, f is kept: see `keep_safer`.

    Args:
        ensemble: f, the mean prediction, (C, H, W), [0, 1] scale.
        variance: of the predictions, by plane, of the same shape.
        observation: y, likewise.
        known: 1 where an entry of y is known, else 0: (C, H, W) or (1, H, W). Elsewhere
            f stands in y's place. For holes without noise see missing.fill_holes.
        sigma: s, standard deviation of y's white noise on the 0-255 scale. None: it is
            not known, and all of the residual counts as noise. Under a blur that is
            nearly so, for A leaves little of the error of f.
        forward_operator: A, linear, for every channel by itself and the same at every
            place of the image, which it takes as periodic; from and to (1, C, H, W).

    Returns:
        The fused restoration, and its squared error as predicted from the variance;
        both (C, H, W), float32, on the CPU.
    """
    y = torch.as_tensor(observation, dtype=torch.float32)
    f, variance, known = (torch.as_tensor(x).to(y) for x in (ensemble, variance, known))
    size, share = y.shape[1:], known.mean().item()
    y = torch.where(known > 0, y, forward_operator(f[None])[0])
    known = known.amax(0, keepdim=True)
    planes = opponent(y)
    y, f = (torch.tensordot(planes, x, 1) for x in (y, f))
    # No array is kept that is not needed again: of large pictures memory is short.
    del ensemble, observation
    # Beside unknown entries, such as lamps, predictions vary more than elsewhere.
    mean = (known * variance).mean((1, 2), keepdim=True) / known.mean()
    mean = (SPREAD * mean).clamp(min=1e-12)
    residual = known * (y - forward_operator(f[None])[0])
    impulse = y.new_zeros(1, 1, *size)
    impulse[..., 0, 0] = 1
    transfer = torch.fft.rfft2(forward_operator(impulse)[0])
    power = transfer.abs() ** 2
    if sigma is None:
        noise = (residual**2).mean().item() / share
    else:
        noise = quiet_energy(residual) / share - mean.mean() * power.mean()
        noise = max((sigma / 255) ** 2, noise.item())
    passed = bounded(power, noise / mean)
    ratio = noise * (1 / passed).mean((1, 2), keepdim=True) / mean
    # Twice the noise's energy is not chance, whatever the predictions agree upon.
    margin = 1 + (CAUTION * ratio**2).clamp(max=1)
    residual = wiener(residual, margin * noise)
    pilot = f + convolve(residual, transfer.conj() / passed)
    del residual
    left = torch.maximum(noise / (mean * power + noise + 1e-12), 1 - power / passed)
    left = left.mean((1, 2), keepdim=True)
    del passed
    expected = SPREAD * left * variance
    if (power < UNBLURRED).any():
        if noise > (LEAST_BLURRED / 255) ** 2:
            pilot, expected = refine(pilot, mean, y, known, noise, transfer)
    elif noise > (LEAST_SIGMA / 255) ** 2:
        expected *= 1 - GAIN * (1 - left)
        second = second_estimate(y, noise)
        restored = f + convolve(
            known * (y - forward_operator(f[None])[0]), transfer.conj()
        )
        given = f, variance, restored, noise
        slabs, top = [], 0
        for estimate, risk in filter_slabs(pilot, restored, noise):
            rows = slice(top, top + estimate.shape[1])
            estimate = estimate.lerp(second[:, rows], SECOND)
            slabs.append(keep_safer(estimate, risk, top, *given))
            top = rows.stop
        pilot = torch.cat(slabs, 1)
    fused = torch.tensordot(planes.T, pilot, 1)
    error = torch.tensordot(planes.T**2, expected, 1)  # planes err independently
    return fused.cpu().numpy(), error.cpu().numpy()


def keep_safer(estimate, risk, top, f, variance, restored, level):
    """Take f in a slab where the second pass risks more than f errs.

    How much f errs its predictions' variance tells, or the energy nearby of what the
    pass's observation has besides f and its noise.

    Args:
        estimate, risk: of the pass, (C, rows, W), from row `top` on.
        f, variance, restored: the ensemble, its predictions' variance and the pass's
            observation, (C, H, W).
        level: variance of that one's noise.
    """
    bottom, edge = top + estimate.shape[1], AROUND // 2
    first = max(0, top - edge)
    near = (x[:, first : bottom + edge] for x in (restored, f))
    energy = torch.sub(*near) ** 2
    missed = F.avg_pool2d(energy, AROUND, 1, edge, count_include_pad=False)
    rows, within = slice(top, bottom), slice(top - first, bottom - first)
    missed = missed[:, within] - level
    ratio = risk / torch.maximum(SPREAD * variance[:, rows], missed).clamp(min=1e-12)
    return estimate.lerp(f[:, rows], ratio**2 / (1 + ratio**2))


def bounded(power, noise_over_error):
    """Bound from below what is divided by, the power that a blur has left: (C, H, W')."""
    least = (noise_over_error / AMPLIFICATION).clamp(min=LEAST_POWER, max=1)
    return torch.maximum(power, least)


def quiet_energy(residual):
    """Return the energy of a residual's spectrum that its quietest quarter stays below."""
    spectra = (torch.fft.rfft2(plane, norm="ortho").abs() ** 2 for plane in residual)
    bins = [
        [
            part.mean()
            for rows in spectrum.tensor_split(BINS)
            for part in rows.tensor_split(BINS, 1)
        ]
        for spectrum in spectra  # one by one, for memory's sake
    ]
    return torch.tensor(bins).mean(0).quantile(QUIET_SHARE).item()
