"""Fusing's first pass: a Wiener filter of the residual, frequency by frequency."""

import numpy as np
import scipy.fft
import torch
from torch.nn import functional as F

PATCH = 16  # pixels a side
STRIDE = 2  # pixels between patches
# The energy of a frequency is averaged over WINDOW x WINDOW patches and BAND x BAND
# neighbouring frequencies.
WINDOW, BAND = 15, 3
# An entry's result depends on the pixels up to this distance.
REACH = PATCH - STRIDE + STRIDE * (WINDOW // 2)
SLAB = 2**17  # pixels filtered at a time, to save memory


def cosines():
    """Return the orthonormal cosine transform of a patch as convolution weights.

    (PATCH**2, 1, PATCH, PATCH): one weight for each frequency.
    """
    waves = torch.from_numpy(scipy.fft.dct(np.eye(PATCH), axis=0, norm="ortho"))
    planes = waves[:, None, :, None] * waves[:, None, :]
    return planes.reshape(PATCH**2, 1, PATCH, PATCH).float()


def wiener(residual, noise):
    """Remove white noise from a residual, patch by patch.

    Args:
        residual: (C, H, W).
        noise: variance of its noise.

    Returns:
        The filtered residual, (C, H, W).
    """
    height, width = residual.shape[1:]
    right, below = REACH + width % STRIDE, REACH + height % STRIDE
    around = (REACH, right, REACH, below)
    basis = cosines().to(residual)
    filtered = torch.empty_like(residual)
    rows = max(2 * REACH, SLAB // width // STRIDE * STRIDE)
    for plane, result in zip(residual, filtered):
        plane = F.pad(plane[None, None], around, mode="reflect")
        for top in range(0, height, rows):
            slab = plane[:, :, top : top + rows + 2 * REACH]
            slab = _wiener(slab, noise, basis)[0, 0, :, :width]
            result[top : top + rows] = slab[: height - top]
    return filtered


def _wiener(residual, noise, basis):
    """Filter a plane (1, 1, H + 2 REACH, W + 2 REACH); return its inner (1, 1, H, W)."""
    edge = WINDOW // 2
    waves = F.conv2d(residual, basis, stride=STRIDE)  # (1, PATCH^2, h, w)
    energy = F.avg_pool2d(waves**2, WINDOW, 1)
    bands = energy[0].flatten(1).T.unflatten(1, (PATCH, PATCH))
    bands = F.avg_pool2d(bands, BAND, 1, BAND // 2, count_include_pad=False)
    energy = bands.flatten(1).T.reshape(energy.shape)
    share = (1 - noise / energy.clamp(min=1e-12)).clamp(min=0)
    kept = waves[..., edge:-edge, edge:-edge] * share
    filtered = F.conv_transpose2d(kept, basis, stride=STRIDE)
    edge = PATCH - STRIDE
    # Every pixel is the mean of (PATCH / STRIDE)^2 patches.
    return filtered[..., edge:-edge, edge:-edge] * (STRIDE / PATCH) ** 2
