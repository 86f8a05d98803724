"""The second pass: similar patches of a picture are filtered together."""

import functools
import math

import torch
from torch.nn import functional as F

SEARCH_REACH = 18  # pixels around a tile in which similar patches are searched
TILE = 16  # pixels a side; the reference patches of a tile have the same candidates
MAX_TILES = 64  # filtered at a time, to save memory
ROUNDING = 3e-6  # share of a group's energy that float32 may lose
DETAIL_FACTOR = 8  # a group whose energy times this equals the noise's is half detail

# Smallest sigma (0-255 scale) -> side of a patch in pixels; patches in a group; boost, the
# factor of the pilot's Gram matrix in detail, because the pilot is smoother than the
# truth.
GROUPS = {0: (6, 45, 1), 12: (6, 45, 1.5), 20: (8, 80, 2)}


def filter_groups(pilot, observation, noise, boost=None):
    """Estimate a picture from groups of similar patches, given a first estimate of it.

    A group has k patches of n pixels: X of the pilot, (k, n), and Y of the observation.
    The noise of Y has the variance s^2 and, in a patch, the covariance S, (n, n). The
    group is estimated twice: by ridge regression, which combines its patches, and by
    Wiener's filter, which combines the pixels of a patch. With the means subtracted:

        T Y with T = X X' (X X' + n s^2 I)^-1 = X (X' X + n s^2 I)^-1 X'
        Y W with W = (X' X + k S)^-1 X' X

    The first is the second step of NL-Ridge (Herbreteau, Kervrann, SIAM J. Imaging
    Sciences 2022), the other the second step of NL-Bayes (Lebrun, Buades, Morel, same
    journal, 2013). A patch's estimate is the mean of both. A pixel is the mean of the
    estimates of all patches that hold it, weighted by the inverse of the noise left in
    them. Its risk has two parts: half of that noise, since two estimates are averaged; and
    the error that the filters would make on the pilot, the mean square of X - T X and
    X - X W.

    Args:
        pilot: the first estimate, (C, H, W), sides of 32 or more. Each plane is filtered
            by itself; patches are compared in the first one.
        observation: of the same shape.
        noise: variance of the observation's noise, above 0: one number, or one for each
            frequency of torch.fft.rfft2, (C, H, W // 2 + 1).
        boost: factor of the Gram matrices in detail; None: that in GROUPS.

    Returns:
        The new estimate, and its risk, an expected squared error; both (C, H, W).
    """
    planes, height, width = pilot.shape
    noise = torch.as_tensor(noise).to(pilot).expand(planes, height, width // 2 + 1)
    # A picture's energy lies in the low frequencies, so their noise chooses the settings.
    sigma = 255 * noise[:, 0, 0].mean().sqrt().item()
    patch, size, usual_boost = GROUPS[max(k for k in GROUPS if k <= sigma)]
    estimators = [
        functools.partial(
            two_filters,
            variance=variance,
            covariance=_covariance(plane, (height, width), patch),
            boost=boost or usual_boost,
        )
        for variance, plane in zip(effective_variances(noise), noise)
    ]
    return filter_once(pilot, observation, patch, size, estimators)


def effective_variances(noise):
    """Return one variance for each plane, (C,), of noise given by frequency, (C, H, W').

    It is the root mean square of the variances, which is above their mean for coloured
    noise: where patches overlap, such noise averages out less than white noise does.
    """
    return (noise**2).mean((1, 2)).sqrt()


def _covariance(noise, size, patch):
    """Return a patch's covariance (n, n) of noise given by frequency, (H, W')."""
    shared = torch.fft.irfft2(noise, s=size)  # indexed by the distance of two pixels
    place = torch.arange(patch**2, device=noise.device)
    down, across = (x[:, None] - x for x in (place // patch, place % patch))
    return shared[down, across]


def filter_once(pilot, observation, patch, size, estimators):
    """Filter once; return the estimate and its risk, as filter_groups does.

    Args:
        pilot, observation: (C, H, W).
        patch, size: a patch's side in pixels, and the number of patches in a group.
        estimators: a function for each plane. It takes groups of the pilot and of the
            observation, both (groups, k, n), and returns the values of two_filters.
    """
    (height, width), device = pilot.shape[1:], pilot.device
    rows, columns = (_tiles(n, patch, device) for n in (height, width))
    within = torch.arange(patch, device=device)
    within = (within[:, None] * width + within).flatten()
    # A view: guide[i] is the patch whose upper left corner is pixel i of the first plane.
    count = height * width - (patch - 1) * (width + 1)
    guide = (pilot[0].flatten() - 0.5).as_strided((count, patch, patch), (1, width, 1))
    planes = list(zip(pilot, observation, estimators))
    # Weighted sums of estimates and of risks, and sums of weights.
    sums = pilot.new_zeros(3, len(pilot), height * width)
    tiles = torch.arange(len(rows[0]) * len(columns[0]), device=device)
    for some in tiles.split(MAX_TILES):
        down, across = some // len(columns[0]), some % len(columns[0])
        references, candidates = (
            (r[down, :, None] * width + c[across, None]).flatten(1)
            for r, c in zip(rows, columns)
        )
        corners = _most_similar(guide, references, candidates, size)
        pixels = corners[..., None] + within  # (groups, k, n)
        for i, (x, y, estimate) in enumerate(planes):
            x, y = x.flatten()[pixels], y.flatten()[pixels]
            for total, value in zip(sums[:, i], estimate(x, y)):
                total.index_add_(0, pixels.flatten(), value.expand_as(x).flatten())
    sums[:2] /= sums[2].clone()
    return sums[:2].view(2, *pilot.shape)


def _tiles(size, patch, device):
    """Return the first pixels, along an axis, of each tile's references and candidates.

    (tiles, references) and (tiles, candidates).
    """
    last, stride = size - patch, patch // 2 + 1
    count = TILE // stride
    begins = torch.arange(0, last + stride, stride, device=device)
    begins = F.pad(begins, (0, -len(begins) % count), value=last)
    begins = begins.clamp(max=last).view(-1, count)
    span = min((count - 1) * stride + 2 * SEARCH_REACH, last) + 1
    first = (begins[:, :1] - SEARCH_REACH).clamp(0, last + 1 - span)
    return begins, first + torch.arange(span, device=device)


def _most_similar(guide, references, candidates, size):
    """Return the corners of the patches nearest to each reference, (groups, size).

    Args:
        guide: the patches of the first plane by corner, (corners, patch, patch).
        references, candidates: corners by tile, (tiles, ...), as indices of the guide.
            Each reference is also a candidate, and always chosen.
        size: patches in a group, at most.
    """
    ours, theirs = (guide[x].flatten(2) for x in (references, candidates))
    # |ours - theirs|^2 less |ours|^2, which is the same for all candidates
    distance = theirs.norm(dim=2).square()[:, None] - 2 * ours @ theirs.transpose(1, 2)
    distance[candidates[:, None] == references[..., None]] = -math.inf
    nearest = distance.topk(min(size, distance.shape[2]), 2, largest=False)[1]
    candidates = candidates[:, None].expand(-1, references.shape[1], -1)
    return candidates.gather(2, nearest).flatten(0, 1)


def two_filters(x, y, variance, covariance, boost=1):
    """Estimate the patches of groups by the two filters: see filter_groups.

    Args:
        x, y: groups of the pilot and of the observation, (groups, k, n).
        variance: s^2.
        covariance: S, (n, n).
        boost: factor of the Gram matrices of groups with detail.

    Returns:
        weight * estimate, (groups, k, n), weight * risk, (groups, k, 1), and the weight,
        (groups, k, 1): the inverse of the noise left in a patch, as a share of s^2. That
        share is at least 1 / k, as in the mean of the group.
    """
    (k, n), mean = x.shape[1:], y.mean((1, 2), keepdim=True)
    centred, z = x - x.mean((1, 2), keepdim=True), y - mean
    # In flat groups the pilot's waves are remains of noise, so the boost falls to 1.
    energy = DETAIL_FACTOR * centred.square().mean((1, 2), keepdim=True)
    boost = boost ** (energy / (energy + variance))
    half = _solve(centred, n * variance / boost * torch.eye(n).to(x), centred.mT)
    ridge = centred @ (half @ z) + mean
    left = (centred @ (half @ half.mT) * centred).sum(2).clamp(min=1 / k)
    lost = (centred - centred @ (half @ centred)).square().mean(2)
    mean = y.mean(1, keepdim=True)
    centred, z = x - x.mean(1, keepdim=True), y - mean
    weights = _solve(centred, k * covariance / boost, centred.mT @ centred)
    wiener = z @ weights + mean
    kept = (covariance @ weights * weights).sum((1, 2)) / (n * variance) + 1 / k
    left = (left + kept[:, None]) / 2
    lost = (lost + (centred - centred @ weights).square().mean(2)) / 2
    weight = 1 / left[..., None]
    risk = variance * left / 2 + lost
    return weight * (ridge + wiener) / 2, weight * risk[..., None], weight


def _solve(x, damping, right):
    """Solve (X' X + damping) Z = right, with enough damping to outweigh rounding errors."""
    gram = x.mT @ x + damping
    diagonal = gram.diagonal(dim1=1, dim2=2)
    diagonal += ROUNDING * diagonal.sum(1, keepdim=True)
    return torch.cholesky_solve(right, torch.linalg.cholesky(gram))
