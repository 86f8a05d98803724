"""Partial convolution (Liu et al., ECCV 2018), as the TensorFlow version of Self2Self has it."""

import math

import torch
from torch import nn
from torch.nn import functional as F


class PConv2d(nn.Conv2d):
    """A convolution of the entries that a mask keeps.

    With S the sum of the mask over a window and over all input channels:

        output       = conv(x * mask) * k*k / (S + 1e-8) * clip(S, 0, 1) + bias
        updated mask = clip(S, 0, 1)

    The numerator is k*k and not k*k*C because the TensorFlow layer computes that: a full
    window of C channels is scaled by 1/C. The bias is added everywhere, in empty windows
    too. The output is not multiplied by the updated mask: earlier ports did so and stayed
    below the quality of the TensorFlow version.

    The arguments are those of nn.Conv2d, and `ratio`. Any padding is with zeros, of the
    features and of the mask.

    Args:
        ratio: "window": the numerator k*k. "entries": k*k*C, which scales a full window
            by 1 and learns faster.
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
        # Flat, since a channels_last window makes a mask's convolution ten times as slow.
        window = torch.ones(math.prod(self.kernel_size))
        self.register_buffer("window", window, persistent=False)
        self.numerator = window.numel() * (in_channels if ratio == "entries" else 1)

    def extra_repr(self):
        """Return the settings of nn.Conv2d and the numerator of the ratio."""
        return f"{super().extra_repr()}, numerator={self.numerator}"

    def forward(self, x, mask):
        """Convolve the kept entries of a feature map.

        Args:
            x: features, (N, C, H, W).
            mask: 1 = kept, 0 = dropped, (N, C, H, W); or (N, 1, H, W), which all C
                channels share.

        Returns:
            The output and the updated mask, both (N, out_channels, H', W'). The updated
            mask is the same for every channel: an expanded view.
        """
        settings = self.stride, self.padding, self.dilation
        kept = self.count_kept(mask)  # S, (N, 1, H', W')
        updated = kept.clamp(0, 1)
        ratio = self.numerator / (kept + 1e-8) * updated
        output = F.conv2d(x * mask, self.weight, None, *settings) * ratio
        if self.bias is not None:
            output = output + self.bias.view(-1, 1, 1)
        return output, updated.expand_as(output)

    def count_kept(self, mask):
        """Return S, the sum of the mask over each window and all channels, (N, 1, H', W').

        The mask is (N, C, H, W) or (N, 1, H, W). A box filter over the channels' sum
        gives what a convolution with C x C windows of ones would give.
        """
        kept = mask.sum(1, keepdim=True) * (self.in_channels // mask.shape[1])
        settings = self.stride, self.padding, self.dilation
        window = self.window.view(1, 1, *self.kernel_size)
        return F.conv2d(kept, window, None, *settings)
