"""What image files hold besides pixels comes back; other programs' TIFFs are read as they are."""

import io
import logging
import struct
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image, ImageCms
from scripts import run

import pictures
import utils

RNG = np.random.default_rng(0)
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def random(*shape, dtype="uint16", peak=None):
    """Random pixels of a type's whole range."""
    if np.dtype(dtype).kind == "f":
        return RNG.random(shape).astype(dtype)
    info = np.iinfo(dtype)
    return RNG.integers(info.min, (peak or info.max) + 1, shape).astype(dtype)


def round_trip(pixels, **told):
    """Write a TIFF, read it and write it again; return the picture and the new file."""
    tifffile.imwrite("a.tif", pixels, **told)
    picture = pictures.read_picture("a.tif")
    picture.save("out.tif", picture.image)
    return picture, tifffile.TiffFile("out.tif")


def joined(name="a.tif"):
    """Write each plane of a stack as it was read, and join them; return the new file."""
    files = []
    for plane in utils.planes(Path(name)):
        picture = pictures.read_picture(plane)
        files.append(f"{plane.name}.tif")
        picture.save(files[-1], picture.image)
    pictures.join_planes("joined.tif", name, files)
    return tifffile.TiffFile("joined.tif")


@pytest.mark.parametrize("dtype", ["uint16", "float64"])
def test_planar_rgb(dtype):
    given = random(3, 37, 41, dtype=dtype)
    picture, made = round_trip(given, photometric="rgb", planarconfig="separate")
    peak = np.iinfo(dtype).max if "u" in dtype else 1
    np.testing.assert_allclose(picture.image, given / peak, rtol=1e-6)
    np.testing.assert_allclose(made.asarray(), np.moveaxis(given, 0, 2), rtol=1e-6)


@pytest.mark.parametrize("shaped", [False, True])
def test_three_pages_written_as_one_series(shaped):
    more = {} if shaped else {"metadata": None}
    given = random(3, 64, 64, dtype="uint8")
    tifffile.imwrite("a.tif", given, photometric="minisblack", **more)
    with joined() as made:
        assert [series.shape for series in made.series] == [(3, 64, 64)]
        assert made.is_shaped == shaped
        np.testing.assert_array_equal(made.asarray(), given)


def test_imagej_hyperstack():
    given = random(2, 3, 2, 33, 40)
    metadata = {"axes": "TZCYX", "unit": "um", "spacing": 0.3, "finterval": 0.1}
    tifffile.imwrite(
        "a.tif", given, imagej=True, resolution=(5.0, 4.0), metadata=metadata
    )
    with joined() as made:
        assert made.is_imagej
        (series,) = made.series
        assert (series.axes, series.shape) == ("TZCYX", given.shape)
        assert made.pages[0].resolution == (5, 4)
        for key in ("unit", "spacing", "finterval"):
            assert made.imagej_metadata[key] == metadata[key]
        np.testing.assert_array_equal(made.asarray(), given)


def test_several_series_come_back():
    stack, scan = random(2, 40, 48, dtype="uint8"), random(50, 60, 3)
    with tifffile.TiffWriter("a.tif") as file:
        file.write(stack, photometric="minisblack")
        file.write(scan, photometric="rgb")
    with joined() as made:
        for series, given in zip(made.series, (stack, scan), strict=True):
            np.testing.assert_array_equal(series.asarray(), given)


def test_a_single_ifd_holds_all_planes_of_an_imagej_stack():
    given = random(4, 33, 40)
    tifffile.imwrite("whole.tif", given, imagej=True)
    data = bytearray(Path("whole.tif").read_bytes())
    with tifffile.TiffFile("whole.tif") as whole:
        assert len(whole.pages) == 4
        first = whole.pages[0]
        end = first.offset + 2 + 12 * len(first.tags)
    data[end : end + 4] = bytes(4)  # no next IFD, as of files over 4 GB
    Path("a.tif").write_bytes(data)
    assert len(utils.planes(Path("a.tif"))) == 4
    for number in range(4):
        image = pictures.read_picture(f"a.tif/{number + 1}").image[0]
        np.testing.assert_allclose(image * 65535, given[number], rtol=1e-6)


