"""Pictures and PSF files in and out, and scores."""

import io
import itertools
import logging
import math
import re
import shutil
import warnings
import zlib
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import imagecodecs
import numpy as np
import scipy.io
import scipy.ndimage
import tifffile
from PIL import Image, PngImagePlugin
from skimage.metrics import structural_similarity

import utils
from utils import JPEG, TIFF, InputError, atomic_file, stack_of

# Silence the libraries' warnings about damaged files; we print one line instead.
for library in ("tifffile", "imagecodecs"):
    logging.getLogger(library).setLevel(logging.CRITICAL + 1)
warnings.filterwarnings("ignore", module="PIL")
Image.MAX_IMAGE_PIXELS = None  # refuse_size checks it
PngImagePlugin.MAX_TEXT_CHUNK = 2**24  # bytes; a scanner's colour profile has millions

# --- pictures ------------------------------------------------------------------------

SMALLEST_SIDE = 32  # pixels: the network halves a picture five times
MAX_PIXELS = 2**25  # pixels of a picture, or of its --crop
MAX_DECODED = 2**28  # pixels of a file
MAX_PSF_SIDE = 4096  # pixels; as --kernel_size
MAX_PACKED = 2**14  # pixels per byte of a file; deflate packs 8256 of one bit
RESOLUTION, ORIENTATION, NODATA = 282, 274, 42113  # TIFF tags; NODATA is GDAL's
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE, YCBCR = 0, 1, 2, 3, 6  # photometrics
COLOURS = {WHITE_IS_ZERO: 1, BLACK_IS_ZERO: 1, RGB: 3, PALETTE: 1}  # samples, no alpha
UNKNOWN, PREMULTIPLIED, STRAIGHT = 0, 1, 2  # kinds of a TIFF's extra sample
FAST_PNG = {"level": 1, "strategy": 3, "filter": 16}  # as imagecodecs advises
EXIF = b"Exif\0\0"  # Pillow's EXIF begins with it, a PNG's does not
# XMP of a gain map or a video, which our file does not have.
GAIN_MAP = re.compile(rb"(?i)hdrgm|gain-?map|photos/1\.0/container|MicroVideo")


class Picture(NamedTuple):
    """An image file's pixels, and what it takes to write another file of its kind.

    `image` holds the file's numbers divided by `peak`, in float32, or in float64 where
    they have more digits. Three equal channels are read as one and written as three.
    """

    image: np.ndarray  # (C, H, W), C = 1 or 3 (red, green, blue), cropped
    absent: np.ndarray | None  # (C, H, W), True where the file holds no measurement
    uncropped: str  # the size and kind before cropping
    alpha: np.ndarray | None  # (H, W), the file's numbers
    dtype: np.dtype  # of the file's numbers
    peak: float  # the file's number that becomes 1
    stored: int  # channels in the file, without alpha
    suffix: str
    metadata: dict  # arguments of tifffile.imwrite, or those of encode

    @property
    def inverted(self):
        """Tell whether white is zero in the file."""
        return self.metadata.get("photometric") == WHITE_IS_ZERO

    def measured(self):
        """Return the image, (C, H, W), with NaN where nothing was measured."""
        absent = False if self.absent is None else self.absent
        return np.where(absent, self.image.dtype.type(np.nan), self.image)

    def refuse_format(self, path):
        """Raise InputError if a file of that name cannot hold this picture."""
        fitting = [*TIFF]
        if self.dtype.kind == "u" and self.dtype.itemsize <= 2:
            fitting.append(".png")
        if self.dtype == np.uint8 and self.alpha is None:
            fitting += JPEG
        if path.suffix.lower() not in fitting:
            alpha = "" if self.alpha is None else " with alpha"
            fault = f"{self.dtype} pixels{alpha} need {' or '.join(fitting)}"
            raise InputError(f"--output {path}: {fault}")

    def refuse_misfit(self, path, other, its_path, channels):
        """Raise InputError unless another Picture has this one's size, and its channels or one."""
        same_size = other.uncropped.split()[0] == self.uncropped.split()[0]
        if not same_size or channels not in {1, len(self.image)}:
            fault = f"{other.uncropped}, but {path} is {self.uncropped}"
            raise InputError(f"{its_path}: {fault}")

    def save(self, path, image):
        """Write an image (C, H, W), in this one's units, with its depth and metadata.

        The path's suffix selects the format. A TIFF gets the file's own numbers. A PNG or
        JPEG goes from black to white, in 16 bits where the file has more than 8.
        """
        suffix, (black, white) = Path(path).suffix.lower(), black_and_white(self.image)
        image = np.clip(image, 0, 1) if (black, white) == (0, 1) else image
        image = np.broadcast_to(image, (self.stored, *image.shape[1:]))
        if suffix in TIFF:
            samples = [quantise(x, self.dtype, self.peak) for x in image]
            samples += [] if self.alpha is None else [self.alpha]
            told = self.metadata
            if self.suffix not in TIFF:
                kind = RGB if self.stored == 3 else BLACK_IS_ZERO
                told = {"photometric": kind, "iccprofile": told.get("iccprofile")}
                told["extrasamples"] = None if self.alpha is None else [STRAIGHT]
            with atomic_file(path) as file:
                tifffile.imwrite(file, np.dstack(samples).squeeze(), **told)
            return
        image = (image - black) / (white - black)
        image = 1 - image if self.inverted else image
        if self.alpha is not None:
            alpha = np.divide(self.alpha, self.peak, dtype=np.float64).clip(0, 1)
            if self.metadata.get("extrasamples") == [PREMULTIPLIED]:
                image = image / np.maximum(alpha, 1e-6)
            image = [*image, alpha]
        dtype = np.dtype(np.uint8 if self.dtype.itemsize == 1 else np.uint16)
        most = np.iinfo(dtype).max
        # Channel by channel, to save memory.
        samples = [quantise(x.clip(0, 1), dtype, most) for x in image]
        utils.write_atomically(path, encode(suffix, np.dstack(samples), self.metadata))

    def part(self, place):
        """Return a part of the picture, given by slices of (C, H, W)."""
        alpha = None if self.alpha is None else self.alpha[place[1:]]
        absent = None if self.absent is None else self.absent[place]
        image = np.ascontiguousarray(self.image[place])
        return self._replace(image=image, absent=absent, alpha=alpha)


