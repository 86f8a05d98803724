"""The network package against references written out here, on tiny tensors."""

from pathlib import Path

import numpy as np
import pytest
import scipy.fft
import torch
from scipy import ndimage
from torch import nn
from torch.nn import functional as F

from deblur import CircularBlur, gaussian_psf
from network import fusion, punet
from network.fusion import wiener
from network.muon import Muon, orthogonalise
from network.pconv import PConv2d
from network.punet import EdgePad, Punet
from network.self2self import BernoulliMasks, Self2Self, dropped_loss, flip

FIXTURE = Path(__file__).parent / "fixtures" / "tf_pconv2d.npz"
DOUBLE = {"dtype": torch.float64}

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
on_devices = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=needs_cuda)]
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random_image(*shape, seed=0):
    return torch.rand(shape, generator=seeded(seed))


def block_mask(*shape, seed=0):
    """A Bernoulli mask, half dropped, with a missing block at the top left."""
    mask = (torch.rand(shape, generator=seeded(seed), **DOUBLE) < 0.5).double()
    mask[..., : shape[-2] * 2 // 3, : shape[-1] * 2 // 3] = 0
    return mask


def sparse_mask(*shape):
    """A Bernoulli mask with 95 % dropped."""
    return (torch.rand(shape, generator=seeded(), **DOUBLE) < 0.05).double()


def identity(x):
    return x


def roll(x):
    """An operator that a flip on its wrong side gives away."""
    return x.roll(1, -1)


# Partial convolution


def naive_pconv(x, mask, weight, bias, stride, padding, dilation):
    """The definition, window by window; bias may be 0."""
    (_, _, kh, kw), (ph, pw) = weight.shape, padding
    edges = ((0, 0), (0, 0), (ph, ph), (pw, pw))
    mask = np.pad(np.broadcast_to(mask, x.shape), edges)
    x = np.pad(x, edges) * mask
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, (kh, kw))]
    size = [(n - r) // s + 1 for n, r, s in zip(x.shape[2:], reach, stride)]
    output = np.empty((len(x), len(weight), *size))
    updated = np.empty_like(output)
    for i, j in np.ndindex(*size):
        top, left = i * stride[0], j * stride[1]
        rows = slice(top, top + reach[0], dilation[0])
        columns = slice(left, left + reach[1], dilation[1])
        kept = mask[:, :, rows, columns].sum((1, 2, 3))[:, None]
        value = np.einsum("nchw,ochw->no", x[:, :, rows, columns], weight)
        ratio = kh * kw / (kept + 1e-8) * kept.clip(0, 1)
        output[:, :, i, j] = value * ratio + bias
        updated[:, :, i, j] = kept.clip(0, 1)
    return output, updated


@pytest.mark.parametrize("kept", [1, 0.05], ids=["binary", "soft"])
@pytest.mark.parametrize("mask_channels", [3, 1])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "window",
    [
        {"kernel_size": 3},
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": (2, 3), "stride": 2, "dilation": 2, "padding": (1, 2)},
        {"kernel_size": (2, 3), "stride": (1, 3), "dilation": (3, 1)},
    ],
)
def test_pconv_is_its_definition(window, bias, mask_channels, kept):
    layer = PConv2d(3, 4, **window, bias=bias).double()
    x = random_image(2, 3, 11, 12).double()
    mask = kept * block_mask(2, mask_channels, 11, 12)
    output, updated = layer(x, mask)
    expected = naive_pconv(
        x.numpy(),
        mask.numpy(),
        layer.weight.detach().numpy(),
        layer.bias.detach().numpy() if bias else 0,
        layer.stride,
        layer.padding,
        layer.dilation,
    )
    np.testing.assert_allclose(output.detach(), expected[0], atol=1e-12)
    np.testing.assert_allclose(updated, expected[1], atol=1e-12)
    assert updated.shape == output.shape
    empty = updated == 0
    assert empty.any()
    alone = layer.bias if bias else torch.zeros(4, **DOUBLE)
    assert torch.equal(output[empty], alone.view(-1, 1, 1).expand_as(output)[empty])


@pytest.mark.parametrize("case", range(3))
def test_pconv_is_tensorflows(case):
    with np.load(FIXTURE) as golden:
        x, m, w, b, y, mo = (
            torch.from_numpy(golden[f"{key}{case}"])
            for key in ("x", "m", "w", "b", "y", "mo")
        )
    layer = PConv2d(w.shape[1], w.shape[0], 3, padding=1)
    layer.load_state_dict({"weight": w, "bias": b})
    output, updated = layer(x, m)
    torch.testing.assert_close(output, y, rtol=1e-5, atol=1e-5)
    assert torch.equal(updated, mo)