def test_ome_tiff():
    given = random(2, 3, 33, 40)
    sizes = {"PhysicalSizeX": 0.1, "PhysicalSizeXUnit": "µm", "PhysicalSizeZ": 0.5}
    metadata = sizes | {"axes": "ZCYX", "Channel": {"Name": ["DAPI", "GFP", "RFP"]}}
    tifffile.imwrite("a.ome.tif", given, ome=True, metadata=metadata)
    with joined("a.ome.tif") as made:
        assert made.is_ome and made.series[0].axes == "ZCYX"
        assert made.series[0].shape == given.shape
        pixels = tifffile.xml2dict(made.ome_metadata)["OME"]["Image"]["Pixels"]
        assert {k: pixels[k] for k in sizes} == sizes
        assert [c["Name"] for c in pixels["Channel"]] == ["DAPI", "GFP", "RFP"]


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_white_is_zero(dtype):
    given = random(37, 41, dtype=dtype)
    picture, made = round_trip(given, photometric="miniswhite")
    np.testing.assert_allclose(made.asarray(), given, rtol=1e-6)
    assert made.pages[0].photometric.name == "MINISWHITE"
    picture.save("shown.png", picture.image)
    shown = cv2.imread("shown.png", cv2.IMREAD_UNCHANGED)
    peak = np.iinfo(shown.dtype).max
    assert np.abs(shown / peak - (1 - picture.image[0])).max() < 1 / peak


@pytest.mark.parametrize(
    ("dtype", "kind", "colours"),
    [
        ("uint8", "assocalpha", 3),
        ("uint16", "unassalpha", 3),
        ("uint16", "assocalpha", 1),
        ("float32", "unassalpha", 1),
    ],
)
def test_alpha(dtype, kind, colours):
    peak = 1 if dtype == "float32" else np.iinfo(dtype).max
    straight, alpha = RNG.random((37, 41, colours)), RNG.random((37, 41, 1))
    stored = straight * alpha if kind == "assocalpha" else straight
    given = np.concatenate([stored, alpha], 2) * peak
    given = (given if peak == 1 else np.rint(given)).astype(dtype)
    name = "rgb" if colours == 3 else "minisblack"
    told = {"photometric": name, "planarconfig": "contig", "extrasamples": [kind]}
    picture, made = round_trip(given, **told)
    assert picture.image.shape[0] == colours
    np.testing.assert_allclose(made.asarray(), given, rtol=1e-6)
    assert made.pages[0].extrasamples[0].name == kind.upper()
    picture.save("shown.png", picture.image)
    shown = cv2.imread("shown.png", cv2.IMREAD_UNCHANGED)
    shown = shown / np.iinfo(shown.dtype).max
    opaque = alpha[..., 0] > 0.5
    error = np.abs(shown[..., 2::-1] - straight)[opaque]
    assert error.max() < (0.01 if dtype == "uint8" else 1e-4)


@pytest.mark.parametrize("compression", ["zstd", "lzw"])
def test_compressed_tiles_of_16x16(compression):
    given = random(37, 41, 3)
    told = {"photometric": "rgb", "tile": (16, 16), "compression": compression}
    _, made = round_trip(given, **told)
    np.testing.assert_array_equal(made.asarray(), given)


@pytest.mark.parametrize("bits", [2, 4, 12])
def test_numbers_of_few_bits_fill_their_own_range(bits):
    given = random(37, 41, dtype="uint8" if bits < 8 else "uint16", peak=2**bits - 1)
    picture, made = round_trip(given, bitspersample=bits)
    assert picture.image.max() > 0.99
    np.testing.assert_array_equal(made.asarray(), given)
    assert made.pages[0].bitspersample == bits


@pytest.mark.parametrize(
    "dtype", ["int8", "int16", "int32", "uint32", "float16", "float64"]
)
def test_types_that_are_rare(dtype):
    given = random(37, 41, dtype=dtype)
    _, made = round_trip(given)
    assert made.asarray().dtype == dtype
    np.testing.assert_array_equal(made.asarray(), given)


def test_what_cannot_be_read_is_named():
    for dtype in ("int64", "complex64", "bool"):
        tifffile.imwrite("a.tif", np.ones((40, 40), dtype))
        with pytest.raises(utils.InputError, match=dtype):
            pictures.read_picture("a.tif")
    data = random(40, 40, dtype="uint8")
    tifffile.imwrite("a.tif", data, compression="zlib")
    with tifffile.TiffFile("a.tif", mode="r+") as file:
        file.pages[0].tags["Compression"].overwrite(34676)  # SGI's LogLuv
    with pytest.raises(utils.InputError, match="SGILOG|34676"):
        pictures.read_picture("a.tif")


