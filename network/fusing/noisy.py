"""Fusing the ensemble with an observation that has white noise."""

import torch
from torch.nn import functional as F

from network.ensemble import opponent
from network.fusing.plug import convolve, refine
from network.fusing.residual import wiener
from network.fusing.second import second_estimate
from network.fusing.similar import filter_groups

MIN_UNBLURRED = 0.999  # power that every frequency keeps if nothing is blurred
MIN_SIGMA = 0.3  # 0-255 scale; against less noise no similar patches are needed
BINS = 8  # parts of the residual's spectrum along each side
QUIET_SHARE = 0.25  # of these parts; the quietest hold hardly more than noise
MAX_QUIET = 0.5  # their energy over the noise's; below it the PSF is not exact
ENERGY_SIDE = 25  # pixels; the residual's energy in such a window shows the error of f
# Measured on crops of House, Peppers and kodim01, sigma 10 to 50.
SPREAD = 2.2  # squared error of the ensemble over the variance of the predictions
SECOND_SHARE = 0.5  # of the second estimate in its mean with the other
RISK_FACTOR = 2.2  # squared error of the result over the second pass's risk
# Under a blur a difference is inverted where the blur's power exceeds DAMPING times the
# noise over the ensemble's error, and MIN_POWER.
DAMPING, MIN_POWER = 0.2, 1e-5


def fuse_noisy(ensemble, variance, observation, known, sigma, forward_operator):
    """Add to the ensemble's mean the detail that the observation still shows.

    Each plane is fused by itself: see `ensemble.opponent`. A second estimate is made of y alone,
    so it errs differently than the network: see `second.second_estimate`.

    Without a blur a first pass filters the residual y - f, which is the noise plus the
    error of f: see `residual.wiener`. Its result is the pilot of a second pass over
    similar patches: see `similar.filter_groups`. The mean of this and of the second
    estimate is the result. Where it risks more than f errs, f is kept: see `keep_safer`.

    Under a blur the second estimate is one of A(x). Its difference from A(f) is inverted
    and added to f. From there `plug.refine` goes on. What the second estimate still has
    beyond its result is inverted, and half of it or more is added.

    Args:
        ensemble: f, the mean prediction, (C, H, W), [0, 1] scale.
        variance: of the predictions, by plane, of the same shape.
        observation: y, of the same shape and scale.
        known: 1 where an entry of y is known, else 0: (C, H, W) or (1, H, W). A(f) stands
            in for unknown entries. For holes without noise see missing.fill_holes.
        sigma: s, standard deviation of y's white noise on the 0-255 scale. It is raised to
            what the quietest quarter of the residual's spectrum holds, less the error. None:
            the whole residual counts as noise. Under a blur that is nearly true.
        forward_operator: A, from and to (1, C, H, W). It is linear, treats every channel
            by itself and every place alike, and takes the image as periodic.

    Returns:
        The fused restoration, and its predicted squared error; both (C, H, W), float32,
        on the CPU.
    """
    y = torch.as_tensor(observation, dtype=torch.float32)
    f, variance, known = (torch.as_tensor(x).to(y) for x in (ensemble, variance, known))
    known_share = known.mean().item()
    y = torch.where(known > 0, y, forward_operator(f[None])[0])
    known = known.amax(0, keepdim=True)
    planes = opponent(y)
    y, f = (torch.tensordot(planes, x, 1) for x in (y, f))
    # Beside unknown entries, such as lamps, predictions vary more than elsewhere.
    error = (known * variance).mean((1, 2), keepdim=True) / known.mean()
    error = (SPREAD * error).clamp(min=1e-12)
    impulse = y.new_zeros(1, 1, *y.shape[1:])
    impulse[..., 0, 0] = 1
    transfer = torch.fft.rfft2(forward_operator(impulse)[0])
    power = transfer.abs() ** 2
    residual = y - convolve(f, transfer)  # 0 where y is unknown
    energies = quiet_energy(residual), (residual**2).mean().item()
    quiet, loud = (x / known_share for x in energies)
    noise = loud if sigma is None else (sigma / 255) ** 2
    is_noisy = noise > (MIN_SIGMA / 255) ** 2
    if is_noisy:
        noise = max(noise, quiet - (error * power).mean().item())
    del residual  # large pictures fill the memory
    if is_noisy and (power >= MIN_UNBLURRED).all():
        y = convolve(y, transfer.conj())  # A may move the picture
        second = second_estimate(y, noise)
        result, risk = filter_groups(f + wiener(y - f, noise), y, noise)
        result = result.lerp(second, SECOND_SHARE)
        result = keep_safer(result, risk, f, variance, y, noise)
        expected = RISK_FACTOR * risk
    else:
        second = second_estimate(y, noise) if is_noisy else y
        least = (DAMPING * noise / error).clamp(min=MIN_POWER)
        inverse = transfer.conj() / (power + least)
        result = start = f + convolve(second - convolve(f, transfer), inverse)
        expected = noise / (power + noise / error + MIN_POWER)
        expected = expected.mean((1, 2), keepdim=True).expand_as(f)
        if is_noisy:
            result, expected = refine(start, error, y, known, noise, transfer)
            rest = second - convolve(result, transfer)
            # The less the blur takes, the more the second estimate is one of x itself.
            result += SECOND_SHARE * (1 + power.mean()) * convolve(rest, inverse)
            if quiet < MAX_QUIET * noise:
                # The rest of `noise` is the PSF's error, which `refine` repeats.
                result = (start + result) / 2
    fused = torch.tensordot(planes.T, result, 1)
    predicted = torch.tensordot(planes.T**2, expected, 1)  # planes err independently
    return fused.cpu().numpy(), predicted.cpu().numpy()


def keep_safer(estimate, risk, f, variance, restored, noise):
    """Move an estimate towards f where f errs less than the estimate risks.

    The squared error of f is estimated twice, and the larger estimate is taken: from the
    predictions' variance, and from the energy of restored - f in a window, less the noise.

    Args:
        estimate, risk: of the second pass: its result and expected squared error.
        f, variance, restored: the ensemble, its predictions' variance and the observation
            that the pass has filtered. All are (C, H, W).
        noise: variance of that observation's noise.
    """
    energy = local_energy(restored - f, ENERGY_SIDE)
    error = torch.maximum(SPREAD * variance, energy - noise)
    ratio = risk / error.clamp(min=1e-12)
    return estimate.lerp(f, ratio**2 / (1 + ratio**2))


def local_energy(x, side):
    """Return the mean square of x (C, H, W) in a window around every entry."""
    energy = F.avg_pool2d(x**2, side, 1, side // 2, count_include_pad=False)
    return energy.clamp(min=1e-12)


def quiet_energy(residual):
    """Return the energy below which the quietest quarter of a residual's spectrum lies.

    Args:
        residual: (C, H, W). Its spectrum is cut into BINS x BINS parts.
    """
    spectrum = torch.fft.rfft2(residual, norm="ortho").abs() ** 2
    parts = F.adaptive_avg_pool2d(spectrum, BINS).mean(0)
    return parts.quantile(QUIET_SHARE).item()
