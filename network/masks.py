"""The random parts of a sample: Bernoulli masks, photon counts and flips."""

import math

import numpy as np
import torch

BFLOAT16_ONE = 0x3F80  # the bits of 1 in bfloat16


class BernoulliMasks:
    """A seeded stream of Bernoulli masks on one device.

    Each 64-bit draw makes four entries of 16 bits, so a drop rate is exact to 2**-16. On
    the CPU the draws are NumPy's. PyTorch's are three times slower there, and its
    bernoulli_ is twenty times slower.

    Args:
        device: where the masks are made.
        entropy: natural numbers that select the stream, such as (seed, step).
    """

    def __init__(self, device, *entropy):
        self.device = device
        if device.type == "cuda":
            self.generator = torch.Generator(device)
        self.seed(*entropy)

    def seed(self, *entropy):
        """Go to the start of the stream that `entropy` selects."""
        sequence = np.random.SeedSequence(entropy)
        if self.device.type == "cuda":
            self.generator.manual_seed(
                int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))
            )
        else:
            self.bits = np.random.SFC64(sequence)

    def state(self):
        """Return the position in the stream, as a tensor."""
        if self.device.type == "cuda":
            return self.generator.get_state()
        return torch.from_numpy(self.bits.state["state"]["state"].view(np.int64).copy())

    def load_state(self, state):
        """Go to a position that `state` returned."""
        if self.device.type == "cuda":
            self.generator.set_state(state.cpu())
        else:
            words = state.numpy().view(np.uint64)
            self.bits.state = self.bits.state | {"state": {"state": words}}

    def __call__(self, shape, drop_rate):
        """Draw a mask (N, C, H, W): 1 = kept, 0 = dropped with probability drop_rate.

        It is bool on CUDA. On the CPU it is bfloat16, because a product with bool takes
        ten times as long there. Its order is channels_last, like that of feature maps.
        """
        count = math.prod(shape)
        words = (count + 3) // 4
        threshold = min(round(drop_rate * 2**16), 2**16 - 1) - 2**15
        if self.device.type == "cuda":
            bits = torch.empty(words, dtype=torch.int64, device=self.device)
            bits.random_(-(2**63), None, generator=self.generator)
            kept = bits.view(torch.int16)[:count] >= threshold
        else:
            bits = torch.from_numpy(self.bits.random_raw(words).view(np.int64))
            # Integers in place: a conversion from bool takes six times as long.
            kept = bits.view(torch.int16)[:count].ge_(threshold).mul_(BFLOAT16_ONE)
            kept = kept.view(torch.bfloat16).to(self.device)
        n, c, h, w = shape
        return kept.view(n, h, w, c).permute(0, 3, 1, 2)

    def poisson(self, mean):
        """Draw Poisson numbers, float32, with the given means; a negative mean counts as 0."""
        mean = mean.clamp(min=0)
        if self.device.type == "cuda":
            return torch.poisson(mean, generator=self.generator)
        drawn = np.random.Generator(self.bits).poisson(mean.cpu().numpy())
        return torch.from_numpy(drawn).to(self.device, torch.float32)


def flip(x, flips):
    """Mirror the samples of x (N, C, H, W). Doing it twice gives x back.

    Args:
        flips: (N, 2, 1, 1). A sample is mirrored left-right if its first entry is above
            0, and up-down if its second one is.
    """
    x = torch.where(flips[:, :1] > 0, x.flip(-1), x)
    return torch.where(flips[:, 1:] > 0, x.flip(-2), x)
