"""The gradients of a 2-D convolution, fast on every CPU."""

import itertools

import torch
from torch.nn import functional as F

BAND_PIXELS = 4096  # multiplied at once, so that they stay in the processor's cache
MIN_CHANNELS = 8  # with fewer, PyTorch's own gradient is faster


def gradients(x, weight, grad, needed):
    """Return the gradients of F.conv2d(x, weight, bias); None where they are not needed.

    On a CPU with AVX2 but without AVX-512, PyTorch takes eight times as long for the
    gradient of the weight as for the convolution. There `weight_gradient` replaces it.

    Args:
        x: (N, C, H, W), channels_last.
        weight: (K, C, h, w).
        grad: the output's gradient, (N, K, H - h + 1, W - w + 1).
        needed: whether the gradients of x, weight and bias are needed.
    """
    on_cpu = x.device.type == "cpu" and x.dtype == torch.float32
    slow = on_cpu and torch.backends.cpu.get_cpu_capability() == "AVX2"
    ours = needed[1] and slow and x.shape[1] >= MIN_CHANNELS
    asked = [needed[0], False, False] if ours else needed
    settings = [1, 1], [0, 0], [1, 1], False, [0, 0], 1  # no stride, no padding, ...
    grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        grad, x, weight, [len(weight)], *settings, asked
    )
    if ours:
        grad_weight = weight_gradient(x, grad, weight.shape)
        grad_bias = grad.sum((0, 2, 3)) if needed[2] else None
    return grad_x, grad_weight, grad_bias


def weight_gradient(x, grad, shape):
    """Return the gradient of a convolution's weight.

    The output's gradient is padded with zeros to the size of x. Then the entries that meet
    in tap (i, j) of the weight are i W + j pixels apart in memory, everywhere. So the
    gradient of a tap is a product of two matrices, which are views of the maps.

    Args:
        x: the input, (N, C, H, W), channels_last.
        grad: gradient of the output, (N, K, H - h + 1, W - w + 1).
        shape: of the weight, (K, C, h, w).
    """
    k, c, height, width = shape
    grad = F.pad(grad, (0, width - 1, 0, height - 1))
    grad, pixels = (t.permute(0, 2, 3, 1).reshape(-1, t.shape[1]) for t in (grad, x))
    made = x.new_zeros(height, width, k, c)
    for first in range(0, len(grad), BAND_PIXELS):
        for i, j in itertools.product(range(height), range(width)):
            start = first + i * x.shape[3] + j
            met = pixels[start : start + BAND_PIXELS]
            made[i, j].addmm_(grad[first : first + len(met)].T, met)
    return made.permute(2, 3, 0, 1)
