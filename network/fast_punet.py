"""Punet by a fast path, if that path computes what Punet.forward computes."""

import copy
import math
import sys

import torch

from network import cpu_punet
from network.masks import BernoulliMasks
from network.punet import Punet

try:
    from network import triton_punet
except ImportError:  # Triton is not installed
    triton_punet = None

TOLERANCE = 1e-3  # difference over a tensor's norm; float32's rounding makes far less
SAMPLE_SIDE = 64  # pixels

_agreements = {}  # path, network as it was compared, and device -> whether they agree


class FastPunet(Punet):
    """A Punet that takes a fast path: Triton kernels on CUDA, else cpu_punet.

    The fast paths do not follow edits of Punet and PConv2d. So a path is compared with
    Punet.forward before its first use. If they differ, Punet.forward runs, and a line on
    stderr says so.
    """

    def forward(self, x, mask, draw=None):
        """Predict, as Punet.forward does, with the feature maps in the type of x."""
        path = cpu_punet
        if triton_punet and triton_punet.usable(x):
            path = triton_punet
        if not agrees(self, path, x.device):
            return super().forward(x, mask, draw)
        return path.forward(self, x, mask, draw or self.draw)


def agrees(network, path, device):
    """Tell whether a path computes what Punet.forward computes.

    A process compares once for each set of layers and settings.

    Args:
        network: a Punet.
        path: a module with a `forward` that takes a Punet and its arguments.
        device: where to compare.
    """
    key = path, Punet.forward, repr(network), device
    if key not in _agreements:
        difference = largest_difference(network, path, device)
        _agreements[key] = difference <= TOLERANCE
        if not _agreements[key]:
            print(
                f"network: Punet was changed: {path.__name__} differs from Punet.forward "
                f"by {difference:.2g}; the plain network runs, more slowly",
                file=sys.stderr,
            )
    return _agreements[key]


@torch.inference_mode(False)
@torch.enable_grad()
def largest_difference(network, path, device):
    """Compare a path with Punet.forward, on one sample of SAMPLE_SIDE pixels in float32.

    Weights, sample and dropout have random states of their own.

    Returns:
        The largest relative difference among the prediction and the gradients of the
        weights: norm of the difference over norm of the plain one. Infinity if the path
        cannot run.
    """
    network = copy.deepcopy(network).float().cpu()
    channels = network.encoder[0].in_channels
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        for module in network.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        # Biases can make weak signals equal in float32; then rounding chooses the maxima.
        for layer in network.encoder:
            torch.nn.init.zeros_(layer.bias)
        sample, target = torch.rand(2, 1, channels, SAMPLE_SIDE, SAMPLE_SIDE)
    network.to(device, memory_format=torch.channels_last)
    sample, target = sample.to(device), target.to(device)
    plain = prediction_and_gradients(Punet.forward, network, sample, target)
    try:
        fast = prediction_and_gradients(path.forward, network, sample, target)
    except Exception:  # noqa: BLE001 - layers that the path does not know
        return math.inf
    differences = [
        (ours - expected).norm() / expected.norm().clamp(min=1e-30)
        for ours, expected in zip(fast, plain, strict=True)
    ]
    return torch.stack(differences).max().item()


def prediction_and_gradients(forward, network, sample, target):
    """Return a prediction and the gradients of its squared error, in full float32."""
    draw = BernoulliMasks(sample.device, 0)
    mask = draw(sample.shape, 0.3).float()
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        prediction = forward(network, sample * mask, mask, draw)
        loss = ((prediction - target) ** 2).mean()
        weights = list(network.parameters())
        gradients = torch.autograd.grad(
            loss, weights, allow_unused=True, materialize_grads=True
        )
    return prediction.detach(), *gradients