@pytest.mark.parametrize("bias", [True, False])
def test_pconv_is_made_like_conv2d(bias):
    torch.manual_seed(0)
    plain = nn.Conv2d(3, 4, (2, 3), 2, 1, 2, bias=bias)
    torch.manual_seed(0)
    partial = PConv2d(3, 4, (2, 3), 2, 1, 2, bias)
    for name in ("kernel_size", "stride", "padding", "dilation"):
        assert getattr(partial, name) == getattr(plain, name)
    torch.testing.assert_close(partial.state_dict(), plain.state_dict(), rtol=0, atol=0)


# Network


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
            x = x * next(dropout_masks) / (1 - drop_rate)
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


@pytest.mark.parametrize("make_mask", [sparse_mask, block_mask])
@pytest.mark.parametrize("drop_rate", [0, 0.3])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(32, 32), (45, 33), (79, 32)])
def test_punet_is_its_plain_self(size, channels, drop_rate, make_mask):
    shape = (2, channels, *size)
    mask = make_mask(*shape)
    x = (random_image(*shape).double() * mask).requires_grad_()
    torch.manual_seed(0)
    network = Punet(channels, drop_rate).double()
    parameters = list(network.parameters())
    draw = Recorder()
    prediction = network(x, mask, draw)
    plain = plain_punet(parameters, x, mask, draw.masks, drop_rate)
    target = random_image(*shape, seed=1)
    results = [
        (output, *torch.autograd.grad(((output - target) ** 2).sum(), (x, *parameters)))
        for output in (prediction, plain)
    ]
    for ours, expected in zip(*results, strict=True):
        assert ours.shape == expected.shape
        assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()


@needs_cuda
def test_punet_is_the_same_on_cuda():
    shape = (2, 3, 45, 33)
    mask = block_mask(*shape)
    x = random_image(*shape).double() * mask
    network = Punet(3, 0.3).double()
    draw = Recorder()
    on_cpu = network(x, mask, draw)
    masks = iter(draw.masks)
    network.cuda()
    on_cuda = network(x.cuda(), mask.cuda(), lambda *_: next(masks).cuda().bool())
    torch.testing.assert_close(on_cuda.cpu(), on_cpu)


@needs_cuda
@pytest.mark.parametrize("ratio", ["window", "entries"])
@pytest.mark.parametrize("drop_rate", [0, 0.3])
@pytest.mark.parametrize("shape", [(1, 1, 64, 64), (2, 3, 45, 33), (1, 1, 79, 32)])
def test_fused_kernels_compute_the_same(shape, drop_rate, ratio, monkeypatch):
    mask = sparse_mask(*shape).float().cuda()
    x = random_image(*shape).cuda() * mask
    torch.manual_seed(0)
    network = Punet(shape[1], drop_rate, ratio).cuda()
    network.to(memory_format=torch.channels_last)
    assert punet.fused is not None
    assert punet.fused.usable(x)
    target = random_image(*shape, seed=1).cuda()
    results = []
    for module in (punet.fused, None):
        monkeypatch.setattr(punet, "fused", module)
        draw = Recorder()
        with torch.backends.cudnn.flags(
            enabled=True, deterministic=True, allow_tf32=False
        ):
            output = network(x, mask, lambda *a, draw=draw: draw(*a).cuda().bool())
            loss = ((output - target) ** 2).mean()
            grads = torch.autograd.grad(loss, list(network.parameters()))
        results.append((output, loss, *grads))
    for ours, expected in zip(*results, strict=True):
        # 32-bit gradients of two orders of summation
        assert (ours - expected).abs().max() <= 5e-5 * expected.abs().max()


@pytest.mark.parametrize("channels, count", [(1, 988_609), (3, 991_203)])
def test_punet_has_its_weights(channels, count):
    assert sum(p.numel() for p in Punet(channels, 0.3).parameters()) == count


def test_dropout_is_active_in_eval_mode():
    network = Punet(1, 0.3).eval()
    x = random_image(1, 1, 32, 32)
    with torch.no_grad():
        a, b = (network(x, torch.ones_like(x)) for _ in range(2))
    assert not torch.equal(a, b)


