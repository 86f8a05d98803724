"""A second estimate of a picture, from similar patches alone: no network, no training."""

import functools

import torch

from network.fusing.similar import ROUNDING, filter_once, two_filters

FIRST = 11, 24  # pixels along a patch's side, patches in a group: the first step
ROUNDS = 4  # of filtering that follow the first step; of a large picture fewer
FULL = 2**18  # pixels up to which there are that many, so that training takes longer
GROUPS = (6, 45), (5, 32)  # the same for odd and for even rounds
KEPT = 0.75  # share of the residual y - x that is given back, falling to 0
DOUBT = 0.1  # variance of x's error, in units of the noise's
NOISIER = 0.5  # a, by which the first step is more cautious than Stein's estimate


def second_estimate(y, noise, rounds=None):
    """Estimate a picture from its observation alone, from groups of similar patches.

    The first step is that of NL-Ridge (Herbreteau, Kervrann, SIAM J. Imaging Sciences
    2022): see `first_step`. M rounds follow, which remove the noise little by little, as
    LIChI does (the same authors, IEEE Transactions on Image Processing 2024). With x the
    last estimate, round m filters

        z = x + t (y - x),    t = 1 in the first round, then KEPT (1 - (m - 1) / M).

    z has the share t of y's noise, and some of x's error, which counts as noise, too. (In
    LIChI z is the last round's output, which still has that share. Giving the residual
    back anew gains 0.05 dB in the mean with the network's.) The filters are those of
    `similar.two_filters`. They learn their coefficients from x, in groups found in x.

    Args:
        y: observation, (C, H, W), sides of 32 or more; luminance first, where there is
            colour (see noisy.opponent), because patches are compared in the first plane.
        noise: variance of its white noise, the same in all planes; above 0.
        rounds: M. 0: the first step alone. None: ROUNDS, or as many as the size allows.

    Returns:
        The estimate, (C, H, W).
    """
    if rounds is None:
        rounds = max(1, min(ROUNDS, ROUNDS * FULL // y[0].numel()))
    first = functools.partial(first_step, level=noise)
    x = _filter(y, y, *FIRST, first)
    share = 1.0
    for done in range(rounds):
        patch, size = GROUPS[done % len(GROUPS)]
        level = noise * (share**2 + DOUBT * (1 - share))
        covariance = level * torch.eye(patch**2).to(y)
        filters = functools.partial(two_filters, level=level, covariance=covariance)
        x = _filter(x, x.lerp(y, share), patch, size, filters)
        share = KEPT * (1 - (done + 1) / rounds)
    return x


def first_step(_, y, level):
    """Estimate a group's patches by linear combinations that minimise an estimated risk.

    Y, (k, n), has k noisy patches of n pixels. With S = Y Y' and s^2 the noise's variance

        T Y with T = (S + n (a s)^2 I)^-1 (S - n s^2 I)

    minimises Stein's unbiased estimate of the squared error for a = 0 (NL-Ridge). With
    a > 0 it has learnt to predict Y from Y with more noise, of standard deviation a s,
    which follows chance less (LIChI, after Noisier2Noise).

    Args:
        y: groups of the observation, (groups, k, n); k at most n.
        level: s^2.

    Returns:
        What similar.two_filters does, but no risk: 0.
    """
    k, n = y.shape[1:]
    gram, identity = y @ y.mT, torch.eye(k).to(y)
    damping = n * level * NOISIER**2 + ROUNDING * y.square().sum((1, 2))
    damping = damping[:, None, None]
    factor = torch.linalg.cholesky(gram + damping * identity)
    combine = identity - (n * level + damping) * torch.cholesky_inverse(factor)
    weight = 1 / combine.square().sum(2, keepdim=True).clamp(min=1 / k)
    return weight * (combine @ y), 0 * weight, weight


def _filter(pilot, observation, patch, size, estimate):
    """Filter a picture once, all planes alike."""
    estimators = [estimate] * len(pilot)
    slabs = filter_once(pilot, observation, patch, size, estimators)
    return torch.cat([slab for slab, _ in slabs], 1)
