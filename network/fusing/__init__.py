"""Fusing the ensemble with the observation, which still shows detail that the network lost."""


def fuse(what, ensemble, variance, observation, known, sigma, forward_operator):
    """Fuse the ensemble's mean with the observation.

    Args:
        what: "noise" for an observation with white noise, see noisy.fuse_noisy; "shared"
            for one whose noise neighbours share, see shared.fuse_shared; "holes" for one
            without noise that has unknown entries, see missing.fill_holes. These three
            explain the other arguments.

    Returns:
        The fused restoration and its predicted squared error, (C, H, W), float32.
    """
    from network.fusing.missing import fill_holes  # late: see network/__init__.py
    from network.fusing.noisy import fuse_noisy
    from network.fusing.shared import fuse_shared

    given = ensemble, variance, observation, known
    if what == "holes":
        return fill_holes(*given)
    if what == "shared":
        return fuse_shared(*given)
    return fuse_noisy(*given, sigma, forward_operator)
