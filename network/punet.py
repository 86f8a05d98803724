"""The network of Self2Self: partial convolutions, then a decoder with dropout in every layer.

This is the place to change it. `Punet` is written in plain PyTorch. `fast_punet.FastPunet`,
which training uses, computes the same in fewer passes over memory. It compares itself with
`Punet.forward` and steps aside when the two differ, so an edit here always counts.
"""

import itertools
import math

import torch
from torch import nn
from torch.nn import functional as F

from network.pconv import PConv2d


class Punet(nn.Module):
    """The encoder-decoder of the paper: 988,609 weights for gray, 991,203 for colour.

    Dropout is active in eval mode too: predictions that differ are the ensemble.

    Args:
        channels: C, the channels of the image.
        drop_rate: p of the dropout in the decoder, in [0, 1).
        ratio: numerator of the partial convolutions, "window" or "entries": see PConv2d.
        drop_upsampled: whether dropout also drops entries of the upsampled maps, as the
            paper's network does. Without it the fast paths convolve before they upsample,
            which takes 4 multiplications instead of 9.
        bend: where the last sigmoid turns into a straight line, in [0, 0.5): see
            bent_sigmoid. 0: nowhere, as in the paper.
        width: share of the paper's channels, in (0, 1], in the encoder at full resolution
            and in the decoder at half resolution. Most of the time goes there.
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
        # The Triton kernels need multiples of 4.
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

    def extra_repr(self):
        """Return the settings that the layers do not show."""
        names = "drop_rate", "drop_upsampled", "bend"
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)

    def forward(self, x, mask, draw=None):
        """Predict the clean image from the kept entries of an observation.

        Args:
            x: the observation times the mask, (N, C, H, W); H and W at least 32.
            mask: 1 = kept, 0 = dropped, (N, C, H, W), in the type of the weights.
            draw: source of the dropout, `draw(shape, drop_rate)` -> mask with 1 = kept.
                None: PyTorch's own random state.

        Returns:
            The prediction, (N, C, H, W), in the type of the weights. It lies in (0, 1)
            unless there is a bend.
        """
        draw = draw or self.draw
        x = x.to(mask.dtype)
        skips = [x]  # (N, C, H, W)
        enc0, enc1, *middle, enc6 = self.encoder
        x, mask = self._encode(enc0, x, mask)  # (N, 48, H, W)
        x, mask = self._encode(enc1, x, mask)  # (N, 48, H, W)
        x, mask = halve(x), halve(mask)  # (N, 48, H/2, W/2); an odd side rounds up
        for layer in middle:  # enc2 .. enc5
            skips.append(x)  # (N, 48, H/2, W/2), then /4, /8, /16
            x, mask = self._encode(layer, x, mask)  # the same size
            x, mask = halve(x), halve(mask)  # (N, 48, H/4, W/4), then /8, /16, /32
        x, mask = self._encode(enc6, x, mask)  # (N, 48, H/32, W/32)
        for first, second, *last in self.decoder:  # dec5 .. dec1
            skip = skips.pop()  # (N, 48, H/16, W/16), then /8, /4, /2, and (N, C, H, W)
            # (N, 48, H/16, W/16), then (N, 96, H/8, W/8) ..
            x = double(x, skip.shape[2:])
            upsampled = x.shape[1]
            # (N, 96, ..), then 3 x 144, and (N, 96 + C, H, W)
            x = torch.cat((x, skip), 1)
            x = self._decode(first, x, draw, 0 if self.drop_upsampled else upsampled)
            x = F.leaky_relu(x, 0.1)  # (N, 96, H/16, W/16) .. , and (N, 64, H, W)
            x = self._decode(second, x, draw)
            x = F.leaky_relu(x, 0.1)  # (N, 96, H/16, W/16) .. , and (N, 32, H, W)
        x = self._decode(last[0], x, draw)  # (N, C, H, W)
        return bent_sigmoid(x, self.bend)

    def _encode(self, layer, x, mask):
        """Pad by 1, with edge values and with ones, then convolve the kept entries."""
        x = F.pad(x, (1, 1, 1, 1), mode="replicate")
        mask = F.pad(mask, (1, 1, 1, 1), value=1.0)
        x, mask = layer(x, mask)
        return F.leaky_relu(x, 0.1), mask

    def _decode(self, layer, x, draw, whole=0):
        """Drop entries of x, but none of its first `whole` channels; pad and convolve."""
        if self.drop_rate:
            x, dropped = x[:, :whole], x[:, whole:]
            keep = draw(dropped.shape, self.drop_rate)
            x = torch.cat((x, dropped * keep / (1 - self.drop_rate)), 1)
        return layer(F.pad(x, (1, 1, 1, 1), mode="replicate"))

    def draw(self, shape, drop_rate):
        """Draw a dropout mask from PyTorch's own random state: 1 = kept, 0 = dropped."""
        device = self.decoder[0][0].weight.device
        return (torch.rand(shape, device=device) >= drop_rate).float()

    def initialise_like_tensorflow(self):
        """Draw new weights as the TensorFlow code does.

        Glorot's uniform weights in the encoder. In the decoder He's normal weights, with
        standard deviation sqrt(2 / fan-in), and 1 / sqrt(fan-in) in the last layer. All
        biases are 0.
        """
        for layer in self.encoder:
            nn.init.xavier_uniform_(layer.weight)
        *layers, last = itertools.chain.from_iterable(self.decoder)
        for layer in layers:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        nn.init.kaiming_normal_(last.weight, nonlinearity="linear")
        for layer in (*self.encoder, *layers, last):
            nn.init.zeros_(layer.bias)

    @torch.no_grad()
    def start_at(self, mean):
        """Set the last bias so that the first predictions have a mean, (C,), in [0, 1]."""
        bias = inverse_bent_sigmoid(mean.clamp(0.02, 0.98), self.bend)
        self.decoder[-1][-1].bias.copy_(bias)


def halve(x):
    """Max-pool 2x2: (N, C, H, W) to half of H and W, rounded up."""
    return F.max_pool2d(x, 2, ceil_mode=True)


def double(x, size):
    """Repeat every pixel 2x2: (N, C, h, w) to (N, C, H, W) with size = (H, W).

    H is 2 h or 2 h - 1, and W likewise.
    """
    x = F.interpolate(x, scale_factor=2, mode="nearest")
    return x[..., : size[0], : size[1]]


def bent_sigmoid(x, bend):
    """Compute the sigmoid, continued by its tangents below `bend` and above 1 - bend.

    It reaches every value, and its gradient vanishes nowhere. Bend 0: the plain sigmoid.
    """
    if not bend:
        return torch.sigmoid(x)
    end = math.log(1 / bend - 1)
    inner = x.clamp(-end, end)
    return torch.sigmoid(inner) + bend * (1 - bend) * (x - inner)


def inverse_bent_sigmoid(y, bend):
    """Return the x for which bent_sigmoid(x, bend) is y; with bend 0, y is in (0, 1)."""
    inner = y.clamp(bend, 1 - bend)
    x = torch.logit(inner)
    return x + (y - inner) / (bend * (1 - bend)) if bend else x
