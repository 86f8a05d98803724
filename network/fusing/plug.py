"""Plug and play: a blur's inverse and the filter of similar patches, in turn."""

import torch

from network.fusing.similar import filter_slabs

ROUNDS, LEAST_ROUNDS = 12, 3
ENTRIES = 2**24  # filtered in all rounds together, so that training takes longer
FIRST = 2.0  # deviation that z is taken to have in the first round, over the ensemble's
LEAST_LAST = 0.4  # and in the last round, at least; a strong blur leaves more
MOMENTUM = 0.8  # share of its last move that z moves on by before a round
NEW, MOST_GAIN = 0.9, 3.0  # see refine
# The error is this times the filter's risk times the mean squared gradient to the power of a
# third. The filter does not know what it has never seen, and sharper pictures have more
# of that. Measured on Cameraman, House and camera under six blurs.
UNSEEN = 140
FARTHEST = 3.0  # squared move from the start, over the error, from which detail is lost
LEAST_RATIO = 1e-6  # of noise and error; float32 cannot divide by less power


def refine(start, error, observation, known, noise, transfer):
    """Refine a deblurred picture by half-quadratic splitting.

    A round moves the estimate z on, with momentum, and then alternates

        x = argmin |A x - y|^2 / s^2 + |x - z|^2 / e
        z = the filter of similar patches, of x, with z as the pilot

    With the transfer function H of A, the expected squared error of x in a frequency is
    s^2 / (|H|^2 + s^2 / e), which colours the noise that the filter is told. A filter in
    the place of a prior: Venkatakrishnan et al., GlobalSIP 2013; a falling e: Zhang et
    al., TPAMI 2021. Where y is unknown A z stands in its place.

    Args:
        start: the first z, by plane, (C, H, W).
        error: expected squared error of the ensemble by plane, (C, 1, 1); e begins above
            it and falls below.
        observation: y, by plane, (C, H, W).
        known: 1 where y is known, else 0; (C, H, W) or (1, H, W).
        noise: s^2, variance of y's white noise.
        transfer: H, the same for every plane, (1, H, W // 2 + 1), as of torch.fft.rfft2.

    Returns:
        The mean of the last x and z, or the start where detail was lost; and its predicted squared error; both (C, H, W).
    """
    power = transfer.abs() ** 2
    z = before = start
    rounds = min(ROUNDS, max(LEAST_ROUNDS, ENTRIES // start.numel()))
    left = (noise / (FIRST**2 * error[0] * power[0] + noise)).mean().item()
    gain = min(MOST_GAIN, max(1, 1 / (NEW * (1 - left) ** 0.5 + 1e-6)))
    last = max(LEAST_LAST, left**2)
    for place in torch.linspace(0, 1, rounds).tolist():
        z, before = z + MOMENTUM * (z - before), z
        deviation = FIRST * (last / FIRST) ** place
        ratio = (noise / (error * deviation**2)).clamp(min=LEAST_RATIO)
        x = known * (observation - convolve(z, transfer))
        x = z + convolve(x, transfer.conj() / (power + ratio))
        uncertain = noise / (power + ratio)
        slabs = zip(*filter_slabs(z, x, uncertain, 1, gain))
        z, risk = (torch.cat(rows, 1) for rows in slabs)
    steps = (z.diff(dim=axis).square().mean((1, 2), keepdim=True) for axis in (1, 2))
    expected = UNSEEN * risk * sum(steps) ** (1 / 3)
    # A texture that never repeats is filtered away: the result goes much farther from the
    # start than the ensemble can err.
    result = (x + z) / 2
    moved = ((result - start) ** 2).mean((1, 2), keepdim=True)
    lost = (moved / (FARTHEST * error)) ** 4
    return result.lerp(start, lost / (1 + lost)), expected


def convolve(images, transfers):
    """Convolve planes (C, H, W) circularly, with transforms (C or 1, H, W // 2 + 1)."""
    size = images.shape[1:]
    pairs = zip(images, transfers.expand(len(images), -1, -1))
    # one by one, for memory's sake
    return torch.stack(
        [torch.fft.irfft2(torch.fft.rfft2(x) * h, s=size) for x, h in pairs]
    )
