"""The network and its fast paths against one that is written out here, and their parts."""

import pytest
import torch
from tensors import (
    DOUBLE,
    block_mask,
    needs_cuda,
    random_image,
    seeded,
    sparse_mask,
)
from torch import nn
from torch.nn import functional as F

from network import cpu_punet, fast_punet, punet
from network.cpu_punet import EdgedConvolution, convolve_edged
from network.fast_punet import FastPunet, triton_punet
from network.masks import BernoulliMasks
from network.punet import Punet


def test_first_weights_are_those_of_the_tensorflow_code():
    """Moments by layer; the last layer has no ReLU behind it."""
    torch.manual_seed(0)
    network = Punet(3, 0.3)
    network.initialise_like_tensorflow()
    *middle, last = [conv for stage in network.decoder for conv in stage]
    for layers, gain in ((middle, 2), ([last], 1), (network.encoder, None)):
        for layer in layers:
            out, fan_in = layer.weight.shape[0], layer.weight[0].numel()
            expected = gain / fan_in if gain else 2 / (fan_in + 9 * out)
            count = layer.weight.numel()
            weight = layer.weight.detach()
            assert weight.var() == pytest.approx(expected, rel=6 / count**0.5)
            assert weight.mean().abs() < 4 * (expected / count) ** 0.5
            assert (layer.bias == 0).all()
            if not gain:  # uniform
                assert weight.abs().max() <= (3 * expected) ** 0.5


class Recorder:
    """A dropout source that keeps what it drew."""

    def __init__(self):
        self.masks = []
        self.generator = seeded(7)

    def __call__(self, shape, drop_rate):
        uniform = torch.rand(shape, generator=self.generator, **DOUBLE)
        self.masks.append((uniform >= drop_rate).double())
        return self.masks[-1]


def plain_punet(parameters, x, mask, dropout_masks, drop_rate):
    """Punet step by step, parameters and dropout masks in forward order."""
    parameters, dropout_masks = iter(parameters), iter(dropout_masks)

    def pad(t):
        return F.pad(t, (1, 1, 1, 1), mode="replicate")

    def encode(x, mask):
        weight, bias = next(parameters), next(parameters).view(-1, 1, 1)
        mask = F.pad(mask, (1, 1, 1, 1), value=1.0)
        kept = F.conv2d(mask, torch.ones_like(weight))
        updated = kept.clamp(0, 1)
        x = F.conv2d(pad(x) * mask, weight) * (9 / (kept + 1e-8) * updated) + bias
        return F.leaky_relu(x, 0.1), updated

    def decode(x):
        if drop_rate:
            keep = next(dropout_masks)
            kept = x.shape[1] - keep.shape[1]  # channels that nothing is dropped of
            dropped = x[:, kept:] * keep / (1 - drop_rate)
            x = torch.cat((x[:, :kept], dropped), 1)
        return F.conv2d(pad(x), next(parameters), next(parameters))

    skips = [x]
    x, mask = encode(*encode(x, mask))
    for _ in range(4):
        x, mask = (F.max_pool2d(t, 2, ceil_mode=True) for t in (x, mask))
        skips.append(x)
        x, mask = encode(x, mask)
    x, mask = (F.max_pool2d(t, 2, ceil_mode=True) for t in (x, mask))
    x, mask = encode(x, mask)
    while skips:
        skip = skips.pop()
        x = F.interpolate(x, scale_factor=2, mode="nearest")
        x = x[:, :, : skip.shape[2], : skip.shape[3]]
        x = F.leaky_relu(decode(torch.cat((x, skip), 1)), 0.1)
        x = F.leaky_relu(decode(x), 0.1)
    x = torch.sigmoid(decode(x))
    assert not [*parameters, *dropout_masks]
    return x


CASES = [
    # channels, drop rate, whether upsampled maps are dropped, height, width, mask
    (1, 0.0, True, 45, 33, sparse_mask),
    (3, 0.0, True, 32, 32, block_mask),
    (1, 0.3, True, 79, 32, block_mask),
    (3, 0.3, True, 45, 33, sparse_mask),
    (1, 0.3, False, 32, 32, sparse_mask),
    (3, 0.3, False, 45, 33, block_mask),
]


