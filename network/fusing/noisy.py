"""Fusing the ensemble with an observation that has white noise."""

import torch
from torch.nn import functional as F

from network.fusing.plug import convolve, refine
from network.fusing.residual import wiener
from network.fusing.second import second_estimate
from network.fusing.similar import filter_slabs

BINS = 8  # parts of the residual's spectrum along each side
QUIET_SHARE = 0.25  # of these parts; the quietest hold hardly more than noise

# Dividing by the blur's transfer function makes noise stronger: at most to this many times
# the ensemble's error.
MAX_AMPLIFICATION = 12
# A frequency that a blur leaves with less power is never restored, because the division
# would multiply rounding errors.
MIN_POWER = 1e-4

MIN_UNBLURRED = 0.999  # power that every frequency keeps if nothing is blurred
# With less noise (0-255 scale) no second pass follows, and under a blur no plug and play.
MIN_PASS_SIGMA, MIN_PLUG_SIGMA = 0.5, 0.1
# Energy of the residual's quietest quarter over that of the noise. Below this share the PSF is
# not exact.
MAX_QUIET = 0.5
ENERGY_SIDE = 25  # pixels; the residual's energy in such a window shows the error of f

# Measured on crops of House, Peppers and kodim01, sigma 10 to 50. e is the ensemble's
# squared error, s^2 the noise's variance and q = s^2 / e.
SPREAD = 2.2  # e = SPREAD * variance of the predictions
CAUTION = 0.001  # energy that counts as noise = s^2 * (1 + min(1, CAUTION * q^2))
SECOND_SHARE = 0.5  # of the second estimate in its mean with the other
# Under a blur its difference is inverted where the blur's power exceeds DAMPING s^2 / e.
DAMPING = 0.2
# If the first pass leaves the share l of e, the second leaves l * (1 - REMOVED * (1 - l)).
REMOVED = 0.3


def opponent(like):
    """Return the matrix that takes colours to luminance and two colour differences.

    We call these three, or the one channel of a gray image, planes. The matrix is
    orthonormal, so white noise stays white. For a gray image it is the identity.

    Args:
        like: an image (C, H, W); the matrix has its type and its device.
    """
    matrix = torch.eye(len(like))
    if len(like) == 3:
        matrix = torch.tensor([[1.0, 1, 1], [1, 0, -1], [1, -2, 1]])
    return (matrix / matrix.norm(dim=1, keepdim=True)).to(like)


