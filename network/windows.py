"""Parts of a picture: windows that a step is trained on, tiles that it is predicted by."""

import numpy as np
import torch

GRID = 32  # pixels: five poolings; tiles that lie on it pool as the whole picture does
TILE = 768  # side of a tile, pixels: bounds the memory that a prediction takes
# What a tile sees around what it is used for: beyond it hardly anything counts.
MARGIN = 128


class Window:
    """The part of a picture that a step is trained on; a captured step reads its place.

    Under an operator that looks around it is larger than asked for by as much, may reach
    over the picture's edge to the opposite side, and what lies within the operator's
    reach of the window's edge is not judged.

    Args:
        whole: the picture's height and width.
        side: of the window, in pixels, rounded up to 32s; 0: the whole picture.
        reach: pixels that the forward operator looks around an entry.
        device: of its tensors.
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
        """Go to a place that `entropy`, such as (seed, step), names."""
        if not self.is_whole:
            found = window_corner(self.whole, self.size, self.reach > 0, *entropy)
            for scalar, first in zip(self.corner, found):
                scalar.fill_(first)

    def place(self):
        """Return the indices of the window's rows, (h, 1), and columns, (w,)."""
        rows, columns = (
            (first + torch.arange(size, device=self.corner.device)) % n
            for first, size, n in zip(self.corner, self.size, self.whole)
        )
        return rows[:, None], columns


def window_corner(shape, window, periodic, *entropy):
    """Choose a window's first row and column; every pixel is about as likely to lie in it.

    Args:
        shape: the picture's height and width.
        window: the window's.
        periodic: whether it may reach over the picture's edge to the opposite side.
        entropy: natural numbers that name the choice, such as (seed, step).
    """
    draws = np.random.default_rng(entropy).random(2)
    corner = []
    for size, side, draw in zip(shape, window, draws):
        if side == size:
            first = 0
        elif periodic:
            first = int(draw * size)
        else:  # centres anywhere; a window that would leave the picture is moved back
            first = int(np.clip(round(draw * size - side / 2), 0, size - side))
        corner.append(first)
    return corner


def tiles(size):
    """Cover an axis of `size` pixels with tiles.

    Returns:
        For each tile its first pixel, the one after its last, and its pixels' weights
        (length,): they rise and fall over half a margin, far enough from the tile's ends.
    """
    if size <= TILE:
        return [(0, size, torch.ones(size))]
    step = (TILE - 2 * MARGIN) // GRID * GRID
    found = []
    for first in range(0, size - 2 * MARGIN, step):
        last = min(first + TILE, size)
        place = torch.arange(first, last) + 0.5
        rise = ((place - first) / (MARGIN / 2) - 1.5).clamp(0, 1) if first else 1
        fall = ((last - place) / (MARGIN / 2) - 1.5).clamp(0, 1) if last < size else 1
        found.append((first, last, rise * fall * torch.ones(len(place))))
    return found