@pytest.mark.parametrize("kind", ["thumbnail", "pyramid"])
def test_reduced_pages_are_passed_over(kind):
    given = random(64, 70, dtype="uint8")
    with tifffile.TiffWriter("a.tif") as file:
        if kind == "thumbnail":
            file.write(given[::2, ::2], subfiletype=1)
        file.write(given, subifds=1 if kind == "pyramid" else None)
        if kind == "pyramid":
            file.write(given[::2, ::2], subfiletype=1)
    assert utils.planes(Path("a.tif")) == [Path("a.tif")]
    image = pictures.read_picture("a.tif").image[0]
    np.testing.assert_allclose(image * 255, given, rtol=1e-6)


def test_profile_resolution_and_orientation_of_a_tiff():
    told = {"iccprofile": PROFILE, "resolution": (300, 150), "photometric": "rgb"}
    told |= {"resolutionunit": "CENTIMETER", "description": "a scan", "metadata": None}
    told["extratags"] = [(274, "H", 1, 6, True)]
    picture, made = round_trip(random(37, 41, 3, dtype="uint8"), **told)
    page = made.pages[0]
    assert page.iccprofile == PROFILE and page.description == "a scan"
    assert page.resolution == (300, 150) and page.resolutionunit == 3
    assert page.tags[274].value == 6
    picture.save("shown.png", picture.image)
    assert Image.open("shown.png").info["icc_profile"] == PROFILE


def test_a_palette_is_colours_but_imagejs_is_a_view():
    numbers = random(37, 41, dtype="uint8")
    palette = random(3, 256)
    tifffile.imwrite("a.tif", numbers, photometric="palette", colormap=palette)
    image = pictures.read_picture("a.tif").image
    np.testing.assert_array_equal(np.rint(image * 255), palette[:, numbers] >> 8)
    _, made = round_trip(numbers, imagej=True, colormap=palette)
    np.testing.assert_array_equal(made.asarray(), numbers)
    np.testing.assert_array_equal(made.pages[0].colormap, palette)


def test_a_tiny_file_that_claims_any_size_is_refused():
    tifffile.imwrite("a.tif", random(40, 40, dtype="uint8"))
    with tifffile.TiffFile("a.tif", mode="r+") as file:
        for tag, value in (("ImageWidth", 60000), ("ImageLength", 60000)):
            file.pages[0].tags[tag].overwrite(value)
    for crop in (0, 32):
        with pytest.raises(utils.InputError, match="60000x60000 pixels, over 268"):
            pictures.read_picture("a.tif", crop)
    tifffile.imwrite("b.tif", random(2, 40, 40), imagej=True)
    data = Path("b.tif").read_bytes().replace(b"images=2", b"images=9")
    Path("b.tif").write_bytes(data)
    with pytest.raises((utils.InputError, OSError)):
        pictures.read_picture("b.tif/9")


def test_a_stack_is_restored_plane_by_plane_and_joined():
    tifffile.imwrite("a.tif", random(2, 32, 32), imagej=True)
    assert run("denoise", "--path a.tif --iteration 1 --num_prediction 1") == 0
    stack, *own = sorted(
        Path("images").rglob("restored.tif"), key=lambda f: len(str(f))
    )
    assert [f.parents[2].name for f in sorted(own)] == ["1", "2"]
    for pixels, plane in zip(tifffile.imread(stack), sorted(own), strict=True):
        np.testing.assert_array_equal(pixels, tifffile.imread(plane))


def jpeg_of(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "jpeg", quality=100, subsampling=0)
    return buffer.getvalue()


def test_a_jpeg_keeps_its_chroma():
    Path("a.jpg").write_bytes(jpeg_of(random(40, 48, 3, dtype="uint8")))
    picture = pictures.read_picture("a.jpg")
    picture.save("out.jpg", picture.image)
    again = pictures.read_picture("out.jpg")
    assert np.abs(again.image - picture.image).max() < 6 / 255


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_a_gray_pngs_transparent_number_is_alpha(dtype):
    gray = random(40, 48, dtype=dtype, peak=9)
    Image.fromarray(gray).save("a.png", transparency=4)
    picture = pictures.read_picture("a.png")
    assert picture.image.shape == (1, 40, 48)
    expected = np.where(gray == 4, 0, np.iinfo(dtype).max)
    np.testing.assert_array_equal(picture.alpha, expected)


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_a_crop_of_a_picture_that_is_too_large_as_a_whole(name):
    whole = np.zeros((4160, 8192), np.uint8)
    whole[2064:2096, 4080:4112] = 200  # the middle
    cv2.imwrite(name, whole, [cv2.IMWRITE_TIFF_COMPRESSION, 1])
    assert (pictures.read_picture(name, 32).image > 0.75).all()
    for crop in (0, 8190):
        with pytest.raises(utils.InputError, match="8192x4160 pixels, over 33 mill"):
            pictures.read_picture(name, crop)


