"""The Self2Self network: partial convolutions, then a decoder with dropout throughout."""

import itertools

import torch
from torch import nn
from torch.nn import functional as F

from network.pconv import PConv2d

try:
    from network import triton_punet
except ImportError:  # no Triton: PyTorch's own kernels run
    triton_punet = None


class Punet(nn.Module):
    """The masked, dropout encoder-decoder.

    988,609 weights for one channel, 991,203 for three. Dropout is active whenever the
    network runs, in eval mode too: predictions that differ are the ensemble.

    Args:
        channels: C, the image's channels.
        drop_rate: p of the decoder's dropout, in [0, 1).
        ratio: the partial convolutions' numerator, "window" or "entries".
    """

    def __init__(self, channels, drop_rate, ratio="window"):
        super().__init__()
        self.drop_rate = drop_rate
        self.encoder = nn.ModuleList(
            PConv2d(c, 48, 3, ratio=ratio) for c in (channels, *[48] * 6)
        )  # enc0 .. enc6
        widths = [
            (96, 96, 96),
            *[(144, 96, 96)] * 3,
            (96 + channels, 64, 32, channels),
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
            The prediction, (N, C, H, W), in (0, 1), in the weights' type.
        """
        if triton_punet and triton_punet.usable(x):
            # On CUDA in float32 Triton kernels do all that follows: the same prediction
            # and gradients, but for rounding.
            return triton_punet.forward(self, x, mask, draw or self._draw)
        skips = [x]
        for i, layer in enumerate(self.encoder):
            # (N, 48, H/2^j, W/2^j), rounded up, with j = 0, 0, 1, 2, 3, 4, 5
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
        for stage in self.decoder:
            skip = skips.pop()
            for conv in stage:
                if conv is not self.decoder[0][0]:
                    x = F.leaky_relu_(x, 0.1)
                x, skip = self._dropout_conv(conv, x, skip, draw or self._draw), None
        return torch.sigmoid(x.to(self.decoder[-1][-1].bias.dtype))

    def _dropout_conv(self, conv, x, skip, draw):
        """Join the skip, drop out, pad, convolve; the weights carry dropout's scale."""
        keep, size = None, (x if skip is None else skip).shape[2:]
        if self.drop_rate:
            shape = len(x), conv.in_channels, *size
            keep = draw(shape, self.drop_rate)
            keep = keep.to(x.dtype) if keep.is_floating_point() else keep
        weight = (conv.weight / (1 - self.drop_rate)).to(x.dtype)
        return F.conv2d(EdgePad.apply(keep, x, skip), weight, conv.bias.to(x.dtype))

    def _draw(self, shape, drop_rate):
        return (
            torch.rand(shape, device=self.decoder[0][0].weight.device) >= drop_rate
        ).float()


class EdgePad(torch.autograd.Function):
    """Join a skip, drop entries and pad by one pixel with edge values, in channels_last.

    Equals F.pad(joined * keep, (1, 1, 1, 1), mode="replicate"), in one pass over memory,
    where joined is x itself or, with a skip, torch.cat((up(x), skip), 1); up() is
    nearest x2, cropped to the skip's size. That padding's backward is slow, and not
    deterministic on CUDA.
    """

    @staticmethod
    def forward(ctx, keep, x, skip):
        """Pad x (N, C, h, w), joined with skip (N, C', H, W) or None.

        `keep` is (N, C + C', H, W), 1 = kept, or None, which keeps everything.
        """
        ctx.save_for_backward(keep)
        ctx.channels, ctx.step = x.shape[1], 1 if skip is None else 2
        height, width = (x if skip is None else skip).shape[2:]
        channels = ctx.channels + (0 if skip is None else skip.shape[1])
        padded = torch.empty(
            (len(x), channels, height + 2, width + 2),
            dtype=x.dtype,
            device=x.device,
            memory_format=torch.channels_last,
        )
        for source, part, kept in EdgePad.parts(ctx, keep, padded[..., 1:-1, 1:-1]):
            h, w = part.shape[2:]
            torch.mul(x[..., :h, :w] if source == "x" else skip, kept, out=part)
        padded[..., 0, :] = padded[..., 1, :]
        padded[..., -1, :] = padded[..., -2, :]
        padded[..., 0] = padded[..., 1]
        padded[..., -1] = padded[..., -2]
        return padded

    @staticmethod
    def parts(ctx, keep, inner):
        """Yield each part of a joined map, whence it comes, and its part of `keep`.

        x, where it is upsampled, goes to four parts: every other row and column each.
        """
        c, step = ctx.channels, ctx.step
        for i, j in itertools.product(range(step), repeat=2):
            part = (slice(None), slice(c), slice(i, None, step), slice(j, None, step))
            yield "x", inner[part], 1 if keep is None else keep[part]
        if step == 2:
            yield "skip", inner[:, c:], 1 if keep is None else keep[:, c:]

    @staticmethod
    def backward(ctx, grad):
        """Give every pixel the gradients of its copies."""
        (keep,) = ctx.saved_tensors
        # In place: the convolution that read the padded map made this gradient for nobody else.
        grad[..., 1] += grad[..., 0]
        grad[..., -2] += grad[..., -1]
        grad[..., 1, :] += grad[..., 0, :]
        grad[..., -2, :] += grad[..., -1, :]
        grad_x = grad_skip = None
        for source, part, kept in EdgePad.parts(ctx, keep, grad[..., 1:-1, 1:-1]):
            h, w = part.shape[2:]
            if source == "x" and grad_x is None:
                grad_x = part * kept
            elif source == "x":
                grad_x[..., :h, :w] += part * kept
            elif ctx.needs_input_grad[2]:
                grad_skip = part * kept
        return None, grad_x, grad_skip
