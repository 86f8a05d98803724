"""A second estimate of a picture, from similar patches alone: no network, no training."""

import functools

import torch

from network.fusing.similar import ROUNDING, filter_once, two_filters

# Pixels along a patch's side, patches in a group: in the first step, and in odd and in even
# rounds.
FIRST_GROUP, GROUPS = (11, 24), ((6, 45), (5, 32))
ROUNDS = 4  # of filtering after the first step; a large picture has fewer
FULL_ROUNDS = 2**18  # pixels up to which it has all; more would outlast the training
GIVEN_BACK = 0.75  # bounds the share of the residual y - x that a later round gets back
DOUBT = 0.1  # variance of x's error over the noise's
NOISIER = 0.5  # a in `first_step`; above 0 the step follows chance less than with a = 0


def second_estimate(y, noise, rounds=None):
    """Estimate a picture from its observation alone, by groups of similar patches.

    The first step is that of NL-Ridge (Herbreteau, Kervrann, SIAM J. Imaging Sciences
    2022): see `first_step`. M rounds follow and remove the noise little by little, as
    LIChI does (the same authors, IEEE Transactions on Image Processing 2024). x is the
    last estimate. Round m filters

        z = x + t (y - x),    t = 1 in the first round, then GIVEN_BACK (1 - (m - 1) / M).

    z has the share t of y's noise. It also has some of x's error, which counts as noise.
    The filters are those of `similar.two_filters`. They learn their coefficients from x,
    in groups found in x. LIChI takes the last round's output for z. Adding y - x in every
    round is better by 0.05 dB, once the result is averaged with the network's.

    Args:
        y: observation by plane (see ensemble.opponent), (C, H, W), sides of 32 or more.
            Patches are compared in the first plane, which is luminance.
        noise: variance of its white noise, the same in all planes; above 0.
        rounds: M. 0: the first step alone. None: ROUNDS, fewer for a large picture.

    Returns:
        The estimate, (C, H, W).
    """
    if rounds is None:
        rounds = max(1, min(ROUNDS, ROUNDS * FULL_ROUNDS // y[0].numel()))
    first = functools.partial(first_step, variance=noise)
    x, _ = filter_once(y, y, *FIRST_GROUP, [first] * len(y))
    share = 1.0
    for done in range(rounds):
        patch, size = GROUPS[done % len(GROUPS)]
        variance = noise * (share**2 + DOUBT * (1 - share))
        covariance = variance * torch.eye(patch**2).to(y)
        filters = functools.partial(
            two_filters, variance=variance, covariance=covariance
        )
        x, _ = filter_once(x, x.lerp(y, share), patch, size, [filters] * len(y))
        share = GIVEN_BACK * (1 - (done + 1) / rounds)
    return x


def first_step(_, y, variance):
    """Estimate the patches of a group by linear combinations of them.

    Y, (k, n), has k noisy patches of n pixels, S = Y Y', and s^2 is the noise's variance.
    The estimate is

        T Y with T = (S + n (a s)^2 I)^-1 (S - n s^2 I)

    For a = 0 it minimises Stein's unbiased estimate of the squared error (NL-Ridge). For
    a > 0 T predicts Y from Y with added noise of standard deviation a s, and follows
    chance less (LIChI, after Noisier2Noise).

    Args:
        _: groups of the pilot, which this step does not use.
        y: groups of the observation, (groups, k, n); k at most n.
        variance: s^2.

    Returns:
        The three values of similar.two_filters, with the risk 0.
    """
    k, n = y.shape[1:]
    gram, identity = y @ y.mT, torch.eye(k).to(y)
    damping = n * variance * NOISIER**2 + ROUNDING * y.square().sum((1, 2))
    damping = damping[:, None, None]
    factor = torch.linalg.cholesky(gram + damping * identity)
    combine = identity - (n * variance + damping) * torch.cholesky_inverse(factor)
    weight = 1 / combine.square().sum(2, keepdim=True).clamp(min=1 / k)
    return weight * (combine @ y), 0 * weight, weight
