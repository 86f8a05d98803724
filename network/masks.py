"""Random masks and flips: what makes one sample of the observation differ from another."""

import math

import numpy as np
import torch

BFLOAT16_ONE = 0x3F80  # the bits of 1 in bfloat16


class BernoulliMasks:
    """A seeded stream of Bernoulli masks on one device.

    Four entries come from one 64-bit draw, 16 bits each, so a rate is exact to 2**-16.
    On the CPU the draws are NumPy's: PyTorch's are serial there and three times slower,
    its bernoulli_ twenty times.

    Args:
        device: where the masks are made.
        entropy: non-negative integers that name the stream, such as (seed, step).
    """

    def __init__(self, device, *entropy):
        self.device = device
        if device.type == "cuda":
            self.generator = torch.Generator(device)
        self.seed(*entropy)

    def seed(self, *entropy):
        """Start the stream named by `entropy`."""
        sequence = np.random.SeedSequence(entropy)
        if self.device.type == "cuda":
            self.generator.manual_seed(
                int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))
            )
        else:
            self.bits = np.random.SFC64(sequence)

    def state(self):
        """The stream's position, as a tensor."""
        if self.device.type == "cuda":
            return self.generator.get_state()
        return torch.from_numpy(self.bits.state["state"]["state"].view(np.int64).copy())

    def load_state(self, state):
        """Go on from a position that `state` gave."""
        if self.device.type == "cuda":
            self.generator.set_state(state.cpu())
        else:
            words = state.numpy().view(np.uint64)
            self.bits.state = self.bits.state | {"state": {"state": words}}

    def __call__(self, shape, drop_rate):
        """Draw a mask: 1 = kept, 0 = dropped with probability drop_rate.

        It is bool on CUDA and bfloat16, which has 0 and 1, on the CPU, which multiplies
        by bool ten times slower; in channels_last order, as the maps that it multiplies.
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
            # As integers, in place: converting from bool takes six times as long.
            kept = bits.view(torch.int16)[:count].ge_(threshold).mul_(BFLOAT16_ONE)
            kept = kept.view(torch.bfloat16).to(self.device)
        n, c, h, w = shape
        return kept.view(n, h, w, c).permute(0, 3, 1, 2)

    def poisson(self, mean):
        """Draw Poisson numbers, float32, of the given means: below 0 as of 0."""
        mean = mean.clamp(min=0)
        if self.device.type == "cuda":
            return torch.poisson(mean, generator=self.generator)
        drawn = np.random.Generator(self.bits).poisson(mean.cpu().numpy())
        return torch.from_numpy(drawn).to(self.device, torch.float32)


def flip(x, flips):
    """Mirror samples of x (N, C, H, W) left-right and up-down; its own inverse.

    Args:
        flips: (N, 2, 1, 1); where the first is not 0, left-right, the second, up-down.
    """
    x = torch.where(flips[:, :1] > 0, x.flip(-1), x)
    return torch.where(flips[:, 1:] > 0, x.flip(-2), x)
