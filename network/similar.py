"""A second pass: a picture's similar patches, filtered together."""

import math

import torch
from torch.nn import functional as F

REACH = 18  # pixels from a patch within which similar ones are looked for
TILE = 16  # pixels a side: the patches of a tile look at the same ones
ROUNDING = 3e-6  # of a group's energy, in float32
TILES = 64  # worked on at a time, for memory's sake

# From these sigmas (0-255 scale) on: side of a patch in pixels; patches in a group; what
# the pilot's Gram matrix is multiplied by, because the pilot is smoother than the truth;
# how often all is done, each time with the last estimate as the pilot.
GROUPS = {0: (7, 60, 1, 2), 12: (7, 60, 1.5, 2), 20: (9, 120, 2, 1)}


def filter_groups(pilot, observation, noise, times=None):
    """Estimate a picture from groups of similar patches, given a first estimate of it.

    The second step of NL-Ridge (Herbreteau, Kervrann, SIAM J. Imaging Sciences 2022). A
    group has k patches of n pixels: X of the pilot, (k, n), and Y of the observation.
    Each patch is estimated as a linear combination of all, T Y, by ridge regression,
    X and Y taken from their means:

        T = X X' (X X' + n s^2 I)^-1 = X (X' X + n s^2 I)^-1 X'

    with s^2 the noise's variance. A pixel is the mean of its estimates, weighted by
    1 / |T's row|^2, the inverse of the noise that is left in one. What a pixel risks is
    that noise, s^2 |T's row|^2, halved by the mean, and what T would do to the pilot, the
    mean square of X - T X.

    Args:
        pilot: (C, H, W), sides of 32 or more; the planes are filtered one by one, and
            patches are compared in the first.
        observation: y, of the same shape.
        noise: s^2, variance of the observation's white noise; above 0.
        times: how often all is done; None: as GROUPS has it.

    Returns:
        The second estimate and its risk, an expected squared error; both (C, H, W).
    """
    level = 255 * math.sqrt(noise)
    patch, size, gain, usual = GROUPS[max(k for k in GROUPS if k <= level)]
    for _ in range((times or usual) - 1):
        pilot = _filter_once(pilot, observation, noise, patch, size, gain)[0]
    return _filter_once(pilot, observation, noise, patch, size, gain)


def _filter_once(pilot, observation, noise, patch, size, gain):
    """The same, once, with given groups."""
    (height, width), device = pilot.shape[1:], pilot.device
    rows, columns = (_tiles(n, patch, device) for n in (height, width))
    within = torch.arange(patch, device=device)
    within = (within[:, None] * width + within).flatten()
    guide, planes = pilot[0].flatten() - 0.5, list(zip(pilot, observation))
    sums = [torch.zeros(len(pilot), height * width, device=device) for _ in range(3)]
    tiles = torch.arange(len(rows[0]) * len(columns[0]), device=device)
    for some in tiles.split(TILES):
        down, across = some // len(columns[0]), some % len(columns[0])
        references, candidates = (
            (r[down, :, None] * width + c[across, None]).flatten(1)
            for r, c in zip(rows, columns)
        )
        corners = _most_similar(guide, references, candidates, within, size)
        pixels = corners[..., None] + within  # (groups, k, n)
        for (x, y), *plane in zip(planes, *sums):
            x, y = x.flatten()[pixels], y.flatten()[pixels]
            estimate, kept, lost = _ridge(x, y, noise / gain)
            weight, risk = 1 / kept, noise * kept / 2 + lost
            for total, value in zip(plane, (estimate, risk[..., None], x.new_ones(()))):
                value = (value * weight[..., None]).expand_as(x)
                total.index_add_(0, pixels.flatten(), value.flatten())
    *totals, weights = sums
    return [total.div_(weights).view_as(pilot) for total in totals]


def _tiles(size, patch, device):
    """Return where along an axis each tile's patches begin, and those they look at."""
    last, stride = size - patch, patch // 2 + 1
    count = TILE // stride
    begins = torch.arange(0, last + stride, stride, device=device)
    begins = F.pad(begins, (0, -len(begins) % count), value=last)
    begins = begins.clamp(max=last).view(-1, count)
    span = min((count - 1) * stride + 2 * REACH, last) + 1
    first = (begins[:, :1] - REACH).clamp(0, last + 1 - span)
    return begins, first + torch.arange(span, device=device)


def _most_similar(guide, references, candidates, within, size):
    """Return the corners of the patches nearest to each reference, itself among them.

    Args:
        guide: (H * W,).
        references, candidates: corners by tile, (tiles, ...), as indices of the guide.
        within: a patch's pixels, from its corner.
        size: patches in a group, at most.
    """
    ours = guide[references[..., None] + within]
    theirs = guide[candidates[..., None] + within]
    # |ours - theirs|^2, but for what is the same for all candidates
    distance = theirs.square().sum(2)[:, None] - 2 * ours @ theirs.transpose(1, 2)
    distance[candidates[:, None] == references[..., None]] = -math.inf
    nearest = distance.topk(min(size, distance.shape[2]), 2, largest=False)[1]
    candidates = candidates[:, None].expand(-1, references.shape[1], -1)
    return candidates.gather(2, nearest).flatten(0, 1)


def _ridge(x, y, noise):
    """Return T Y, (groups, k, n), |T's rows|^2 and the rows' mean (X - T X)^2.

    Each from its mean, which is sure enough. The ridge is never so low that rounding
    decides, and no estimate surer than the mean of its group.
    """
    mean = y.mean((1, 2), keepdim=True)
    x, y = x - x.mean((1, 2), keepdim=True), y - mean
    gram = x.transpose(1, 2) @ x
    diagonal = gram.diagonal(dim1=1, dim2=2)
    diagonal += ROUNDING * diagonal.sum(1, keepdim=True) + x.shape[2] * noise
    half = torch.cholesky_solve(x.transpose(1, 2), torch.linalg.cholesky(gram))
    rows = (x @ (half @ half.transpose(1, 2)) * x).sum(2).clamp(min=1 / x.shape[1])
    return x @ (half @ y) + mean, rows, (x - x @ (half @ x)).square().mean(2)
