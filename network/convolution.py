"""Convolution of channels_last maps, with a weight gradient that every CPU is quick at."""

import itertools

import torch
from torch.nn import functional as F

PLAIN = (1, 1), (0, 0), (1, 1)  # stride, padding, dilation
BAND = 4096  # pixels that are multiplied at once: they stay in the processor's cache
FEW = 8  # channels: of a map with fewer PyTorch's own gradient is the faster one


def convolve(x, weight, bias=None, *settings):
    """Convolve maps (N, C, H, W) with a weight (K, C, h, w), as F.conv2d does.

    On a CPU with AVX2 and no more, PyTorch's gradient of the weight takes eight times as
    long as the convolution. Where stride, padding and dilation are PLAIN, or not given,
    `weight_gradient` replaces it.
    """
    slow = x.device.type == "cpu" and x.dtype == torch.float32 and x.shape[1] >= FEW
    slow = slow and torch.backends.cpu.get_cpu_capability() == "AVX2"
    if slow and settings in ((), PLAIN):
        return Convolution.apply(x, weight, bias)
    return F.conv2d(x, weight, bias, *settings)


class Convolution(torch.autograd.Function):
    """F.conv2d, but for how the weight's gradient is computed."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        """Convolve: see `convolve`."""
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        """Return the gradients of x, weight and bias."""
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.nn.grad.conv2d_input(x.shape, weight, grad)
        if ctx.needs_input_grad[1]:
            grad_weight = weight_gradient(x, grad, weight.shape)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum((0, 2, 3))
        return grad_x, grad_weight, grad_bias


def weight_gradient(x, grad, shape):
    """Return the gradient of a weight of a shape (K, C, h, w).

    With the gradient (N, K, H', W') brought to the size of x (N, C, H, W) by zeros, the
    entries that meet in a tap (i, j) lie i W + j pixels apart, all alike. So a tap's
    gradient is a product of two matrices, which are views of the maps.
    """
    k, c, height, width = shape
    grad = F.pad(grad, (0, width - 1, 0, height - 1))
    grad, pixels = (t.permute(0, 2, 3, 1).reshape(-1, t.shape[1]) for t in (grad, x))
    made = x.new_zeros(height, width, k, c)
    for first in range(0, len(grad), BAND):
        for i, j in itertools.product(range(height), range(width)):
            apart = first + i * x.shape[3] + j
            met = pixels[apart : apart + BAND]
            made[i, j].addmm_(grad[first : first + len(met)].T, met)
    return made.permute(2, 3, 0, 1)
