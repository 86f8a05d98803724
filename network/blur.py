"""The forward operators A of y = A(x) + n, and what such an operator must be.

An operator is a function from and to images (N, C, H, W). It is linear, treats every channel
by itself and every place alike, takes the image as periodic, and keeps its size. Its
attribute `reach` is the distance in pixels at which other entries still affect an entry; the
identity has 0 or no `reach`. A step on CUDA is captured once and replayed, so after its first
call an operator must not copy anything from the host.
"""

import numpy as np

ROUNDING = 1e-5  # relative and absolute: an operator that changes less is the identity


def identity(x):
    """The forward operator of denoising."""
    return x


class CircularBlur:
    """The forward operator of deblurring: circular convolution with a PSF.

    It is a true convolution (the PSF is flipped), as scipy.ndimage.convolve computes it
    with mode="wrap".

    Args:
        psf: k, (h, w), not larger than the images.

    `margin` is the PSF's reach on each side, (above, below), (left, right). Without these
    pixels the result is that of scipy.signal.convolve2d with mode="valid".
    """

    def __init__(self, psf):
        self.psf = np.array(psf, order="C")  # PyTorch takes no negative strides
        self.copies = {}  # (device, type) -> the PSF, kept for captured steps
        self.reach = max(psf.shape) // 2
        self.margin = [((s - 1) // 2, s // 2) for s in psf.shape]

    def __call__(self, x):
        """Blur images (N, C, H, W)."""
        from torch import fft

        size, (height, width) = x.shape[-2:], self.psf.shape
        if height > size[0] or width > size[1]:
            raise ValueError(
                f"the PSF of {width}x{height} pixels is larger than the image of "
                f"{size[1]}x{size[0]}"
            )
        if (x.device, x.dtype) not in self.copies:
            self.copies[x.device, x.dtype] = x.new_tensor(self.psf)
        padded = x.new_zeros(size)
        padded[:height, :width] = self.copies[x.device, x.dtype]
        transfer = fft.rfft2(padded.roll((-(height // 2), -(width // 2)), (0, 1)))
        return fft.irfft2(fft.rfft2(x) * transfer, s=size)


def gaussian_psf(size, sigma):
    """Return a Gaussian PSF (size, size) of standard deviation sigma, both in pixels."""
    exponent = ((np.arange(size) - (size - 1) / 2) / sigma) ** 2 / 2
    profile = np.exp(exponent.min() - exponent)  # a tiny sigma must not give all zeros
    return np.outer(profile, profile) / profile.sum() ** 2


def check_operator(forward_operator, y):
    """Apply a forward operator to an observation (1, C, H, W), and check the result.

    Raises:
        ValueError: the result is no tensor of y's shape, or it differs from y though the
            operator has no `reach`.
    """
    import torch

    with torch.no_grad():
        made = forward_operator(y)
    if not torch.is_tensor(made) or made.shape != y.shape:
        kind, shape = type(made).__name__, tuple(getattr(made, "shape", ()))
        raise ValueError(
            f"the forward operator gives a {kind} {shape} for a picture {tuple(y.shape)};"
            " it must give a tensor of that shape"
        )
    if getattr(forward_operator, "reach", 0) or made is y:
        return
    if not torch.allclose(made, y, ROUNDING, ROUNDING, equal_nan=True):
        raise ValueError(
            "the forward operator changes a picture and has no `reach`; set it to the "
            "distance in pixels at which entries still mix"
        )
