"""Fusing the ensemble with an observation without noise, whose entries are partly missing."""

import torch
from scipy.ndimage import gaussian_filter

from network.ensemble import opponent
from network.fusing.noisy import SPREAD
from network.fusing.similar import filter_groups

ROUNDS = 8
DECAY = 0.64  # factor of the guess's assumed squared error from one round to the next
OVERSHOOT = 1.8  # the guess moves this many times as far as the filter moves it
GUESS_SHARE = 0.3  # of the guess in the pilot; the rest is the last filter's result


def fill_holes(ensemble, variance, observation, known):
    """Fuse the ensemble's mean with an observation without noise that has holes.

    The first guess is the ensemble plus the residual, which `spread_residual` extends to
    the missing entries. Each round filters the guess by its similar patches, as if every
    entry had noise with the guess's squared error, and puts the known entries back. The
    squared error is that of f at first and falls from round to round.

    Args:
        ensemble: f, the mean prediction, (C, H, W), [0, 1] scale.
        variance: of the predictions, by plane, of the same shape: see ensemble.opponent.
        observation: y, of the same shape and scale.
        known: 1 where an entry of y is known, else 0: (C, H, W) or (1, H, W). With
            (1, H, W) the planes are filtered, otherwise the channels.

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
    guess = result = f + spread_residual(residual, known)
    for k in range(ROUNDS):
        pilot = result.lerp(guess, GUESS_SHARE)
        result, _ = filter_groups(pilot, guess, missed * DECAY**k)
        guess = torch.where(known > 0, y, guess.lerp(result, OVERSHOOT))
    fused = torch.where(known > 0, y, result)
    error = SPREAD * variance * (1 - known)
    return (
        torch.tensordot(planes.T, fused, 1).cpu().numpy(),
        torch.tensordot(planes.T**2, error, 1).cpu().numpy(),
    )


def spread_residual(residual, known):
    """Set the unknown entries of a residual to a Gaussian mean of the known ones nearby.

    Args:
        residual: (C, H, W).
        known: 1 where an entry is known, else 0: (C, H, W) or (1, H, W).
    """
    width = 0.7 / known.mean().sqrt().item()  # standard deviation in pixels
    total, weight = (
        gaussian_filter(x.cpu().numpy(), (0, width, width), mode="constant", truncate=3)
        for x in (residual * known, known)
    )
    spread = torch.from_numpy(total / weight.clip(1e-6)).to(residual)
    return torch.where(known > 0, residual, spread)
