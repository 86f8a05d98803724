"""Plug and play: inverting a blur and filtering similar patches take turns."""

import numpy as np
import torch

from network.fusing.similar import filter_groups

ROUNDS, MIN_ROUNDS = 12, 3
MAX_ENTRIES = 2**24  # filtered in all rounds together; more would outlast the training
# Assumed standard deviation of z's error over that of the ensemble's: in the first round,
# and in the last one at least. A strong blur leaves more.
FIRST_DEVIATION, MIN_LAST_DEVIATION = 2.0, 0.4
MOMENTUM = 0.8  # before a round z moves on by this share of its last move
BOOST_DIVISOR, MAX_BOOST = 0.9, 3.0  # see refine
# Predicted error over that of a Wiener filter, which knows no similar patches. Measured on
# Cameraman and House under six blurs.
ERROR_FACTOR = 0.44
FITTED, RINGS = (0.02, 0.25), 24  # cycles per pixel; see wiener_error
NEAR = 6.0  # pixels; see wiener_error
MAX_MOVE = 3.0  # mean squared move from start, over the error; above it detail is lost
MIN_RATIO = 1e-6  # noise over error, at least; float32 cannot divide by less power


def refine(start, error, observation, known, noise, transfer):
    """Refine a deblurred picture by half-quadratic splitting.

    A filter replaces the prior (Venkatakrishnan et al., GlobalSIP 2013), and z's assumed
    squared error e falls from round to round (Zhang et al., TPAMI 2021). Each round moves
    the estimate z on with momentum, and then computes

        x = argmin |A x - y|^2 / s^2 + |x - z|^2 / e
        z = x filtered by similar patches, with z as the pilot

    H is the transfer function of A. At a frequency x has the expected squared error
    s^2 / (|H|^2 + s^2 / e); the filter takes it as the spectrum of x's noise. A z replaces
    unknown entries of y.

    x keeps a share of z's error at every frequency. `left` is the mean share in the first
    round. The larger it is, the more detail the pilot lacks. So the filter's boost is
    1 / (BOOST_DIVISOR sqrt(1 - left)), from 1 to MAX_BOOST, and the last round's deviation
    is left^2, at least MIN_LAST_DEVIATION.

    Args:
        start: the first z, by plane, (C, H, W).
        error: expected squared error of the ensemble by plane, (C, 1, 1); e begins above
            it and does not end above it.
        observation: y, by plane, (C, H, W).
        known: 1 where y is known, else 0; (C, H, W) or (1, H, W).
        noise: s^2, variance of y's white noise.
        transfer: H for all planes, (1, H, W // 2 + 1), as torch.fft.rfft2 returns it.

    Returns:
        The mean of the last x and z, moved back to the start in planes that lost detail,
        and its predicted squared error; both (C, H, W).
    """
    power = transfer.abs() ** 2
    z = before = start
    rounds = min(ROUNDS, max(MIN_ROUNDS, MAX_ENTRIES // start.numel()))
    left = (noise / (FIRST_DEVIATION**2 * error[0] * power[0] + noise)).mean().item()
    boost = min(MAX_BOOST, max(1, 1 / (BOOST_DIVISOR * (1 - left) ** 0.5 + 1e-6)))
    last = max(MIN_LAST_DEVIATION, left**2)
    for place in torch.linspace(0, 1, rounds).tolist():
        z, before = z + MOMENTUM * (z - before), z
        deviation = FIRST_DEVIATION * (last / FIRST_DEVIATION) ** place
        ratio = (noise / (error * deviation**2)).clamp(min=MIN_RATIO)
        x = known * (observation - convolve(z, transfer))
        x = z + convolve(x, transfer.conj() / (power + ratio))
        uncertain = noise / (power + ratio)
        z, risk = filter_groups(z, x, uncertain, boost)
    # The filter removes a texture that never repeats. Then the result lies much farther from
    # the start than the ensemble's error allows.
    result = (x + z) / 2
    moved = ((result - start) ** 2).mean((1, 2), keepdim=True)
    lost = (moved / (MAX_MOVE * error)) ** 4
    result = result.lerp(start, lost / (1 + lost))
    expected = ERROR_FACTOR * wiener_error(result, power, noise)
    return result, risk * (expected / risk.mean((1, 2), keepdim=True))


def wiener_error(image, power, noise):
    """Return the mean squared error of Wiener's filter for such a picture, (C, 1, 1).

    The filter gets the picture's spectrum as a power law of frequency. The law is fitted to
    the mean energies of RINGS rings, between the frequencies FITTED. A frequency that the
    blur has removed can be inferred from its neighbours, so the blur's power is averaged over
    them, by a Gaussian of 1 / (2 pi NEAR) cycles per pixel.

    Args:
        image: (C, H, W); its detail may be lost.
        power: |H|^2 of the blur, (1, H, W // 2 + 1).
        noise: variance of the observation's noise.
    """
    size, (low, high) = image.shape[1:], FITTED
    down, across = (torch.fft.fftfreq(n).to(image) for n in size)
    near = ((down[:, None] * size[0]) ** 2 + (across * size[1]) ** 2) / (2 * NEAR**2)
    power = torch.fft.rfft2(torch.fft.irfft2(power, s=size) * torch.exp(-near)).real
    frequency = torch.hypot(down[:, None], across[: power.shape[2]].abs())
    ring = ((frequency - low) * (RINGS / (high - low))).floor().long()
    inside = (ring >= 0) & (ring < RINGS)
    energy = torch.fft.rfft2(image, norm="ortho").abs() ** 2
    values = torch.stack((torch.ones_like(frequency), frequency, *energy))[:, inside]
    sums = values.new_zeros(len(values), RINGS).index_add_(1, ring[inside], values)
    sums = sums[:, sums[0] > 0].double().cpu().numpy()
    x, *y = np.log(np.maximum(sums[1:] / sums[0], 1e-12))
    laws = torch.from_numpy(np.polyfit(x, np.transpose(y), 1)).to(image)
    slope, offset = laws[..., None, None]
    signal = torch.exp(offset + slope * frequency.clamp(min=low).log())
    left = signal * noise / (power.clamp(min=0) * signal + noise)
    return left.mean((1, 2), keepdim=True)


def convolve(images, transfers):
    """Convolve planes (C, H, W) circularly, given transfer functions (C or 1, H, W // 2 + 1)."""
    size = images.shape[1:]
    pairs = zip(images, transfers.expand(len(images), -1, -1))
    # One plane after the other, to save memory.
    return torch.stack(
        [torch.fft.irfft2(torch.fft.rfft2(x) * h, s=size) for x, h in pairs]
    )
