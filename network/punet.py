"""The Self2Self network: partial convolutions, then a decoder with dropout throughout."""

from itertools import pairwise

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
            nn.ModuleList(nn.Conv2d(c, d, 3) for c, d in pairwise(stage))
            for stage in widths
        )

    def forward(self, x, mask, draw=None):
        """Predict the clean image from the kept entries of an observation.

        Args:
            x: the observation times the mask, (N, C, H, W); H and W at least 32.
            mask: 1 = kept, 0 = dropped, (N, C, H, W).
            draw: the dropout's source, `draw(shape, drop_rate)` -> mask with 1 = kept;
                PyTorch's own random state where it is None.

        Returns:
            The prediction, (N, C, H, W), in (0, 1).
        """
        if triton_punet and triton_punet.usable(x):
            # On CUDA in float32 Triton kernels do all that follows: the same prediction
            # and gradients, but for rounding.
            return triton_punet.forward(self, x, mask, draw or self._draw)
        skips = [x]
        for i, layer in enumerate(self.encoder):
            # (N, 48, H/2^j, W/2^j), rounded up, with j = 0, 0, 1, 2, 3, 4, 5
            x, mask = layer(
                EdgePad.apply(None, x), F.pad(mask, (1, 1, 1, 1), value=1.0)
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
            height, width = skip.shape[2:]
            maps = (
                F.interpolate(x, scale_factor=2, mode="nearest")[..., :height, :width],
                skip,
            )
            for conv in stage:
                x = self._dropout_conv(conv, maps, draw or self._draw)
                x = (
                    F.leaky_relu_(x, 0.1)
                    if conv is not self.decoder[-1][-1]
                    else torch.sigmoid(x)
                )
                maps = (x,)
        return x

    def _dropout_conv(self, conv, maps, draw):
        """Concatenate, drop out, pad, convolve; the weights carry dropout's scale."""
        n, _, height, width = maps[0].shape
        keep = (
            draw((n, conv.in_channels, height, width), self.drop_rate)
            if self.drop_rate
            else None
        )
        return F.conv2d(
            EdgePad.apply(keep, *maps), conv.weight / (1 - self.drop_rate), conv.bias
        )

    def _draw(self, shape, drop_rate):
        return (
            torch.rand(shape, device=self.decoder[0][0].weight.device) >= drop_rate
        ).float()


class EdgePad(torch.autograd.Function):
    """Concatenate feature maps, drop entries and pad by one pixel with edge values.

    Equals F.pad(torch.cat(maps, 1) * keep, (1, 1, 1, 1), mode="replicate"), in one pass
    over memory; that padding's backward is slow, and not deterministic on CUDA.
    """

    @staticmethod
    def forward(ctx, keep, *maps):
        """Pad maps (N, C1, H, W), (N, C2, H, W), ...

        `keep` is (N, C1 + C2 + ..., H, W), 1 = kept, or None, which keeps everything.
        """
        n, _, height, width = maps[0].shape
        ctx.channels = [x.shape[1] for x in maps]
        padded = torch.empty(
            (n, sum(ctx.channels), height + 2, width + 2),
            dtype=maps[0].dtype,
            device=maps[0].device,
            memory_format=torch.channels_last
            if maps[0].is_cuda
            else torch.contiguous_format,
        )
        parts = padded[..., 1:-1, 1:-1].split(ctx.channels, 1)
        kept = [1] * len(maps) if keep is None else keep.split(ctx.channels, 1)
        for part, x, k in zip(parts, maps, kept):
            torch.mul(x, k, out=part)
        padded[..., 0, :] = padded[..., 1, :]
        padded[..., -1, :] = padded[..., -2, :]
        padded[..., 0] = padded[..., 1]
        padded[..., -1] = padded[..., -2]
        ctx.save_for_backward(keep)
        return padded

    @staticmethod
    def backward(ctx, grad):
        """Give every edge pixel the gradients of its copies."""
        (keep,) = ctx.saved_tensors
        # In place: the convolution that read the padded map made this gradient for nobody else.
        grad[..., 1] += grad[..., 0]
        grad[..., -2] += grad[..., -1]
        grad[..., 1, :] += grad[..., 0, :]
        grad[..., -2, :] += grad[..., -1, :]
        inner = grad[..., 1:-1, 1:-1]
        return None, *(inner if keep is None else inner * keep).split(ctx.channels, 1)
