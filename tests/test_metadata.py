"""Profile, EXIF, XMP and orientation of PNG and JPEG files come back."""

import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps, PngImagePlugin

import pictures

RNG = np.random.default_rng(0)
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
GAIN_MAP = b'<x:xmpmeta xmlns:hdrgm="http://ns.adobe.com/hdr-gain-map/1.0/"/>'
PLAIN_XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


def random(*shape):
    return RNG.integers(0, 256, shape, np.uint8)


@pytest.mark.parametrize(
    ("suffix", "turned"), [*(("png", turned) for turned in range(1, 9)), ("jpg", 6)]
)
def test_orientation_is_applied_and_then_upright(suffix, turned):
    smooth = np.add.outer(2 * np.arange(40), 3 * np.arange(48)).astype(np.uint8)
    exif = Image.Exif()
    exif[274], exif[271] = turned, "a maker"
    image = Image.fromarray(smooth)
    image.save(
        f"a.{suffix}", exif=exif, **({"quality": 100} if suffix == "jpg" else {})
    )
    upright = np.array(ImageOps.exif_transpose(Image.open(f"a.{suffix}")))
    picture = pictures.read_picture(f"a.{suffix}")
    assert picture.image.shape[1:] == upright.shape
    assert np.abs(picture.image[0] * 255 - upright).max() < 4
    picture.save(f"out.{suffix}", picture.image)
    kept = Image.open(f"out.{suffix}").getexif()
    assert (kept[274], kept[271]) == (1, "a maker")


def camera_file(name, xmp):
    """Write a file as cameras do: a profile, EXIF of orientation 6, XMP, a second picture."""
    exif = Image.Exif()
    exif[274], exif[271] = 6, "a maker"
    told = {"icc_profile": PROFILE, "exif": exif, "xmp": xmp}
    image, small = Image.new("RGB", (48, 40), "red"), Image.new("RGB", (8, 8))
    if name.endswith("png"):
        xmp_chunk = PngImagePlugin.PngInfo()
        xmp_chunk.add_itxt("XML:com.adobe.xmp", told.pop("xmp").decode())
        image.save(name, pnginfo=xmp_chunk, **told)
    else:
        told |= {"save_all": True, "append_images": [small]}
        image.save(name, "MPO", **told)


@pytest.mark.parametrize("made", ["out.jpg", "out.png"])
@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
def test_profile_exif_and_xmp_come_back(name, made, capfd):
    for xmp in (PLAIN_XMP, GAIN_MAP):
        camera_file(name, xmp)
        picture = pictures.read_picture(name)
        picture.save(made, picture.image)
        with Image.open(made) as kept:
            assert kept.info["icc_profile"] == PROFILE
            assert (kept.getexif()[274], kept.getexif()[271]) == (1, "a maker")
            upright = PLAIN_XMP.replace(b"6", b"1") if xmp == PLAIN_XMP else None
            assert kept.info.get("xmp") == upright and kept.size == (40, 48)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
def test_a_profile_of_any_size_comes_back_where_it_fits_the_pixels(name, capfd):
    random_bytes = random(2**21).tobytes()
    large = struct.pack(">I", len(PROFILE) + 2**21) + PROFILE[4:] + random_bytes
    for shape, profile in (((40, 48, 3), large), ((40, 48), None)):
        pixels = random(*shape)
        Image.fromarray(pixels).save(name, icc_profile=large)
        picture = pictures.read_picture(name)
        picture.save(f"out{picture.suffix}", picture.image)
        assert Image.open(f"out{picture.suffix}").info.get("icc_profile") == profile
    assert capfd.readouterr().err == ""  # libpng dislikes colours' profiles on gray


def test_exif_that_a_jpeg_has_in_two_segments_is_left_out():
    Image.fromarray(random(40, 48, 3)).save("a.jpg")
    data = Path("a.jpg").read_bytes()
    segment = b"\xff\xe1" + struct.pack(">H", 60008) + b"Exif\0\0" + bytes(60000)
    Path("a.jpg").write_bytes(data[:2] + 2 * segment + data[2:])
    picture = pictures.read_picture("a.jpg")
    picture.save("out.jpg", picture.image)
    assert "exif" not in Image.open("out.jpg").info


def test_metadata_behind_a_pngs_pixels_is_found():
    camera_file("a.png", PLAIN_XMP)
    data = Path("a.png").read_bytes()
    at = data.index(b"eXIf") - 4
    end = at + 12 + int.from_bytes(data[at : at + 4])
    Path("a.png").write_bytes(data[:at] + data[end:-12] + data[at:end] + data[-12:])
    assert pictures.read_picture("a.png").image.shape == (3, 48, 40)
