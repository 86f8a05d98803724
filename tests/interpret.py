"""Run the Triton kernels on the CPU, in Triton's interpreter, against Punet in float64.

Called with the number of a case, it prints a JSON list of two pairs, for the Triton kernels
and for cpu_punet in the same type. A pair holds the largest error of the prediction and the
largest error of any gradient, relative to the largest value of the tensor. It is a script
because the interpreter must be chosen before the kernels are imported.
"""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from tensors import random_image, seeded, sparse_mask
from triton.runtime.interpreter import interpreter_builder

from network import cpu_punet, triton_punet
from network.punet import Punet

FAST = 1, 0.3, "entries", False, 0.1, 0.5
# The network, type of its maps, height and width, then of the kernels: pixels from which
# maps are widened, block of pixels and of channels (large ones are interpreted sooner)
CASES = [
    (FAST, torch.float32, 33, 34, 2**14, 64, 64),
    ((3, 0.3, "window", True), torch.float32, 33, 32, 0, 32, 128),
    (FAST, torch.bfloat16, 32, 32, 2**14, 128, 128),
]


def run(forward, network, x, mask, target, masks):
    """Return a prediction and the gradients of its squared error."""
    drawn = iter(masks)
    output = forward(network, x, mask, lambda *_: next(drawn).to(x.dtype))
    loss = ((output - target) ** 2).mean()
    return output, *torch.autograd.grad(loss, list(network.parameters()))


def errors(made, expected):
    """Return the largest relative error of the first tensor and of the others."""
    each = [
        ((a - b).abs().max() / b.abs().max()).item()
        for a, b in zip(made, expected, strict=True)
    ]
    return each[0], max(each[1:])


def measure(settings, dtype, height, width, *kernels):
    """Return one case's errors, Triton's and PyTorch's."""
    # Without a check of integers' overflow, which takes a third of the time.
    options = replace(interpreter_builder.options, sanitize_overflow=False)
    interpreter_builder.options = options
    triton_punet.LARGE, triton_punet.BLOCK_W, triton_punet.BLOCK_C = kernels
    torch.manual_seed(0)
    network = Punet(*settings)
    network.to(memory_format=torch.channels_last)
    channels = settings[0]
    mask = sparse_mask(1, channels, height, width).float()
    x = random_image(1, channels, height, width) * mask
    target, masks, generator = random_image(*x.shape, seed=1), [], seeded(7)

    def draw(shape, rate):
        masks.append((torch.rand(shape, generator=generator) >= rate).float())
        return masks[-1]

    network(x, mask, draw)  # for the masks' sizes
    made = [
        run(forward, network, x.to(dtype), mask, target, masks)
        for forward in (triton_punet.forward, cpu_punet.forward)
    ]
    doubles = [t.double() for t in (x, mask, target)]
    exact = run(Punet.forward, network.double(), *doubles, masks)
    return [errors(tensors, exact) for tensors in made]


if __name__ == "__main__":
    print(json.dumps(measure(*CASES[int(sys.argv[1])])))