def black_and_white(image):
    """Return black and white: 0 and 1, or the finite extremes of an image that leaves [0, 1]."""
    image = image[np.isfinite(image)]
    low, high = (float(image.min()), float(image.max())) if image.size else (0.0, 1.0)
    if low >= 0 and high <= 1:
        return 0.0, 1.0
    return low, high if high > low else low + 1


def quantise(image, dtype, peak):
    """Return an image times peak as numbers of a type; integers are rounded and clipped."""
    numbers = np.asarray(image, np.float64) * peak
    if dtype.kind in "ui":
        numbers = np.rint(np.nan_to_num(numbers)).clip(np.iinfo(dtype).min, peak)
    return numbers.astype(dtype)


def describe(channels, height, width):
    """Return an image's size and kind as text."""
    return f"{width}x{height} {'gray' if channels == 1 else 'colour'}"


def peak_of(dtype, metadata):
    """Return the number that stands for 1: the largest of the file's bits, or 1.0."""
    bits = metadata.get("bitspersample") or 8 * dtype.itemsize
    return {"u": 2**bits - 1, "i": 2 ** (bits - 1) - 1}.get(dtype.kind, 1)


def read_picture(path, crop=0):
    """Read an image file as a Picture.

    Args:
        path: a PNG, JPEG or TIFF file, or a plane of a stack such as cells.tif/007: gray or
            colour, integers of up to 32 bits or floats.
        crop: side of the centre crop, pixels; 0: the whole image.

    Raises:
        InputError, OSError: the file cannot be read or restored; the message says why.
    """
    path, jpeg = Path(path), Path(path).suffix.lower() in JPEG
    with utils.naming(path, "not a PNG, JPEG or TIFF image"):
        pixels, colours, metadata = read_pixels(path, crop)
        (height, width), dtype = pixels.shape[:2], pixels.dtype
        if crop:
            top, left = max(0, height - crop) // 2, max(0, width - crop) // 2
            pixels = pixels[top : top + crop, left : left + crop].copy()
        refuse_kind(pixels, jpeg)
    numbers = pixels[..., :colours].transpose(2, 0, 1)
    alpha = pixels[..., colours] if pixels.shape[2] > colours else None
    if all(np.array_equal(x, numbers[0], equal_nan=True) for x in numbers[1:]):
        numbers = numbers[:1]
    absent, peak = find_absent(numbers, alpha, metadata), peak_of(dtype, metadata)
    wide = dtype.itemsize > 2 and dtype != np.float32  # more digits than float32 has
    kind = np.float64 if wide else np.float32
    image = np.divide(numbers, peak, dtype=kind, order="C")
    uncropped = describe(len(image), height, width)
    suffix = (stack_of(path) or path).suffix.lower()
    return Picture(
        image, absent, uncropped, alpha, dtype, peak, colours, suffix, metadata
    )


