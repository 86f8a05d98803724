"""Parts of a picture: windows for training steps, tiles for predictions."""

import numpy as np
import torch

GRID = 32  # pixels; tiles on it are pooled five times just as the whole picture is
TILE_SIDE = 768  # pixels; bounds the memory of a prediction
# Pixels of a tile around the part that is used; pixels farther away hardly affect it.
TILE_MARGIN = 128


class Window:
    """The part of a picture that a step trains on. A captured step reads its place.

    Under a blur the window grows by the operator's reach on each side. It may then cross
    the edge of the picture and continue at the opposite one. Entries within the reach of
    the window's edge are not judged.

    Args:
        whole: height and width of the picture.
        side: side of the window in pixels, rounded up to a multiple of 32. 0: the whole
            picture.
        reach: distance in pixels at which the forward operator still mixes entries.
        device: device of the window's tensors.
    """

    def __init__(self, whole, side, reach, device):
        side = side and -(-(side + 2 * reach) // GRID) * GRID
        self.whole, self.reach = tuple(whole), reach
        self.size = tuple(min(n, side or n) for n in whole)
        self.is_whole = self.size == self.whole
        self.corner = torch.zeros(2, dtype=torch.int64, device=device)
        self.inner = torch.ones(1, 1, *self.size, device=device)  # 1: judged
        for axis, (n, size) in enumerate(zip(self.whole, self.size), 2):
            if reach and size < n:
                for part in (slice(reach), slice(size - reach, None)):
                    self.inner.transpose(2, axis)[:, :, part] = 0

    def move(self, *entropy):
        """Move to the place that `entropy`, such as (seed, step), selects."""
        if not self.is_whole:
            corner = choose_corner(self.whole, self.size, self.reach > 0, *entropy)
            for scalar, first in zip(self.corner, corner):
                scalar.fill_(first)

    def place(self):
        """Return the indices of the window's rows, (h, 1), and columns, (w,).

        Those of the whole picture are slices, which make views.
        """
        if self.is_whole:
            return slice(None), slice(None)
        rows, columns = (
            (first + torch.arange(size, device=self.corner.device)) % n
            for first, size, n in zip(self.corner, self.size, self.whole)
        )
        return rows[:, None], columns


def choose_corner(shape, window, periodic, *entropy):
    """Choose the first row and column of a window so that it covers all pixels about alike.

    Args:
        shape: height and width of the picture.
        window: height and width of the window.
        periodic: whether the window may cross the picture's edge to the opposite side.
        entropy: natural numbers that select the place, such as (seed, step).
    """
    draws = np.random.default_rng(entropy).random(2)
    corner = []
    for size, side, draw in zip(shape, window, draws):
        if side == size:
            first = 0
        elif periodic:
            first = int(draw * size)
        else:  # the centre is anywhere; a window that leaves the picture is moved back
            first = int(np.clip(round(draw * size - side / 2), 0, size - side))
        corner.append(first)
    return corner


def tiles(size):
    """Cover an axis of `size` pixels with tiles.

    Returns:
        A list with each tile's first pixel, the pixel after its last, and the weights of
        its pixels, (length,). The weights of all tiles add up to 1 at every pixel. At an
        end that another tile overlaps, the outer three quarters of TILE_MARGIN
        have weight 0, and the weight rises over the next half of it.
    """
    if size <= TILE_SIDE:
        return [(0, size, torch.ones(size))]
    ramp = TILE_MARGIN / 2
    step = (TILE_SIDE - 2 * TILE_MARGIN) // GRID * GRID
    found = []
    for first in range(0, size - 2 * TILE_MARGIN, step):
        last = min(first + TILE_SIDE, size)
        place = torch.arange(first, last) + 0.5
        rise = ((place - first) / ramp - 1.5).clamp(0, 1) if first else 1
        fall = ((last - place) / ramp - 1.5).clamp(0, 1) if last < size else 1
        found.append((first, last, rise * fall * torch.ones(len(place))))
    return found
