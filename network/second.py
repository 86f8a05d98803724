"""A second estimate of a picture, from similar patches alone: no network, no training."""

import functools

import torch

from network.similar import ROUNDING, filter_once, two_filters

FIRST = 11, 24  # pixels along a patch's side, patches in a group: the first step
ROUNDS = 4  # of filtering that follow the first step; of a large picture fewer
FULL = 2**19  # pixels up to which there are that many, so that training takes longer
GROUPS = (6, 45), (5, 32)  # the same for odd and for even rounds
KEPT = (
    0.75  # share of the residual that the first round gives back; the last gives none
)
DOUBT = 0.1  # variance of a noise-free estimate's error, in units of the noise's
NOISIER = (
    0.5  # standard deviation of the noise that the first step learns to remove more
)


def second_estimate(y, noise, rounds=None):
    """Estimate a picture from its observation alone, from groups of similar patches.

    The first step is that of NL-Ridge (Herbreteau, Kervrann, SIAM J. Imaging Sciences
    2022): see `first_step`. Then, as in LIChI (the same authors, IEEE Transactions on
    Image Processing 2024), rounds of filtering take away the noise little by little. With
    x the estimate of the round before, round m of M filters

        z = x + t (y - x),    t = KEPT * (1 - (m - 1) / M), and 1 in the first round,

    which has t of y's noise and some error of x. The filters are those of
    `similar.two_filters`. They learn their coefficients from x, in groups that are found
    anew in x.

    Args:
        y: observation, (C, H, W), sides of 32 or more; luminance first, where there is
            colour (see fusion.opponent), because patches are compared in the first plane.
        noise: variance of its white noise, the same in all planes; above 0.
        rounds: M. 0: the first step alone. None: ROUNDS, or as many as the size allows.

    Returns:
        The estimate and its risk, an expected squared error; both (C, H, W).
    """
    if rounds is None:
        rounds = max(1, min(ROUNDS, ROUNDS * FULL // y[0].numel()))
    first = functools.partial(first_step, level=noise)
    x, risk = _filter(y, y, *FIRST, first)
    share = 1.0
    for done in range(rounds):
        patch, size = GROUPS[done % len(GROUPS)]
        level = noise * (share**2 + DOUBT * (1 - share))
        covariance = level * torch.eye(patch**2).to(y)
        filters = functools.partial(two_filters, level=level, covariance=covariance)
        x, risk = _filter(x, torch.lerp(x, y, share), patch, size, filters)
        share = KEPT * (1 - (done + 1) / rounds)
    return x, risk


def first_step(_, y, level):
    """Estimate a group's patches by linear combinations that minimise an estimated risk.

    Y, (k, n), has k noisy patches of n pixels. With S = Y Y' and s^2 the noise's variance

        T Y with T = (S + n (a s)^2 I)^-1 (S - n s^2 I)

    minimises Stein's unbiased estimate of the risk for a = 0, and for a > 0 what remains
    to be predicted after noise of the standard deviation a s was added (NL-Ridge;
    LIChI's Noisier2Noise form).

    Args:
        y: groups of the observation, (groups, k, n); k at most n.
        level: s^2.

    Returns:
        What similar.two_filters does; the risk is Stein's estimate.
    """
    k, n = y.shape[1:]
    gram, identity = y @ y.mT, torch.eye(k).to(y)
    damping = n * level * NOISIER**2 + ROUNDING * y.square().sum((1, 2))
    damping = damping[:, None, None]
    factor = torch.linalg.cholesky(gram + damping * identity)
    combine = identity - (n * level + damping) * torch.cholesky_inverse(factor)
    estimate = combine @ y
    left = combine.square().sum(2).clamp(min=1 / k)
    risk = (estimate - y).square().mean(2) - level
    risk = risk + 2 * level * combine.diagonal(dim1=1, dim2=2)
    weight = 1 / left[..., None]
    return weight * estimate, weight * risk[..., None], weight


def _filter(pilot, observation, patch, size, estimate):
    """Filter a picture once, all planes alike; return estimate and risk."""
    estimators = [estimate] * len(pilot)
    slabs = zip(*filter_once(pilot, observation, patch, size, estimators))
    return [torch.cat(slab, 1) for slab in slabs]