def test_dropout_keeps_its_rate():
    torch.manual_seed(0)
    keep = Punet(1, 0.3)._draw((1000, 1000), 0.3)
    assert abs(keep.double().mean() - 0.7) < 4 * (0.3 * 0.7 / keep.numel()) ** 0.5


@pytest.mark.parametrize("keep", [None, "float", "bool"])
@pytest.mark.parametrize("size", [(1, 1), (1, 4), (2, 3), (6, 5)])
def test_edge_pad_is_replicate_padding(size, keep):
    maps = [random_image(2, c, *size).requires_grad_() for c in (2, 3)]
    if keep:
        drawn = torch.rand((2, 5, *size), generator=seeded(1)) < 0.7
        keep = drawn if keep == "bool" else drawn.float()
    joined = torch.cat(maps, 1) * (1 if keep is None else keep)
    expected = F.pad(joined, (1, 1, 1, 1), mode="replicate")
    padded = EdgePad.apply(keep, *maps)
    assert torch.equal(padded, expected)
    weight = random_image(*expected.shape, seed=2)
    grads, expected_grads = (
        torch.autograd.grad((out * weight).sum(), maps) for out in (padded, expected)
    )
    torch.testing.assert_close(grads, expected_grads)


# Masks, loss and flips


def masks_of(device, *entropy):
    return BernoulliMasks(torch.device(device), *entropy)


@on_devices
@pytest.mark.parametrize("drop_rate", [0.3, 0.05])
def test_masks_keep_their_rate(device, drop_rate):
    mask = masks_of(device, 0)((1, 1, 1000, 1000), drop_rate)
    assert mask.shape == (1, 1, 1000, 1000)
    assert set(mask.unique().tolist()) == {0, 1}
    error = (drop_rate * (1 - drop_rate) / mask.numel()) ** 0.5
    assert abs(mask.double().mean() - (1 - drop_rate)) < 4 * error


@on_devices
def test_masks_drop_nothing_at_rate_zero(device):
    assert masks_of(device, 0)((2, 3, 33, 35), 0.0).all()


@on_devices
@pytest.mark.parametrize("drop_rate", [0.3, 0.05])
def test_masks_are_independent(device, drop_rate):
    mask = masks_of(device, 0)((2, 3, 400, 400), drop_rate).double().flatten().cpu()
    neighbours, row, channel, sample = range(1, 9), 400, 400**2, 3 * 400**2
    for lag in (*neighbours, row, channel, sample):
        pair = torch.stack((mask[lag:], mask[:-lag]))
        assert abs(torch.corrcoef(pair)[0, 1]) < 5 / pair.shape[1] ** 0.5, lag


@on_devices
def test_masks_are_named_by_their_entropy(device):
    shape = (1, 3, 32, 33)
    first = masks_of(device, 0, 5)(shape, 0.3)
    assert torch.equal(first, masks_of(device, 0, 5)(shape, 0.3))
    for other in ((0, 6), (1, 5), (5, 0)):
        assert not torch.equal(first, masks_of(device, *other)(shape, 0.3))


@on_devices
def test_masks_go_on_from_a_state(device):
    masks = masks_of(device, 0)
    first = masks((1, 1, 32, 33), 0.3)
    state = masks.state()
    expected = [masks((1, 1, 32, 33), 0.3) for _ in range(2)]
    assert not torch.equal(first, expected[0])
    resumed = masks_of(device, 1)
    resumed.load_state(state)
    for mask in expected:
        assert torch.equal(resumed((1, 1, 32, 33), 0.3), mask)


def test_loss_is_the_mean_over_dropped_entries():
    prediction, y = random_image(2, 3, 5, 4), random_image(1, 3, 5, 4, seed=1)
    dropped = 1 - block_mask(2, 3, 5, 4).float()
    errors = [
        (prediction[index] - y[0][index[1:]]).item() ** 2
        for index in np.ndindex(*prediction.shape)
        if dropped[index]
    ]
    loss = dropped_loss(prediction, y, dropped).item()
    assert loss == pytest.approx(sum(errors) / len(errors))


def test_loss_is_blind_to_kept_entries():
    prediction = random_image(2, 3, 8, 8).requires_grad_()
    y = random_image(2, 3, 8, 8, seed=1)
    kept = block_mask(2, 3, 8, 8).float()
    loss = dropped_loss(prediction, y, 1 - kept)
    assert torch.equal(loss, dropped_loss(prediction + 9 * kept, y, 1 - kept))
    assert torch.equal(loss, dropped_loss(prediction, y - 9 * kept, 1 - kept))
    (grad,) = torch.autograd.grad(loss, prediction)
    assert torch.equal(grad != 0, kept == 0)


