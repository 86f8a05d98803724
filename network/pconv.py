"""Partial convolution (Liu et al., ECCV 2018), as the TensorFlow version of Self2Self has it."""

import torch
from torch import nn
from torch.nn import functional as F

from network.convolution import convolve


class PConv2d(nn.Conv2d):
    """A convolution of the entries that a mask keeps; it says which windows held any.

    With S the sum of the mask over a window and over all input channels:

        output       = conv(x * mask) * k*k / (S + 1e-8) * clip(S, 0, 1) + bias
        updated mask = clip(S, 0, 1)

    The numerator is k*k, not k*k*C: that is what the TensorFlow layer computes, so a
    full window of C channels is scaled by 1/C. The bias is added everywhere, in empty
    windows too, and the output is not multiplied by the updated mask, which kept
    earlier ports below the TensorFlow version's quality.

    Arguments are those of nn.Conv2d, and one more. Padding, where there is any, is with
    zeros, on features and on mask.

    Args:
        ratio: "window": the numerator k*k; "entries": k*k*C, so that a full window is
            scaled by 1, which learns faster.
    """

    def __init__(
        self,
        in_channels,
        out_channels,
        kernel_size,
        stride=1,
        padding=0,
        dilation=1,
        bias=True,
        ratio="window",
    ):
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, bias=bias
        )
        window = torch.ones(1, 1, *self.kernel_size)
        self.register_buffer("window", window, persistent=False)
        self.numerator = window.numel() * (in_channels if ratio == "entries" else 1)

    def forward(self, x, mask):
        """Convolve the kept entries of a feature map.

        Args:
            x: features, (N, C, H, W), in the type to compute in.
            mask: 1 = kept, 0 = dropped; (N, C, H, W), or (N, 1, H, W), which all C
                channels share; in a type that counts a window's entries exactly.

        Returns:
            The output (N, out_channels, H', W') and the updated mask of the same shape:
            the same for every channel, so a view of one.
        """
        # A box filter over the channels' sum is the C-to-C convolution with ones.
        kept = mask.sum(1, keepdim=True) * (self.in_channels // mask.shape[1])
        kept = F.conv2d(
            kept, self.window, None, self.stride, self.padding, self.dilation
        )  # S, (N, 1, H', W')
        updated = kept.clamp(0, 1)
        settings = self.stride, self.padding, self.dilation
        full = self.window.numel() * self.in_channels
        if x.device.type == "cpu" and kept.min() == full:
            # Nothing is missing, so that all windows have one ratio.
            weight = (self.weight * (self.numerator / full)).to(x.dtype)
            bias = None if self.bias is None else self.bias.to(x.dtype)
            output = convolve(*two_channels(x, weight), bias, *settings)
            return output, updated.expand_as(output)
        ratio = self.numerator / (kept + 1e-8) * updated
        mask, ratio, weight = (t.to(x.dtype) for t in (mask, ratio, self.weight))
        x = x * spread(mask, x)
        output = convolve(*two_channels(x, weight), None, *settings)
        if self.bias is None:
            output = output * spread(ratio, output)
        else:
            bias = self.bias.to(x.dtype).view(1, -1, 1, 1)
            output = torch.addcmul(spread(bias, output), output, spread(ratio, output))
        return output, updated.expand_as(output)


def spread(x, like):
    """Give what is the same in all channels or places of a map (N, C, H, W) its size.

    Of a broadcast operand PyTorch makes a product in bfloat16 five times slower.
    """
    if like.dtype != torch.bfloat16:
        return x
    return x.expand_as(like).contiguous(memory_format=torch.channels_last)


def two_channels(x, weight):
    """Give a map (N, 1, H, W) and its weight (K, 1, ...) a second, empty channel.

    Of one channel PyTorch makes no channels_last maps. Others come back as they are.
    """
    if x.shape[1] > 1:
        return x, weight
    x, weight = (F.pad(t, (0, 0, 0, 0, 0, 1)) for t in (x, weight))
    return x, weight.contiguous(memory_format=torch.channels_last)
