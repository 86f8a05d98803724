"""Punet.forward in fewer passes over memory, from PyTorch's own operations.

It runs on a CPU, and on any other device without Triton. Maps (N, C, H, W) are in
channels_last order and in the type of x: in bfloat16 too, while the weights stay float32.
"""

import functools
import itertools

import torch
from torch.nn import functional as F

from network import convolution
from network.punet import bent_sigmoid, double, halve

# At each end of a padded axis: the place of a copy, and that of its original.
EDGES = (0, 1), (-1, -2)
# Up to so many pixels PyTorch's own functions are faster than EdgedConvolution.
SMALL_MAP = 1024
# Up to so many, bfloat16 saves less time than converting and reordering weights takes.
FLOAT32_MAP = 64
# Up to so many, one convolution of joined maps is faster than two and an addition.
SMALL_JOINED = 256


def forward(network, x, mask, draw):
    """Compute what Punet.forward computes, with the same draws in the same order.

    Args:
        network: a Punet.
        x, mask, draw: as in Punet.forward; x in the type to compute in.
    """
    skips = [x]
    for i, layer in enumerate(network.encoder):
        x, mask = convolve_kept(layer, x, mask)
        x = F.leaky_relu_(x, 0.1)
        if 1 <= i <= 5:
            x = halve(x)
            if x.dtype == torch.bfloat16 and x[:, 0].numel() <= FLOAT32_MAP:
                x = x.float()
            mask = None if mask is None else halve(mask)
            if i <= 4:
                skips.append(x)
    for i, (first, *others) in enumerate(network.decoder):
        x, skip = F.leaky_relu_(x, 0.1) if i else x, skips.pop()
        x = convolve_joined(network, first, x.to(skip.dtype), skip, draw)
        for layer in others:
            x = F.leaky_relu_(x, 0.1)
            keep = draw_kept(network, layer.in_channels, x, draw)
            scale = 1 / (1 - network.drop_rate)
            x = convolve_edged(x, layer.weight, layer.bias, scale, keep)
    return bent_sigmoid(x.to(layer.bias.dtype), network.bend)


def convolve_kept(layer, x, mask):
    """Pad, and compute PConv2d.forward for a layer with stride 1 and with a bias.

    Args:
        layer: a PConv2d.
        x: features, (N, C, H, W).
        mask: (N, C, H, W) or (N, 1, H, W), in a type that counts the entries of a window
            exactly. None: nothing is missing.

    Returns:
        The output (N, K, H, W), and the updated mask (N, 1, H, W) or None.
    """
    full = layer.window.numel() * layer.in_channels
    if mask is not None:
        mask = F.pad(mask, (1, 1, 1, 1), value=1.0)
        kept = layer.count_kept(mask)
        updated = kept.clamp(0, 1)
        if x.device.type == "cpu" and updated.min() == 1:
            updated = None  # on other devices this test would wait
            mask = None if kept.min() == full else mask
    if mask is None:
        scale = layer.numerator / full
        return convolve_edged(x, layer.weight, layer.bias, scale), None
    ratio = (layer.numerator / (kept + 1e-8) * kept.clamp(0, 1)).to(x.dtype)
    output = convolve_edged(
        x, layer.weight, layer.bias, 1, None, mask.to(x.dtype), ratio
    )
    return output, updated


def convolve_joined(network, layer, x, skip, draw):
    """Upsample x, join the skip, drop entries and convolve.

    Without dropout on the upsampled map the layer convolves x, before it is upsampled, and
    the skip separately, and the results are added. On a small map that takes longer.

    Args:
        x: (N, C, h, w).
        skip: (N, C', H, W); H is 2 h or 2 h - 1, W is 2 w or 2 w - 1.

    Returns:
        (N, K, H, W).
    """
    channels, scale = (x.shape[1], skip.shape[1]), 1 / (1 - network.drop_rate)
    if network.drop_upsampled:
        x = torch.cat((double(x, skip.shape[2:]), skip), 1)
        keep = draw_kept(network, x.shape[1], x, draw)
        return convolve_edged(x, layer.weight, layer.bias, scale, keep)
    keep = draw_kept(network, channels[1], skip, draw)
    if skip[:, 0].numel() <= SMALL_JOINED:
        skip = skip if keep is None else skip * keep * scale
        x = torch.cat((double(x, skip.shape[2:]), skip), 1)
        return convolve_edged(x, layer.weight, layer.bias)
    weight_x, weight_skip = layer.weight.split(channels, 1)
    joined = convolve_edged(skip, weight_skip, layer.bias, scale, keep)
    convolved = convolve_edged(x, phase_weights(weight_x), None)
    return AddUpsampled.apply(joined, convolved)


def draw_kept(network, channels, like, draw):
    """Draw which entries of a map are kept: (N, channels, H, W).

    Args:
        channels: the number of channels in which entries are dropped.
        like: a map with the N, H, W and the type of the mask.

    Returns:
        A mask, 1 = kept; or None, if the drop rate is 0.
    """
    if not network.drop_rate:
        return None
    keep = draw((len(like), channels, *like.shape[2:]), network.drop_rate)
    return keep.to(like.dtype) if keep.is_floating_point() else keep


def convolve_edged(x, weight, bias, scale=1, keep=None, mask=None, ratio=None):
    """Compute EdgedConvolution, for a small map by PyTorch's own functions."""
    given = x, weight, bias, scale, keep, mask, ratio
    if x[:, 0].numel() > SMALL_MAP:
        return EdgedConvolution.apply(*given)
    x = x if keep is None else x * keep
    padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
    padded = padded if mask is None else padded * mask
    weight = (weight if scale == 1 else weight * scale).to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    if ratio is None:
        return F.conv2d(padded, weight, bias)
    return F.conv2d(padded, weight) * ratio + bias.view(-1, 1, 1)