def test_loss_of_a_mask_that_drops_nothing_is_zero():
    prediction = torch.ones(1, 1, 4, 4, requires_grad=True)
    loss = dropped_loss(prediction, torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 4))
    (grad,) = torch.autograd.grad(loss, prediction)
    assert loss == 0 and (grad == 0).all()


def test_flip_flips_each_sample_as_told_and_back():
    x = random_image(4, 3, 5, 6)
    flips = torch.tensor([[0, 0], [1, 0], [0, 1], [1, 1]]).view(4, 2, 1, 1)
    flipped = flip(x, flips)
    expected = (x[0], x[1].flip(-1), x[2].flip(-2), x[3].flip(-1, -2))
    assert torch.equal(flipped, torch.stack(expected))
    assert torch.equal(flip(flipped, flips), x)


# Muon


def test_orthogonalising_keeps_the_singular_vectors():
    left = torch.linalg.qr(torch.randn(2, 24, 24, generator=seeded()))[0]
    right = torch.linalg.qr(torch.randn(2, 60, 24, generator=seeded(1)))[0]
    values = torch.logspace(0, 1.7, 24)
    made = orthogonalise(left * values @ right.mT)
    values = left.mT @ made @ right
    kept = values.diagonal(dim1=-2, dim2=-1)
    assert 0.65 < kept.min() and kept.max() < 1.25
    assert (values - torch.diag_embed(kept)).abs().max() < 1e-4


@pytest.mark.parametrize(
    "layout", [torch.contiguous_format, torch.channels_last], ids=str
)
def test_muon_is_pytorchs(layout):
    """PyTorch's takes matrices and works in bfloat16."""
    shapes = (40, 36, 3, 3), (33, 32, 3, 3), (40, 36, 3, 3)
    weights = [random_image(*shape, seed=i) for i, shape in enumerate(shapes)]
    matrices = [nn.Parameter(weight.flatten(1).clone()) for weight in weights]
    ours = [nn.Parameter(weight.clone(memory_format=layout)) for weight in weights]
    settings = {"weight_decay": 0, "adjust_lr_fn": "match_rms_adamw"}
    theirs = torch.optim.Muon(matrices, lr=0.5, **settings)
    optimizer = Muon(ours, torch.tensor(0.5))
    for step in range(4):
        for i, (weight, matrix) in enumerate(zip(ours, matrices)):
            weight.grad = random_image(*weight.shape, seed=9 * step + i) - 0.5
            matrix.grad = weight.grad.flatten(1)
        optimizer.step()
        theirs.step()
    for weight, matrix, start in zip(ours, matrices, weights):
        moved = weight - start
        assert 0.05 < moved.std() < 0.4
        difference = moved.flatten(1) - (matrix - start.flatten(1))
        assert difference.std() < 0.03 * moved.std()


def test_muon_steps_the_wide_convolutions_and_adam_the_rest():
    adam, muon = begun(random_image(3, 32, 33), optimizer="muon").optimizers
    sizes = [[w.shape for w in o.param_groups[0]["params"]] for o in (adam, muon)]
    assert {len(shape) for shape in sizes[0]} == {1, 4}
    assert (48, 3, 3, 3) in sizes[0] and (3, 32, 3, 3) in sizes[0]
    assert (32, 64, 3, 3) in sizes[1] and (48, 48, 3, 3) in sizes[1]
    assert sum(map(len, sizes)) == 36


# Learner


def begun(y, operator=identity, **settings):
    """A learner that has begun on y."""
    defaults = {"drop_rate": 0.3, "lr": 1e-3, "optimizer": "adam"}
    defaults |= {"bs": 1, "seed": 0, "device": "cpu"}
    learner = Self2Self(**defaults | settings)
    learner.begin(y, operator)
    return learner


def train(learner, steps):
    for _ in range(steps):
        learner.train_step()
    return learner


