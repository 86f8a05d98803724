"""Punet.forward in fewer passes over memory, from PyTorch's own operations.

It runs on a CPU, and on any other device without Triton. Maps (N, C, H, W) are in
channels_last order and in the type of x: in bfloat16 too, while the weights stay float32.
"""

import itertools

import torch
from torch.nn import functional as F

from network.convolution import conv2d
from network.punet import bent_sigmoid, halve


def forward(network, x, mask, draw):
    """Compute what Punet.forward computes, with the same draws in the same order.

    Args:
        network: a Punet.
        x, mask, draw: as in Punet.forward; x in the type to compute in.
    """
    skips = [x]
    for i, layer in enumerate(network.encoder):
        x = EdgePad.apply(None, x, None)
        mask = F.pad(mask, (1, 1, 1, 1), value=1.0)
        x, mask = convolve_kept(layer, x, mask)
        x = F.leaky_relu_(x, 0.1)
        if 1 <= i <= 5:
            x, mask = halve(x), halve(mask)
            if i <= 4:
                skips.append(x)
    for i, (first, *others) in enumerate(network.decoder):
        x = F.leaky_relu_(x, 0.1) if i else x
        x = convolve_joined(network, first, x, skips.pop(), draw)
        for layer in others:
            x = F.leaky_relu_(x, 0.1)
            keep, weight = draw_dropout(network, layer, 0, x, draw)
            padded = EdgePad.apply(keep, x, None)
            x = conv2d(padded, weight.to(x.dtype), layer.bias.to(x.dtype))
    return bent_sigmoid(x.to(layer.bias.dtype), network.bend)


def convolve_kept(layer, x, mask):
    """Compute PConv2d.forward for a layer with stride 1, without padding, with a bias.

    Args:
        layer: a PConv2d.
        x: features, (N, C, H, W).
        mask: (N, C, H, W) or (N, 1, H, W), in a type that counts the entries of a window
            exactly.

    Returns:
        The output (N, K, H - 2, W - 2), and the updated mask (N, 1, H - 2, W - 2).
    """
    kept = layer.count_kept(mask)
    updated = kept.clamp(0, 1)
    full = layer.window.numel() * layer.in_channels
    if x.device.type == "cpu" and kept.min() == full:
        # Nothing is missing, so all windows have one ratio.
        weight = (layer.weight * (layer.numerator / full)).to(x.dtype)
        return conv2d(*two_channels(x, weight), layer.bias.to(x.dtype)), updated
    ratio = layer.numerator / (kept + 1e-8) * updated
    mask, ratio, weight, bias = (
        t.to(x.dtype) for t in (mask, ratio, layer.weight, layer.bias.view(1, -1, 1, 1))
    )
    x = x * expand(mask, x)
    output = conv2d(*two_channels(x, weight))
    bias, ratio = expand(bias, output), expand(ratio, output)
    return torch.addcmul(bias, output, ratio), updated


def convolve_joined(network, layer, x, skip, draw):
    """Upsample x, join the skip, drop entries and convolve.

    The layer convolves x and the skip separately, and the results are added. Without
    dropout on the upsampled map x is convolved before it is upsampled.

    Args:
        x: (N, C, h, w).
        skip: (N, C', H, W); H is 2 h or 2 h - 1, W is 2 w or 2 w - 1.

    Returns:
        (N, K, H, W).
    """
    c, size = x.shape[1], skip.shape[2:]
    whole = 0 if network.drop_upsampled else c
    keep, weight = draw_dropout(network, layer, whole, skip, draw)
    keep_x = keep_skip = keep
    if keep is not None:
        keep_x, keep_skip = keep[:, : c - whole], keep[:, c - whole :]
    early = whole or keep is None
    weight_x, weight_skip = weight[:, :c], weight[:, c:]
    if early:
        weight_x = phase_weights(weight_x)
    weight_x, weight_skip, bias = (
        t.to(x.dtype) for t in (weight_x, weight_skip, layer.bias)
    )
    skip = EdgePad.apply(keep_skip, skip, None)
    joined = conv2d(*two_channels(skip, weight_skip), bias)
    if early:
        convolved = conv2d(EdgePad.apply(None, x, None), weight_x)
        return AddUpsampled.apply(joined, convolved)
    return joined.add_(conv2d(EdgePad.apply(keep_x, x, size), weight_x))


def draw_dropout(network, layer, whole, like, draw):
    """Draw which entries of a layer's input are kept.

    Args:
        layer: an nn.Conv2d with C input channels.
        whole: number of channels, the first ones, that keep all their entries.
        like: a map with the N, H, W and the type of the input.

    Returns:
        The mask of the other channels, (N, C - whole, H, W), or None if the drop rate
        is 0; and the layer's weight, which takes over the scale 1 / (1 - p).
    """
    if not network.drop_rate:
        return None, layer.weight
    shape = len(like), layer.in_channels - whole, *like.shape[2:]
    keep = draw(shape, network.drop_rate)
    keep = keep.to(like.dtype) if keep.is_floating_point() else keep
    weight = layer.weight / (1 - network.drop_rate)
    if whole:
        weight = torch.cat((layer.weight[:, :whole], weight[:, whole:]), 1)
    return keep, weight


def expand(x, like):
    """Expand x, which broadcasts to a map `like` (N, C, H, W), to its full size.

    Only in bfloat16: there PyTorch multiplies five times slower when it broadcasts.
    """
    if like.dtype != torch.bfloat16:
        return x
    return x.expand_as(like).contiguous(memory_format=torch.channels_last)


