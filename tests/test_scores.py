"""PSNR and SSIM, also of an image that its PSF has moved."""

import numpy as np
import pytest
import scipy.ndimage
import skimage.data

import pictures
from network.psf import find_shift

RNG = np.random.default_rng(0)


def test_scores_are_those_of_the_clipped_image():
    clean = RNG.random((1, 40, 40)).astype(np.float32)
    assert pictures.score(clean, clean) == (np.inf, pytest.approx(1))
    error = 0.05 * np.sign(0.5 - clean)  # stays in [0, 1]
    assert pictures.score(clean + error, clean)[0] == pytest.approx(26.0206, abs=1e-3)
    far = np.where(clean > 0.5, 7, -7)
    near = np.where(clean > 0.5, 1, 0)
    assert pictures.score(far, clean) == pictures.score(near, clean)
    high = [1e6 + np.float64(x) for x in (clean + error, clean)]  # heights, say
    assert pictures.score(*high) == pytest.approx(
        pictures.score(clean + error, clean), 1e-2
    )


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("shift", [(0, 0), (2.5, -0.7), (-6.2, 3.3)])
def test_a_moved_image_is_scored_at_its_shift(channels, shift):
    smooth = scipy.ndimage.gaussian_filter(skimage.data.camera() / 255, 1.0)
    noise = np.random.default_rng(0).normal(0, 0.02, (channels, 160, 160))
    moved = scipy.ndimage.fourier_shift(np.fft.fft2(smooth), shift)
    moved = np.fft.ifft2(moved).real[150:310, 150:310] + noise
    clean = np.broadcast_to(smooth[150:310, 150:310], moved.shape)
    found = find_shift(moved, clean)
    np.testing.assert_allclose(found, shift, atol=0.06)
    expected = pictures.score(clean + noise, clean)[0]
    psnr = pictures.score_moved(moved, clean, found)
    assert psnr == pytest.approx(expected, abs=0.2)
    assert not any(shift) or pictures.score(moved, clean)[0] < expected - 5
    assert find_shift(moved, np.zeros_like(clean)) is None
    assert find_shift(np.zeros_like(clean), clean) is None
