"""Punet.forward on CUDA: one Triton kernel does everything between two convolutions.

A feature map x is stored as the convolution left it. The bias and the ratio are stored beside
it, and the kernel that reads the map next applies them and the activation:

    leaky_relu(x * ratio + bias, 0.1)        (x itself if there is no bias)

Maps (N, C, H, W) are channels_last with C a multiple of 4: x[n, c, h, w] lies at
((n * H + h) * W + w) * C + c. Ratios are (N, 1, H, W). Each program works on BLOCK_W pixels
of a row and BLOCK_C channels. There are no atomic additions: equal inputs give equal bits.
"""

import functools

import torch
import triton
import triton.language as tl
from torch.nn import functional as F

from network.pconv import PConv2d
from network.punet import bent_sigmoid

BLOCK_W, BLOCK_C = 64, 32
# Maps of LARGE pixels or more get zero channels up to a multiple of ALIGN. With 48, 97, 144 ...
# channels cuDNN takes up to half as long again.
LARGE, ALIGN = 2**14, 64

# One compilation serves all sizes; `// 4 * 4` says that channels are multiples of 4.
_jit = triton.jit(
    do_not_specialize=[
        *("height", "width", "up", "pool", "pixels", "weight", "numerator"),
        *("channels", "x_c", "skip_c", "out_c", "first_c", "keep_c", "keep_s"),
    ]
)


