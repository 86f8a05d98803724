"""Pictures and PSF files in and out."""

import cv2
import numpy as np
import pytest
import scipy.io

import pictures

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
