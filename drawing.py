"""The drawings that a run leaves, as PNG files' bytes. Imports nothing of this project."""

import io
import math
import warnings

import numpy as np

warnings.filterwarnings("ignore", "Glyph .* missing")

MAX_PANEL = 1024  # pixels a side of a picture in a drawing
MAX_RATIO = 4  # of a drawn picture's height to its width
BARE = {"xticks": [], "yticks": [], "frame_on": False}  # axes with an image alone


def new_figure(size, dpi):
    """Return a Matplotlib figure; size is its (width, height) in inches."""
    from matplotlib.figure import Figure  # late, as PyTorch is

    return Figure(figsize=size, dpi=dpi, layout="constrained")


def drawn(figure):
    """Return a figure as a PNG file's bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def comparison(panels, ends):
    """Draw titled images side by side.

    Args:
        panels: title -> image (C, H, W), all of one size.
        ends: the values drawn as black and as white.
    """
    _, height, width = next(iter(panels.values())).shape
    every = math.ceil(max(height, width) / MAX_PANEL)
    size = len(panels) * 4, 4 * min(height / width, MAX_RATIO) + 0.4
    figure = new_figure(size, max(320, width // every) / 4)
    (row,) = figure.subplots(1, len(panels), squeeze=False, subplot_kw=BARE)
    for axes, (title, image) in zip(row, panels.items()):
        pixels = (image[:, ::every, ::every] - ends[0]) / max(ends[1] - ends[0], 1e-30)
        pixels = pixels.clip(0, 1).transpose(1, 2, 0)
        axes.imshow(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))
        axes.set_title(title, fontsize="large" if len(title) < 40 else "small")
    return drawn(figure)


def uncertainty(deviation):
    """Draw the predictions' standard deviation (H, W), in a file's numbers."""
    height, width = deviation.shape
    every = math.ceil(max(height, width) / MAX_PANEL)
    figure = new_figure((6, max(5 * min(height / width, MAX_RATIO), 4)), 160)
    axes = figure.subplots(subplot_kw=BARE)
    shown = axes.imshow(deviation[::every, ::every], cmap="magma", vmin=0)
    label = "standard deviation of the predictions, in the file's numbers"
    figure.colorbar(shown, ax=axes, label=label)
    return drawn(figure)


def curves(records):
    """Draw loss and PSNR over the steps, a line for each of the results' records."""
    figure = new_figure((9, 4), 120)
    axes = figure.subplots(1, 2)
    for record in records:
        # Matplotlib reads "$" as a formula, and drops a name that begins with "_".
        name = " " + record["name"].replace("$", r"\$")
        every = record["loss_every"]
        losses = [(every * n, loss) for n, loss in enumerate(record["losses"], 1)]
        scores = [(row[0], row[2]) for row in record["rows"] if row[2] is not None]
        for axis, points in zip(axes, (losses, scores)):
            if points:
                axis.plot(*zip(*points), marker=".", label=name)
    for axis, title in zip(axes, ("loss", "PSNR (dB)")):
        axis.set(xlabel="step", ylabel=title)
        axis.grid(alpha=0.3)
    if 0 < len(axes[0].lines) <= 12:
        axes[0].legend(fontsize="small")
    return drawn(figure)
