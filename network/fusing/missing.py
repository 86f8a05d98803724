"""Fusing where entries are missing: from what is known nearby, and from similar patches."""

import math

import torch
from torch.nn import functional as F

from network.fusing.noisy import SPREAD, opponent
from network.fusing.similar import filter_groups

ROUNDS = 8
STEP = 0.64  # what is taken for the guess's squared error, from one round to the next
BEYOND = 1.8  # how far a guess follows the filter, which moves it too little
SHARPER = 0.3  # of the pilot, the share that is the picture filtered, not the result


def fill_holes(ensemble, variance, observation, known):
    """Fuse the ensemble's mean with an observation without noise that has holes.

    The residual is carried to the missing entries. Then, in every round, the known
    entries are put back, and similar patches are filtered together, as if all entries
    had the noise of a guess; it is less from round to round.

    Args:
        ensemble: f, the mean prediction, (C, H, W), [0, 1] scale.
        variance: of the predictions, by plane, of the same shape: see noisy.opponent.
        observation: y, likewise.
        known: 1 where an entry of y is known, else 0: (C, H, W), or (1, H, W), with which
            colours are filtered as luminance and differences.

    Returns:
        The fused restoration, and its squared error as predicted from the variance;
        both (C, H, W), float32, on the CPU.
    """
    y = torch.as_tensor(observation, dtype=torch.float32)
    f, variance, known = (torch.as_tensor(x).to(y) for x in (ensemble, variance, known))
    planes = opponent(y)
    if len(known) > 1:
        variance = torch.tensordot(planes.T**2, variance, 1)
        planes = torch.eye(len(y)).to(y)
    y, f = (torch.tensordot(planes, x, 1) for x in (y, f))
    residual = known * (y - f)
    missed = ((residual**2).mean() / known.mean()).item()
    guess = result = f + spread(residual, known)
    for k in range(ROUNDS):
        pilot = result.lerp(guess, SHARPER)
        result, _ = filter_groups(pilot, guess, missed * STEP**k, times=1)
        guess = torch.where(known > 0, y, guess.lerp(result, BEYOND))
    fused = torch.where(known > 0, y, result)
    error = SPREAD * variance * (1 - known)
    return (
        torch.tensordot(planes.T, fused, 1).cpu().numpy(),
        torch.tensordot(planes.T**2, error, 1).cpu().numpy(),
    )


def spread(residual, known):
    """Carry a residual to the entries that are not known: the mean of those nearby.

    Args:
        residual: (C, H, W).
        known: 1 where it is known, else 0, (1, H, W) or of the residual's shape.
    """
    width = 0.7 / known.mean().sqrt().item()  # pixels; a Gaussian's
    reach = math.ceil(3 * width)
    profile = torch.exp(-((torch.arange(-reach, reach + 1) / width) ** 2) / 2)
    down, across = (profile.to(residual).view(1, 1, *s) for s in ((-1, 1), (1, -1)))
    total, weight = (
        F.conv2d(
            F.conv2d(x[:, None], down, padding=(reach, 0)), across, padding=(0, reach)
        )[:, 0]
        for x in (residual * known, known)
    )
    return torch.where(known > 0, residual, total / weight.clamp(min=1e-6))