class Spy(nn.Module):
    """Stands in for Punet: keeps what it is shown, answers `answer(x, mask)`."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer
        self.scale = nn.Parameter(torch.ones(()))
        self.inputs, self.masks = [], []

    def forward(self, x, mask, draw):
        self.inputs.extend(x)
        self.masks.extend(mask)
        return self.answer(x, mask) * self.scale


FLIPS = [(), (-1,), (-2,), (-1, -2)]


def flip_of(x, mask, y):
    """How y was flipped to give x under its mask."""
    (dims,) = [dims for dims in FLIPS if torch.equal(y.flip(dims) * mask, x)]
    return dims


@pytest.mark.parametrize("operator", [identity, roll])
def test_predictions_are_flipped_back_before_the_operator(operator):
    clean = random_image(3, 32, 33)
    y = operator(clean)

    def clean_flipped_like_y(x, mask):
        samples = zip(x, mask, strict=True)
        return torch.stack([clean.flip(flip_of(*sample, y)) for sample in samples])

    learner = begun(y, operator, bs=2)
    learner.network = spy = Spy(clean_flipped_like_y)
    train(learner, 12)
    assert {flip_of(*sample, y) for sample in zip(spy.inputs, spy.masks)} == {*FLIPS}
    assert learner.mean_loss() == 0
    np.testing.assert_allclose(learner.predict(8), clean, atol=1e-6)


def test_entries_judged_are_those_not_seen():
    y = 1 + random_image(1, 32, 33)
    learner = begun(y)
    learner.network = spy = Spy(lambda x, mask: x)
    for _ in range(12):
        learner.train_step()
        dropped = (y**2).sum() - (spy.inputs[-1] ** 2).sum()
        expected = dropped / (1 - spy.masks[-1]).sum()
        assert learner.mean_loss() == pytest.approx(expected.item(), rel=1e-4)


def test_batch_is_several_samples_of_one_observation():
    y = random_image(1, 32, 33)
    learner = begun(y, bs=2)
    learner.network = spy = Spy(lambda x, mask: x)
    train(learner, 1)
    a, b = (
        m.flip(flip_of(x, m, y)) for x, m in zip(spy.inputs, spy.masks, strict=True)
    )
    assert not torch.equal(a, b)


def test_drop_rate_zero_judges_every_entry():
    y = random_image(1, 32, 33)
    learner = begun(y, drop_rate=0)
    learner.network = spy = Spy(lambda x, mask: torch.zeros_like(x))
    train(learner, 1)
    assert spy.masks[0].all()
    assert learner.mean_loss() == pytest.approx((y**2).mean().item())


def test_same_seed_repeats_however_often_one_looks():
    y = random_image(1, 32, 33)
    watched = begun(y)
    for _ in range(4):
        watched.predict(2)
        torch.rand(1)  # PyTorch's own random state is not the learner's
        watched.train_step()
    unwatched = train(begun(y), 4)
    assert watched.mean_loss() == unwatched.mean_loss()
    np.testing.assert_array_equal(watched.predict(3), unwatched.predict(3))
    assert not np.array_equal(
        unwatched.predict(3), train(begun(y, seed=1), 4).predict(3)
    )


@pytest.mark.parametrize("optimizer, average", [("adam", 0), ("adamw", 0), ("muon", 2)])
def test_learner_goes_on_from_a_state(optimizer, average):
    y = random_image(1, 32, 33)
    learner = begun(y, optimizer=optimizer, average=average)
    learner.begin_again()
    train(learner, 3)
    state = learner.state_dict()
    train(learner, 3)
    resumed = begun(y, optimizer=optimizer, average=average)
    resumed.load_state_dict(state)
    train(resumed, 3)
    assert resumed.step == learner.step == 6
    assert resumed.mean_loss() == learner.mean_loss()
    np.testing.assert_array_equal(resumed.predict(2), learner.predict(2))


@pytest.mark.parametrize(
    "shape, operator",
    [((1, 32, 33), identity), ((1, 32, 33), roll), ((3, 34, 32), identity)],
)
def test_second_image_is_learnt_like_a_first(shape, operator):
    learner = train(begun(random_image(1, 32, 33), average=2), 3)
    second = random_image(*shape, seed=1)
    learner.begin(second, operator)
    fresh = begun(second, operator, average=2)
    np.testing.assert_array_equal(learner.predict(2), fresh.predict(2))
    train(learner, 3)
    train(fresh, 3)
    assert learner.step == 3
    assert learner.mean_loss() == fresh.mean_loss()
    np.testing.assert_array_equal(learner.predict(2), fresh.predict(2))


def test_prediction_makes_no_graph():
    learner = begun(random_image(3, 32, 33))
    graphs = []
    learner.network.register_forward_hook(
        lambda network, inputs, output: graphs.append(output.requires_grad)
    )
    restored = learner.predict(3)
    assert graphs == [False] * 3
    assert restored.shape == (3, 32, 33) and restored.dtype == np.float32


def test_prediction_is_the_mean_of_the_ensemble():
    learner = train(begun(random_image(1, 32, 33), seed=5), 2)
    masks = masks_of("cpu", 5, 2)
    with torch.no_grad():
        samples = [learner._sample(masks, 1)[0][0] for _ in range(4)]
    assert not torch.equal(samples[0], samples[1])
    np.testing.assert_allclose(learner.predict(4), sum(samples) / 4, atol=1e-6)
    variance = np.var(samples, 0, ddof=1)
    np.testing.assert_allclose(learner.variance, variance, atol=1e-6)


# Fusion


def naive_wiener(residual, noise):
    """Patch by patch, frequency by frequency."""
    size, stride, reach = fusion.PATCH, fusion.STRIDE, fusion.REACH
    band = fusion.BAND
    _, height, width = residual.shape
    around = [(reach, reach + height % 2), (reach, reach + width % 2)]
    padded = np.pad(residual, [(0, 0), *around], mode="reflect").astype(float)
    places = [range(0, n - size + 1, stride) for n in padded.shape[1:]]
    waves = np.array(
        [
            [
                scipy.fft.dctn(
                    padded[:, i : i + size, j : j + size], axes=(1, 2), norm="ortho"
                )
                for j in places[1]
            ]
            for i in places[0]
        ]
    )
    total, count = np.zeros_like(padded), np.zeros(padded.shape[1:])
    edge = fusion.WINDOW // 2
    for a in range(edge, len(waves) - edge):
        for b in range(edge, len(waves[0]) - edge):
            near = waves[a - edge : a + edge + 1, b - edge : b + edge + 1]
            energy = np.stack([(near**2).mean((0, 1, 2)), np.ones((size, size))])
            energy = ndimage.uniform_filter(energy, (0, band, band), mode="constant")
            energy = energy[0] / energy[1]
            kept = waves[a, b] * np.clip(1 - noise / energy, 0, 1)
            rows, columns = (slice(k * stride, k * stride + size) for k in (a, b))
            patch = scipy.fft.idctn(kept, axes=(1, 2), norm="ortho")
            total[:, rows, columns] += patch
            count[rows, columns] += 1
    inner = tuple(slice(reach, reach + n) for n in (height, width))
    return total[:, *inner] / count[inner]


@pytest.mark.parametrize("shape", [(1, 61, 36), (3, 32, 35)])
def test_residuals_filter_is_its_definition(shape, monkeypatch):
    residual = torch.randn(shape, generator=seeded()) + random_image(*shape)
    expected = naive_wiener(residual.numpy(), 0.9)
    assert 0.1 < expected.std() < 0.8
    np.testing.assert_allclose(wiener(residual, 0.9), expected, atol=1e-5)
    monkeypatch.setattr(fusion, "SLAB", 2)
    np.testing.assert_allclose(wiener(residual, 0.9), expected, atol=1e-5)


def observed(error, noise, shape=(1, 128, 128)):
    """A clean image, an estimate of it and an observation, with white differences."""
    clean = random_image(*shape).numpy()
    draws = np.random.default_rng(0).standard_normal((2, *shape), np.float32)
    return clean, clean + error * draws[0], clean + noise * draws[1]


def fused(f, y, sigma, error, operator=identity):
    """Fuse, told that f's squared error is error**2."""
    variance = np.full_like(y, error**2 / fusion.SPREAD)
    return fusion.fuse(f, variance, y, sigma, operator)


