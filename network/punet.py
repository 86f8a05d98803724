"""The Self2Self network: partial convolutions, then a decoder with dropout throughout."""

import itertools
import math

import torch
from torch import nn
from torch.nn import functional as F

from network.convolution import convolve
from network.pconv import PConv2d, two_channels

try:
    from network import triton_punet
except ImportError:  # no Triton: PyTorch's own kernels run
    triton_punet = None


class Punet(nn.Module):
    """The masked, dropout encoder-decoder.

    Of the published width 988,609 weights for one channel, 991,203 for three. Dropout is
    active whenever the network runs, in eval mode too: predictions that differ are the
    ensemble.

    Args:
        channels: C, the image's channels.
        drop_rate: p of the decoder's dropout, in [0, 1).
        ratio: the partial convolutions' numerator, "window" or "entries".
        drop_upsampled: whether dropout takes entries of the upsampled maps, too, as the
            paper's network does. Without it they are convolved before they are
            upsampled, which takes 4 multiplications in place of 9.
        bend: the last sigmoid goes on as a straight line below this and above 1 - bend;
            0: nowhere, as in the paper. In [0, 0.5).
        width: share of the paper's channels that the encoder has at full resolution, and
            the decoder at half, in (0, 1]: most of a step's time goes there.
    """

    def __init__(
        self,
        channels,
        drop_rate,
        ratio="window",
        drop_upsampled=True,
        bend=0.0,
        width=1.0,
    ):
        super().__init__()
        self.drop_rate, self.drop_upsampled, self.bend = drop_rate, drop_upsampled, bend
        # Triton's kernels want multiples of 4.
        few, many = (max(8, round(n * width / 8) * 8) for n in (48, 96))
        self.encoder = nn.ModuleList(
            PConv2d(c, d, 3, ratio=ratio)
            for c, d in itertools.pairwise((channels, few, few, *[48] * 5))
        )  # enc0 .. enc6
        widths = [
            (96, 96, 96),
            *[(144, 96, 96)] * 2,
            (96 + few, many, many),
            (many + channels, 64, 32, channels),
        ]  # dec5 .. dec1
        self.decoder = nn.ModuleList(
            nn.ModuleList(nn.Conv2d(c, d, 3) for c, d in itertools.pairwise(stage))
            for stage in widths
        )

    def forward(self, x, mask, draw=None):
        """Predict the clean image from the kept entries of an observation.

        Args:
            x: the observation times the mask, (N, C, H, W), in the type to compute in;
                H and W at least 32.
            mask: 1 = kept, 0 = dropped, (N, C, H, W), in the weights' type.
            draw: the dropout's source, `draw(shape, drop_rate)` -> mask with 1 = kept;
                PyTorch's own random state where it is None.

        Returns:
            The prediction, (N, C, H, W), in the weights' type; without a bend in (0, 1).
        """
        if triton_punet and triton_punet.usable(x):
            # On CUDA in float32 Triton kernels do all that follows: the same prediction
            # and gradients, but for rounding.
            x = triton_punet.forward(self, x, mask, draw or self._draw)
            return bent_sigmoid(x, self.bend)
        skips = [x]
        for i, layer in enumerate(self.encoder):
            # (N, 48 or fewer, H/2^j, W/2^j), rounded up, with j = 0, 0, 1, 2, 3, 4, 5
            x, mask = layer(
                EdgePad.apply(None, x, None), F.pad(mask, (1, 1, 1, 1), value=1.0)
            )
            x, mask = (
                F.leaky_relu_(x, 0.1),
                mask[:, :1],
            )  # the updated mask is the same for every channel
            if 1 <= i <= 5:
                x, mask = (F.max_pool2d(t, 2, ceil_mode=True) for t in (x, mask))
                if i <= 4:
                    skips.append(x)
        draw = draw or self._draw
        for i, (first, *others) in enumerate(self.decoder):
            x = self._join(first, F.leaky_relu_(x, 0.1) if i else x, skips.pop(), draw)
            for conv in others:
                x = F.leaky_relu_(x, 0.1)
                keep, weight = self._dropout(conv, 0, x, draw)
                padded = EdgePad.apply(keep, x, None)
                x = convolve(padded, weight.to(x.dtype), conv.bias.to(x.dtype))
        return bent_sigmoid(x.to(self.decoder[-1][-1].bias.dtype), self.bend)

    def _join(self, conv, x, skip, draw):
        """Upsample x (N, C, h, w), join the skip (N, C', H, W), drop out and convolve.

        Each of the two is convolved by itself, and the sum is taken. An x that is not
        dropped is convolved before it is upsampled.
        """
        c, size = x.shape[1], skip.shape[2:]
        keep, weight = self._dropout(conv, 0 if self.drop_upsampled else c, skip, draw)
        of_x, of_skip = weight[:, :c], weight[:, c:]
        keep_x = keep_skip = keep
        if keep is not None:
            keep_skip = keep[:, -skip.shape[1] :]
            keep_x = keep[:, :c] if self.drop_upsampled else None
        if keep_x is None:
            of_x = phase_weights(of_x)
        of_x, of_skip, bias = (t.to(x.dtype) for t in (of_x, of_skip, conv.bias))
        skip = EdgePad.apply(keep_skip, skip, None)
        joined = convolve(*two_channels(skip, of_skip), bias)
        if keep_x is None:
            convolved = convolve(EdgePad.apply(None, x, None), of_x)
            return AddUpsampled.apply(joined, convolved)
        return joined.add_(convolve(EdgePad.apply(keep_x, x, size), of_x))

    def _dropout(self, conv, first, x, draw):
        """Draw which entries of a convolution's input are kept, of `first` channels all.

        Returns a mask of the other channels, (N, C - first, H, W) with N, H and W of x,
        None where all is kept; and the weight, which carries the dropout's scale.
        """
        if not self.drop_rate:
            return None, conv.weight
        n, _, height, width = x.shape
        shape = n, conv.in_channels - first, height, width
        keep = draw(shape, self.drop_rate)
        keep = keep.to(x.dtype) if keep.is_floating_point() else keep
        weight = conv.weight / (1 - self.drop_rate)
        if first:
            weight = torch.cat((conv.weight[:, :first], weight[:, first:]), 1)
        return keep, weight

    def _draw(self, shape, drop_rate):
        return (
            torch.rand(shape, device=self.decoder[0][0].weight.device) >= drop_rate
        ).float()