@triton.jit
def _tile(height, width, channels, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return a program's image, row, columns (BLOCK_W, 1), channels (1, BLOCK_C), tile."""
    chunks, tiles = tl.cdiv(channels, BLOCK_C), tl.cdiv(width, BLOCK_W)
    tile = tl.program_id(0) // chunks
    row = (tile // tiles).to(tl.int64)
    w = tile % tiles * BLOCK_W + tl.arange(0, BLOCK_W)[:, None]
    c = tl.program_id(0) % chunks * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    return row // height, row % height, w, c, tile


@triton.jit
def _read(x, bias, ratio, start, w, c, channels, valid):
    """Return x * ratio + bias in the columns w of the row that starts at pixel `start`."""
    z = tl.load(x + start * channels + (w * channels + c), valid & (c < channels), 0.0)
    z = z.to(tl.float32)
    if bias is not None:
        z *= tl.load(ratio + start + w, valid, 0.0)
        z += tl.load(bias + c, c < channels, 0.0)
    return z


@_jit
def _pad_forward(
    out, x, bias, ratio, skip, keep, scale, x_c, skip_c, out_c, keep_c, keep_s, height,
    width, up, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Write one tile of `out`, (N, out_c, height + 2, width + 2)."""
    x_c, skip_c, out_c = x_c // 4 * 4, skip_c // 4 * 4, out_c // 4 * 4
    n, i, j, c, _ = _tile(height + 2, width + 2, out_c, BLOCK_W, BLOCK_C)
    valid = (j < width + 2) & (c < out_c)
    h = tl.minimum(tl.maximum(i - 1, 0), height - 1)
    w = tl.minimum(tl.maximum(j - 1, 0), width - 1)
    start = (n * ((height + up) >> up) + (h >> up)) * ((width + up) >> up)
    value = _read(x, bias, ratio, start, w >> up, c, x_c, valid)
    if bias is not None:
        value = tl.where(value > 0, value, 0.1 * value)
    start = (n * height + h) * width
    place = skip + start * skip_c + (w * skip_c + c - x_c)
    value += tl.load(place, valid & (c >= x_c) & (c < x_c + skip_c), 0.0).to(tl.float32)
    place = keep + start * keep_c + (w * keep_c + c * keep_s)
    value *= tl.load(place, valid & (c * keep_s < keep_c), 0).to(tl.float32) * scale
    start = (n * (height + 2) + i) * (width + 2)
    tl.store(out + start * out_c + (j * out_c + c), value, valid)


@_jit
def _pad_backward(
    grad_x, sums, grad, x, bias, ratio, keep, scale, first_c, x_c, out_c, keep_c, keep_s,
    height, width, up, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Write one tile of a source's gradient: x_c channels of the padded map, from first_c.

    The source's pixel (h, w) has one or 2 x 2 copies in the padded map, and more in its
    border. It adds up the gradients in the rows top..bottom and the columns left..right.
    """
    x_c, out_c, first_c = x_c // 4 * 4, out_c // 4 * 4, first_c // 4 * 4
    source_h, source_w = (height + up) >> up, (width + up) >> up
    n, h, w, c, tile = _tile(source_h, source_w, x_c, BLOCK_W, BLOCK_C)
    valid = (w < source_w) & (c < x_c)
    top, bottom = (h << up) + 1, tl.minimum((h << up) + up + 1, height)
    top, bottom = top - (top == 1), bottom + (bottom == height)
    left, right = (w << up) + 1, tl.minimum((w << up) + up + 1, width)
    left, right = left - (left == 1), right + (right == width)
    first_w = tile % tl.cdiv(source_w, BLOCK_W) * BLOCK_W
    first_d, last_d = 1 - (first_w == 0), 1 + up + (first_w + BLOCK_W >= source_w)
    total = tl.zeros((BLOCK_W, BLOCK_C), tl.float32)
    for i in range(top, bottom + 1):
        start = (n * (height + 2) + i) * (width + 2)
        inner = (n * height + tl.minimum(tl.maximum(i - 1, 0), height - 1)) * width
        for d in range(first_d, last_d + 1):
            j = (w << up) + d
            read = valid & (left <= j) & (j <= right)
            place = grad + (start * out_c + first_c) + (j * out_c + c)
            value = tl.load(place, read, 0.0).to(tl.float32)
            j = tl.minimum(tl.maximum(j - 1, 0), width - 1)
            place = keep + inner * keep_c + (j * keep_c + (first_c + c) * keep_s)
            total += value * tl.load(place, read, 0).to(tl.float32)
    total *= scale
    start = (n * source_h + h) * source_w
    if bias is not None:
        z = _read(x, bias, ratio, start, w, c, x_c, valid)
        total = tl.where(z > 0, total, 0.1 * total)
        place = sums + tile * x_c + c
        tl.store(place, tl.sum(total, 0, keep_dims=True), c < x_c)
        total *= tl.load(ratio + start + w, valid, 0.0)
    tl.store(grad_x + start * x_c + (w * x_c + c), total, valid)


@triton.jit
def _window(x, bias, ratio, n, i, j, c, channels, height, width):
    """Return the four values x * ratio + bias of a 2 x 2 window; -inf outside the map."""
    top = (n * height + 2 * i) * width
    right = 2 * j + 1 < width
    low = 2 * i + 1 + 0 * j < height  # a block: the interpreter refuses a scalar in `&`
    p = _read(x, bias, ratio, top, 2 * j, c, channels, 2 * j < width)
    q = _read(x, bias, ratio, top, 2 * j + 1, c, channels, right)
    r = _read(x, bias, ratio, top + width, 2 * j, c, channels, (2 * j < width) & low)
    s = _read(x, bias, ratio, top + width, 2 * j + 1, c, channels, right & low)
    none = float("-inf")
    q, r, s = tl.where(right, q, none), tl.where(low, r, none), tl.where(right, s, none)
    return p, q, r, tl.where(low, s, none)


@_jit
def _pool_forward(
    out, x, bias, ratio, channels, height, width,
    BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Write one tile of `out`. The activation keeps the order of values, so it comes last."""
    channels = channels // 4 * 4
    out_h, out_w = tl.cdiv(height, 2), tl.cdiv(width, 2)
    n, i, j, c, _ = _tile(out_h, out_w, channels, BLOCK_W, BLOCK_C)
    p, q, r, s = _window(x, bias, ratio, n, i, j, c, channels, height, width)
    best = tl.maximum(tl.maximum(p, q), tl.maximum(r, s))
    best = tl.where(best > 0, best, 0.1 * best)
    place = out + (n * out_h + i) * out_w * channels + (j * channels + c)
    tl.store(place, best, (j < out_w) & (c < channels))


@_jit
def _pool_backward(
    grad_x, sums, grad, x, bias, ratio, channels, height, width,
    BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Pass the gradient to the first of a window's greatest values, as PyTorch does."""
    channels = channels // 4 * 4
    out_h, out_w = tl.cdiv(height, 2), tl.cdiv(width, 2)
    n, i, j, c, tile = _tile(out_h, out_w, channels, BLOCK_W, BLOCK_C)
    valid = (j < out_w) & (c < channels)
    p, q, r, s = _window(x, bias, ratio, n, i, j, c, channels, height, width)
    best = tl.maximum(tl.maximum(p, q), tl.maximum(r, s))
    chosen = tl.where(p == best, 0, tl.where(q == best, 1, tl.where(r == best, 2, 3)))
    place = grad + (n * out_h + i) * out_w * channels + (j * channels + c)
    total = tl.load(place, valid, 0.0).to(tl.float32)
    total = tl.where(best > 0, total, 0.1 * total)
    place = sums + tile * channels + c
    tl.store(place, tl.sum(total, 0, keep_dims=True), c < channels)
    for d in tl.static_range(4):
        h, w = 2 * i + d // 2 + 0 * j, 2 * j + d % 2
        inside = valid & (h < height) & (w < width)
        start = (n * height + h) * width
        value = tl.where(chosen == d, total, 0.0)
        value *= tl.load(ratio + start + w, inside, 0.0)
        tl.store(grad_x + start * channels + (w * channels + c), value, inside)


@_jit
def _mask_forward(
    ratio, updated, mask, weight, numerator, channels, height, width, pool, pixels,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Write PConv2d's ratio, and its updated mask after pool x pool max-pooling."""
    out_h, out_w = tl.cdiv(height, pool), tl.cdiv(width, pool)
    p = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    n, i, j = p // (out_h * out_w), p // out_w % out_h, p % out_w
    best = tl.zeros((BLOCK,), tl.float32)
    for d in range(pool * pool):
        h, w = i * pool + d // pool, j * pool + d % pool
        valid = (p < pixels) & (h < height) & (w < width)
        kept = tl.zeros((BLOCK,), tl.float32)
        for c in range(channels):
            for k in tl.static_range(9):
                y, x = h + k // 3 - 1, w + k % 3 - 1
                inside = valid & (y >= 0) & (y < height) & (x >= 0) & (x < width)
                place = mask + ((n * channels + c) * height + y) * width + x
                # The map's border is padded with ones.
                kept += tl.load(place, inside, 1).to(tl.float32)
        kept *= weight
        clipped = tl.minimum(kept, 1.0)
        place = ratio + (n * height + h) * width + w
        tl.store(place, numerator / (kept + 1e-8) * clipped, valid)
        best = tl.maximum(best, tl.where(valid, clipped, 0.0))
    tl.store(updated + p, best > 0, p < pixels)


def _empty(x, channels, height, width):
    """Return an empty channels_last map with the N, type and device of x."""
    shape, layout = (x.shape[0], channels, height, width), torch.channels_last
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)


def _tiles(tiled):
    """Return the number of tiles that cover a map's N * H rows."""
    return tiled.shape[0] * tiled.shape[2] * triton.cdiv(tiled.shape[3], BLOCK_W)


def _launch(kernel, tiled, *args):
    """Run a kernel, one program for every tile and channel block of the map `tiled`."""
    grid = (_tiles(tiled) * triton.cdiv(tiled.shape[1], BLOCK_C),)
    with torch.cuda.device_of(tiled):
        kernel[grid](*args, BLOCK_W=BLOCK_W, BLOCK_C=BLOCK_C)


@functools.cache
def _second_stream(device):
    """Return a stream beside the current one; None on a CPU, where kernels are interpreted."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


def _conv2d_gradient(grad, x, weight, which):
    """Return the gradient of F.conv2d with respect to x (which = 0) or the weight (1)."""
    settings = [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [which == 0, which == 1, False]
    backward = torch.ops.aten.convolution_backward(grad, x, weight, None, *settings)
    return backward[which].contiguous(memory_format=torch.channels_last)


class Layer(torch.autograd.Function):
    """A convolution and everything between it and the convolution before.

    Equals F.conv2d(F.pad(cat((up(activated x), skip), 1) * keep * scale, (1, 1, 1, 1),
    "replicate"), weight). With a skip, up() is nearest x2 upsampling cropped to the size
    of the skip; without one it is the identity.
    """

    @staticmethod
    def forward(ctx, x, bias, ratio, skip, keep, scale, weight):
        """Convolve.

        Args:
            x: (N, C, h, w).
            bias, ratio: of x, (C,) and (N, 1, h, w), or None and None: x is activated.
            skip: (N, C', H, W), or None.
            keep: 1 = kept, bool, (N, at most C + C', H, W), or (N, 1, H, W) for all
                channels. The channels that keep and weight lack are zero padding.
            scale: factor of the kept entries.
            weight: (K, at most C + C', 3, 3).
        """
        n, keep_c, height, width = keep.shape
        skip_c = 0 if skip is None else skip.shape[1]
        channels = x.shape[1] + skip_c
        if n * height * width >= LARGE and channels >= 48:
            channels = triton.cdiv(channels, ALIGN) * ALIGN
        ctx.sizes = channels, keep_c, int(keep_c > 1), height, width
        ctx.skip_c, ctx.scale, ctx.extra = skip_c, scale, channels - weight.shape[1]
        padded = _empty(x, channels, height + 2, width + 2)
        args = x, bias, ratio, x if skip is None else skip, keep, scale, x.shape[1]
        weight = weight.to(x.dtype)
        up = int(skip is not None)
        _launch(_pad_forward, padded, padded, *args, skip_c, *ctx.sizes, up)
        if ctx.extra:
            weight = F.pad(weight, (0, 0, 0, 0, 0, ctx.extra))
        ctx.save_for_backward(x, bias, ratio, keep, padded, weight)
        return F.conv2d(padded, weight).contiguous(memory_format=torch.channels_last)

    @staticmethod
    def backward(ctx, grad):
        """Return the gradients; grad is (N, K, H, W). A second stream computes the weight's."""
        x, bias, ratio, keep, padded, weight = ctx.saved_tensors
        grad_x = grad_bias = grad_skip = sums = None
        grad = grad.contiguous(memory_format=torch.channels_last)
        second = _second_stream(x.device)
        if second is not None:
            second.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(second):
            grad_weight = _conv2d_gradient(grad, padded, weight, 1)
            if ctx.extra:
                grad_weight = grad_weight[:, : -ctx.extra]
                grad_weight = grad_weight.contiguous(memory_format=torch.channels_last)
            grad_weight = grad_weight.float()
        if ctx.needs_input_grad[0]:
            grad = _conv2d_gradient(grad, padded, weight, 0)
            grad_x = torch.empty_like(x)
            if bias is not None:
                sums = x.new_empty(_tiles(x), x.shape[1], dtype=torch.float32)
            args = grad_x, sums, grad, x, bias, ratio, keep, ctx.scale, 0, x.shape[1]
            _launch(_pad_backward, x, *args, *ctx.sizes, int(ctx.skip_c > 0))
            grad_bias = None if bias is None else sums.sum(0)
        if ctx.needs_input_grad[3]:
            grad_skip = _empty(x, ctx.skip_c, *keep.shape[2:])
            args = grad_skip, None, grad, x, None, None, keep, ctx.scale, x.shape[1]
            _launch(_pad_backward, grad_skip, *args, ctx.skip_c, *ctx.sizes, 0)
        if second is not None:
            torch.cuda.current_stream(x.device).wait_stream(second)
        return grad_x, grad_bias, None, grad_skip, None, None, grad_weight


class Pool(torch.autograd.Function):
    """Activate and max-pool 2x2: (N, C, H, W) to half of H and W, rounded up."""

    @staticmethod
    def forward(ctx, x, bias, ratio):
        """Pool x (N, C, H, W) with its bias (C,) and ratio (N, 1, H, W)."""
        ctx.save_for_backward(x, bias, ratio)
        _, channels, height, width = x.shape
        out = _empty(x, channels, -(-height // 2), -(-width // 2))
        _launch(_pool_forward, out, out, x, bias, ratio, channels, height, width)
        return out

    @staticmethod
    def backward(ctx, grad):
        """Return the gradients; grad is (N, C, ceil(H / 2), ceil(W / 2))."""
        x, bias, ratio = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        grad_x = torch.empty_like(x)
        sums = x.new_empty(_tiles(grad), x.shape[1], dtype=torch.float32)
        args = grad_x, sums, grad, x, bias, ratio, *x.shape[1:]
        _launch(_pool_backward, grad, *args)
        return grad_x, sums.sum(0), None


def window_ratio(mask, layer, pool):
    """Return a PConv2d's ratio (N, 1, H, W), and its updated mask, max-pooled pool x pool.

    Args:
        mask: (N, C, H, W), bool; it is padded with ones.
        layer: a PConv2d; C divides its number of channels, and each C share a mask.
        pool: 1 or 2.
    """
    n, channels, height, width = mask.shape
    ratio = torch.empty((n, 1, height, width), device=mask.device)
    updated = mask.new_empty(n, 1, -(-height // pool), -(-width // pool))
    sizes = layer.in_channels // channels, float(layer.numerator), channels
    sizes += height, width, pool, updated.numel()
    grid = (triton.cdiv(updated.numel(), 128),)
    with torch.cuda.device_of(mask):
        _mask_forward[grid](ratio, updated, mask.contiguous(), *sizes, BLOCK=128)
    return ratio, updated


def _convolve_image(x, mask, weight):
    """Convolve the masked image, (N, K, H, W), as a matrix product: cuDNN is slow here."""
    n, _, height, width = x.shape
    mask = mask.to(x.dtype)
    x = F.pad(x, (1, 1, 1, 1), mode="replicate") * F.pad(mask, (1, 1, 1, 1), value=1.0)
    windows = F.unfold(x, 3)  # (N, C * 9, H * W)
    out = windows.transpose(1, 2) @ weight.flatten(1).T
    return out.view(n, height, width, -1).permute(0, 3, 1, 2)


def forward(network, x, mask, draw):
    """Compute what Punet.forward computes, with the same draws in the same order.

    x is float32 or bfloat16, the type of the feature maps.
    """
    n, channels, height, width = x.shape
    rate = network.drop_rate
    image = F.pad(x, (0, 0, 0, 0, 0, -channels % 4))
    skips = [image.contiguous(memory_format=torch.channels_last)]
    ones = mask.new_ones(n, 1, height, width)  # ratio of the decoder's layers
    x = _convolve_image(x, mask, network.encoder[0].weight.to(x.dtype))
    mask, bias, ratio = mask.bool(), None, None
    for i, layer in enumerate(network.encoder):
        if i > 0:
            x = Layer.apply(x, bias, ratio, None, mask, 1.0, layer.weight)
        pool = 2 if 1 <= i <= 5 else 1
        bias, (ratio, mask) = layer.bias, window_ratio(mask, layer, pool)
        if pool == 2:
            x, bias, ratio = Pool.apply(x, bias, ratio), None, None
            if i <= 4:
                skips.append(x)
    for stage in network.decoder:
        skip = skips.pop()
        size = skip.shape[2:]
        for conv in stage:
            keep, weight = mask.new_ones(n, 1, *size), conv.weight
            if rate:
                first = 0 if skip is None or network.drop_upsampled else x.shape[1]
                keep = draw((n, conv.in_channels - first, *size), rate).bool()
                if first:  # no entry of the upsampled map is dropped
                    keep = F.pad(keep, (0, 0, 0, 0, first, 0), value=True)
                    whole, rest = weight[:, :first], weight[:, first:]
                    weight = torch.cat((whole * (1 - rate), rest), 1)
                keep = keep.contiguous(memory_format=torch.channels_last)
            x = Layer.apply(x, bias, ratio, skip, keep, 1 / (1 - rate), weight)
            bias, ratio, skip = conv.bias, ones, None
    return bent_sigmoid(x + bias.view(-1, 1, 1), network.bend)


def usable(x):
    """Tell whether `forward` can run for x: on CUDA, with a Triton that works."""
    supported = x.dtype in (torch.float32, torch.bfloat16)
    return x.is_cuda and supported and _compiles(x.device)


@functools.cache
def _compiles(device):
    """Tell whether Triton compiles a kernel on a device."""
    mask = torch.ones((1, 1, 4, 4), dtype=torch.bool, device=device)
    try:
        window_ratio(mask, PConv2d(1, 1, 3), 1)
    except Exception:  # noqa: BLE001 - there may be no C compiler
        return False
    return True