def expand(x, like):
    """Expand x, which broadcasts to a map `like` (N, C, H, W), to its full size.

    Only in bfloat16: there PyTorch multiplies five times slower when it broadcasts.
    """
    if like.dtype != torch.bfloat16:
        return x
    return x.expand_as(like).contiguous(memory_format=torch.channels_last)


class EdgedConvolution(torch.autograd.Function):
    """A 3x3 or 2x2 convolution with all that precedes it, in channels_last.

    Drops entries of x, pads it by one pixel with edge values, applies a mask and convolves
    with scale * weight: equals F.conv2d(F.pad(x * keep, (1, 1, 1, 1), mode="replicate") *
    mask, scale * weight) * ratio + bias, in the type of x.

    On a large map it passes over memory less often than PyTorch's own functions do.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, scale=1, keep=None, mask=None, ratio=None):
        """Convolve x (N, C, H, W).

        Args:
            weight, bias: (K, C, 3, 3) or (K, C, 2, 2), and (K,) or None; float32 as a rule.
            scale: factor of the weight.
            keep: (N, C, H, W), 1 = kept, or None: all is kept.
            mask: (N, 1 or C, H + 2, W + 2), or None: 1 everywhere.
            ratio: (N, 1, H, W), with a bias, or None: 1 everywhere.
        """
        padded = pad_edges(x, keep)
        if mask is not None:
            mask = expand(mask, padded)
            padded *= mask
        scaled = (weight if scale == 1 else weight * scale).to(x.dtype)
        if x.shape[1] == 1:  # PyTorch makes no channels_last maps from one channel
            padded, scaled = (F.pad(t, (0, 0, 0, 0, 0, 1)) for t in (padded, scaled))
            scaled = scaled.contiguous(memory_format=torch.channels_last)
        ctx.scale, ctx.channels, ctx.dtype = scale, x.shape[1], weight.dtype
        bias = None if bias is None else bias.to(x.dtype)
        output = F.conv2d(padded, scaled, bias if ratio is None else None)
        if ratio is not None:
            ratio = expand(ratio, output)
            bias = expand(bias.view(1, -1, 1, 1), output)
            output = torch.addcmul(bias, output, ratio)
        ctx.save_for_backward(padded, scaled, keep, mask, ratio)
        return output

    @staticmethod
    def backward(ctx, grad):
        """Return the gradients of x, weight and bias; grad is (N, K, H', W')."""
        padded, scaled, keep, mask, ratio = ctx.saved_tensors
        grad_x, grad_weight, grad_bias = convolution.gradients(
            padded,
            scaled,
            grad if ratio is None else grad * ratio,
            ctx.needs_input_grad[:3],
        )
        if ratio is not None:
            grad_bias = grad.sum((0, 2, 3))
        if grad_x is not None:
            grad_x = grad_x[:, : ctx.channels]
            grad_x = fold_edges(grad_x if mask is None else grad_x * mask, keep)
        if grad_weight is not None:
            grad_weight = grad_weight[:, : ctx.channels].to(ctx.dtype)
            grad_weight = grad_weight if ctx.scale == 1 else grad_weight * ctx.scale
        if grad_bias is not None:
            grad_bias = grad_bias.to(ctx.dtype)
        return grad_x, grad_weight, grad_bias, None, None, None, None


def pad_edges(x, keep):
    """Drop entries of x and pad it: see EdgedConvolution.forward."""
    n, c, h, w = x.shape
    padded = torch.empty(
        (n, c, h + 2, w + 2),
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last,
    )
    inside = padded[..., 1:-1, 1:-1]
    inside.copy_(x) if keep is None else torch.mul(x, keep, out=inside)
    for axis, (edge, inner) in itertools.product((2, 3), EDGES):
        padded.select(axis, edge).copy_(padded.select(axis, inner))
    return padded


def fold_edges(grad, keep):
    """Return the gradient of x, given that of pad_edges, (N, C, H + 2, W + 2); overwrite it."""
    for axis, (edge, inner) in itertools.product((3, 2), EDGES):
        grad.select(axis, inner).add_(grad.select(axis, edge))
    grad = grad[..., 1:-1, 1:-1]
    return grad if keep is None else grad * keep


def phase_weights(weight):
    """Return the weights that do before nearest x2 upsampling what `weight` does after it.

    Args:
        weight: (K, C, 3, 3), for the upsampled map padded with its edges.

    Returns:
        (4 K, C, 2, 2), for the map itself padded with its edges: 4 multiplications where
        `weight` takes 9. Channel (2 i + j) K + k is output k at the rows 2 r + i and the
        columns 2 s + j, for i and j in 0 and 1; it lies at (r + i, s + j).
    """
    k, c = weight.shape[:2]
    taps = weight.permute(0, 2, 3, 1).reshape(k, 9, c)
    made = phase_matrix(weight.device, weight.dtype) @ taps
    # From (K, i, row, j, column, C) to (i, j, K, row, column, C).
    made = made.view(k, 2, 2, 2, 2, c).permute(1, 3, 0, 2, 4, 5)
    return made.reshape(4 * k, 2, 2, c).permute(0, 3, 1, 2)


@functools.cache
@torch.inference_mode(False)
def phase_matrix(device, dtype):
    """Return the matrix (16, 9) of phase_weights, from taps to phases and their taps."""
    # Three rows of an upsampled map copy two rows: an even row's window has the first one
    # once and the second one twice, an odd row's window has the first one twice.
    rows = torch.tensor([[1, 0, 0], [0, 1, 1], [1, 1, 0], [0, 0, 1]])
    return torch.kron(rows, rows).to(device, dtype)


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
        ).zero_()  # phases do not use every row and column at the edge
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
