"""Pictures and PSF files in and out, and their scores."""

import io
import itertools
import logging
import math
import os
import re
import warnings
import zlib
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

# A tiny file may claim any size. OpenCV reads its limit, in pixels, when it is imported.
MAX_DECODED = 2**28
os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(MAX_DECODED))

import cv2
import numpy as np
import scipy.io
import scipy.ndimage
import skimage.data
import tifffile
from PIL import Image, PngImagePlugin
from skimage.metrics import structural_similarity
from skimage.registration import phase_cross_correlation

from utils import (
    InputError,
    atomic_file,
    first_line,
    is_utf8,
    write_atomically,
)

# Silence the libraries' warnings about damaged files; we print one line instead.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
logging.getLogger("tifffile").setLevel(logging.CRITICAL + 1)
warnings.filterwarnings("ignore", module="PIL")
Image.MAX_IMAGE_PIXELS = None  # refuse_size knows better
PngImagePlugin.MAX_TEXT_CHUNK = 2**24  # bytes; a scanner's colour profile has millions

# --- pictures in and out -------------------------------------------------------------

TIFF, JPEG = (".tif", ".tiff"), (".jpg", ".jpeg")
SUFFIXES = (".png", *JPEG, *TIFF)
SMALLEST_SIDE = 32  # pixels: five poolings
MAX_PIXELS = 2**25  # of a picture, or of its --crop
MOST_ROUNDING = 0.04  # share of the mean; above it is said
MAX_PACKED = 2**14  # pixels per byte of a file; deflate packs 8256 of one bit
RESOLUTION, ORIENTATION = 282, 274  # tags; an orientation of 1 is upright
NODATA = 42113  # GDAL's tag: the number, as text, where nothing was measured
# A TIFF's photometric: its name for the writer, and how many samples are colours.
COLOURS = {0: ("miniswhite", 1), 1: ("minisblack", 1), 2: ("rgb", 3), 3: ("palette", 1)}
ALPHAS = {0: "unspecified", 1: "assocalpha", 2: "unassalpha"}
# XMP that promises what only the input has behind its picture: a gain map, a video.
GAIN_MAP = re.compile(rb"(?i)hdrgm|gain-?map|photos/1\.0/container|MicroVideo")


LARGEST_PSF = 4096  # side, pixels; as --kernel_size
# A PSF's border is a camera's offset where its extremes differ by no more than FLAT, and
# its median is below LOW of the peak.
FLAT, LOW = 1.3, 0.2


class Picture(NamedTuple):
    """An image file's pixels, and what it takes to write their like.

    `image` has the file's numbers over `peak`, in float32, or float64 where a number has
    more digits. Three channels that are alike are one here, and three again in the file.
    """

    image: np.ndarray  # (C, H, W), C = 1 or 3 (red, green, blue), cropped
    absent: np.ndarray | None  # (C, H, W), True where by the file nothing was measured
    uncropped: str  # the file's size and kind
    alpha: np.ndarray | None  # (H, W), the file's own numbers
    dtype: np.dtype
    peak: float  # the number that stands for 1: an integer type's largest
    stored: int  # the file's channels, without alpha
    suffix: str
    encoder_arguments: dict

    def save(self, path, image):
        """Write an image (C, H, W), in this one's units, with its depth and metadata.

        The path's suffix says the format. A TIFF has the file's own numbers; other files
        go from black to white, and have 16 bits where the file has more than 8.
        """
        suffix, (black, white) = Path(path).suffix, black_and_white(self.image)
        image = np.clip(image, 0, 1) if (black, white) == (0, 1) else image
        image = np.broadcast_to(image, (self.stored, *image.shape[1:]))
        if suffix in TIFF:
            samples = [quantise(x, self.dtype, self.peak) for x in image]
            samples += [] if self.alpha is None else [self.alpha]
            pixels = np.dstack(samples) if len(samples) > 1 else samples[0]
            write_tiff(
                path, [([pixels], pixels.shape, pixels.dtype, self.encoder_arguments)]
            )
            return
        image = (image[::-1] - black) / (white - black)  # blue, green, red
        if white_is_zero(self.encoder_arguments):
            image = 1 - image
        if self.alpha is not None:
            alpha = np.divide(self.alpha, self.peak, dtype=np.float64).clip(0, 1)
            if self.encoder_arguments.get("extrasamples") == ["assocalpha"]:
                image = image / np.maximum(alpha, 1e-6)
            image = [*image, *image, *image, alpha][-4:]
        dtype = np.dtype(np.uint8 if self.dtype.itemsize == 1 else np.uint16)
        # by channel, for memory's sake
        planes = [quantise(np.clip(x, 0, 1), dtype, np.iinfo(dtype).max) for x in image]
        write_atomically(
            path, encode(suffix, np.dstack(planes), self.encoder_arguments)
        )

    def rounding(self, image):
        """Say by which share an image's mean changes when it is rounded to be written."""
        written = [quantise(x, self.dtype, self.peak).mean() for x in image]
        mean = self.peak * image.mean(dtype=np.float64)
        return abs(np.mean(written) - mean) / max(abs(mean), 1e-30)

    def part(self, place):
        """Return a part of it, by slices of (C, H, W)."""
        alpha = None if self.alpha is None else self.alpha[place[1:]]
        absent = None if self.absent is None else self.absent[place]
        image = np.ascontiguousarray(self.image[place])
        return self._replace(image=image, absent=absent, alpha=alpha)