@pytest.mark.parametrize("forward", [Punet.forward, cpu_punet.forward])
@pytest.mark.parametrize(
    ("channels", "drop_rate", "drop_upsampled", "height", "width", "make_mask"), CASES
)
def test_prediction_and_gradients_are_those_of_the_definition(
    channels, drop_rate, drop_upsampled, height, width, make_mask, forward
):
    shape = (2, channels, height, width)
    mask = make_mask(*shape)
    x = (random_image(*shape).double() * mask).requires_grad_()
    torch.manual_seed(0)
    share = 1.0 if drop_upsampled else 0.5
    network = Punet(channels, drop_rate, "window", drop_upsampled, 0, share).double()
    parameters = list(network.parameters())
    draw = Recorder()
    prediction = forward(network, x, mask, draw)
    drawn = [96, 96, 144, 96, 144, 96, 144, 96, 96 + channels, 64, 32]
    if not drop_upsampled:
        drawn[0:9:2] = [48, 48, 48, 24, channels]
        drawn[7] = 48
    assert [m.shape[1] for m in draw.masks] == (drawn if drop_rate else [])
    plain = plain_punet(parameters, x, mask, draw.masks, drop_rate)
    target = random_image(*shape, seed=1)
    results = [
        (output, *torch.autograd.grad(((output - target) ** 2).sum(), (x, *parameters)))
        for output in (prediction, plain)
    ]
    for ours, expected in zip(*results, strict=True):
        assert ours.shape == expected.shape
        assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.fixture
def no_agreements(monkeypatch):
    """Forget which fast paths have been compared."""
    monkeypatch.setattr(fast_punet, "_agreements", {})


SETTINGS = [(1, 0.3), (3, 0.2, "entries", False, 0.1, 0.5)]


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_fast_path_runs_and_is_compared_once(
    settings, no_agreements, monkeypatch, capsys
):
    calls, forward = [], cpu_punet.forward
    monkeypatch.setattr(
        cpu_punet, "forward", lambda *a: calls.append(a[1].shape) or forward(*a)
    )
    network = FastPunet(*settings)
    x = random_image(1, settings[0], 32, 33)
    before = torch.get_rng_state()
    with torch.inference_mode():
        for _ in range(2):
            network(x, torch.ones_like(x), BernoulliMasks(x.device, 0))
    sample = 1, settings[0], fast_punet.SAMPLE_SIDE, fast_punet.SAMPLE_SIDE
    assert calls == [sample, x.shape, x.shape]
    assert torch.equal(torch.get_rng_state(), before)
    assert capsys.readouterr() == ("", "")


def edited_slope(monkeypatch):
    monkeypatch.setattr(
        "network.punet.F.leaky_relu", lambda x, _: F.leaky_relu_(x, 0.2)
    )


def edited_pooling(monkeypatch):
    def halve(x):
        return F.avg_pool2d(x, 2, ceil_mode=True)

    monkeypatch.setattr("network.punet.halve", halve)


def edited_gradient(monkeypatch):
    double = punet.double
    monkeypatch.setattr("network.punet.double", lambda x, s: double(x, s).detach())


class MaskBlind(nn.Conv2d):
    """A layer that the fast paths cannot run."""

    def forward(self, x, mask):
        return super().forward(x), mask[..., 1:-1, 1:-1]


def edited_layers(monkeypatch):
    init = Punet.__init__

    def other(self, *settings):
        init(self, *settings)
        self.encoder[6] = MaskBlind(48, 48, 3)

    monkeypatch.setattr(Punet, "__init__", other)


@pytest.mark.parametrize(
    "edit", [edited_slope, edited_pooling, edited_gradient, edited_layers]
)
@pytest.mark.parametrize("settings", SETTINGS)
def test_an_edited_network_runs_as_edited_and_one_line_says_so(
    settings, edit, no_agreements, monkeypatch, capsys
):
    edit(monkeypatch)
    network = FastPunet(*settings)
    x = random_image(1, settings[0], 32, 33)
    made = [
        forward(network, x, torch.ones_like(x), BernoulliMasks(x.device, 0))
        for forward in (FastPunet.forward, FastPunet.forward, Punet.forward)
    ]
    assert torch.equal(made[0], made[2]) and torch.equal(made[1], made[2])
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == 1 and "Punet was changed" in printed[0]


@needs_cuda
def test_punet_is_the_same_on_cuda():
    shape = (2, 3, 45, 33)
    mask = block_mask(*shape)
    x = random_image(*shape).double() * mask
    network = FastPunet(3, 0.3).double()
    draw = Recorder()
    on_cpu = network(x, mask, draw)
    masks = iter(draw.masks)
    network.cuda()
    on_cuda = network(x.cuda(), mask.cuda(), lambda *_: next(masks).cuda().bool())
    torch.testing.assert_close(on_cuda.cpu(), on_cpu)


