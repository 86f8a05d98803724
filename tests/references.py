"""Definitions written out slowly, pictures and scores that several test files share."""

from pathlib import Path

import numpy as np
import skimage.data
import torch
from scipy import ndimage

from network.blur import CircularBlur, gaussian_psf, identity
from network.fusing import similar
from network.noise import gaussian_noise


def naive_filter(pilot, y, noise, patch, size, boost):
    """Reference by reference, with T and W as the matrices of their definitions.

    The noise is by frequency, (H, W // 2 + 1).
    """
    shared = np.fft.irfft2(noise, y.shape)
    pixels = [(a, b) for a in range(patch) for b in range(patch)]
    covariance = np.array(
        [[shared[a - c, b - d] for c, d in pixels] for a, b in pixels]
    )
    variance, n = np.sqrt((noise**2).mean()), patch**2

    def two_filters(x, z):
        k = len(x)
        centred = x - x.mean()
        energy = similar.DETAIL_FACTOR * (centred**2).mean()
        strength = boost ** (energy / (energy + variance))
        gram = strength * centred @ centred.T
        t = np.linalg.solve(gram + n * variance * np.eye(k), gram)
        ridge = z.mean() + t @ (z - z.mean())
        lost = ((centred - t @ centred) ** 2).mean(1)
        left = np.maximum((t**2).sum(1), 1 / k)
        centred = x - x.mean(0)
        gram = strength * centred.T @ centred
        w = np.linalg.solve(gram + k * covariance, gram)
        wiener = z.mean(0) + (z - z.mean(0)) @ w
        lost = (lost + ((centred - centred @ w) ** 2).mean(1)) / 2
        left = (left + np.trace(w.T @ covariance @ w) / n / variance + 1 / k) / 2
        return (ridge + wiener) / 2, left, variance * left / 2 + lost

    return by_groups(pilot, y, patch, size, two_filters)


def by_groups(pilot, y, patch, size, estimate):
    """Estimate a plane and its risk group by group; see similar.filter_once.

    Of a group's patches x of the pilot and z of y, (k, n), `estimate` returns estimates
    (k, n), and for each of them the noise left in it and its risk.
    """
    height, width = y.shape
    stride = patch // 2 + 1
    count = similar.TILE // stride
    total, risk, weights = np.zeros((3, *y.shape))

    def axis(length):
        """Each reference's place along an axis, and the first and last it looks at."""
        last = length - patch
        places = [min(i * stride, last) for i in range(-(-last // stride) + 1)]
        places += [last] * (-len(places) % count)
        span = min((count - 1) * stride + 2 * similar.SEARCH_REACH, last)
        for i, place in enumerate(places):
            tile = places[i - i % count]
            first = min(max(tile - similar.SEARCH_REACH, 0), last - span)
            yield place, range(first, first + span + 1)

    def at(image, i, j):
        return image[i : i + patch, j : j + patch].ravel()

    for i, rows in axis(height):
        for j, columns in axis(width):
            corners = [(a, b) for a in rows for b in columns]
            ours = at(pilot, i, j)
            corners.sort(key=lambda c: ((at(pilot, *c) - ours) ** 2).sum())
            corners = corners[:size]
            assert corners[0] == (i, j)
            x, z = (np.stack([at(image, *c) for c in corners]) for image in (pilot, y))
            for (a, b), *values in zip(corners, *estimate(x, z)):
                estimated, kept, risked = values
                place = slice(a, a + patch), slice(b, b + patch)
                total[place] += estimated.reshape(patch, patch) / kept
                risk[place] += risked / kept
                weights[place] += 1 / kept
    return total / weights, risk / weights


def saved(task):
    """A clean crop of camera, its observation, and what `fast` made of it in 500 steps."""
    arrays = np.load(Path(__file__).parent / "fixtures/ensembles.npz")
    f, deviation = (arrays[f"{task}_{x}"] for x in ("ensemble", "deviation"))
    clean = skimage.data.camera()[None, 100:196, 200:296].astype(np.float32) / 255
    blur = CircularBlur(gaussian_psf(15, 1.0))
    operator, sigma = {"denoise": (identity, 25), "deblur": (blur, 10)}[task]
    y = operator(torch.from_numpy(clean)[None])[0].numpy()
    y = y + gaussian_noise(clean.shape, sigma, 0)
    variance = deviation.astype(np.float32) ** 2
    return clean, (f.astype(np.float32), variance, y, np.ones(1), sigma, operator)


def decibels(image, clean):
    return -10 * np.log10(((image - clean) ** 2).mean())


def photograph(channels=1, side=256):
    """A photograph from 0.1 to 0.9, (C, side, side), without noise of its own."""
    pixels = skimage.data.astronaut() if channels == 3 else skimage.data.camera()
    pixels = np.atleast_3d(pixels)[:side, 128 : 128 + side] / 255
    return 0.1 + 0.8 * ndimage.gaussian_filter(pixels, (0.7, 0.7, 0)).transpose(2, 0, 1)
