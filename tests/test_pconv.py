"""The partial convolution against its definition and TensorFlow's outputs."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tensors import (
    DOUBLE,
    block_mask,
    random_image,
)
from torch import nn
from torch.nn import functional as F

from network import convolution
from network.pconv import PConv2d

FIXTURE = Path(__file__).parent / "fixtures" / "tf_pconv2d.npz"


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


def test_full_windows_scaled_by_one():
    torch.manual_seed(0)
    layer = PConv2d(5, 4, 3, ratio="entries")
    x = random_image(1, 5, 9, 9)
    expected = F.conv2d(x, layer.weight, layer.bias)
    torch.testing.assert_close(layer(x, torch.ones_like(x))[0], expected)


def test_with_avx2_alone_gradients_are_the_same(monkeypatch):
    x = random_image(2, 9, 70, 61).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.linspace(-1, 1, 270).view(5, 9, 3, 2), torch.arange(5.0)
    given = [t.requires_grad_() for t in (x, weight, bias)]
    output = F.conv2d(*given)
    grad = random_image(*output.shape, seed=1)
    expected = torch.autograd.grad(output, given, grad)
    calls, own = [], convolution.weight_gradient
    monkeypatch.setattr(
        convolution, "weight_gradient", lambda *a: calls.append(a) or own(*a)
    )
    for capability, count in (("AVX512", 0), ("AVX2", 1)):
        monkeypatch.setattr(
            torch.backends.cpu, "get_cpu_capability", lambda c=capability: c
        )
        made = convolution.gradients(x.detach(), weight.detach(), grad, [True] * 3)
        assert len(calls) == count
        for ours, its in zip(made, expected, strict=True):
            torch.testing.assert_close(ours, its, rtol=1e-4, atol=1e-3)