def black_and_white(image):
    """Return what black and white are: 0, 1, or for values beyond them the extremes.

    Those of finite values.
    """
    image = image[np.isfinite(image)]
    low, high = (float(image.min()), float(image.max())) if image.size else (0.0, 1.0)
    if low >= 0 and high <= 1:
        return 0.0, 1.0
    return low, high if high > low else low + 1


def quantise(image, dtype, peak):
    """Turn values, of which 1 stands for the peak, into numbers of a type.

    Integers are rounded, and clipped to the type's range.
    """
    numbers = np.asarray(image, np.float64) * peak
    if dtype.kind in "ui":
        numbers = np.rint(np.nan_to_num(numbers)).clip(np.iinfo(dtype).min, peak)
    return numbers.astype(dtype)


def describe(channels, height, width):
    """Say an image's size and kind."""
    return f"{width}x{height} {'gray' if channels == 1 else 'colour'}"


def read_picture(path, crop=0):
    """Read an image file.

    Args:
        path: a PNG, JPEG or TIFF file, or a plane of one: gray or colour, of integers
            up to 32 bits or floats.
        crop: side of the centre crop, pixels; 0 = whole.

    Raises:
        InputError, OSError: it cannot be restored; the text says why.
    """
    path = Path(path)
    suffix = (stack_of(path) or path).suffix.lower()
    pixels, stored, bits, written = read_pixels(path, crop)
    height, width = pixels.shape[:2]
    if crop:
        top, left = max(0, height - crop) // 2, max(0, width - crop) // 2
        pixels = pixels[top : top + crop, left : left + crop].copy()
    fault = unusable(pixels, suffix in JPEG)
    if fault:
        raise InputError(f"{path}: {fault}")
    color, alpha = pixels[..., :stored], pixels[..., stored:]
    alpha = alpha[..., 0] if alpha.size else None
    alike = color == color[..., :1]
    if color.dtype.kind == "f":
        alike |= np.isnan(color) & np.isnan(color[..., :1])
    if alike.all():
        color = color[..., :1]
    dtype, peak = pixels.dtype, peak_of(pixels.dtype, bits)
    wide = dtype.itemsize > 2 and dtype != np.float32  # more digits than float32's
    image = color.transpose(2, 0, 1)
    image = np.divide(image, peak, dtype=np.float64 if wide else np.float32, order="C")
    uncropped = describe(len(image), height, width)
    absent = find_absent(color.transpose(2, 0, 1), alpha, written)
    return Picture(
        image, absent, uncropped, alpha, dtype, peak, stored, suffix, written
    )


def find_absent(numbers, alpha, written):
    """Tell where a file says that nothing was measured; None where it is everywhere.

    Args:
        numbers: the file's, (C, H, W).
        alpha: (H, W), or None.
        written: arguments of the encoder.
    """
    absent = np.zeros(numbers.shape, bool)
    if alpha is not None and written.get("extrasamples") != ["unspecified"]:
        absent |= alpha == 0
    for code, _, _, text, _ in written.get("extratags", ()):
        with suppress(ValueError):  # of a driver that writes no number
            if code == NODATA:
                absent |= numbers == numbers.dtype.type(float(text))
    return absent if absent.any() and not absent.all() else None