def refuse_kind(pixels, jpeg):
    """Raise InputError for pixels (H, W, samples) that cannot be restored."""
    (height, width, samples), dtype = pixels.shape, pixels.dtype
    if dtype.kind not in "uif" or dtype.itemsize > (8 if dtype.kind == "f" else 4):
        raise InputError(f"{dtype} pixels; convert it to 8 or 16 bits")
    if jpeg and (dtype != np.uint8 or samples in (2, 4)):
        raise InputError("no JPEG, whatever its name says; rename it")
    if min(height, width) < SMALLEST_SIDE:
        raise InputError(f"{width}x{height} pixels; a side needs {SMALLEST_SIDE}")


def refuse_size(path, height, width, crop):
    """Raise InputError for too many pixels to restore, or to decode for a crop."""
    size, used = height * width, min(height, crop or height) * min(width, crop or width)
    packed = MAX_PACKED * path.stat().st_size
    for pixels, most, fault in (
        (size, MAX_DECODED, "over 268 million; cut a part out of it"),
        (used, MAX_PIXELS, "over 33 million; --crop 4096 takes its centre"),
        (size, max(MAX_PIXELS, packed), "too many for so small a file; it is damaged"),
    ):
        if pixels > most:
            raise InputError(f"{width}x{height} pixels, {fault}")


def find_absent(numbers, alpha, metadata):
    """Return where a file's numbers (C, H, W) are transparent or NODATA, as bools.

    None: nowhere, or everywhere. Alpha is (H, W) or None, metadata a Picture's.
    """
    absent = np.zeros(numbers.shape, bool)
    if alpha is not None and metadata.get("extrasamples") != [UNKNOWN]:
        absent |= alpha == 0
    for code, _, _, value, _ in metadata.get("extratags", ()):
        with suppress(ValueError):  # some programs write no number
            if code == NODATA:
                absent |= numbers == float(value)
    return absent if absent.any() and not absent.all() else None


def read_mask(path, crop=0):
    """Read a mask: a pixel that looks black, or is transparent, is missing.

    Returns:
        The mask's Picture, and 1 where a pixel is known, else 0, (C or 1, H, W), float32.

    Raises:
        InputError, OSError: no pixel is missing, or the file is no mask.
    """
    mask = read_picture(path, crop)
    if mask.suffix in JPEG:
        raise InputError(f"{path}: a JPEG's zeros are not exact; save it as PNG")
    known = mask.image != int(mask.inverted)
    known = known[:1] if (known == known[:1]).all() else known
    known = known if mask.alpha is None else known & (mask.alpha != 0)
    if known.all():
        within = " within --crop" if crop else ""
        fault = f"no pixel of this mask{within} is 0 or transparent"
        raise InputError(f"{path}: {fault}; paint black what is missing")
    return mask, known.astype(np.float32)


def read_pixels(path, crop=0):
    """Read an image file's pixels (H, W, samples), in its type; any error may be raised.

    Also return how many samples are colours, 1 or 3, and the metadata of a Picture.
    """
    suffix = (stack_of(path) or path).suffix.lower()
    return (read_tiff if suffix in TIFF else read_plain)(path, crop)


# --- file formats --------------------------------------------------------------------


def read_plain(path, crop):
    """Read a PNG or JPEG, whatever its name says, turned upright: see read_pixels.

    Pillow has no colours of 16 bits, so imagecodecs decodes a PNG's pixels.
    """
    with Image.open(path) as image:
        refuse_size(path, image.height, image.width, crop)
        if image.format == "TIFF":
            return read_tiff(path, crop)
        image.load()  # a PNG's metadata may lie behind its pixels
        info, is_png = image.info, image.format == "PNG"
        if not is_png:
            gray = "L" if image.mode in ("1", "L") else "RGB"
            mode = "RGBA" if image.has_transparency_data else gray
            pixels = np.array(image.convert(mode))
    if is_png:
        pixels = imagecodecs.png_decode(path.read_bytes())
    metadata = {key: info.get(key) or b"" for key in ("exif", "xmp")}
    metadata["iccprofile"] = info.get("icc_profile")
    if GAIN_MAP.search(metadata["xmp"]):
        del metadata["xmp"]
    pixels = turn_upright(pixels.reshape(*pixels.shape[:2], -1), metadata)
    return pixels, 3 if pixels.shape[2] > 2 else 1, metadata


