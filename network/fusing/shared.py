"""Fusing the ensemble with an observation whose noise neighbours share, as a camera's."""

import math

import numpy as np
import scipy.fft
import scipy.ndimage
import torch

from network.ensemble import opponent
from network.fusing.noisy import keep_safer, local_energy
from network.fusing.similar import filter_groups
from network.jpeg import LOW, ORDER, blocks_of

MAX_BLOCKS = 2**16  # at most about this many are used
LOWEST = (ORDER >= 1) & (ORDER <= 2)  # waves of 8 to 16 pixels
FLAT_SHARE = 0.05  # of the blocks, the flattest
DETAIL_SHARE = 0.4  # of the filtered y in the fused luminance, at least
# Energy of y - f over that of y where f is flat. Above it f has lost detail.
MAX_GROWTH = 4
MIN_VARIANCE = 1e-7  # in the learner's units; filters need some noise
BRIGHTNESSES = 4  # groups of blocks, since noise changes with brightness
LOST_SIDE = 9  # pixels; the energy of y - f in such a window shows lost detail
MIN_LOST = 2  # that energy over the noise's; below it nothing is lost for certain
WIDE = 24  # pixels, deviation of the Gaussian that keeps the colours of large areas


def fuse_shared(ensemble, variance, observation, known):
    """Fuse the ensemble's mean f with an observation y with shared noise.

    A filter for white noise averages away little of what neighbours share, so it gets
    the noise's variance at low frequencies. It filters f, which has kept some noise, and
    the luminance of y, which shows detail that f has lost. `keep_safer` judges the latter;
    the more f has lost, the more of y is taken. Where y - f has far more energy than the
    noise, y itself is taken. The colours are those of f: y's are noisy. Only those of large
    areas are y's: there the network's error is larger than the noise that remains.

    Args:
        ensemble, variance, observation, known: see noisy.fuse_noisy.

    Returns:
        The fused restoration, and its predicted squared error, which is the variance (0.9
        to 1.9 of the true error on 7 of 10 photos); (C, H, W), float32, on the CPU.
    """
    y = torch.as_tensor(observation, dtype=torch.float32)
    f, variance, known = (torch.as_tensor(x).to(y) for x in (ensemble, variance, known))
    y, planes = torch.where(known > 0, y, f), opponent(y)
    y, f = (torch.tensordot(planes, x, 1) for x in (y, f))
    noise, loudest, growth = shared_variance(f, y)
    noise, loudest = (
        x.clamp(min=MIN_VARIANCE) / known.mean() for x in (noise, loudest)
    )
    share = min(1, DETAIL_SHARE * max(1, growth / MAX_GROWTH))
    fused, _ = filter_twice(f, f, noise)
    first = f[:1], variance[:1], y[:1], noise[:1]
    detail, risk = filter_twice(f[:1], y[:1], noise[:1])
    fused[:1] = fused[:1].lerp(keep_safer(detail, risk, *first), share)
    lost = 1 - MIN_LOST * loudest / local_energy(y[:1] - f[:1], LOST_SIDE)
    fused[:1] = fused[:1].lerp(y[:1], lost.clamp(min=0))
    for plane, other in zip(fused[1:], (y - fused)[1:].cpu().numpy()):
        plane += torch.as_tensor(scipy.ndimage.gaussian_filter(other, WIDE)).to(plane)
    fused = torch.tensordot(planes.T, fused, 1)
    error = torch.tensordot(planes.T**2, variance, 1)
    return fused.cpu().numpy(), error.cpu().numpy()


def filter_twice(pilot, observation, noise):
    """Filter twice, the second time with the first estimate as the pilot: see filter_groups."""
    estimate, _ = filter_groups(pilot, observation, noise)
    return filter_groups(estimate, observation, noise)


def shared_variance(f, y):
    """Measure the variance of y's noise in 8x8 blocks.

    Returns:
        That at low frequencies by plane, (C, 1, 1). It is measured in y - f, which lacks the
        noise that f has kept, and in y where f is flattest; the larger one counts.
        The luminance's where f is flattest, at the brightness where it is largest.
        The luminance's energy in y - f over that in y where f is flattest.
    """
    step = max(2, math.ceil(math.sqrt(f[0].numel() / MAX_BLOCKS)))
    blocks = (blocks_of(x.cpu().numpy(), step) for x in (f, y, y - f))
    spectra = (scipy.fft.dctn(x, axes=(3, 4), norm="ortho") for x in blocks)
    of_f, of_y, of_rest = (x.reshape(len(f), -1, ORDER.size) for x in spectra)
    flatness = (of_f[0][:, LOW] ** 2).sum(1)

    def flat(some):
        n = math.ceil(FLAT_SHARE * len(some))
        return of_y[:, some[flatness[some].argsort()[:n]]]

    def energy(spectra):
        return (spectra[0][:, ORDER > 0] ** 2).mean()

    by_brightness = of_f[0][:, 0].argsort()
    flattest = flat(by_brightness)
    lowest = [(part[..., LOWEST] ** 2).mean((1, 2)) for part in (of_rest, flattest)]
    loudest = max(energy(flat(x)) for x in np.array_split(by_brightness, BRIGHTNESSES))
    growth = energy(of_rest) / (energy(flattest) or 1)
    lowest, loudest = (torch.as_tensor(x).to(f) for x in (np.maximum(*lowest), loudest))
    return lowest[:, None, None], loudest, growth