def read_mask(path, crop=0):
    """Read which pixels are known, as a mask shows it: black, or transparent, is missing.

    Args:
        path, crop: see read_picture.

    Returns:
        The mask's Picture; 1 where a pixel is known, else 0, (C, H, W) or (1, H, W), float32.

    Raises:
        InputError, OSError: nothing, or not exactly what, is missing; the text says why.
    """
    mask = read_picture(path, crop)
    if mask.suffix in JPEG:
        raise InputError(f"{path}: a JPEG's zeros are not exact; save it as PNG")
    seen = 1 - mask.image if white_is_zero(mask.encoder_arguments) else mask.image
    known = seen != 0
    known = known[:1] if (known == known[:1]).all() else known
    known = known if mask.alpha is None else known & (mask.alpha != 0)
    if known.all():
        raise InputError(
            f"{path}: no pixel of this mask{' within --crop' if crop else ''} is 0, nor "
            "transparent; paint black what is missing"
        )
    return mask, known.astype(np.float32)


def peak_of(dtype, bits):
    """Return the number that stands for 1: the largest of so many bits, or 1.0."""
    return {"u": 2**bits - 1, "i": 2 ** (bits - 1) - 1}.get(dtype.kind, 1)


def white_is_zero(written):
    """Tell whether a file's pixels look inverted, by the arguments of its encoder."""
    return written.get("photometric") == "miniswhite"


def unusable(pixels, jpeg):
    """Say why a file's pixels (H, W, samples) cannot be restored; None where they can."""
    (height, width, samples), dtype = pixels.shape, pixels.dtype
    if dtype.kind not in "uif" or dtype.itemsize > (8 if dtype.kind == "f" else 4):
        return f"{dtype} pixels; convert it to 8 or 16 bits"
    if jpeg and (dtype != np.uint8 or samples == 4):
        return "no JPEG, whatever its name says; rename it"
    if min(height, width) < SMALLEST_SIDE:
        return f"{width}x{height} pixels; a side needs {SMALLEST_SIDE} or more"
    return None


def read_pixels(path, crop=0):
    """Read an image file's pixels as they are.

    Args:
        path: see read_picture.
        crop: side of what will be used of them: a file may have more than MAX_PIXELS.

    Returns:
        Its pixels, (H, W, samples), in the file's own type; how many of the samples are
        colours, red, green and blue; the bits of a sample; arguments of the encoder.
    """
    if not is_utf8(path.absolute()):  # the results' folders are named by all of it
        raise InputError(f"{path}: a file name that is not UTF-8; rename it")
    suffix = (stack_of(path) or path).suffix.lower()
    try:
        return (read_tiff if suffix in TIFF else read_plain)(path, crop)
    except (InputError, FileNotFoundError, PermissionError):
        raise
    except Exception as error:  # noqa: BLE001 - a damaged file fails in many ways
        raise InputError(
            f"{path} is damaged, or not a PNG, JPEG or TIFF image: {first_line(error)}"
        ) from None


def refuse_size(path, height, width, crop=0):
    """Raise InputError for more pixels than can be restored, or decoded to crop them."""
    used = min(height, crop or height) * min(width, crop or width)
    if height * width > MAX_DECODED:
        fault = "over 268 million; cut a part out of it"
    elif used > MAX_PIXELS:
        fault = "over 33 million; --crop 4096 takes its centre"
    elif height * width > max(
        MAX_PIXELS, MAX_PACKED * (stack_of(path) or path).stat().st_size
    ):
        fault = "more than so small a file can hold; it is damaged"
    else:
        return
    raise InputError(f"{path}: {width}x{height} pixels, {fault}")


def compare(path, claimed, found):
    """Raise InputError where a decoder's shape and type are not what the file claims."""
    if claimed != found:
        raise InputError(f"{path}: pixels of another size or type than the file claims")