@pytest.mark.parametrize("error", [0.02, 0.05, 0.1])
def test_fusing_white_errors_is_the_inverse_variance_mean(error):
    noise = 0.05
    clean, f, y = observed(error, noise)
    best = error**2 / (error**2 + noise**2)
    result, predicted = fused(f, y, 255 * noise, error)
    expected = best * noise**2
    assert ((result - clean) ** 2).mean() == pytest.approx(expected, rel=0.1)
    assert predicted.mean() == pytest.approx(expected, rel=1e-3)
    assert np.abs(result - f - best * (y - f)).mean() < 0.25 * error


@pytest.mark.parametrize("channels", [1, 3])
def test_fusing_without_noise_gives_y_and_with_much_the_ensemble(channels):
    _, f, y = observed(0.1, 0, (channels, 40, 33))
    np.testing.assert_allclose(fused(f, y, 0, 0.1)[0], y, atol=1e-5)
    np.testing.assert_allclose(fused(f, y, 1e4, 0.1)[0], f, atol=1e-6)


@pytest.mark.parametrize("operator", [identity, CircularBlur(gaussian_psf(15, 1.0))])
def test_fusing_does_not_believe_a_level_far_too_low(operator):
    clean, f, _ = observed(0.03, 0)
    noise = 0.1 * torch.randn(1, 128, 128, generator=seeded())
    y = (operator(torch.from_numpy(clean)[None])[0] + noise).numpy()
    right, _ = fused(f, y, 25.5, 0.03, operator)
    low, _ = fused(f, y, 5, 0.03, operator)
    errors = [((x - clean) ** 2).mean() for x in (f, right, low)]
    assert errors[1] < errors[0] * 1.01
    assert errors[2] < errors[0] * 1.1


