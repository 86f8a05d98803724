"""Checks of what a caller gives the learner: observation and mask."""

import numpy as np

SMALLEST_SIDE = 32  # pixels: five poolings
MAX_CHANNELS = SMALLEST_SIDE - 1  # so (H, W, C) is never taken for (C, H, W)


def check_observation(y, known=None):
    """Check an observation and its mask; return both as arrays, y with 0 where unknown.

    Args:
        y: the observation, floats (C, H, W), with fewer than 32 channels and sides of 32
            pixels or more.
        known: 1 where an entry of y is known, else 0: (C, H, W) or (1, H, W); None: ones
            (1, H, W).

    Raises:
        ValueError: y or known has another shape or type; the message names it.
    """
    y = np.asarray(y)
    if (
        y.ndim != 3
        or not 0 < len(y) <= MAX_CHANNELS
        or min(y.shape[1:]) < SMALLEST_SIDE
    ):
        raise ValueError(
            f"y has the shape {y.shape}; it must be (C, H, W), with C from 1 to "
            f"{MAX_CHANNELS} and sides of {SMALLEST_SIDE} pixels or more"
        )
    if y.dtype.kind != "f":
        raise ValueError(f"y is of type {y.dtype}; it must be of floats")
    one, all_channels = (1, *y.shape[1:]), y.shape
    known = np.ones(one) if known is None else np.asarray(known)
    if known.shape not in (one, all_channels):
        shapes = " or ".join(map(str, dict.fromkeys([one, all_channels])))
        raise ValueError(f"known has the shape {known.shape}; it must be {shapes}")
    return np.where(known, y, y.dtype.type(0)), known