@pytest.mark.parametrize("side", [16000, 60000])
def test_a_tiny_jpeg_that_claims_any_size_is_not_decoded(side, monkeypatch):
    data = bytearray(jpeg_of(random(40, 48, 3, dtype="uint8")))
    at = data.index(b"\xff\xc0") + 5  # the frame's height and width
    data[at : at + 4] = struct.pack(">HH", side, side)
    Path("a.jpg").write_bytes(data)
    monkeypatch.delattr("PIL.ImageFile.ImageFile.load")
    with pytest.raises(utils.InputError, match=f"{side}x{side} pixels"):
        pictures.read_picture("a.jpg", 32)


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_three_channels_alike_are_one_and_come_back_as_three(name):
    given = np.dstack([random(40, 48, dtype="uint8")] * 3)
    cv2.imwrite(name, given)
    picture = pictures.read_picture(name)
    assert picture.image.shape == (1, 40, 48)
    picture.save(f"out-{name}", picture.image)
    made = cv2.imread(f"out-{name}", cv2.IMREAD_UNCHANGED)
    np.testing.assert_array_equal(made, given)


def test_contents_count_more_than_a_name():
    given = random(40, 48, 3)
    tifffile.imwrite("tiff.png", given, photometric="rgb")
    picture = pictures.read_picture("tiff.png")
    np.testing.assert_allclose(
        picture.image * 65535, given.transpose(2, 0, 1), rtol=1e-6
    )
    picture.save("out.png", picture.image)
    made = cv2.imread("out.png", cv2.IMREAD_UNCHANGED)
    np.testing.assert_array_equal(made[..., ::-1], given)
    Image.fromarray((given >> 8).astype(np.uint8)).save("bmp.png", "bmp")
    image = pictures.read_picture("bmp.png").image
    np.testing.assert_array_equal(np.rint(image * 255), given.transpose(2, 0, 1) >> 8)


def test_a_mask_says_what_is_missing_as_it_looks(capsys):
    hole = np.full((40, 40), 255, np.uint8)
    hole[10:14, 3:8] = 0  # 20 of 1600 pixels
    white = np.full_like(hole, 255)
    cv2.imwrite("black.png", hole)
    cv2.imwrite("clear.png", np.dstack([white, white, white, hole]))
    cv2.imwrite("feathered.png", hole - (hole == 255) * np.uint8(9))
    tifffile.imwrite("white_is_zero.tif", 255 - hole, photometric="miniswhite")
    tifffile.imwrite("float.tif", 1 - hole / np.float32(255), photometric="miniswhite")
    for name in ("black.png", "clear.png", "feathered.png", *Path().glob("*.tif")):
        _, known = pictures.read_mask(name)
        np.testing.assert_array_equal(known, hole[None] > 0)
    cv2.imwrite("a.png", random(40, 40, dtype="uint8"))
    flags = "--observed --noise_sigma 0 --mask clear.png --test_frequency 4"
    assert run("denoise", f"--path a.png {flags}") == 0
    told = capsys.readouterr().out
    assert "1.25% missing" in told and "as it is" not in told


@pytest.mark.parametrize(("dtype", "told"), [("uint16", 1), ("float32", 0)])
def test_an_integer_file_of_photon_counts_says_to_save_as_float(dtype, told, capsys):
    tifffile.imwrite("a.tif", RNG.poisson(0.5, (40, 40)).astype(dtype))
    flags = "--observed --noise_sigma 0 --missing 0.9 --test_frequency 4"
    assert run("denoise", f"--path a.tif {flags}") == 0
    assert capsys.readouterr().out.count("save it as float") == told


def test_damaged_files_are_no_noise_on_stderr():
    for library in ("tifffile", "imagecodecs"):
        assert logging.getLogger(library).level > logging.CRITICAL
