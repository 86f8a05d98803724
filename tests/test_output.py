"""Where --output puts the restored picture, in which format, and what it never replaces."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image, ImageCms
from scripts import files, run, write


def read(path):
    """Read an image (H, W, samples): red, green, blue."""
    if Path(path).suffix.startswith(".tif"):
        return tifffile.imread(path)
    pixels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    return pixels[..., [2, 1, 0, 3][: pixels.shape[2]]]


def test_the_restored_picture_is_copied_and_named_last(capsys):
    write("in/a.png")
    for again in ("", "--seed 1", "--seed 1 --resume"):
        assert run("denoise", f"in/a.png --output out/clean.png {again}") == 0
        assert capsys.readouterr().out.splitlines()[-1] == "out/clean.png"
    restored = [file.read_bytes() for file in Path("images").rglob("restored.png")]
    assert len({*restored}) == 2
    assert Path("out/clean.png").read_bytes() in restored
    assert run("denoise", "in/a.png") == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert Path(last).name == "restored.png" and Path(last).exists()


@pytest.mark.parametrize(
    ("given", "output", "tolerance"),
    [
        ("a.png", "b.tif", 0),
        ("a.png", "b.JPEG", 5),
        ("a.jpg", "b.jpeg", 0),
        ("a.jpg", "b.png", 0),
        ("deep.tif", "b.PNG", 0),
        ("deep.tif", "b.tiff", 0),
        ("alpha.png", "b.tif", 0),
    ],
)
def test_the_suffix_decides_the_format(given, output, tolerance):
    channels = 4 if given == "alpha.png" else 3
    write(given, channels, dtype=np.uint16 if "deep" in given else np.uint8)
    assert run("denoise", f"{given} --observed --output {output}") == 0
    (restored,) = Path("images").rglob("restored.*")
    made, expected = read(output), read(restored)
    assert made.dtype == expected.dtype and made.shape == expected.shape
    assert abs(made.astype(int) - expected).max() <= tolerance
    kinds = {".tif": b"II*", ".tiff": b"II*", ".png": b"\x89PNG"}
    kind = kinds.get(Path(output).suffix.lower(), b"\xff\xd8")
    assert Path(output).read_bytes().startswith(kind)


def test_a_colour_profile_goes_with_the_picture():
    write("a.png", channels=3)
    data = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.open("a.png").save("a.png", icc_profile=data)
    assert run("denoise", "a.png --observed --output b.tif") == 0
    with tifffile.TiffFile("b.tif") as tiff:
        assert tiff.pages[0].iccprofile == data
        assert tiff.pages[0].photometric.name == "RGB"


def test_what_a_format_cannot_hold_is_refused_before_training(capsys):
    write("deep.tif", dtype=np.uint16)
    write("alpha.png", channels=4)
    tifffile.imwrite("float.tif", np.random.default_rng(0).random((32, 32), np.float32))
    stack = np.zeros((2, 32, 32), np.uint8)
    tifffile.imwrite("stack.tif", stack, photometric="minisblack")
    before = files()
    for given, output, words in (
        ("deep.tif", "b.jpg", "uint16 pixels need .tif or .tiff or .png"),
        ("alpha.png", "b.jpg", "uint8 pixels with alpha need .tif or .tiff or .png"),
        ("float.tif", "b.png", "float32 pixels need .tif or .tiff"),
        ("stack.tif", "b.png", "a stack needs .tif or .tiff"),
        ("alpha.png", "b.webp", "uint8 pixels with alpha need .tif"),
        ("deep.tif", "b", "uint16 pixels need .tif"),
    ):
        assert run("denoise", f"{given} --observed --output {output}") == 2
        err = capsys.readouterr().err
        assert f"--output {output}: {words}" in err and err.count("\n") == 1
        assert files() == before


def test_neither_an_input_nor_anothers_file_is_replaced(capsys):
    for name in ("in/a.png", "mask.png", "clean.png", "mine.png"):
        write(name, side=40)
    cv2.imwrite("mask.png", np.eye(40, dtype=np.uint8))
    flags = "--path in/a.png --observed --mask mask.png --reference clean.png"
    before = files()
    for task, more, output, words in (
        ("denoise", "", "in/../in/a.png", "a folder or an input"),
        ("denoise", "", "mask.png", "a folder or an input"),
        ("denoise", "", "clean.png", "a folder or an input"),
        ("deblur", "--kernel clean.png", "clean.png", "a folder or an input"),
        ("denoise", "", "in", "a folder or an input"),
        ("denoise", "", "mine.png", "no run wrote it as it is"),
    ):
        assert run(task, f"{flags} {more} --output {output}") == 2
        err = capsys.readouterr().err
        assert words in err and output in err and err.count("\n") == 1
        assert files() == before


def test_a_file_that_was_changed_since_is_kept(capsys):
    write("in/a.png")
    assert run("denoise", "in/a.png --output b.png") == 0
    edited = Path("b.png").read_bytes() + b"edited"
    Path("b.png").write_bytes(edited)
    assert run("denoise", "in/a.png --output b.png") == 2
    assert "no run wrote it as it is" in capsys.readouterr().err
    assert Path("b.png").read_bytes() == edited


def test_a_folders_pictures_go_to_a_folder(capsys):
    write("in/a.png")
    write("in/b.jpg", channels=3)
    stack = np.random.default_rng(0).integers(0, 256, (2, 32, 32), np.uint8)
    tifffile.imwrite("in/c.tif", stack, photometric="minisblack")
    assert run("denoise", "in --output out") == 0
    lines = capsys.readouterr().out.splitlines()
    names = ["a.png", "b.jpg", "c.tif"]
    assert lines[-3:] == [f"out/{name}" for name in names]
    for name in names:
        made = Path("images/in", name).glob("denoise/*/restored.*")
        assert Path("out", name).read_bytes() == next(made).read_bytes()
    assert tifffile.imread("out/c.tif").shape == stack.shape
    assert run("denoise", "in --output in") == 2
    assert "a folder or an input" in capsys.readouterr().err