@needs_cuda
@pytest.mark.parametrize(
    "settings", [(0, "window"), (0.3, "window"), (0.3, "entries", False)]
)
@pytest.mark.parametrize("shape", [(1, 1, 64, 64), (2, 3, 45, 33), (1, 1, 79, 32)])
def test_triton_kernels_compute_the_same(shape, settings):
    mask = sparse_mask(*shape).float().cuda()
    x = random_image(*shape).cuda() * mask
    torch.manual_seed(0)
    network = Punet(shape[1], *settings).cuda()
    network.to(memory_format=torch.channels_last)
    assert triton_punet.usable(x)
    target = random_image(*shape, seed=1).cuda()
    results = []
    for path in (triton_punet, cpu_punet):
        draw = Recorder()
        with torch.backends.cudnn.flags(
            enabled=True, deterministic=True, allow_tf32=False
        ):
            output = path.forward(
                network, x, mask, lambda *a, draw=draw: draw(*a).cuda().bool()
            )
            loss = ((output - target) ** 2).mean()
            grads = torch.autograd.grad(loss, list(network.parameters()))
        results.append((output, loss, *grads))
    for ours, expected in zip(*results, strict=True):
        # 32-bit gradients of two orders of summation, over which leaky ReLUs of nearly 0
        # and maxima that nearly tie may decide otherwise
        assert (ours - expected).abs().max() <= 1e-3 * expected.abs().max()


@pytest.mark.parametrize(
    "channels, width, count",
    [(1, 1, 988_609), (3, 1, 991_203), (1, 0.5, 799_897)],
)
def test_punet_has_its_weights(channels, width, count):
    network = Punet(channels, 0.3, width=width)
    assert sum(p.numel() for p in network.parameters()) == count


def test_dropout_is_active_in_eval_mode():
    network = Punet(1, 0.3).eval()
    x = random_image(1, 1, 32, 32)
    with torch.no_grad():
        a, b = (network(x, torch.ones_like(x)) for _ in range(2))
    assert not torch.equal(a, b)


def test_dropout_keeps_its_rate():
    torch.manual_seed(0)
    keep = Punet(1, 0.3).draw((1000, 1000), 0.3)
    assert abs(keep.double().mean() - 0.7) < 4 * (0.3 * 0.7 / keep.numel()) ** 0.5


@pytest.mark.parametrize("convolve", [EdgedConvolution.apply, convolve_edged])
@pytest.mark.parametrize("keep", [None, "float", "bool"])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("shape", [(3, 1, 4), (1, 6, 5), (3, 6, 5)])
def test_edged_convolution_is_that_of_a_padded_map(shape, masked, keep, convolve):
    channels, height, width = shape
    x = random_image(2, *shape)
    weight, bias = random_image(4, channels, 3, 3, seed=3), random_image(4, seed=4)
    given = [t.requires_grad_() for t in (x, weight, bias)]
    if keep:
        drawn = torch.rand(x.shape, generator=seeded(1)) < 0.7
        keep = drawn if keep == "bool" else drawn.float()
    mask = ratio = None
    if masked:
        mask = block_mask(2, 1, height + 2, width + 2).float()
        ratio = random_image(2, 1, height, width, seed=5)
    padded = F.pad(x * (1 if keep is None else keep), (1,) * 4, mode="replicate")
    expected = F.conv2d(padded * (mask if masked else 1), weight * 1.25)
    expected = expected * (ratio if masked else 1) + bias.view(-1, 1, 1)
    made = convolve(*given, 1.25, keep, mask, ratio)
    torch.testing.assert_close(made, expected)
    grad = random_image(*expected.shape, seed=2)
    before = grad.clone()
    gradients = [torch.autograd.grad(out, given, grad) for out in (made, expected)]
    torch.testing.assert_close(*gradients)
    assert torch.equal(grad, before)


@pytest.mark.parametrize("channels", [1, 3])
def test_bfloat16_is_float32_but_for_rounding(channels):
    torch.manual_seed(0)
    network = Punet(channels, 0.3, "entries", drop_upsampled=False)
    shape = (1, channels, 45, 33)
    mask = block_mask(*shape).float()
    x, target = random_image(*shape) * mask, random_image(*shape, seed=1)
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        prediction = cpu_punet.forward(network, x.to(dtype), mask, Recorder())
        assert prediction.dtype == torch.float32
        loss = ((prediction - target) ** 2).mean()
        results.append(torch.autograd.grad(loss, list(network.parameters())))
        results[-1] += (prediction.detach(),)
    for exact, rounded in zip(*results, strict=True):
        assert rounded.dtype == torch.float32
        difference = (rounded - exact).norm() / exact.norm()
        # Gradients add up many roundings, of either sign.
        assert 0 < difference < (1e-3 if exact is results[0][-1] else 0.25)