def initialise_like_tensorflow(network):
    """Draw a Punet's first weights as the TensorFlow code does.

    Glorot's uniform ones in the encoder; in the decoder He's normal ones, of standard
    deviation sqrt(2 / fan-in), in the last layer 1 / sqrt(fan-in); no biases.
    """
    for layer in network.encoder:
        nn.init.xavier_uniform_(layer.weight)
    *layers, last = itertools.chain.from_iterable(network.decoder)
    for layer in layers:
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    nn.init.kaiming_normal_(last.weight, nonlinearity="linear")
    for layer in (*network.encoder, *layers, last):
        nn.init.zeros_(layer.bias)


def bent_sigmoid(x, bend):
    """The sigmoid, continued by its tangents where it is below bend and above 1 - bend.

    So every value can be reached, and a gradient passes everywhere.
    """
    if not bend:
        return torch.sigmoid(x)
    end = math.log(1 / bend - 1)
    inner = x.clamp(-end, end)
    return torch.sigmoid(inner) + bend * (1 - bend) * (x - inner)


def inverse_bent_sigmoid(y, bend):
    """Return the x of which bent_sigmoid makes y; without a bend y is in (0, 1)."""
    inner = y.clamp(bend, 1 - bend)
    x = torch.logit(inner)
    return x + (y - inner) / (bend * (1 - bend)) if bend else x


