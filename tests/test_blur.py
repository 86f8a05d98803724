"""The blur is SciPy's convolution, and the Gaussian PSF has the sigma that it is given."""

import numpy as np
import pytest
import scipy.ndimage
import torch

import deblur

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("shape", [(3, 3), (4, 6), (5, 2), (1, 7), (32, 33)])
@pytest.mark.parametrize("channels", [1, 3])
def test_blur_is_scipys_circular_convolution(shape, channels):
    psf = RNG.random(shape)[::-1]  # turned, as PSFs often are
    psf /= psf.sum()
    image = RNG.random((channels, 32, 45)).astype(np.float32)
    blurred = deblur.CircularBlur(psf)(torch.from_numpy(image)[None])[0].numpy()
    for ours, channel in zip(blurred, image.astype(float)):
        reference = scipy.ndimage.convolve(channel, psf, mode="wrap")
        np.testing.assert_allclose(ours, reference, atol=2e-6)


def test_flips_commute_with_a_symmetric_psf_alone():
    image = torch.rand(1, 1, 32, 32)
    for psf, commutes in ((deblur.gaussian_psf(5, 1.0), True), (np.eye(3, 2), False)):
        blur = deblur.CircularBlur(psf)
        same = torch.allclose(blur(image.flip(-1)), blur(image).flip(-1), atol=1e-5)
        assert same is commutes


def test_gaussian_psf():
    psf = deblur.gaussian_psf(15, 1.5)
    assert psf.sum() == pytest.approx(1)
    rows = (np.arange(15) - 7)[:, None]
    assert (psf * rows**2).sum() == pytest.approx(1.5**2, rel=0.01)
    assert (psf == psf[::-1, ::-1]).all()