def fuse_noisy(ensemble, variance, observation, known, sigma, forward_operator):
    """Add to the ensemble's mean what its residual holds besides noise.

    Each plane is fused by itself: see `opponent`. The residual r = y - A(f) is the noise
    plus A applied to the error of f.

    The first pass filters the residual in overlapping patches. E is the energy of a
    frequency, averaged over a window of patches and over neighbouring frequencies. E is
    the sum of the noise's energy s^2 and the error's energy e. So e is known without a
    clean image, and r e / E is the best linear estimate of A(x - f). Divided by A's
    transfer function it is an estimate of x - f. If A is the identity and all energies are
    equal, the result is the inverse-variance mean of f and y; the gain beyond that mean
    comes from frequencies and places in which the network errs more than elsewhere.

    Two rules make the first pass careful. The smaller the predictions' variance, the more
    of E counts as noise. And sigma is raised to what the quietest quarter of the
    residual's spectrum holds, less the error.

    Without a blur a second pass over similar patches follows: see `similar.filter_slabs`.
    It is averaged with `second.second_estimate`, which uses y alone and so errs
    differently. Where this risks more than f errs, f is kept: see `keep_safer`. Under a
    blur `plug.refine` follows instead. There the second estimate is one of A(x): half of
    its difference from the result is inverted and added.

    Args:
        ensemble: f, the mean prediction, (C, H, W), [0, 1] scale.
        variance: of the predictions, by plane, of the same shape.
        observation: y, of the same shape and scale.
        known: 1 where an entry of y is known, else 0: (C, H, W) or (1, H, W). A(f) stands
            in for unknown entries. For holes without noise see missing.fill_holes.
        sigma: s, standard deviation of y's white noise on the 0-255 scale. None: it is
            unknown, and the whole residual counts as noise. Under a blur that is nearly
            true, because A removes most of the error of f.
        forward_operator: A, from and to (1, C, H, W). It is linear, treats every channel
            by itself and every place alike, and takes the image as periodic.

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
    # Arrays that are not needed again are freed: large pictures fill the memory.
    del ensemble, observation
    # Beside unknown entries, such as lamps, predictions vary more than elsewhere.
    error = (known * variance).mean((1, 2), keepdim=True) / known.mean()
    error = (SPREAD * error).clamp(min=1e-12)
    residual = y - forward_operator(f[None])[0]  # 0 where y is unknown
    impulse = y.new_zeros(1, 1, *size)
    impulse[..., 0, 0] = 1
    transfer = torch.fft.rfft2(forward_operator(impulse)[0])
    power = transfer.abs() ** 2
    if sigma is None:
        noise = quiet = (residual**2).mean().item() / share
    else:
        quiet = quiet_energy(residual) / share
        noise = (quiet - error.mean() * power.mean()).item()
        noise = max((sigma / 255) ** 2, noise)
    divisor = bound_power(power, noise / error)
    ratio = noise * (1 / divisor).mean((1, 2), keepdim=True) / error
    # From 1 to 2: chance alone never doubles the energy of noise.
    caution = 1 + (CAUTION * ratio**2).clamp(max=1)
    residual = wiener(residual, caution * noise)
    pilot = f + convolve(residual, transfer.conj() / divisor)
    del residual
    left = torch.maximum(noise / (error * power + noise + 1e-12), 1 - power / divisor)
    left = left.mean((1, 2), keepdim=True)  # share of the error after the first pass
    del divisor
    expected = SPREAD * left * variance
    if (power < MIN_UNBLURRED).any():
        if noise > (MIN_PLUG_SIGMA / 255) ** 2:
            start = pilot
            pilot, expected = refine(start, error, y, known, noise, transfer)
            rest = second_estimate(y, noise) - convolve(pilot, transfer)
            inverse = transfer.conj() / (power + DAMPING * noise / error)
            pilot += SECOND_SHARE * convolve(rest, inverse)
            if quiet < MAX_QUIET * noise:
                # The rest of `noise` is the PSF's error, which the rounds of `refine` repeat.
                pilot = (start + pilot) / 2
    elif noise > (MIN_PASS_SIGMA / 255) ** 2:
        expected *= 1 - REMOVED * (1 - left)
        restored = convolve(y, transfer.conj())  # A may move the picture
        second = second_estimate(restored, noise)
        inputs = f, variance, restored, noise
        slabs, top = [], 0
        for estimate, risk in filter_slabs(pilot, restored, noise):
            rows = slice(top, top + estimate.shape[1])
            estimate = estimate.lerp(second[:, rows], SECOND_SHARE)
            slabs.append(keep_safer(estimate, risk, top, *inputs))
            top = rows.stop
        pilot = torch.cat(slabs, 1)
    fused = torch.tensordot(planes.T, pilot, 1)
    predicted = torch.tensordot(planes.T**2, expected, 1)  # planes err independently
    return fused.cpu().numpy(), predicted.cpu().numpy()


def keep_safer(estimate, risk, top, f, variance, restored, noise):
    """Move a slab of the second pass towards f where f errs less than the pass risks.

    The squared error of f is estimated twice, and the larger estimate is taken: from the
    predictions' variance, and from the energy of restored - f in a window, less the noise.

    Args:
        estimate, risk: the pass's result and expected squared error, (C, rows, W), from
            row `top` on.
        f, variance, restored: the ensemble, its predictions' variance and the observation
            that the pass has filtered, (C, H, W).
        noise: variance of that observation's noise.
    """
    bottom, edge = top + estimate.shape[1], ENERGY_SIDE // 2
    first = max(0, top - edge)
    near = (x[:, first : bottom + edge] for x in (restored, f))
    energy = torch.sub(*near) ** 2
    error = F.avg_pool2d(energy, ENERGY_SIDE, 1, edge, count_include_pad=False)
    rows, within = slice(top, bottom), slice(top - first, bottom - first)
    error = error[:, within] - noise
    ratio = risk / torch.maximum(SPREAD * variance[:, rows], error).clamp(min=1e-12)
    return estimate.lerp(f[:, rows], ratio**2 / (1 + ratio**2))


def bound_power(power, noise_over_error):
    """Raise a blur's power (C, H, W') to the least that may be divided by."""
    least = (noise_over_error / MAX_AMPLIFICATION).clamp(min=MIN_POWER, max=1)
    return torch.maximum(power, least)


def quiet_energy(residual):
    """Return the energy below which the quietest quarter of a residual's spectrum lies.

    Args:
        residual: (C, H, W). Its spectrum is cut into BINS x BINS parts.
    """
    # One plane after the other, to save memory.
    spectra = (torch.fft.rfft2(plane, norm="ortho").abs() ** 2 for plane in residual)
    bins = [F.adaptive_avg_pool2d(spectrum[None], BINS) for spectrum in spectra]
    return torch.cat(bins).mean(0).quantile(QUIET_SHARE).item()