def two_channels(x, weight):
    """Add an empty second channel to a map (N, 1, H, W) and to its weight (K, 1, h, w).

    PyTorch makes no channels_last maps from one channel. Other maps pass unchanged.
    """
    if x.shape[1] > 1:
        return x, weight
    x, weight = (F.pad(t, (0, 0, 0, 0, 0, 1)) for t in (x, weight))
    return x, weight.contiguous(memory_format=torch.channels_last)


class EdgePad(torch.autograd.Function):
    """Upsample, drop entries and pad by one pixel with edge values, in channels_last.

    Equals F.pad(up(x) * keep, (1, 1, 1, 1), mode="replicate") in one pass over memory.
    With a size (H, W), up() repeats pixels 2x2 and crops to that size; with None it is
    the identity. The backward pass of PyTorch's padding is slow, and not deterministic on
    CUDA.
    """

    @staticmethod
    def forward(ctx, keep, x, size):
        """Pad x (N, C, h, w); keep is (N, C, H, W), 1 = kept, or None: all is kept."""
        ctx.save_for_backward(keep)
        ctx.step = 1 if size is None else 2
        height, width = size or x.shape[2:]
        padded = torch.empty(
            (*x.shape[:2], height + 2, width + 2),
            dtype=x.dtype,
            device=x.device,
            memory_format=torch.channels_last,
        )
        for part, kept in copies(ctx.step, padded[..., 1:-1, 1:-1], keep):
            h, w = part.shape[2:]
            torch.mul(x[..., :h, :w], kept, out=part)
        padded[..., 0, :] = padded[..., 1, :]
        padded[..., -1, :] = padded[..., -2, :]
        padded[..., 0] = padded[..., 1]
        padded[..., -1] = padded[..., -2]
        return padded

    @staticmethod
    def backward(ctx, grad):
        """Add up the gradients of each pixel's copies; grad is (N, C, H + 2, W + 2)."""
        if not ctx.needs_input_grad[1]:
            return None, None, None
        (keep,) = ctx.saved_tensors
        every = slice(None)

        def kept(part, rows, columns):
            return part * (1 if keep is None else keep[..., rows, columns])

        # Into a copy, because others may hold `grad`.
        inner = kept(grad[..., 1:-1, 1:-1], every, every)
        for edge in (0, -1):
            inner[..., edge] += kept(grad[..., 1:-1, edge], every, edge)
        for edge in (0, -1):
            row = grad[..., edge, 1:-1].clone()
            row[..., 0] += grad[..., edge, 0]
            row[..., -1] += grad[..., edge, -1]
            inner[..., edge, :] += kept(row, edge, every)
        if ctx.step == 1:
            return None, inner, None
        (first, _), *others = copies(ctx.step, inner, None)
        grad_x = first.clone()  # the first copy of every pixel: none is cropped
        for part, _ in others:
            h, w = part.shape[2:]
            grad_x[..., :h, :w] += part
        return None, grad_x, None


def copies(step, inner, keep):
    """Yield each step x step phase of a map `inner`, and of `keep`; 1 if that is None."""
    for i, j in itertools.product(range(step), repeat=2):
        part = ..., slice(i, None, step), slice(j, None, step)
        yield inner[part], 1 if keep is None else keep[part]


def phase_weights(weight):
    """Return the weights that do before nearest x2 upsampling what `weight` does after.

    Args:
        weight: (K, C, 3, 3), for the upsampled map padded with its edges.

    Returns:
        (4 K, C, 2, 2), for the map itself padded with its edges: 4 multiplications where
        `weight` takes 9. Channel (2 i + j) K + k is output k at the rows 2 r + i and the
        columns 2 s + j, for i and j in 0 and 1; it lies at (r + i, s + j).
    """
    for axis in (-2, -1):
        # Three rows of an upsampled map copy two rows: an even row's window has the first
        # one once and the second one twice, an odd row's window has the first one twice.
        first, second, third = weight.unbind(axis)
        even = torch.stack((first, second + third), axis)
        odd = torch.stack((first + second, third), axis)
        weight = torch.stack((even, odd), -5)
    return weight.flatten(0, 2).contiguous(memory_format=torch.channels_last)


class AddUpsampled(torch.autograd.Function):
    """Add to a map (N, K, H, W), in place, what phase_weights gave: (N, 4 K, h + 1, w + 1).

    H is 2 h or 2 h - 1, and W is 2 w or 2 w - 1.
    """

    @staticmethod
    def forward(ctx, x, convolved):
        """Add the four phases to x."""
        ctx.shape = convolved.shape
        ctx.mark_dirty(x)
        for part, source in phases(x, convolved):
            part += source
        return x

    @staticmethod
    def backward(ctx, grad):
        """Return the gradients of x and of the phases; grad is (N, K, H, W)."""
        convolved = torch.empty(
            ctx.shape,
            dtype=grad.dtype,
            device=grad.device,
            memory_format=torch.channels_last,
        ).zero_()  # each phase has rows and columns at the edge that it did not give
        for part, source in phases(grad, convolved):
            source.copy_(part)
        return grad, convolved


def phases(x, convolved):
    """Yield every other row and column of x, and the part of `convolved` that belongs there."""
    k = x.shape[1]
    for i, j in itertools.product(range(2), repeat=2):
        part, first = x[..., i::2, j::2], (2 * i + j) * k
        h, w = part.shape[2:]
        yield part, convolved[:, first : first + k, i : i + h, j : j + w]
