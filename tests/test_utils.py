"""Pictures in and out, noise, metrics, the PSF and the blur."""

import cv2
import numpy as np
import pytest
import scipy.io
import scipy.ndimage
import skimage.data
import torch

import deblur
import pictures
import utils

RNG = np.random.default_rng(0)


def pixels(dtype, channels, height=37, width=41):
    """Random pixels as OpenCV has them, using the whole range of the type."""
    shape = (height, width, channels) if channels > 1 else (height, width)
    if np.dtype(dtype).kind == "f":
        return RNG.random(shape).astype(dtype)
    return RNG.integers(0, np.iinfo(dtype).max + 1, shape).astype(dtype)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize(
    ("suffix", "dtype"),
    [(".png", "uint8"), (".png", "uint16"), (".tif", "uint8"), (".TIFF", "uint16")]
    + [(".tif", "float32"), (".tif", "float64")],
)
def test_lossless_round_trip(tmp_path, suffix, dtype, channels):
    given = pixels(dtype, channels)
    path = tmp_path / f"a{suffix}"
    cv2.imwrite(str(path), given)
    picture = pictures.read_picture(path)
    assert picture.image.shape == (3 if channels > 1 else 1, 37, 41)
    assert (picture.alpha is not None) == (channels == 4)
    assert 0.9 < picture.image.max() <= 1
    out = tmp_path / f"out{picture.suffix}"
    picture.save(out, picture.image)
    back = cv2.imread(str(out), cv2.IMREAD_UNCHANGED)
    assert back.dtype == given.dtype
    np.testing.assert_allclose(back, given, rtol=1e-6)


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_round_trip(tmp_path, channels):
    smooth = cv2.GaussianBlur(pixels("uint8", channels), (0, 0), 3)
    cv2.imwrite(str(tmp_path / "a.jpg"), smooth)
    picture = pictures.read_picture(tmp_path / "a.jpg")
    picture.save(tmp_path / "out.jpg", picture.image)
    back = cv2.imread(str(tmp_path / "out.jpg"), cv2.IMREAD_UNCHANGED)
    assert back.shape == smooth.shape
    assert abs(back.astype(int) - smooth).mean() < 2


def test_gray_with_alpha_is_one_channel(tmp_path):
    gray, alpha = pixels("uint8", 1), pixels("uint8", 1)
    cv2.imwrite(str(tmp_path / "a.png"), np.dstack([gray, gray, gray, alpha]))
    picture = pictures.read_picture(tmp_path / "a.png")
    assert picture.image.shape == (1, 37, 41)
    picture.save(tmp_path / "out.png", picture.image)
    back = cv2.imread(str(tmp_path / "out.png"), cv2.IMREAD_UNCHANGED)
    assert (back == np.dstack([gray, gray, gray, alpha])).all()


def test_colours_are_red_green_blue(tmp_path):
    blue = np.zeros((32, 32, 3), np.uint8)
    blue[..., 0] = 255  # OpenCV's first channel
    cv2.imwrite(str(tmp_path / "a.png"), blue)
    image = pictures.read_picture(tmp_path / "a.png").image
    assert image[2].min() == 1
    assert image[:2].max() == 0


def test_quantising_rounds_and_clips():
    values = np.array([-0.3, 0.4 / 255, 0.6 / 255, 254.6 / 255, 1.7])
    kinds = [np.dtype(kind) for kind in (np.uint8, np.int16, np.float32)]
    assert pictures.quantise(values, kinds[0], 255).tolist() == [0, 0, 1, 255, 255]
    assert pictures.quantise([-2, 0.5], kinds[1], 2**15 - 1).tolist() == [
        -(2**15),
        16384,
    ]
    assert pictures.quantise(values, kinds[2], 1) == pytest.approx(values)


def test_centre_crop(tmp_path):
    given = pixels("uint8", 1, 50, 60)
    cv2.imwrite(str(tmp_path / "a.png"), given)
    image = pictures.read_picture(tmp_path / "a.png", crop=40).image[0]
    np.testing.assert_allclose(image * 255, given[5:45, 10:50], atol=1e-4)