def turn_upright(pixels, metadata):
    """Turn pixels (H, W, samples) by their EXIF orientation, and set it to 1, also in XMP."""
    turned = 1
    with suppress(Exception):  # there is no EXIF, or it is damaged
        exif = io.BytesIO(metadata["exif"].removeprefix(EXIF))
        with tifffile.TiffFile(exif, mode="r+") as tags:
            turned = tags.pages[0].tags[ORIENTATION].value
            tags.pages[0].tags[ORIENTATION].overwrite(1)
        metadata["exif"] = EXIF + exif.getvalue()
    if turned != 1 and metadata.get("xmp"):
        upright = rb"\g<1>1", metadata["xmp"]
        metadata["xmp"] = re.sub(rb"(tiff:Orientation(?:=[\"']|>))\d", *upright)
    pixels = pixels.swapaxes(0, 1) if turned in (5, 6, 7, 8) else pixels
    pixels = pixels[:, ::-1] if turned in (2, 3, 6, 7) else pixels
    return np.ascontiguousarray(pixels[::-1] if turned in (3, 4, 7, 8) else pixels)


def encode(suffix, pixels, metadata):
    """Return pixels (H, W, samples) as the bytes of a PNG or JPEG, as the suffix says.

    In the metadata `iccprofile`, `exif` and `xmp` are bytes, or missing.
    """
    profile, exif, xmp = (metadata.get(k) or b"" for k in ("iccprofile", "exif", "xmp"))
    gray, pixels = pixels.shape[2] < 3, pixels.squeeze()
    if profile[16:20] != (b"GRAY" if gray else b"RGB "):  # such as a CMYK JPEG's
        profile = b""
    file = io.BytesIO()
    if suffix in JPEG:
        # A segment holds 64 kB, and Pillow splits only the profile.
        exif, xmp = (x if len(x) < 2**16 - 64 else b"" for x in (exif, xmp))
        kept = {"icc_profile": profile, "exif": exif, "xmp": xmp}
        # Full chroma, so that a JPEG's known pixels come back unchanged.
        image = Image.fromarray(pixels)
        image.save(file, "jpeg", quality=100, subsampling=0, **kept)
        return file.getvalue()
    data = imagecodecs.png_encode(pixels, **FAST_PNG)
    file.write(data[:33])  # signature and IHDR
    for kind, head, content in (
        (b"iCCP", b"ICC Profile\0\0", profile and zlib.compress(profile)),
        (b"eXIf", b"", exif.removeprefix(EXIF)),
        (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0", xmp),
    ):
        if content:
            PngImagePlugin.putchunk(file, kind, head, content)
    file.write(data[33:])
    return file.getvalue()


def read_tiff(path, crop):
    """Read a TIFF file, or one plane of a stack: see read_pixels."""
    stack = stack_of(path)
    file = stack or path
    with tifffile.TiffFile(file) as tiff:
        all_series = utils.full_series(tiff)
        count = sum(n for _, n in all_series)
        if count > 1 and not stack:
            raise InputError(f"it has {count} planes; save the one to use as a file")
        places = [(series, number) for series, n in all_series for number in range(n)]
        series, number = places[int(path.name) - 1 if stack else 0]
        page, metadata = series.keyframe, tiff_arguments(series)
        metadata |= {} if stack else tiff_metadata(tiff, series)
        refuse_size(file, page.imagelength, page.imagewidth, crop)
        if series.dataoffset is not None:  # one array, perhaps with tags for one plane
            at = series.dataoffset + number * page.nbytes
            kind = page.dtype.newbyteorder(tiff.byteorder)
            pixels = tiff.filehandle.read_array(kind, page.size, at).reshape(page.shape)
        else:
            found = series.pages[number]
            ends = np.add(found.dataoffsets, found.databytecounts)
            if found.parent is tiff and max(ends) > tiff.filehandle.size:
                raise ValueError("it ends before its pixels do")
            pixels = found.asarray()
        if (pixels.shape, pixels.dtype) != (page.shape, page.dtype):
            raise ValueError("its pixels have another size or type than it claims")
        colours = COLOURS[metadata["photometric"]]
        if page.photometric == PALETTE and colours == 3:
            pixels = np.moveaxis(page.colormap[:, pixels] >> 8, 0, 2).astype(np.uint8)
    pixels = np.moveaxis(pixels, 0, 2) if page.axes == "SYX" else pixels
    return pixels.reshape(*pixels.shape[:2], -1), colours, metadata


def tiff_arguments(series):
    """Return tifffile.imwrite's arguments for a plane of a series, or raise InputError."""
    page = series.keyframe
    kind, extra, bits = page.photometric, page.extrasamples, page.bitspersample
    if kind == YCBCR and page.compression in (6, 7):  # a JPEG, which tifffile converts
        kind = RGB
    if kind not in COLOURS or page.axes not in ("YX", "YXS", "SYX"):
        name = getattr(kind, "name", kind)
        raise InputError(f"{name} pixels, {page.axes}; convert it to gray or RGB")
    colours, samples = COLOURS[kind], page.samplesperpixel
    alpha = extra[0] if extra in ((PREMULTIPLIED,), (STRAIGHT,)) else UNKNOWN
    if samples > colours + (colours == 3 or alpha != UNKNOWN):
        raise InputError(f"{samples} samples; gray or RGB is needed")
    if kind == PALETTE and not page.is_imagej:  # ImageJ's palette is a view
        kind = RGB
    tags = [page.tags[code] for code in (ORIENTATION, NODATA) if code in page.tags]
    given = RESOLUTION in page.tags
    return {
        "photometric": kind,
        "extrasamples": [alpha] if samples > colours else None,
        "bitspersample": bits if bits < 8 * page.dtype.itemsize else None,
        "colormap": page.colormap if kind == PALETTE else None,
        "iccprofile": page.iccprofile,
        "resolution": page.resolution if given else None,
        "resolutionunit": page.resolutionunit if given else None,
        "extratags": [(t.code, t.dtype, t.count, t.value, True) for t in tags],
        "metadata": None,
    }


def tiff_metadata(tiff, series):
    """Return tifffile.imwrite's arguments for a file's program, axes and units."""
    axes = series.axes.replace("SYX", "YXS")
    if tiff.is_imagej:
        computed = ("ImageJ", "images", "channels", "slices", "frames", "hyperstack")
        kept = {k: v for k, v in tiff.imagej_metadata.items() if k not in computed}
        return {"imagej": True, "metadata": kept | {"axes": axes}}
    if tiff.is_ome:
        images = tifffile.xml2dict(tiff.ome_metadata)["OME"]["Image"]
        image = np.atleast_1d(images)[tiff.series.index(series)]["Pixels"]
        units = ("PhysicalSize", "TimeIncrement")
        kept = {k: v for k, v in image.items() if k.startswith(units)}
        names = [x.get("Name") for x in np.atleast_1d(image.get("Channel", []))]
        kept |= {"Channel": {"Name": names}} if names and all(names) else {}
        return {"ome": True, "metadata": kept | {"axes": axes}}
    if tiff.is_shaped:
        return {"metadata": {} if "Q" in axes else {"axes": axes}}
    text = series.keyframe.description
    return {"description": text} if text and text.isascii() else {}


def read_planes(paths, crop, like):
    """List the images of a stack's planes, NaN where nothing was measured.

    Planes of another shape or peak than the Picture `like`, and bad ones, are left out.
    Heights are cut to a multiple of 8, so that a JPEG's blocks fit below each other.
    """
    images = []
    for path in paths:
        with suppress(InputError):  # a bad plane is reported in its turn
            plane = read_picture(path, crop)
            if plane.image.shape == like.image.shape and plane.peak == like.peak:
                images.append(plane.measured()[:, : plane.image.shape[1] // 8 * 8])
    return images


def copy(path, target):
    """Copy an image file, in the format that the target's suffix names."""
    suffixes = {path.suffix, target.suffix.lower()}
    if any(suffixes <= {*kind} for kind in (JPEG, TIFF, [".png"])):
        with open(path, "rb") as source, atomic_file(target) as file:
            shutil.copyfileobj(source, file)
    else:
        picture = read_picture(path)
        picture.save(target, picture.image)


def join_planes(path, stack, restored):
    """Join a stack's planes, restored to one file each, in a stack of the same kind."""
    files = iter(restored)
    with tifffile.TiffFile(stack) as tiff, atomic_file(path) as file:
        program = {"imagej": tiff.is_imagej, "ome": tiff.is_ome and not tiff.is_imagej}
        large = sum(Path(f).stat().st_size for f in restored) > 4e9
        program["bigtiff"] = large and not tiff.is_imagej
        with tifffile.TiffWriter(file, **program) as made:
            for series, count in utils.full_series(tiff):
                arguments = tiff_arguments(series) | tiff_metadata(tiff, series)
                arguments = {k: v for k, v in arguments.items() if k not in program}
                own = list(itertools.islice(files, count))
                first = tifffile.imread(own[0])
                outer = series.shape[: len(series.shape) - len(series.keyframe.shape)]
                shape = (*outer, *first.shape)
                pixels = map(tifffile.imread, own)  # one by one, to save memory
                made.write(pixels, shape=shape, dtype=first.dtype, **arguments)


# --- MATLAB files and PSFs ---------------------------------------------------------


def save_mat(path, key, array):
    """Write a PSF (h, w) or an image (C, H, W) as a MATLAB file, without a time stamp."""
    array = array.transpose(1, 2, 0).squeeze() if array.ndim == 3 else array
    buffer = io.BytesIO()
    scipy.io.savemat(buffer, {key: array})
    data = b"MATLAB 5.0 MAT-file".ljust(116) + buffer.getvalue()[116:]
    utils.write_atomically(path, data)


def load_mat(path, key):
    """Return the matrix of that key in a MATLAB file, or the file's only matrix."""
    arrays = scipy.io.loadmat(io.BytesIO(Path(path).read_bytes()))
    found = {k: v for k, v in arrays.items() if k[:2] != "__" and np.ndim(v) == 2}
    if key not in found and len(found) != 1:
        raise InputError(f"it has neither `{key}` nor a single matrix")
    return found.get(key, next(iter(found.values())))


def read_psf(path):
    """Read a PSF (h, w), normalised to sum 1.

    Args:
        path: .mat (the array `kernel`, or the file's only matrix), .npy or an image.

    Raises:
        InputError, OSError: the file holds no PSF; the message says why.
    """
    path, suffix = Path(path), Path(path).suffix.lower()
    with utils.naming(path, "no PSF (a PSF is .mat, .npy or an image)"):
        if suffix == ".mat":
            psf = load_mat(path, "kernel")
        elif suffix == ".npy":
            psf = np.lib.format.open_memmap(path, mode="r")
        else:
            pixels, colours, metadata = read_pixels(path)
            psf = pixels[..., :colours].mean(2)
            if metadata.get("photometric") == WHITE_IS_ZERO:  # as it looks
                psf = peak_of(pixels.dtype, metadata) - psf
        real = psf.dtype.kind in "biuf" and psf.ndim == 2
        if not real or max(psf.shape) > MAX_PSF_SIDE:
            raise InputError(f"a PSF is a real matrix of up to {MAX_PSF_SIDE} a side")
        with np.errstate(all="ignore"):
            psf = np.asarray(psf, np.float64)
            psf = psf / max(psf.sum(), 0)
        if not np.isfinite(psf).all() or not 0.999 < psf.sum() < 1.001:
            raise InputError("a PSF is a matrix of finite numbers with a sum above 0")
    return psf


# --- scores --------------------------------------------------------------------------


def score(image, clean, ends=None):
    """Return the PSNR in dB and the SSIM (Wang et al. 2004) of an image.

    The peak is 1, and the image is clipped to [0, 1]. If the clean image leaves [0, 1], the
    peak is its range. `ends`, black and white, replaces that range. Entries that are not
    finite in the clean image do not count. Images (C, H, W).
    """
    low, high = ends or black_and_white(clean)
    wang = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    squares, ssim, count = 0.0, 0.0, 0
    for ours, its in zip(image, clean):  # channel by channel, to save memory
        ours = np.clip(ours, 0, 1) if (low, high) == (0, 1) else ours
        scored = np.isfinite(its)
        ours, its = (np.where(scored, x, low) for x in (ours, its))
        ours, its = (np.float32((x - low) / (high - low)) for x in (ours, its))
        squares += np.square(ours - its, dtype=np.float64).sum()
        ssim += structural_similarity(ours, its, data_range=1, **wang) / len(image)
        count += scored.sum()
    with np.errstate(divide="ignore"):
        return float(-10 * np.log10(squares / max(count, 1))), float(ssim)


def score_moved(image, clean, shift):
    """Return the PSNR of an image (C, H, W) against the clean one, which is shifted first.

    `shift` is (down, right) in pixels. We shift the clean one because interpolation would
    average the image's noise. A border as wide as the shift does not count.
    """
    edge = math.ceil(np.abs(shift).max())
    inner = (slice(None), *(slice(edge, n - edge) for n in clean.shape[1:]))
    moved = np.stack([scipy.ndimage.shift(x, shift, mode="nearest") for x in clean])
    return score(image[inner], moved[inner], black_and_white(clean))[0]