def test_quiet_quarter_of_a_spectrum_is_its_definition():
    residual = random_image(3, 41, 36).numpy() - 0.5
    energy = np.abs(np.fft.rfft2(residual)) ** 2 / (41 * 36)
    rows = np.array_split(energy, fusion.BINS, axis=1)
    parts = [x.mean() for part in rows for x in np.array_split(part, fusion.BINS, 2)]
    expected = np.quantile(parts, 0.25)
    assert fusion.quiet(torch.from_numpy(residual)) == pytest.approx(expected, rel=1e-4)


def test_fusing_inverts_the_operator():
    """Without noise the dense system's solution."""
    psf = np.array([[0, 0.05, 0.0], [0.1, 0.6, 0.15], [0.0, 0.1, 0.0]])
    clean, f, _ = observed(0.1, 0, (1, 32, 33))
    blur = CircularBlur(psf)
    pixels = torch.eye(32 * 33).view(-1, 1, 32, 33)
    matrix = blur(pixels).reshape(32 * 33, -1).numpy().T
    y = (matrix @ clean.ravel()).reshape(clean.shape)
    result, _ = fused(f, y, 0, 0.1, blur)
    np.testing.assert_allclose(result, clean, atol=1e-4)


def test_fusing_under_a_blur_of_one_pixel_is_the_pointwise_form():
    _, f, y = observed(0.05, 0.1, (3, 40, 36))
    result, error = fused(f, y, 25.5, 0.05, CircularBlur(np.ones((1, 1))))
    expected, expected_error = fused(f, y, 25.5, 0.05)
    np.testing.assert_allclose(result, expected, atol=1e-6)
    np.testing.assert_allclose(error, expected_error, atol=1e-6)


def test_fusing_does_not_blow_up_what_a_blur_has_taken():
    clean = ndimage.gaussian_filter(random_image(1, 64, 64).numpy(), (0, 1.5, 1.5))
    blur = CircularBlur(gaussian_psf(15, 2.0))
    noise = 0.01 * torch.randn(1, 64, 64, generator=seeded())
    y = blur(torch.from_numpy(clean)[None])[0] + noise
    f = ndimage.gaussian_filter(clean, (0, 1, 1))
    error = np.sqrt(((f - clean) ** 2).mean())
    result, _ = fused(f, y, 2.55, error, blur)
    assert np.sqrt(((result - clean) ** 2).mean()) < 0.97 * error


def test_learner_fuses_its_own_observation_and_variance():
    y = random_image(1, 32, 33)
    learner = train(begun(y, roll), 2)
    ensemble = learner.predict(4)
    expected = fusion.fuse(ensemble, learner.variance, y, 20, roll)
    for made, other in zip(learner.fuse(ensemble, 20), expected, strict=True):
        np.testing.assert_array_equal(made, other)


# Captured step


def distance(a, b):
    """Mean absolute difference of two learners' predictions."""
    return np.abs(a.predict(64) - b.predict(64)).mean()


@needs_cuda
def test_replays_draw_new_masks():
    learner = begun(random_image(1, 64, 64), lr=0.0, device="cuda")
    losses = [train(learner, 1).mean_loss() for _ in range(4)]
    assert len(set(losses)) == 4