def read_plain(path, crop=0):
    """Read a PNG or JPEG, turned upright: see read_pixels.

    Pillow reads what the file says of its pixels, OpenCV the pixels: Pillow has no colours
    of 16 bits.
    """
    with Image.open(path) as image:
        width, height = image.size
        refuse_size(path, height, width, crop)
        coding = image.tile[0].args if image.format == "PNG" else ""  # such as RGB;16B
        if coding:
            image.load()  # metadata may stand behind the pixels
        told = image.info
    with silent_stderr():  # libpng speaks of profiles that it does not like
        data = np.fromfile(path, np.uint8)
        pixels, *found = cv2.imdecodeWithMetadata(data, cv2.IMREAD_UNCHANGED)
    if pixels is None:
        raise ValueError("its pixels cannot be decoded")
    size, dtype = pixels.shape[:2], pixels.dtype
    compare(path, (height, width), size)
    if coding:
        compare(path, np.dtype(np.uint16 if "16" in coding else np.uint8), dtype)
    pixels = pixels.reshape(*size, -1)
    if pixels.shape[2] == 1 and "transparency" in told:
        # Pillow scales the number of a single bit alone, OpenCV all pixels.
        scale = {"L;2": 85, "L;4": 17}.get(coding, 1)
        clear = pixels == scale * told["transparency"]
        alpha = np.where(clear, 0, np.iinfo(dtype).max).astype(dtype)
        pixels = np.concatenate([pixels, pixels, pixels, alpha], 2)
    written = {"iccprofile": told.get("icc_profile"), "xmp": told.get("xmp")}
    written["exif"] = told.get("exif", b"").removeprefix(b"Exif\0\0")
    for kind, content in zip(*found):
        if kind == cv2.IMAGE_METADATA_CICP:  # which Pillow passes over
            written["cicp"] = content.tobytes()
    if written["xmp"] and GAIN_MAP.search(written["xmp"]):
        del written["xmp"]
    pixels = turn_upright(pixels, written)
    order = [2, 1, 0, 3][: pixels.shape[2]] if pixels.shape[2] > 2 else [0]
    written = {key: value for key, value in written.items() if value}
    return pixels[..., order], min(len(order), 3), 8 * pixels.itemsize, written


@contextmanager
def silent_stderr():
    """Drop what a C library writes to stderr."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def turn_upright(pixels, written):
    """Turn pixels (H, W, samples) as their EXIF says, which then says upright.

    Args:
        written: has `exif`, and perhaps `xmp`, which may repeat the orientation.
    """
    turned = 1
    with suppress(Exception):  # none, or damaged
        exif = io.BytesIO(written["exif"])
        with tifffile.TiffFile(exif, mode="r+") as tags:
            turned = tags.pages[0].tags[ORIENTATION].value
            tags.pages[0].tags[ORIENTATION].overwrite(1)
        written["exif"] = exif.getvalue()
    if turned != 1 and written.get("xmp"):
        upright = rb"\g<1>1", written["xmp"]
        written["xmp"] = re.sub(rb"(tiff:Orientation(?:=[\"']|>))\d", *upright)
    pixels = pixels.swapaxes(0, 1) if turned in (5, 6, 7, 8) else pixels
    pixels = pixels[:, ::-1] if turned in (2, 3, 6, 7) else pixels
    return np.ascontiguousarray(pixels[::-1] if turned in (3, 4, 7, 8) else pixels)


def encode(suffix, pixels, written):
    """Return the bytes of a PNG or JPEG.

    Pillow writes JPEGs, which OpenCV does not with a large profile, or XMP.

    Args:
        suffix: of the format.
        pixels: (H, W, samples), as OpenCV has them.
        written: what else the file holds, as bytes: iccprofile, exif, xmp, cicp.
    """
    profile, gray = written.get("iccprofile") or b"", pixels.shape[2] == 1
    if profile[16:20] != (b"GRAY" if gray else b"RGB "):  # a CMYK JPEG's, say
        profile = b""
    exif, xmp = written.get("exif", b""), written.get("xmp", b"")
    file = io.BytesIO()
    if suffix in JPEG:
        image = Image.fromarray(pixels[..., 0] if gray else pixels[..., ::-1].copy())
        # A segment has 64 kB, of which Pillow splits the profile alone.
        exif, xmp = (x if len(x) < 2**16 - 64 else b"" for x in (exif, xmp))
        kept = {"icc_profile": profile, "exif": exif and b"Exif\0\0" + exif, "xmp": xmp}
        # No chroma is left out: known pixels of a colour JPEG come back as they are.
        image.save(file, "jpeg", quality=100, subsampling=0, **kept)
        return file.getvalue()
    made, data = cv2.imencode(suffix, pixels)
    if not made:
        raise OSError(None, f"OpenCV writes no such {suffix}")
    header, rest = np.split(data, [33])  # signature and IHDR
    file.write(header)
    for kind, content, head in (
        (b"cICP", written.get("cicp"), b""),
        (b"iCCP", profile and zlib.compress(profile), b"ICC Profile\0\0"),
        (b"eXIf", exif, b""),
        (b"iTXt", xmp, b"XML:com.adobe.xmp\0\0\0\0\0"),
    ):
        if content:
            PngImagePlugin.putchunk(file, kind, head, content)
    file.write(rest)
    return file.getvalue()


def stack_of(path):
    """Return the TIFF file that a plane's path, such as cells.tif/007, is in, else None."""
    return path.parent if path.name.isdecimal() and path.parent.is_file() else None