class EdgePad(torch.autograd.Function):
    """Upsample, drop entries and pad by one pixel with edge values, in channels_last.

    Equals F.pad(up(x) * keep, (1, 1, 1, 1), mode="replicate"), in one pass over memory.
    With a size (H, W), up() is nearest x2, cropped to it; else x itself. That padding's
    backward is slow, and not deterministic on CUDA.
    """

    @staticmethod
    def forward(ctx, keep, x, size):
        """Pad x (N, C, h, w).

        `keep` is (N, C, H, W), 1 = kept, or None, which keeps everything.
        """
        ctx.save_for_backward(keep)
        ctx.step = 1 if size is None else 2
        height, width = size or x.shape[2:]
        padded = torch.empty(
            (*x.shape[:2], height + 2, width + 2),
            dtype=x.dtype,
            device=x.device,
            memory_format=torch.channels_last,
        )
        for part, kept in EdgePad.copies(ctx.step, padded[..., 1:-1, 1:-1], keep):
            h, w = part.shape[2:]
            torch.mul(x[..., :h, :w], kept, out=part)
        padded[..., 0, :] = padded[..., 1, :]
        padded[..., -1, :] = padded[..., -2, :]
        padded[..., 0] = padded[..., 1]
        padded[..., -1] = padded[..., -2]
        return padded

    @staticmethod
    def copies(step, inner, keep):
        """Yield the parts of a map that are copies of x, and of `keep`: each step-th pixel."""
        for i, j in itertools.product(range(step), repeat=2):
            part = ..., slice(i, None, step), slice(j, None, step)
            yield inner[part], 1 if keep is None else keep[part]

    @staticmethod
    def backward(ctx, grad):
        """Give every pixel the gradients of its copies."""
        (keep,) = ctx.saved_tensors
        # In place: the convolution that read the padded map made this gradient for nobody else.
        grad[..., 1] += grad[..., 0]
        grad[..., -2] += grad[..., -1]
        grad[..., 1, :] += grad[..., 0, :]
        grad[..., -2, :] += grad[..., -1, :]
        grad_x = None
        if ctx.needs_input_grad[1]:
            for part, kept in EdgePad.copies(ctx.step, grad[..., 1:-1, 1:-1], keep):
                if grad_x is None:  # the first copy of every pixel: none is cropped
                    grad_x = part * kept
                else:
                    h, w = part.shape[2:]
                    grad_x[..., :h, :w] += part * kept
        return None, grad_x, None


def phase_weights(weight):
    """Return what convolves a map before its nearest x2 upsampling as `weight` would after.

    Args:
        weight: (K, C, 3, 3), of the map upsampled, then padded with its edges.

    Returns:
        (4 K, C, 2, 2), of the map itself, padded with its edges. Output k at even or odd
        rows i and columns j, 0 or 1, is channel (2 i + j) K + k, a pixel further on
        where i or j is 1. It takes 4 multiplications where `weight` takes 9.
    """
    for axis in (-2, -1):
        # A window of 3 copied rows covers 2 rows: from an even row on the first one
        # once and the second twice, from an odd row on the other way round.
        first, second, third = weight.unbind(axis)
        even = torch.stack((first, second + third), axis)
        odd = torch.stack((first + second, third), axis)
        weight = torch.stack((even, odd), -5)
    return weight.flatten(0, 2).contiguous(memory_format=torch.channels_last)


class AddUpsampled(torch.autograd.Function):
    """Add what `phase_weights` convolved to a map, (N, K, H, W), in place."""

    @staticmethod
    def forward(ctx, x, convolved):
        """convolved (N, 4 K, h + 1, w + 1); H and W are 2 h or 2 h - 1, and so on."""
        ctx.shape = convolved.shape
        ctx.mark_dirty(x)
        for part, source in AddUpsampled.parts(x, convolved):
            part += source
        return x

    @staticmethod
    def parts(x, convolved):
        """Yield every other row and column of x, and where it lies in `convolved`."""
        k = x.shape[1]
        for i, j in itertools.product(range(2), repeat=2):
            part, first = x[..., i::2, j::2], (2 * i + j) * k
            h, w = part.shape[2:]
            yield part, convolved[:, first : first + k, i : i + h, j : j + w]

    @staticmethod
    def backward(ctx, grad):
        """grad (N, K, H, W)."""
        convolved = torch.empty(
            ctx.shape,
            dtype=grad.dtype,
            device=grad.device,
            memory_format=torch.channels_last,
        ).zero_()  # at an edge each part has a row and a column more than it gave
        for part, source in AddUpsampled.parts(grad, convolved):
            source.copy_(part)
        return grad, convolved