@needs_cuda
@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_captured_steps_are_eager_steps(optimizer):
    y, settings = random_image(3, 64, 64), {"optimizer": optimizer, "device": "cuda"}
    captured, eager = begun(y, roll, **settings), begun(y, roll, **settings)
    for _ in range(5):
        captured.train_step()
        eager._train()
        losses = [x.loss_sum.item() for x in (captured, eager)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@needs_cuda
def test_same_seed_repeats_on_cuda():
    y = random_image(1, 64, 64)
    a, b = (train(begun(y, device="cuda"), 5) for _ in range(2))
    assert distance(a, b) < 1e-3
    assert distance(a, begun(y, device="cuda")) > 5e-3


@needs_cuda
def test_second_image_is_learnt_like_a_first_by_the_same_graph():
    first, second = (random_image(1, 64, 64, seed=seed) for seed in (0, 1))
    learner = train(begun(1 - first**4, device="cuda"), 5)
    graph = learner.graph
    learner.begin(second, identity)
    train(learner, 5)
    fresh = train(begun(second, device="cuda"), 5)
    assert learner.graph is graph
    assert learner.mean_loss() == pytest.approx(fresh.mean_loss(), rel=1e-3)
    assert distance(learner, fresh) < 1e-3


@needs_cuda
def test_learner_goes_on_from_a_state_on_cuda():
    y = random_image(1, 64, 64)
    learner = train(begun(y, device="cuda", average=2), 3)
    state = learner.state_dict()
    train(learner, 3)
    resumed = begun(y, device="cuda", average=2)
    resumed.load_state_dict(state)
    train(resumed, 3)
    assert resumed.mean_loss() == pytest.approx(learner.mean_loss(), rel=1e-3)
    assert distance(resumed, learner) < 1e-3


def test_the_trainings_own_predictions_join_the_ensemble():
    learner = begun(random_image(3, 32, 33), average=2, bs=2, seed=5)
    sampled, sample = [], learner._sample

    def watched_sample(masks, n):
        prediction, mask = sample(masks, n)
        sampled.extend(prediction.detach().numpy().astype(float))
        return prediction, mask

    learner._sample = watched_sample
    restored = train(learner, 4).predict(3)
    weights = np.array([1, 1, 4, 4, 9, 9, 16, 16] + [16] * 3) / 16
    mean = np.average(sampled, 0, weights)
    np.testing.assert_allclose(restored, mean, atol=1e-6)
    errors = (weights[:, None, None, None] * (sampled - mean) ** 2).sum(0)
    np.testing.assert_allclose(
        learner.variance, errors / (weights.sum() - 1), atol=1e-6
    )
    learner._sample = sample
    np.testing.assert_array_equal(learner.predict(3), restored)


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_annealed_learning_rate_rises_and_falls(optimizer):
    settings = {"lr": 0.1, "anneal": 40, "optimizer": optimizer}
    learner = begun(random_image(1, 32, 33), **settings)
    rates = []
    for _ in range(40):
        learner.train_step()
        rates.append(float(learner.optimizers[-1].param_groups[0]["lr"]))
    assert rates[0] == pytest.approx(0.05, rel=0.01)
    assert max(rates) == rates[1]
    assert rates[20] == pytest.approx(0.05)
    assert rates[-1] < 0.001
    assert rates[1:] == sorted(rates[1:], reverse=True)


def test_start_at_the_mean():
    y = random_image(3, 32, 33) * torch.tensor([0.1, 0.5, 1.0])[:, None, None]
    restored = begun(y, start="mean").predict(4)
    np.testing.assert_allclose(restored.mean((1, 2)), y.mean((1, 2)), atol=0.02)


def test_full_windows_scaled_by_one():
    torch.manual_seed(0)
    layer = PConv2d(5, 4, 3, ratio="entries")
    x = random_image(1, 5, 9, 9)
    expected = F.conv2d(x, layer.weight, layer.bias)
    torch.testing.assert_close(layer(x, torch.ones_like(x))[0], expected)


def test_a_network_that_a_dark_picture_kills_lives_at_the_second_start():
    learner = begun(0.02 + 0.15 * random_image(1, 32, 32), lr=1e-4)
    assert not train(learner, 100).alive()
    learner.begin_again()
    assert train(learner, 100).alive()
    assert learner.recent_loss() < 0.004


def test_a_flat_images_flat_prediction_is_alive_and_a_saturated_one_dead():
    noise = 0.1 * torch.randn(1, 32, 32, generator=seeded())
    ramp = torch.linspace(0, 1, 32).expand(1, 32, 32)
    for clean, value, alive in ((0.3, 0.3, True), (0.0, 0.0, True), (ramp, 0, False)):
        learner = begun(clean + noise)
        learner.network = Spy(lambda x, mask, value=value: x * 0 + value)
        assert train(learner, 100).alive() is alive