def full_series(tiff):
    """List a TIFF's series, without thumbnails, and how many planes each has."""
    full = [series for series in tiff.series if not series.keyframe.is_reduced]
    sizes = [math.prod(s.shape) // max(1, math.prod(s.keyframe.shape)) for s in full]
    return list(zip(full, sizes))


def planes(path):
    """List the planes of a TIFF file that has several; else the file itself."""
    count = 1
    if path.suffix.lower() in TIFF and is_utf8(path):
        with suppress(Exception), tifffile.TiffFile(path) as tiff:  # reading says why
            found = sum(n for _, n in full_series(tiff))
            count = found if found <= path.stat().st_size else 1  # each has a byte
    numbers = (f"{plane:0{len(str(count))}d}" for plane in range(1, count + 1))
    return [path / number for number in numbers] if count > 1 else [path]


def read_tiff(path, crop=0):
    """Read a TIFF file, or a plane of one: see read_pixels."""
    stack = stack_of(path)
    with tifffile.TiffFile(stack or path) as tiff:
        series, number = full_series(tiff), int(path.name) - 1 if stack else 0
        count = sum(n for _, n in series)
        if count > 1 and not stack:
            raise InputError(f"{path}: {count} planes; save the one to use by itself")
        for one, n in series:
            if number < n:
                break
            number -= n
        page, arguments = one.keyframe, tiff_arguments(path, one)
        arguments |= {} if stack else tiff_metadata(tiff, one)
        pixels = read_plane(path, tiff, one, number, crop)
        if page.axes == "SYX":
            pixels = np.moveaxis(pixels, 0, 2)
        if page.photometric == 3 and arguments["photometric"] == "rgb":
            pixels = np.moveaxis(page.colormap[:, pixels] >> 8, 0, 2).astype(np.uint8)
        pixels = pixels.reshape(*pixels.shape[:2], -1)
    colours = 3 if arguments["photometric"] == "rgb" else 1
    return (
        pixels,
        colours,
        arguments.get("bitspersample", 8 * pixels.itemsize),
        arguments,
    )


def read_plane(path, tiff, series, number, crop):
    """Read a plane of a series, whose shape and type are what the file claims."""
    page = series.keyframe
    size = [page.shape[page.axes.index(axis)] for axis in "YX"]
    refuse_size(path, *size, crop)
    if series.dataoffset is not None:  # one array, perhaps with but one plane's tags
        at, kind = series.dataoffset, page.dtype.newbyteorder(tiff.byteorder)
        file = stack_of(path) or path
        pixels = np.memmap(file, kind, "r", at + number * page.nbytes, page.shape)
        return np.array(pixels, page.dtype)
    found = series.pages[number]
    ends = np.add(found.dataoffsets, found.databytecounts)
    if found.parent is tiff and max(ends) > tiff.filehandle.size:
        raise InputError(f"{path} is damaged: it ends before its pixels do")
    pixels = found.asarray()
    compare(path, (page.shape, page.dtype), (pixels.shape, pixels.dtype))
    return pixels


def tiff_arguments(path, series):
    """Return the arguments of TiffWriter.write, to write the like of a plane of a series.

    Raises:
        InputError: pixels of a kind that cannot be restored.
    """
    page = series.keyframe
    compressed = page.photometric == 6 and page.compression in (
        6,
        7,
    )  # JPEG, read as RGB
    kind = 2 if compressed else page.photometric
    if kind not in COLOURS or page.axes not in ("YX", "YXS", "SYX"):
        name = getattr(page.photometric, "name", page.photometric)
        raise InputError(
            f"{path}: {name} pixels, {page.axes}; convert it to gray or RGB"
        )
    name, colours = COLOURS[kind]
    extra = page.samplesperpixel - colours
    alphas = [ALPHAS.get(int(x), "unspecified") for x in page.extrasamples]
    if extra > 1 or (extra and colours == 1 and alphas in ([], ["unspecified"])):
        raise InputError(f"{path}: {colours + extra} samples; gray or RGB is needed")
    arguments = {"photometric": name, "metadata": None, "iccprofile": page.iccprofile}
    arguments["extrasamples"] = (alphas or ["unspecified"]) if extra else None
    if page.bitspersample < 8 * page.dtype.itemsize:
        arguments["bitspersample"] = page.bitspersample
    if kind == 3:  # ImageJ's numbers are data, of which the colours are a view
        arguments |= (
            {"colormap": page.colormap} if page.is_imagej else {"photometric": "rgb"}
        )
    if RESOLUTION in page.tags:
        arguments |= {
            "resolution": page.resolution,
            "resolutionunit": page.resolutionunit,
        }
    if ORIENTATION in page.tags:
        turned = page.tags[ORIENTATION].value
        arguments["extratags"] = [(ORIENTATION, "H", 1, turned, True)]
    if NODATA in page.tags:
        tag = (NODATA, "s", 0, str(page.tags[NODATA].value), True)
        arguments["extratags"] = [*arguments.get("extratags", ()), tag]
    return {
        key: value
        for key, value in arguments.items()
        if value is not None or key == "metadata"
    }


def tiff_metadata(tiff, series):
    """Return the arguments of the writer for a whole file: its axes and their units."""
    axes = series.axes.replace("SYX", "YXS")
    if tiff.is_imagej:
        computed = ("ImageJ", "images", "channels", "slices", "frames", "hyperstack")
        kept = {k: v for k, v in tiff.imagej_metadata.items() if k not in computed}
        return {"opened": {"imagej": True}, "metadata": kept | {"axes": axes}}
    if tiff.is_ome:
        images = tifffile.xml2dict(tiff.ome_metadata)["OME"]["Image"]
        image = (images if isinstance(images, list) else [images])[
            tiff.series.index(series)
        ]["Pixels"]
        units = ("PhysicalSize", "TimeIncrement")
        kept = {k: v for k, v in image.items() if k.startswith(units)}
        channels = image.get("Channel", [])
        channels = channels if isinstance(channels, list) else [channels]
        names = [channel.get("Name") for channel in channels]
        kept |= {"Channel": {"Name": names}} if names and all(names) else {}
        return {"opened": {"ome": True}, "metadata": kept | {"axes": axes}}
    if tiff.is_shaped:
        return {"metadata": {} if "Q" in axes else {"axes": axes}}
    text = series.keyframe.description
    return {"description": text} if text and text.isascii() else {}


def write_tiff(path, series):
    """Write series of planes as a TIFF file.

    Args:
        series: for each its planes, an iterable; its shape; its type; the arguments.
    """
    total = sum(math.prod(shape) * dtype.itemsize for _, shape, dtype, _ in series)
    opened = series[0][3].get("opened") or {"bigtiff": total > 4e9}
    with atomic_file(path) as file, tifffile.TiffWriter(file, **opened) as tiff:
        for pixels, shape, dtype, arguments in series:
            arguments = {k: v for k, v in arguments.items() if k != "opened"}
            tiff.write(iter(pixels), shape=shape, dtype=dtype, **arguments)


def join_planes(path, stack, restored):
    """Write the restored planes of a stack as a stack like it.

    Args:
        path: of the file to write.
        stack: the TIFF file they are of.
        restored: files with a plane each, in their order.
    """
    with tifffile.TiffFile(stack) as tiff:
        series, files = [], iter(restored)
        for one, count in full_series(tiff):
            arguments = tiff_arguments(stack, one) | tiff_metadata(tiff, one)
            own = list(itertools.islice(files, count))
            first = tifffile.imread(own[0])
            outer = one.shape[: len(one.shape) - len(one.keyframe.shape)]
            pixels = map(tifffile.imread, own)  # one after the other
            series.append((pixels, (*outer, *first.shape), first.dtype, arguments))
        write_tiff(path, series)


def result_names(path):
    """Return the names of an image's folder and of the image, in the results.

    A plane's folder is its stack's.
    """
    stack = stack_of(path)
    if stack:
        return "/".join(result_names(stack)), path.name
    if path.parent == Path(skimage.data.data_dir):
        return "skimage", path.stem
    return path.parent.resolve().name or "root", path.name


def find_images(path):
    """List the image files that --path means, and the planes of stacks.

    Raises:
        InputError, OSError: there are none.
    """
    given, bundled = Path(path), Path(skimage.data.data_dir)
    if given.is_dir():
        files = sorted(f for f in given.iterdir() if not f.name.startswith("."))
        images = [f for f in files if f.suffix.lower() in SUFFIXES and f.is_file()]
        for file in sorted(set(files) - set(images)):
            print(f"{file}: skipped, no PNG, JPEG or TIFF image")
        if not images:
            raise InputError(f"{path}: no PNG, JPEG or TIFF image in this folder")
        return list(itertools.chain.from_iterable(map(planes, images)))
    if given.exists():
        if given.suffix.lower() not in SUFFIXES:
            raise InputError(f"{path}: not a PNG, JPEG or TIFF file by its name")
        return planes(given)
    named = {f.stem: f for f in sorted(bundled.iterdir()) if f.suffix in SUFFIXES}
    if path in named:
        return planes(named[path])
    raise InputError(
        f"{path}: no such file or folder, nor an image of scikit-image "
        f"({', '.join(named)})"
    )


# --- PSFs ----------------------------------------------------------------------------


def only_matrix(arrays):
    """Return `kernel` of a .mat file's arrays, or its only matrix; None where neither is."""
    found = {k: v for k, v in arrays.items() if not k.startswith("__")}
    found = {k: v for k, v in found.items() if getattr(v, "ndim", 0) == 2}
    return found.get("kernel", next(iter(found.values())) if len(found) == 1 else None)


def without_offset(psf, path):
    """Subtract a camera's offset from the picture of a point (h, w), and say so.

    It is taken from the border; without one the picture comes back as it is.
    """
    border = np.concatenate([psf[0], psf[-1], psf[1:-1, 0], psf[1:-1, -1]])
    offset = np.median(border)
    if border.max() > FLAT * border.min() or not 0 < offset < LOW * psf.max():
        return psf
    print(f"{path}: its border is flat: {offset:g} is subtracted, as a camera's offset")
    return (psf - offset).clip(0)


def shown_psf(path):
    """Read a PSF (h, w) from an image file, as it looks, without a camera's offset."""
    pixels, colours, bits, written = read_pixels(path)
    psf = pixels[..., :colours].mean(2)
    if white_is_zero(written):
        psf = peak_of(pixels.dtype, bits) - psf
    return without_offset(psf, path) if np.isfinite(psf).all() else psf


def read_psf(path):
    """Read a PSF (h, w), normalised to sum 1.

    Args:
        path: .mat (the array `kernel`, or the file's only matrix), .npy or an image.

    Raises:
        InputError, OSError: it is none; the text says why.
    """
    path = Path(path)
    try:
        if path.suffix.lower() == ".mat":
            with open(path, "rb") as file:
                psf = only_matrix(scipy.io.loadmat(file))
        elif path.suffix.lower() == ".npy":
            psf = np.load(path, mmap_mode="r", allow_pickle=False)
        else:
            psf = shown_psf(path)
        if psf is None:
            raise InputError(f"{path}: neither `kernel` nor a single matrix")
        if psf.dtype.kind not in "biuf" or max(psf.shape, default=0) > LARGEST_PSF:
            raise InputError(
                f"{path}: a PSF is a matrix of real numbers, with sides of up to "
                f"{LARGEST_PSF}"
            )
        with np.errstate(over="ignore", invalid="ignore"):
            psf = np.asarray(psf, np.float64)
            psf = psf / psf.sum() if psf.sum() > 0 else psf * np.nan
    except Exception as error:  # a damaged file fails in many ways
        if getattr(error, "filename", None):
            raise  # which says what is wrong
        if path.suffix.lower() not in (".mat", ".npy", *SUFFIXES):
            raise InputError(f"{path}: a PSF is .mat, .npy or an image") from None
        if isinstance(error, InputError):
            raise
        reason = first_line(error)
        raise InputError(f"{path}: no PSF can be read: {reason}") from None
    if psf.ndim != 2 or not np.isfinite(psf).all() or not 0.999 < psf.sum() < 1.001:
        raise InputError(
            f"{path}: a PSF is a matrix of finite numbers with a sum above 0"
        )
    return psf


# --- scores --------------------------------------------------------------------------


def score(image, clean, ends=None):
    """PSNR in dB and SSIM (Wang et al. 2004) of an image (C, H, W).

    Their peak is 1, or the reference's range where it leaves [0, 1], as scikit-image has
    it, or from one of `ends` to the other. The image is clipped to [0, 1], and to no other
    range. Entries that are not finite in the clean image are not scored.
    """
    low, high = ends or black_and_white(clean)
    wang = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    squares, ssim, count = 0.0, 0.0, 0
    for ours, its in zip(image, clean):  # by channel, for memory's sake
        ours = np.clip(ours, 0, 1) if (low, high) == (0, 1) else ours
        scored = np.isfinite(its)
        ours, its = (np.where(scored, x, low) for x in (ours, its))
        ours, its = (np.float32((x - low) / (high - low)) for x in (ours, its))
        squares += np.square(ours - its, dtype=np.float64).sum()
        ssim += structural_similarity(ours, its, data_range=1, **wang) / len(image)
        count += scored.sum()
    with np.errstate(divide="ignore"):
        return float(-10 * np.log10(squares / max(count, 1))), float(ssim)


MATCHED = 1024  # side of the middle part by which a shift is found, pixels


class Moved(NamedTuple):
    """The score of an image that was moved onto the clean one."""

    psnr: float  # dB
    down: float  # pixels
    right: float

    def __str__(self):
        down = f"{abs(self.down):.1f} {'down' if self.down > 0 else 'up'}"
        right = f"{abs(self.right):.1f} {'right' if self.right > 0 else 'left'}"
        return f"{self.psnr:.2f} dB if moved {down}, {right}"


def score_moved(image, clean):
    """Score an image at the best shift by parts of a pixel; None where none is found.

    A PSF that is estimated, or has its mass beside its centre, moves the result, whose
    plain score then says little. The shift is where both images' cross-correlation is
    largest (Guizar-Sicairos et al. 2008). The clean image is moved to the other, for
    interpolation would average the other's noise; a border as wide as the shift is left out.

    Args:
        image, clean: (C, H, W).
    """
    size = clean.shape[1:]
    middle = (slice(max(0, n - MATCHED) // 2, (n + MATCHED) // 2) for n in size)
    middle = (slice(None), *middle)
    fixed, gray = (x[middle].mean(0, dtype=np.float64) for x in (clean, image))
    if not np.isfinite(fixed).all() or min(np.ptp(fixed), np.ptp(gray)) == 0:
        return None
    window = np.outer(*map(np.hanning, fixed.shape))
    shift = np.zeros(2)  # of the image against the clean one
    for _ in range(3):  # the window draws the first shift towards 0, the others less
        moved = scipy.ndimage.shift(fixed, shift, mode="nearest")
        pair = [(x - x.mean()) * window for x in (gray, moved)]
        told = {"upsample_factor": 20, "normalization": None}
        shift = shift + phase_cross_correlation(*pair, **told)[0]
        if (np.abs(shift) > np.array(fixed.shape) / 4).any():
            return None
    edge = math.ceil(np.abs(shift).max())
    inner = (slice(None), *(slice(edge, n - edge) for n in size))
    moved = np.stack([scipy.ndimage.shift(x, shift, mode="nearest") for x in clean])
    psnr, _ = score(image[inner], moved[inner], black_and_white(clean))
    return Moved(psnr, *(0.0 - shift).tolist())