def test_a_cameras_jpeg_is_turned_upright(tmp_path):
    exif = bytes.fromhex(
        "45786966000049492a0008000000010012010300010000000600000000000000"
    )
    data = cv2.imencode(".jpg", pixels("uint8", 1, 40, 64))[1].tobytes()
    marker = b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif
    (tmp_path / "a.jpg").write_bytes(data[:2] + marker + data[2:])
    assert pictures.read_picture(tmp_path / "a.jpg").image.shape == (1, 64, 40)


def test_noise_is_white_and_of_the_named_sigma():
    noise = utils.gaussian_noise((3, 200, 200), 25, 1)
    assert noise.std() * 255 == pytest.approx(25, rel=0.01)
    assert abs(np.mean(noise[0] * noise[1])) < 4 * (25 / 255) ** 2 / 200
    assert (noise == utils.gaussian_noise((3, 200, 200), 25, 1)).all()
    assert not (noise == utils.gaussian_noise((3, 200, 200), 25, 2)).any()


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
    found = pictures.score_moved(moved, clean)
    np.testing.assert_allclose((found.down, found.right), np.negative(shift), atol=0.06)
    expected = pictures.score(clean + noise, clean)[0]
    assert found.psnr == pytest.approx(expected, abs=0.2)
    assert not any(shift) or pictures.score(moved, clean)[0] < expected - 5
    assert pictures.score_moved(moved, np.zeros_like(clean)) is None
    assert pictures.score_moved(np.zeros_like(clean), clean) is None


def test_rounding_to_whole_numbers_is_measured(tmp_path):
    counts = RNG.poisson(0.58, (1, 40, 40))
    for name, dtype, least in (("a.tif", "uint16", 0.2), ("b.tif", "float32", 0)):
        cv2.imwrite(str(tmp_path / name), counts[0].astype(dtype))
        picture = pictures.read_picture(tmp_path / name)
        restored = np.full_like(picture.image, 0.4 / picture.peak)
        rounding = picture.rounding(restored)
        assert rounding == pytest.approx(1 if least else 0, abs=1e-6)
        assert picture.rounding(restored * 1000) < 1e-3


def test_mat_files_repeat(tmp_path, monkeypatch):
    utils.save_mat(tmp_path / "a.mat", "noise", np.eye(3))
    monkeypatch.setattr("time.asctime", lambda: "another day")
    utils.save_mat(tmp_path / "b.mat", "noise", np.eye(3))
    assert (tmp_path / "a.mat").read_bytes() == (tmp_path / "b.mat").read_bytes()
    assert (scipy.io.loadmat(tmp_path / "a.mat")["noise"] == np.eye(3)).all()


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


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("suffix", ["mat", "npy", "png", "tif"])
def test_psf_files(tmp_path, suffix, dtype):
    psf = RNG.integers(1, np.iinfo(dtype).max, (5, 8)).astype(dtype)
    path = tmp_path / f"psf.{suffix}"
    if suffix == "mat":
        scipy.io.savemat(path, {"kernel": psf, "other": np.eye(2)})
    elif suffix == "npy":
        np.save(path, psf)
    else:
        cv2.imwrite(str(path), psf)
    np.testing.assert_allclose(pictures.read_psf(path), psf / psf.sum(), rtol=1e-9)


def test_gaussian_psf():
    psf = deblur.gaussian_psf(15, 1.5)
    assert psf.sum() == pytest.approx(1)
    rows = (np.arange(15) - 7)[:, None]
    assert (psf * rows**2).sum() == pytest.approx(1.5**2, rel=0.01)
    assert (psf == psf[::-1, ::-1]).all()


def test_write_atomically_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    utils.write_atomically(path, b"old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        utils.write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [f.name for f in tmp_path.iterdir()] == ["a.txt"]
