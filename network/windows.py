"""Parts of a picture: windows that a step is trained on, tiles that it is predicted by."""

import numpy as np
import torch

GRID = 32  # pixels: five poolings; tiles that lie on it pool as the whole picture does
TILE = 768  # side of a tile, pixels: bounds the memory that a prediction takes
# What a tile sees around what it is used for: the network's receptive field.
MARGIN = 128


def window_place(shape, window, periodic, *entropy):
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
