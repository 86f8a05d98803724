"""A second pass: a picture's similar patches, filtered together."""

import functools
import math

import torch
from torch.nn import functional as F

REACH = 18  # pixels from a patch within which similar ones are looked for
TILE = 16  # pixels a side: the patches of a tile look at the same ones
ROUNDING = 3e-6  # of a group's energy, in float32
VISIBLE = 8  # times a group's energy over the noise's: how far it is detail
TILES = 64  # worked on at a time, for memory's sake

# From these sigmas (0-255 scale) on: side of a patch in pixels; patches in a group; what
# the pilot's Gram matrix is multiplied by in detail, because the pilot is smoother than the
# truth; how often all is done, each time with the last estimate as the pilot.
GROUPS = {0: (6, 45, 1, 2), 12: (6, 45, 1.5, 2), 20: (8, 80, 2, 1)}


def filter_groups(pilot, observation, noise, times=None):
    """Return what filter_slabs yields as whole pictures: estimate and risk, (C, H, W)."""
    slabs = zip(*filter_slabs(pilot, observation, noise, times))
    return [torch.cat(slab, 1) for slab in slabs]


def filter_slabs(pilot, observation, noise, times=None, gain=None):
    """Estimate a picture from groups of similar patches, given a first estimate of it.

    A group has k patches of n pixels: X of the pilot, (k, n), and Y of the observation,
    whose noise has the covariance S, (n, n), in a patch. It is estimated twice, by ridge
    regression on its patches and by Wiener's filter of its pixels, each from X's mean:

        T Y with T = X X' (X X' + n s^2 I)^-1 = X (X' X + n s^2 I)^-1 X'
        Y W with W = (X' X + k S)^-1 X' X

    The first is the second step of NL-Ridge (Herbreteau, Kervrann, SIAM J. Imaging
    Sciences 2022), the second that of NL-Bayes (Lebrun, Buades, Morel, same journal,
    2013). The mean of both is taken. A pixel is the mean of its patches' estimates,
    weighted by the inverse of the noise that is left in them. What a pixel risks is that
    noise, halved by the mean, and what the filters would do to the pilot, the mean square
    of X - T X and X - X W.

    Args:
        pilot: (C, H, W), sides of 32 or more; the planes are filtered one by one, and
            patches are compared in the first.
        observation: of the same shape.
        noise: variance of the observation's noise; above 0. A number, or by frequency,
            as torch.fft.rfft2 has them, (C, H, W // 2 + 1).
        times: how often all is done; None: as GROUPS has it.
        gain: what a Gram matrix is multiplied by, in detail; None: likewise.

    Yields:
        The second estimate and its risk, an expected squared error, of some rows, both
        (C, rows, W); from top to bottom, for memory's sake.
    """
    planes, height, width = pilot.shape
    noise = torch.as_tensor(noise).to(pilot).expand(planes, height, width // 2 + 1)
    sigma = 255 * noise[:, 0, 0].mean().sqrt().item()  # where pictures' energy is
    patch, size, usual, rounds_of_level = GROUPS[max(k for k in GROUPS if k <= sigma)]
    estimators = [
        functools.partial(
            two_filters,
            level=level,
            covariance=_covariance(plane, (height, width), patch),
            gain=gain or usual,
        )
        for level, plane in zip(noise_levels(noise), noise)
    ]
    for _ in range((times or rounds_of_level) - 1):
        rounds = filter_once(pilot, observation, patch, size, estimators)
        pilot = torch.cat([estimate for estimate, _ in rounds], 1)
    yield from filter_once(pilot, observation, patch, size, estimators)


def noise_levels(noise):
    """Return the variance that counts of noise (C, H, W'), by frequency: (C,).

    Coloured noise does not average out over patches that overlap as white noise does:
    the root mean square.
    """
    return (noise**2).mean((1, 2)).sqrt()


def _covariance(noise, size, patch):
    """Return the covariance in a patch, (n, n), of noise by frequency (H, W')."""
    shared = torch.fft.irfft2(noise, s=size)  # by the distance of two pixels
    place = torch.arange(patch**2, device=noise.device)
    down, across = (x[:, None] - x for x in (place // patch, place % patch))
    return shared[down, across]


def filter_once(pilot, observation, patch, size, estimators):
    """Yield estimates and risks of one filtering, as filter_slabs does.

    Args:
        pilot, observation: (C, H, W).
        patch, size: a patch's side in pixels, and how many patches a group has.
        estimators: one for each plane. It gets the groups of the pilot and of the
            observation, both (groups, k, n), and returns what two_filters does.
    """
    (height, width), device = pilot.shape[1:], pilot.device
    rows, columns = (_tiles(n, patch, device) for n in (height, width))
    within = torch.arange(patch, device=device)
    within = (within[:, None] * width + within).flatten()
    # patches of the guide by their corners, a view
    count = height * width - (patch - 1) * (width + 1)
    guide = (pilot[0].flatten() - 0.5).as_strided((count, patch, patch), (1, width, 1))
    planes = list(zip(pilot, observation, estimators))
    # from row `top` on: the weighted sums of estimates and risks, and the weights'
    top, sums = 0, pilot.new_zeros(3, len(pilot), 0, width)
    for band in torch.arange(len(rows[0])).split(max(1, TILES // len(columns[0]))):
        first, last = rows[1][band[0], 0].item(), rows[1][band[-1], -1].item() + patch
        if first > top:  # no later tile looks above
            yield _means(sums[:, :, : first - top])
        left = sums[:, :, first - top :]
        sums = F.pad(left, (0, 0, 0, last - first - left.shape[2]))
        top = first
        tiles = band[0] * len(columns[0]) + torch.arange(len(band) * len(columns[0]))
        for some in tiles.to(device).split(TILES):
            down, across = some // len(columns[0]), some % len(columns[0])
            references, candidates = (
                (r[down, :, None] * width + c[across, None]).flatten(1)
                for r, c in zip(rows, columns)
            )
            corners = _most_similar(guide, references, candidates, size)
            pixels = corners[..., None] + within  # (groups, k, n)
            places = pixels.flatten() - top * width
            for i, (x, y, estimate) in enumerate(planes):
                x, y = x.flatten()[pixels], y.flatten()[pixels]
                for total, value in zip(sums[:, i], estimate(x, y)):
                    value = value.expand_as(x).flatten()
                    total.view(-1).index_add_(0, places, value)
    yield _means(sums)


def _means(sums):
    """Return estimate and risk from their weighted sums and the weights'."""
    return sums[0] / sums[2], sums[1] / sums[2]


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


def _most_similar(guide, references, candidates, size):
    """Return the corners of the patches nearest to each reference, itself among them.

    Args:
        guide: its patches by corner, (corners, patch, patch).
        references, candidates: corners by tile, (tiles, ...), as indices of the guide.
        size: patches in a group, at most.
    """
    ours, theirs = (guide[x].flatten(2) for x in (references, candidates))
    # |ours - theirs|^2, but for what is the same for all candidates
    distance = theirs.norm(dim=2).square()[:, None] - 2 * ours @ theirs.transpose(1, 2)
    distance[candidates[:, None] == references[..., None]] = -math.inf
    nearest = distance.topk(min(size, distance.shape[2]), 2, largest=False)[1]
    candidates = candidates[:, None].expand(-1, references.shape[1], -1)
    return candidates.gather(2, nearest).flatten(0, 1)


def two_filters(x, y, level, covariance, gain=1):
    """Return a group's estimate (groups, k, n) and risk, times their weight, and that.

    The weight is the inverse of the noise left in a patch, in units of the level's,
    (groups, k, 1). No estimate is taken for surer than the mean of its group.
    """
    (k, n), mean = x.shape[1:], y.mean((1, 2), keepdim=True)
    centred, z = x - x.mean((1, 2), keepdim=True), y - mean
    # In flat groups the pilot has waves that noise has left, and no more than the truth.
    energy = VISIBLE * centred.square().mean((1, 2), keepdim=True)
    gain = gain ** (energy / (energy + level))
    half = _solve(centred, n * level / gain * torch.eye(n).to(x), centred.mT)
    ridge = centred @ (half @ z) + mean
    left = (centred @ (half @ half.mT) * centred).sum(2).clamp(min=1 / k)
    lost = (centred - centred @ (half @ centred)).square().mean(2)
    mean = y.mean(1, keepdim=True)
    centred, z = x - x.mean(1, keepdim=True), y - mean
    weights = _solve(centred, k * covariance / gain, centred.mT @ centred)
    wiener = z @ weights + mean
    kept = (covariance @ weights * weights).sum((1, 2)) / (n * level) + 1 / k
    left = (left + kept[:, None]) / 2
    lost = (lost + (centred - centred @ weights).square().mean(2)) / 2
    weight = 1 / left[..., None]
    risk = level * left / 2 + lost
    return weight * (ridge + wiener) / 2, weight * risk[..., None], weight


def _solve(x, damping, right):
    """Solve (X' X + damping) Z = right; never so little damped that rounding decides."""
    gram = x.mT @ x + damping
    diagonal = gram.diagonal(dim1=1, dim2=2)
    diagonal += ROUNDING * diagonal.sum(1, keepdim=True)
    return torch.cholesky_solve(right, torch.linalg.cholesky(gram))
