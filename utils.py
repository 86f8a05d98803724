"""What both scripts need around the method.

Options; pictures in and out; noise and scores; Result, the files of one image; Run, all
images of one call, with their log and exit status; drawing.
"""

import argparse
import csv
import hashlib
import io
import itertools
import json
import logging
import math
import os
import shlex
import signal
import struct
import sys
import time
import warnings
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

# Read when OpenCV is imported: refuse a tiny file that claims a gigantic image.
os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(2**25))

import cv2
import numpy as np
import scipy.io
import skimage.data
import tifffile
import torch
from matplotlib.figure import Figure
from skimage.metrics import structural_similarity
from tqdm import tqdm

from network.fusion import estimate_sigma
from network.recipes import RECIPES

SAVE_EVERY = 300  # seconds between two checkpoints, at most
TAIL = (
    0.001  # share of the pixels beyond black and white in comparison.png, either side
)
PANEL = 1024  # pixels a side in comparison.png, at most
# a damaged file is reported in one line of ours
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
logging.getLogger("tifffile").setLevel(logging.CRITICAL + 1)  # of odd tags
warnings.filterwarnings("ignore", "Glyph .* missing")  # of names, in figures' fonts
BARE = {"xticks": [], "yticks": [], "frame_on": False}  # axes with an image alone
SLAB = 512  # rows scored at a time
SSIM_REACH = 5  # pixels: its window's, of sigma 1.5


class InputError(Exception):
    """Something that the user gave cannot be used; the text names it and the cure."""


def fail(error):
    """Report on stderr what cannot be done; return the exit status 2."""
    tqdm.write(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
    return 2


# --- files ---------------------------------------------------------------------------


def is_utf8(path):
    """Tell whether a name can be written in a log, and passed to OpenCV."""
    return not any("\ud800" <= c <= "\udfff" for c in str(path))


@contextmanager
def atomic_file(path):
    """Open a file to write that is the old one or the new one, whole, at any moment."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(error.errno, reason, str(path)) from None
    finally:
        with suppress(OSError):  # none, or the disk has become read-only
            temporary.unlink()


def write_atomically(path, data):
    """Write bytes as an atomic file."""
    with atomic_file(path) as file:
        file.write(data)


def save_mat(path, key, array):
    """Write a PSF (h, w) or an image (C, H, W) as a MATLAB file that repeats.

    The time of day in its header is left out.
    """
    array = array.transpose(1, 2, 0).squeeze() if array.ndim == 3 else array
    buffer = io.BytesIO()
    scipy.io.savemat(buffer, {key: array})
    write_atomically(path, b"MATLAB 5.0 MAT-file".ljust(116) + buffer.getvalue()[116:])


# --- options -------------------------------------------------------------------------


def number(kind, low, told, high=math.inf, include_low=True):
    """Make an argparse type: a finite number of `kind` from low up to, not including, high."""

    def convert(value):
        try:
            x = kind(value)
        except ValueError:
            x = math.nan
        if not (low <= x < high and (include_low or x != low)):
            raise argparse.ArgumentTypeError(f"{value!r} is not {told}")
        return x

    return convert


def name(value):
    """An argparse type: what can be written in a log, and passed to OpenCV."""
    if not value or not is_utf8(value):
        raise argparse.ArgumentTypeError(f"{value!r} is empty or not UTF-8")
    return value


def choose_device(value):
    """Turn auto, cpu, cuda, cuda:N or mps into a torch.device that is there.

    Of several processes on a machine (LOCAL_RANK, else RANK) each takes a GPU of its own.
    """
    auto = value == "auto"
    if auto:
        value = "cuda" if torch.cuda.is_available() else "cpu"
    rank = os.environ.get("LOCAL_RANK", os.environ.get("RANK", ""))
    if value == "cuda" and torch.cuda.is_available() and rank.isdecimal():
        value = f"cuda:{int(rank) % torch.cuda.device_count()}"
    try:
        device = torch.device(value)
        if device.type == "cuda" and device.index and torch.cuda.is_available():
            torch.cuda.set_device(device)  # or GPU 0 gets a context of each process
        torch.ones(1, device=device).add(1).item()  # a GPU may be there without kernels
        if device.type in ("cpu", "cuda", "mps"):
            return device
    except (AssertionError, RuntimeError, ValueError) as error:  # PyTorch has them all
        if auto:
            print(f"This PyTorch cannot use {value} ({first_line(error)}): on the CPU.")
            return torch.device("cpu")
    raise argparse.ArgumentTypeError(
        f"no device {value!r} that this PyTorch can use on this machine; there are auto, "
        "cpu, cuda, cuda:N, mps"
    )


count = number(int, 1, "a whole number from 1")
natural = number(int, 0, "a whole number from 0")
seed = number(int, 0, "a whole number from 0 to 2**32 - 1", 2**32)
positive = number(float, 0, "a number above 0", include_low=False)
side = number(int, 1, "a whole number from 1 to 4096", 4097)
rate = number(float, 0, "a rate in [0, 1)", 1)

# Options of either script: type or choices, help. Default values stand in the scripts.
OPTIONS = {
    "path": (name, "image file, folder, or name of an image of scikit-image"),
    "crop": (natural, "side of a centre crop, pixels; 0: the whole image"),
    "sigma": (number(float, 0, "a number from 0"), "noise added, 0-255 scale"),
    "observed": (bool, "the image IS the observation: simulate nothing"),
    "reference": (name, "clean image to score an --observed one against"),
    "mask": (name, "image file, 0 where a pixel is missing"),
    "missing": (rate, "share of the pixels to hide, from the seed, to score them"),
    "kernel_size": (side, "side of the Gaussian PSF, pixels"),
    "kernel_sigma": (number(float, 1e-3, "a number from 0.001"), "its width, pixels"),
    "kernel": (name, "file of any other PSF: .mat, .npy or an image"),
    "boundary": (
        ("wrap", "valid"),
        "wrap: circular; valid: a camera's; None: valid with --observed, else wrap",
    ),
    "recipe": (tuple(RECIPES), "fast: 500 steps; paper: as published, 150,000"),
    "drop_rate": (rate, "p of the Bernoulli mask and of the decoder's dropout"),
    "iteration": (count, "training steps"),
    "lr": (positive, "learning rate"),
    "optimizer": (("adam", "adamw", "muon"), "optimiser"),
    "bs": (count, "Bernoulli samples of the observation per step"),
    "real_noise": (
        bool,
        "steps see the image drawn anew; None: where fast denoises an --observed one",
    ),
    "seed": (seed, "of noise, weights, masks and dropout"),
    "device": (choose_device, "auto, cpu, cuda, cuda:N or mps"),
    "init": (
        name,
        "checkpoint.pt whose weights to begin with; previous: the image's before",
    ),
    "resume": (bool, "go on from the checkpoint of an interrupted run"),
    "test_frequency": (count, "steps between ensemble predictions"),
    "num_prediction": (count, "predictions averaged"),
    "window": (natural, "side of the training's windows, pixels; 0: the whole picture"),
    "precision": (("auto", "float32", "bfloat16"), "bfloat16: on a CPU"),
    "fuse": (("on", "off"), "give back what the residual holds besides noise"),
    "noise_sigma": (positive, "noise of an --observed image, for fusing"),
    "model_type": (name, "name of the results folder"),
    "log_path": (name, "log file; its CSV and curves stand beside it"),
}
# What leaves the restored pixels as they are; what a folder's name tells in its own way.
IRRELEVANT = ["path", "reference", "resume", "test_frequency", "device", "model_type"]
IRRELEVANT += ["log_path"]
NAMED = ["sigma", "observed", "mask", "recipe", "kernel_size", "kernel_sigma", "kernel"]
NAMED += ["init"]


def parse_arguments(description, defaults, decide, argv=None):
    """Read the command line: a flag wins over the script's value, that over the recipe's.

    Args:
        description: what the script does.
        defaults: option name -> default value, None: the recipe's; the names are keys
            of OPTIONS.
        decide: called with the options' values, returns those that the recipe decides.
        argv: arguments, those of the process where it is None.

    Returns:
        The options' values, `device` as a torch.device, with the recipe's ingredients
        that are no options. Errors exit with status 2.
    """
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.error = lambda told: parser.exit(2, f"{parser.prog}: error: {told}\n")
    with suppress(AttributeError):  # a notebook's, which can show any file's name
        sys.stdout.reconfigure(errors="backslashreplace")
    words = []  # the script's values, as flags: they are checked alike
    for key, default in defaults.items():
        kind, told = OPTIONS[key]
        how = {"choices": kind} if isinstance(kind, tuple) else {"type": kind}
        if kind is bool:
            how = {"action": argparse.BooleanOptionalAction}
        if kind is bool and default is not None:
            words += [f"--{key}" if default else f"--no-{key}"]
        elif default is not None:
            words += [f"--{key}={default}"]
        shown = "the recipe's" if key in RECIPES["paper"] else default
        parser.add_argument(f"--{key}", help=f"{told} (default: {shown})", **how)
    args = parser.parse_args(words + (sys.argv[1:] if argv is None else argv))
    if args.recipe == "fast" and (args.lr or args.iteration):
        print("The recipe is fast, but for your flags; --recipe paper is as published.")
    if args.observed and args.sigma not in (0, defaults["sigma"]):
        told = f"--observed: no noise is added, so --sigma {args.sigma:g} says nothing"
        print(f"{told}; --noise_sigma is for fusing")
    asked = args.fuse
    args.precision = None if args.precision == "auto" else args.precision
    if args.precision == "bfloat16" and args.device.type != "cpu":
        parser.error("--precision bfloat16 is for --device cpu")
    for key, value in decide(args).items():
        if getattr(args, key, None) is None:
            setattr(args, key, value)
    refuse_contradictions(parser, args, asked)
    return args


def refuse_contradictions(parser, args, asked):
    """Turn fusing off where it cannot be, and exit where flags contradict each other.

    Args:
        asked: what --fuse was on the command line, or None.
    """
    if not (args.drop_rate and args.num_prediction > 1):
        if asked == "on":
            parser.error("--fuse on needs a --drop_rate and several predictions")
        args.fuse = "off"
    if args.mask and args.missing:
        parser.error("--mask and --missing: one of them says which pixels are missing")
    degraded = args.sigma or "kernel" in args
    if (args.mask or args.missing) and args.fuse == "on" and degraded:
        parser.error("--fuse on: with missing pixels, no noise (--sigma 0) and no blur")
    if Path(args.model_type).name != args.model_type or args.model_type == "..":
        parser.error(f"--model_type {args.model_type!r}: no name of a folder")
    if args.reference and not args.observed:
        parser.error("--reference goes with --observed")
    if args.noise_sigma and not (args.observed and args.sigma and args.fuse == "on"):
        parser.error("--noise_sigma goes with --observed and --fuse on, not --sigma 0")


# --- pictures in and out -------------------------------------------------------------

TIFF, JPEG = (".tif", ".tiff"), (".jpg", ".jpeg")
SUFFIXES = (".png", *JPEG, *TIFF)
SMALLEST_SIDE = 32  # pixels: five poolings
LARGEST = 2**25  # pixels of a plane: a tiny file may claim any size
ORIENTATION = 274  # the tag, of EXIF and of TIFF; 1 is upright
# A TIFF's photometric: its name for the writer, and how many samples are colours.
COLOURS = {0: ("miniswhite", 1), 1: ("minisblack", 1), 2: ("rgb", 3), 3: ("palette", 1)}
ALPHAS = {0: "unspecified", 1: "assocalpha", 2: "unassalpha"}
# What a PNG may hold that OpenCV does not write.
UNWRITTEN = {b"pHYs": "dpi", b"gAMA": "gamma", b"cHRM": "chromaticities"}


class Picture(NamedTuple):
    """An image file's pixels, and what it takes to write their like.

    `image` has the file's numbers over `peak`, in float32, or float64 where a number has
    more digits. Three channels that are alike are one here, and three again in the file.
    """

    image: np.ndarray  # (C, H, W), C = 1 or 3 (red, green, blue), cropped
    whole: str  # the whole image's size and kind
    alpha: np.ndarray | None  # (H, W), the file's own numbers
    dtype: np.dtype
    peak: float  # the number that stands for 1: an integer type's largest
    stored: int  # the file's channels, without alpha
    suffix: str
    written: dict  # what the encoder is told

    def save(self, path, image):
        """Write an image (C, H, W), in this one's units, with its depth and metadata.

        The path's suffix says the format. A TIFF has the file's own numbers; other files
        go from black to white, and have 16 bits where the file has more than 8.
        """
        suffix, ends = Path(path).suffix, ends_of(self.image)
        image = np.clip(image, 0, 1) if ends == (0, 1) else image
        image = np.broadcast_to(image, (self.stored, *image.shape[1:]))
        if suffix in TIFF:
            samples = [quantise(x, self.dtype, self.peak) for x in image]
            samples += [] if self.alpha is None else [self.alpha]
            pixels = np.dstack(samples) if len(samples) > 1 else samples[0]
            write_tiff(path, [([pixels], pixels.shape, pixels.dtype, self.written)])
        else:
            pixels = self._shown(image, ends)
            write_atomically(path, encode(suffix, pixels, self.written))

    def _shown(self, image, ends):
        """Return the pixels of a PNG or JPEG, as OpenCV has them."""
        image = (image - ends[0]) / (ends[1] - ends[0])
        if self.written.get("photometric") == "miniswhite":
            image = 1 - image
        dtype = np.dtype(np.uint8 if self.dtype.itemsize == 1 else np.uint16)
        image, alpha = list(image[::-1]), self.alpha  # blue, green, red
        if alpha is not None:
            alpha = np.divide(alpha, self.peak, dtype=np.float64).clip(0, 1)
            if self.written.get("extrasamples") == ["assocalpha"]:
                image = [x / np.maximum(alpha, 1e-6) for x in image]
            image = [*image * (3 // len(image)), alpha]
        # by channel, for memory's sake
        whole = [quantise(np.clip(x, 0, 1), dtype, np.iinfo(dtype).max) for x in image]
        return np.dstack(whole)

    def inside(self, place):
        """Return a part of it, by slices of (C, H, W)."""
        alpha = None if self.alpha is None else self.alpha[place[1:]]
        return self._replace(image=np.ascontiguousarray(self.image[place]), alpha=alpha)


def ends_of(image):
    """Return what black and white are: 0, 1, or for values beyond them the extremes."""
    low, high = float(image.min()), float(image.max())
    if low >= 0 and high <= 1:
        return 0.0, 1.0
    return low, high if high > low else low + 1


def quantise(image, dtype, peak):
    """Turn values, of which 1 stands for the peak, into numbers of a type.

    Integers are rounded, and clipped to the type's range.
    """
    numbers = np.asarray(image, np.float64) * peak
    if dtype.kind in "ui":
        numbers = np.rint(numbers).clip(np.iinfo(dtype).min, peak)
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
    pixels, stored, bits, written = read_pixels(path)
    height, width = pixels.shape[:2]
    if crop:
        top, left = max(0, height - crop) // 2, max(0, width - crop) // 2
        pixels = pixels[top : top + crop, left : left + crop]
    dtype, wide = pixels.dtype, pixels.dtype.itemsize > 2 and pixels.dtype != np.float32
    reason = unusable(pixels, suffix in JPEG)
    if reason:
        raise InputError(f"{path}: {reason}")
    color, alpha = pixels[..., :stored], pixels[..., stored:]
    alpha = alpha[..., 0] if alpha.size else None
    if (color == color[..., :1]).all():
        color = color[..., :1]
    peak = {"u": 2**bits - 1, "i": 2 ** (bits - 1) - 1, "f": 1}[dtype.kind]
    image = color.transpose(2, 0, 1)
    image = np.divide(image, peak, dtype=np.float64 if wide else np.float32, order="C")
    whole = describe(len(image), height, width)
    return Picture(image, whole, alpha, dtype, peak, stored, suffix, written)


def unusable(pixels, jpeg):
    """Say why a file's pixels (H, W, samples) cannot be restored; None where they can."""
    height, width, samples = pixels.shape
    if pixels.dtype.kind not in "uif" or pixels.dtype.itemsize > 8:
        return f"{pixels.dtype} pixels; convert it to 8 or 16 bits"
    if pixels.dtype.kind in "ui" and pixels.dtype.itemsize > 4:
        return f"{pixels.dtype} pixels; convert it to 32 bits or less"
    if jpeg and (pixels.dtype != np.uint8 or samples == 4):
        return "no JPEG, whatever its name says; rename it"
    if min(height, width) < SMALLEST_SIDE:
        return f"{width}x{height} pixels; a side needs {SMALLEST_SIDE} or more"
    if not np.isfinite(pixels).all():
        return "it holds NaN or infinite pixels"
    return None


def read_pixels(path):
    """Read an image file's pixels as they are.

    Returns:
        Its pixels, (H, W, samples), in the file's own type; how many of the samples are
        colours, red, green and blue; the bits of a sample; what the encoder is told.
    """
    if not is_utf8(path):
        raise InputError(f"{path}: a file name that is not UTF-8; rename it")
    suffix = (stack_of(path) or path).suffix.lower()
    return (read_tiff if suffix in TIFF else read_plain)(path)


@contextmanager
def readable(path):
    """Turn what a decoder says of a damaged file into an InputError."""
    try:
        yield
    except (InputError, FileNotFoundError, PermissionError):
        raise
    except Exception as error:  # noqa: BLE001 - a damaged file fails in many ways
        raise InputError(
            f"{path} is damaged, or not a PNG, JPEG or TIFF image: {first_line(error)}"
        ) from None


def refuse_size(path, height, width):
    """Raise InputError for more pixels than a plane may have."""
    if height * width > LARGEST:
        raise InputError(f"{path}: over 33 million pixels; cut a part out of it")


def read_plain(path):
    """Read a PNG or JPEG, turned upright: see read_pixels."""
    with readable(path):
        data = np.fromfile(path, np.uint8)
        try:
            pixels, *found = cv2.imdecodeWithMetadata(data, cv2.IMREAD_UNCHANGED)
        except cv2.error as error:
            if "CV_IO_MAX_IMAGE" in str(error):
                refuse_size(path, LARGEST, 2)
            pixels = None
        if pixels is None:
            raise InputError(f"{path} is damaged, or not a PNG, JPEG or TIFF image")
        refuse_size(path, *pixels.shape[:2])
        chunks, lost = dict(png_chunks(data.tobytes())), []
        if b"IHDR" in chunks:
            width, height, depth = struct.unpack(">IIB", chunks[b"IHDR"][:9])
            kind = (height, width), np.dtype(np.uint16 if depth > 8 else np.uint8)
            if (pixels.shape[:2], pixels.dtype) != kind:
                raise InputError(f"{path}: pixels of another size than the file names")
            lost = [told for chunk, told in UNWRITTEN.items() if chunk in chunks]
        elif data[6:10].tobytes() == b"JFIF" and data[13]:
            lost = ["dpi"]
        pixels = pixels.reshape(*pixels.shape[:2], -1)
        if pixels.shape[2] == 1 and b"tRNS" in chunks:
            (clear,) = struct.unpack(">H", chunks[b"tRNS"])
            clear *= 255 // (2**depth - 1) if depth < 8 else 1
            alpha = np.where(pixels == clear, 0, np.iinfo(pixels.dtype).max)
            pixels = np.concatenate([*[pixels] * 3, alpha.astype(pixels.dtype)], 2)
        metadata = dict(zip(map(int, found[0]), map(np.ravel, found[1])))
        pixels = turn_upright(pixels, metadata)
    order = [2, 1, 0, 3][: pixels.shape[2]] if pixels.shape[2] > 2 else [0]
    blobs = {}
    for kind, blob in metadata.items():  # but for a damaged one
        if encode(".png", pixels[:1, :1], {"blobs": {kind: blob}}):
            blobs[kind] = blob
    written = {"blobs": blobs, "lost": lost}
    return pixels[..., order], min(len(order), 3), 8 * pixels.itemsize, written


def png_chunks(data):
    """Yield the chunks of a PNG file's bytes: their types and contents."""
    at = 8
    while data.startswith(b"\x89PNG") and at + 8 <= len(data):
        size, kind = struct.unpack(">I4s", data[at : at + 8])
        yield kind, data[at + 8 : at + 8 + size]
        at += size + 12


def turn_upright(pixels, metadata):
    """Turn pixels (H, W, samples) as their EXIF says, which then says upright."""
    turned = 1
    with suppress(Exception):  # none, or damaged
        exif = io.BytesIO(metadata[cv2.IMAGE_METADATA_EXIF].tobytes())
        with tifffile.TiffFile(exif, mode="r+") as tags:
            turned = tags.pages[0].tags[ORIENTATION].value
            tags.pages[0].tags[ORIENTATION].overwrite(1)
        metadata[cv2.IMAGE_METADATA_EXIF] = np.frombuffer(exif.getvalue(), np.uint8)
    pixels = pixels.swapaxes(0, 1) if turned in (5, 6, 7, 8) else pixels
    pixels = pixels[:, ::-1] if turned in (2, 3, 6, 7) else pixels
    return np.ascontiguousarray(pixels[::-1] if turned in (3, 4, 7, 8) else pixels)


def encode(suffix, pixels, written):
    """Return an image file's bytes, None where they cannot be made.

    Args:
        suffix: of the format.
        pixels: as OpenCV has them.
        written: what else the file holds: `blobs`, OpenCV's kind -> bytes; iccprofile.
    """
    metadata = dict(written.get("blobs", {}))
    if "iccprofile" in written:  # a TIFF's
        metadata[cv2.IMAGE_METADATA_ICCP] = np.frombuffer(written["iccprofile"], "u1")
    # Known pixels of a colour JPEG come back as they are: no chroma is left out.
    best = [cv2.IMWRITE_JPEG_QUALITY, 100, cv2.IMWRITE_JPEG_SAMPLING_FACTOR]
    best = [*best, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444] if suffix in JPEG else []
    pixels = np.ascontiguousarray(pixels)
    with suppress(cv2.error):
        kept = list(metadata), list(metadata.values())
        made, data = cv2.imencodeWithMetadata(suffix, pixels, *kept, best)
        return data.tobytes() if made else None
    return None


def stack_of(path):
    """Return the TIFF file that a plane's path, such as cells.tif/007, is in, else None."""
    return path.parent if path.name.isdecimal() and path.parent.is_file() else None


def full_series(tiff):
    """List a TIFF's series and how many planes each has, without thumbnails."""
    full = [series for series in tiff.series if not series.keyframe.is_reduced]
    sizes = [math.prod(s.shape) // max(1, math.prod(s.keyframe.shape)) for s in full]
    return list(zip(full, sizes))


def planes(path):
    """List the planes of a TIFF file that has several; else the file itself."""
    count = 1
    if path.suffix.lower() in TIFF and is_utf8(path):
        with suppress(Exception), tifffile.TiffFile(path) as tiff:  # reading says why
            series = full_series(tiff)
            if sum(n for _, n in series) <= path.stat().st_size:  # each has a byte
                count = sum(n for _, n in series)
    numbers = (f"{plane:0{len(str(count))}d}" for plane in range(1, count + 1))
    return [path / number for number in numbers] if count > 1 else [path]


def read_tiff(path):
    """Read a TIFF file, or a plane of one: see read_pixels."""
    stack = stack_of(path)
    with readable(path), tifffile.TiffFile(stack or path) as tiff:
        series, number = full_series(tiff), int(path.name) - 1 if stack else 0
        count = sum(n for _, n in series)
        if count > 1 and not stack:
            raise InputError(f"{path}: {count} planes; save the one to use by itself")
        for one, n in series:
            if number < n:
                break
            number -= n
        page = one.keyframe
        written = tiff_arguments(path, one, {} if stack else tiff_metadata(tiff, one))
        pixels = read_plane(path, tiff, one, number)
        if page.photometric == 3 and written["photometric"] == "rgb":
            pixels = (page.colormap[:, pixels] >> 8).astype(np.uint8)
        if page.axes == "SYX" or pixels.ndim == 3 and page.photometric == 3:
            pixels = np.moveaxis(pixels, 0, 2)
        pixels = pixels.reshape(*pixels.shape[:2], -1)
    colours = 3 if written["photometric"] == "rgb" else 1
    bits = written.get("bitspersample", 8 * pixels.itemsize)
    return pixels, colours, bits, written


def read_plane(path, tiff, series, number):
    """Read a plane of a series, whose shape and type are what the file says."""
    page, size = series.keyframe, tiff.filehandle.size
    height, width = (page.shape[page.axes.index(axis)] for axis in "YX")
    refuse_size(path, height, width)
    if (
        series.dataoffset is not None
    ):  # one array, perhaps with the tags of its first plane
        at = series.dataoffset + number * page.nbytes
        kind = page.dtype.newbyteorder(tiff.byteorder)
        pixels = np.memmap(
            path.parent if stack_of(path) else path, kind, "r", at, page.shape
        )
        pixels = np.array(pixels, page.dtype)
    else:
        found = series.pages[number]
        ends = np.add(found.dataoffsets, found.databytecounts)
        if found.parent is tiff and max(ends) > size:
            raise InputError(f"{path} is damaged: it ends before its pixels do")
        pixels = found.asarray()
    if (pixels.shape, pixels.dtype) != (page.shape, page.dtype):
        raise InputError(f"{path}: pixels of another size or type than the file names")
    return pixels


def tiff_arguments(path, series, more):
    """Return what the writer is told, to write the like of a series, or of a plane of it.

    Args:
        more: what it is told besides, of a whole file.

    Raises:
        InputError: pixels of a kind that cannot be restored.
    """
    page = series.keyframe
    compressed = page.photometric == 6 and page.compression in (6, 7)  # JPEG, as RGB
    kind = 2 if compressed else page.photometric
    if kind not in COLOURS or page.axes not in ("YX", "YXS", "SYX"):
        name = getattr(page.photometric, "name", page.photometric)
        raise InputError(
            f"{path}: {name} pixels, {page.axes}; convert it to gray or RGB"
        )
    name, colours = COLOURS[kind]
    if kind == 3 and not page.is_imagej:  # whose numbers are data, and colours a view
        name, colours = "rgb", 1
    extra = page.samplesperpixel - colours
    alphas = [ALPHAS.get(int(x), "unspecified") for x in page.extrasamples]
    if extra > 1 or (extra and colours == 1 and alphas[:1] in ([], ["unspecified"])):
        raise InputError(
            f"{path}: {page.samplesperpixel} samples; gray or RGB is needed"
        )
    told = {"photometric": name, "metadata": None} | more
    if extra:
        told["extrasamples"] = alphas or ["unspecified"]
    if page.bitspersample < 8 * page.dtype.itemsize:
        told["bitspersample"] = page.bitspersample
    if name == "palette":
        told["colormap"] = page.colormap
    if page.iccprofile:
        told["iccprofile"] = page.iccprofile
    if 282 in page.tags:
        told |= {"resolution": page.resolution, "resolutionunit": page.resolutionunit}
    if ORIENTATION in page.tags:
        turned = page.tags[ORIENTATION].value
        told["extratags"] = [(ORIENTATION, "H", 1, turned, True)]
    return told


def tiff_metadata(tiff, series):
    """Return what ImageJ's and OME's files, and tifffile's, say of axes and their units."""
    axes = series.axes.replace("SYX", "YXS")
    if tiff.is_imagej:
        made = ("ImageJ", "images", "channels", "slices", "frames", "hyperstack")
        kept = {k: v for k, v in tiff.imagej_metadata.items() if k not in made}
        return {"opened": {"imagej": True}, "metadata": kept | {"axes": axes}}
    if tiff.is_ome:
        images = tifffile.xml2dict(tiff.ome_metadata)["OME"]["Image"]
        image = images if isinstance(images, dict) else images[series.index]
        units = ("PhysicalSize", "TimeIncrement")
        kept = {k: v for k, v in image["Pixels"].items() if k.startswith(units)}
        channels = image["Pixels"].get("Channel", [])
        channels = channels if isinstance(channels, list) else [channels]
        names = [channel.get("Name") for channel in channels]
        kept |= {"Channel": {"Name": names}} if all(names) and names else {}
        return {"opened": {"ome": True}, "metadata": kept | {"axes": axes}}
    if tiff.is_shaped:
        return {"metadata": {"axes": axes} if "Q" not in axes else {}}
    text = series.keyframe.description
    return {"description": text} if text.isascii() and text else {}


def write_tiff(path, series):
    """Write series of planes as a TIFF file.

    Args:
        series: for each its planes, an iterable; its shape; its type; the arguments.
    """
    total = sum(math.prod(shape) * dtype.itemsize for _, shape, dtype, _ in series)
    opened = series[0][3].get("opened", {})
    large = total > 4e9 and not opened  # more than plain TIFF holds
    with (
        atomic_file(path) as file,
        tifffile.TiffWriter(file, bigtiff=large, **opened) as tiff,
    ):
        for pages, shape, dtype, told in series:
            told = {k: v for k, v in told.items() if k != "opened"}
            tiff.write(iter(pages), shape=shape, dtype=dtype, **told)


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
            told = tiff_arguments(stack, one, tiff_metadata(tiff, one))
            own = list(itertools.islice(files, count))
            first = tifffile.imread(own[0])
            outer = one.shape[: len(one.shape) - len(one.keyframe.shape)]
            pixels = map(tifffile.imread, own)  # one after the other
            series.append((pixels, (*outer, *first.shape), first.dtype, told))
        write_tiff(path, series)


def result_names(path):
    """Return the names of an image's folder and of the image, in the results.

    A page's folder is its stack's.
    """
    stack = stack_of(path)
    if stack:
        return "/".join(result_names(stack)), path.name
    if path.parent == Path(skimage.data.data_dir):
        return "skimage", path.stem
    return path.parent.resolve().name or "root", path.name


def contents_name(path):
    """Name a file in a results folder: its stem, and what tells other contents."""
    contents = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    return f"{Path(path).stem}-{contents[:8]}"


def digest(arrays):
    """Return what tells arrays or CPU tensors from others; None where there are none."""
    if arrays is None:
        return None
    total = hashlib.sha256()
    for array in arrays:
        total.update(np.ascontiguousarray(array))
    return total.hexdigest()


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


# --- noise and scores ----------------------------------------------------------------


def gaussian_noise(shape, sigma, seed):
    """White Gaussian noise, float32 on the [0, 1] scale, from the seed and shape alone.

    Args:
        shape: (C, H, W).
        sigma: standard deviation on the 0-255 scale.
        seed: natural number.
    """
    generator, noise = np.random.default_rng(seed), np.empty(shape, np.float32)
    for channel in noise:  # for memory's sake: draws are float64
        channel[:] = generator.standard_normal(shape[1:]) * (sigma / 255)
    return noise


def score(image, clean, ends=(0.0, 1.0)):
    """PSNR in dB and SSIM (Wang et al. 2004) of an image (C, H, W).

    Args:
        clean: the reference, of the same shape.
        ends: what its peak is the distance of; the image is clipped to 0 and 1, and to no
            others.
    """
    height, sums, rows, peak = image.shape[1], np.zeros(2), 0, ends[1] - ends[0]
    wang = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}

    def part(x, rows):
        clipped = np.clip(x[:, rows], *ends) if ends == (0, 1) else x[:, rows]
        return clipped.astype(np.float64) / peak

    for top in range(0, height, SLAB):  # for memory's sake
        inner = slice(top, min(top + SLAB, height))
        sums[0] += ((part(image, inner) - part(clean, inner)) ** 2).mean((0, 2)).sum()
        # SSIM's mean leaves out what lies within its window's reach of an edge.
        around = slice(top, min(top + SLAB + 2 * SSIM_REACH, height))
        if around.stop - top > 2 * SSIM_REACH:
            pair = part(image, around), part(clean, around)
            ssim = structural_similarity(*pair, data_range=1, channel_axis=0, **wang)
            sums[1] += ssim * (around.stop - top - 2 * SSIM_REACH)
            rows += around.stop - top - 2 * SSIM_REACH
    with np.errstate(divide="ignore"):
        return float(-10 * np.log10(sums[0] / height)), float(sums[1] / rows)


# --- one image -----------------------------------------------------------------------

OWN_FILES = ["noisy.png", "noise.mat", "blurred.png", "kernel.mat", "checkpoint*.pt"]
OWN_FILES += ["error.mat", "Self2Self-*.png", "restored.*", "comparison.png"]
OWN_FILES += ["uncertainty.png"]
COLUMNS = ("step", "loss", "psnr", "ssim", "ensemble_psnr", "seconds")
CHECKPOINT_FORMAT = 6


class Result:
    """One image: its picture, its scores, and the files in its results folder.

    Args:
        path: the image file.
        folder: where its results go.
        args: the options' values.
        settings: those of them that decide the restored pixels.
    """

    def __init__(self, path, folder, args, settings):
        self.path, self.folder, self.args, self.settings = path, folder, args, settings
        self.name, self.size = "/".join(result_names(path)), "its size"
        self.rows, self.notes, self.seconds, self.saved_step = [], [], 0.0, None
        self.begun = False
        self.changed = False  # since the log was written
        self.restored = self.deviation = None  # of the last test

    def read(self, margin=((0, 0), (0, 0))):
        """Read the picture.

        Its pixels, or those of --reference, are what results are scored against; an
        --observed image without a reference is not scored.

        Args:
            margin: pixels above, below; left, right, of which nothing is observed but
                through a blur. An --observed picture gets them in addition, another one
                loses them: scores and files are of what they enclose.

        Returns:
            The pixels with their margin, (C, H, W), 1 standing for the file's peak, and 1
            where they are known, 0 where they are missing: (C, H, W) or (1, H, W), float32.
        """
        picture = read_picture(self.path, self.args.crop)
        image, known = picture.image, self._known(picture)
        if self.args.observed:
            image, known = (np.pad(x, [(0, 0), *margin]) for x in (image, known))
        ends = zip(margin, image.shape[1:])
        self.place = (slice(None), *(slice(a, n - b) for (a, b), n in ends))
        self.picture = picture if self.args.observed else picture.inside(self.place)
        self.eight_bits = picture.dtype == np.uint8 and picture.peak == 255
        height, width = self.picture.image.shape[1:]
        if min(height, width) < SMALLEST_SIDE:
            raise InputError(
                f"{self.path}: the PSF leaves {width}x{height} pixels; a side needs "
                f"{SMALLEST_SIDE} or more"
            )
        if picture.written.get("lost"):
            told = ", ".join(picture.written["lost"])
            tqdm.write(f"{self.path}: {told}: not carried through, the rest is")
        self.size = describe(*self.picture.image.shape)
        self.clean = None if self.args.observed else self.picture.image
        if self.args.reference:
            reference = read_picture(self.args.reference, self.args.crop)
            sizes = {x.whole.split()[0] for x in (reference, picture)}
            fits = len(reference.image) <= len(picture.image)
            if len(sizes) > 1 or reference.stored != picture.stored or not fits:
                raise InputError(
                    f"{self.args.reference}: {reference.whole}, but {self.path} is "
                    f"{self.picture.whole}"
                )
            self.clean = np.broadcast_to(reference.image, self.picture.image.shape)
        inner = np.zeros((1, *image.shape[1:]), np.float32)
        inner[self.place] = 1
        self.known = known * inner
        if not self.known.any():
            raise InputError(f"{self.path}: every pixel is missing")
        return image, self.known

    def _known(self, picture):
        """Return what --mask or --missing say is known of a picture: see `read`."""
        known = np.ones((1, *picture.image.shape[1:]), np.float32)
        if self.args.missing:  # other draws than the noise's
            draws = np.random.default_rng((self.args.seed, 1)).random(known.shape)
            known = (draws >= self.args.missing).astype(np.float32)
        if self.args.mask:
            mask = read_picture(self.args.mask, self.args.crop)
            if mask.suffix in JPEG:
                raise InputError(
                    f"{self.args.mask}: a JPEG's zeros are not exact; save it as PNG"
                )
            known = (mask.image != 0).astype(np.float32)
            known = known[:1] if (known == known[:1]).all() else known
            sizes = {x.whole.split()[0] for x in (picture, mask)}
            if len(sizes) > 1 or len(known) not in {1, len(picture.image)}:
                raise InputError(
                    f"{self.args.mask}: {mask.whole}, but {self.path} is "
                    f"{picture.whole}"
                )
        return known

    def begin(self, learner, observation, kernel=None, **simulated):
        """Make the folder ready, and write the observation and what it was made of.

        Earlier results of the same picture and settings are replaced, others set aside.
        With --resume the learner goes on from the checkpoint, where there is one.

        Args:
            learner: the network.Self2Self that has begun on the observation.
            observation: y, (C, H, W), not clipped, with its margin.
            kernel: the PSF (h, w), or None.
            simulated: noise and blurred, of y's shape, that an --observed image has not.

        Then `sigma` is the noise's, for fusing: simulated, given or estimated.
        """
        self.observation = observation = np.ascontiguousarray(observation[self.place])
        # Without noise and blur what is known is the result.
        self.exact = not (self.args.sigma or kernel is not None or self.known.all())
        self.sigma = self._noise_level()
        self.scores = self._score(observation)
        self.heading = f"{self.name}: {self.size}"
        if self.scores:
            self.heading += f", observation {self.scores[0]:.3f} dB"
        if self.scores and ends_of(self.clean) != (0, 1):
            self.heading += (
                " (peak: the reference's range, {1:.4g} less {0:.4g})".format(
                    *(self.picture.peak * end for end in ends_of(self.clean))
                )
            )
        if self.args.fuse == "on":
            self.heading += f", noise sigma {self.sigma:.4g}"
            if self.picture.dtype != np.uint8:
                own = self.sigma / 255 * self.picture.peak
                self.heading += f" ({own:.4g} in the file's numbers)"
        self.ends = ends_of(self.picture.image)
        arrays = {"image or noise": [observation]}
        arrays["reference"] = None if self.clean is None else [self.clean]
        sums = {key: digest(array) for key, array in arrays.items()}
        weights = digest(learner.initial_weights)
        others = {"initial weights": weights, "device": self.args.device.type}
        self.made_from = self.settings | sums | others
        if not (self.args.resume and self._load_checkpoint(learner)):
            make_room(self.folder, self.made_from, self.args.iteration)
        self._write_record()
        self.begun = self.changed = True
        if self.ends != (0, 1):
            low, high = (self.picture.peak * end for end in self.ends)
            tqdm.write(f"{self.name}: PNGs show {low:.4g} black and {high:.4g} white")
        self.picture.save(self.folder / "noisy.png", observation)
        if kernel is not None:
            save_mat(self.folder / "kernel.mat", "kernel", kernel)
        if not self.args.observed:
            save_mat(self.folder / "noise.mat", "noise", simulated["noise"][self.place])
        if not self.args.observed and "blurred" in simulated:
            blurred = simulated["blurred"][self.place]
            self.picture.save(self.folder / "blurred.png", blurred)
        self._announce(learner)
        self.saved_at = time.perf_counter()
        self.started = self.saved_at - self.seconds

    def _score(self, image):
        """Return an image's PSNR and SSIM, None where there is no clean one."""
        if self.clean is None:
            return None
        return score(image, self.clean, ends_of(self.clean))

    def _noise_level(self):
        """Return the noise's sigma: simulated, given, or where fusing asks, estimated."""
        estimated = self.args.observed and self.args.sigma and not self.args.noise_sigma
        if not (estimated and self.args.fuse == "on"):
            return self.args.noise_sigma or self.args.sigma
        sigma = estimate_sigma(self.observation)
        if sigma is None:
            raise InputError(f"{self.path}: no noise is found; --noise_sigma names it")
        return sigma

    def is_test(self, step):
        """Tell whether the ensemble is to be predicted after this step."""
        every = self.args.test_frequency
        return step > 0 and (step % every == 0 or step == self.args.iteration)

    def is_due(self, step):
        """Tell whether a checkpoint is to be saved after this step."""
        late = time.perf_counter() - self.saved_at > SAVE_EVERY
        return late or self.is_test(step)

    def add(self, learner, ensemble, fused=None, error=None):
        """Take a test into the log, and save its pictures.

        Args:
            learner: the network.Self2Self, which has just predicted.
            ensemble: the ensemble's mean, (C, H, W), with its margin.
            fused: that, fused with the observation, which then is the result.
            error: the fused one's predicted squared error, (C, H, W).
        """
        step, loss = learner.step, learner.mean_loss()
        ensemble, fused, error = (
            x if x is None else x[self.place] for x in (ensemble, fused, error)
        )
        if self.exact:
            ensemble, fused = (
                x if x is None else np.where(self.known, self.observation, x)
                for x in (ensemble, fused)
            )
        self.restored = ensemble if fused is None else fused
        peak = self.picture.peak
        self.deviation = peak * np.sqrt(learner.variance[self.place].mean(0))
        psnr, ssim = self._score(self.restored) or (None, None)
        plain, _ = self._score(ensemble) or (None, None)
        seconds = time.perf_counter() - self.started
        self.rows.append((step, loss, psnr, ssim, plain, seconds))
        self.changed = True
        if error is not None:
            save_mat(self.folder / "error.mat", "error", peak**2 * error)
        for name in (f"Self2Self-{step}.png", f"restored{self.picture.suffix}"):
            self.picture.save(self.folder / name, self.restored)
        write_atomically(self.folder / "uncertainty.png", uncertainty(self.deviation))
        panels = [("observation", self.observation, self.scores)]
        panels += [("restored", self.restored, (psnr, ssim))]
        panels += [] if self.clean is None else [("clean", self.clean, None)]
        ends = self.ends
        if self.picture.dtype != np.uint8:  # of a dark picture nothing would be seen
            ends = np.quantile(self.restored, (TAIL, 1 - TAIL))
        write_atomically(self.folder / "comparison.png", comparison(panels, ends))
        self._write_record()
        tqdm.write(f"{self.name}: {row_text(self.rows[-1])}")

    def start_over(self, note):
        """Drop the tests of a network that has died, and note what happened."""
        self.rows.clear()
        for file in (*self.folder.glob("Self2Self-*.png"), self.folder / "error.mat"):
            file.unlink(missing_ok=True)
        self.notes.append(note)
        self.changed = True
        tqdm.write(f"{self.name}: {note}")

    def finish(self, failed=None):
        """Mark the record: there is no more to come.

        Args:
            failed: why there is no more to come, where that is so.
        """
        if failed and not self.begun:
            return
        if not failed and (not self.rows or self.rows[-1][0] < self.args.iteration):
            raise FloatingPointError("the output is not finite; lower --lr")
        self.notes += [f"failed: {failed}"] if failed else []
        self.changed = True
        if self.rows:
            path = self.folder / f"restored{self.picture.suffix}"
            self._write_record(finished=not failed)
            print(path)

    def release(self):
        """Let go of the pixels, once the image is done: the log needs none."""
        self.picture = self.clean = self.known = self.observation = None
        self.restored = self.deviation = None

    def save_checkpoint(self, learner):
        """Save all that the coming steps and the results depend on."""
        state = {"format": CHECKPOINT_FORMAT, "made_from": self.made_from}
        state |= {"rows": self.rows, "notes": self.notes}
        state |= {"seconds": time.perf_counter() - self.started}
        for key, array in ("restored", self.restored), ("deviation", self.deviation):
            state[key] = torch.from_numpy(array) if self.rows else None
        with atomic_file(self.folder / "checkpoint.pt") as file:
            try:
                torch.save(state | {"learner": learner.state_dict()}, file)
            except RuntimeError:  # PyTorch's, which says "unexpected pos"
                raise OSError(None, "cannot be written; is the disk full?") from None
        self.saved_step, self.saved_at = learner.step, time.perf_counter()

    def _load_checkpoint(self, learner):
        """Go on from the checkpoint; tell whether there is one."""
        path = self.folder / "checkpoint.pt"
        if not path.exists():
            return False
        saved = read_checkpoint(path)
        was, now = saved["made_from"], self.made_from
        changed = [k for k in was.keys() | now.keys() if was.get(k) != now.get(k)]
        if changed:
            raise InputError(
                f"{path}: the checkpoint is of another "
                f"{', another '.join(sorted(changed))}; without --resume the run starts "
                "over"
            )
        step, self.rows = saved["learner"]["step"], list(map(tuple, saved["rows"]))
        if step > self.args.iteration and (not self.rows or step != self.rows[-1][0]):
            raise InputError(
                f"{self.name}: the checkpoint is of step {step} already, between "
                "two tests; a larger --iteration goes on from it"
            )
        learner.load_state_dict(saved["learner"])
        self.notes, self.seconds, self.saved_step = (
            saved["notes"],
            saved["seconds"],
            step,
        )
        if self.rows:
            self.restored = saved["restored"].numpy()
            self.deviation = saved["deviation"].numpy()
        return True

    def _announce(self, learner):
        """Name the image, and say how long it will take."""
        tqdm.write(self.heading)
        steps = self.args.iteration - learner.step
        if self.saved_step is not None:
            done = "going on from" if steps > 0 else "finished already, at"
            tqdm.write(f"{self.name}: {done} step {learner.step}")
        if steps > 0:
            tests = math.ceil(steps / self.args.test_frequency)
            planned = steps, tests, self.args.num_prediction, self.args.fuse == "on"
            seconds = learner.forecast(*planned)
            tqdm.write(f"{self.name}: {steps} steps take about {duration(seconds)}")

    def _write_record(self, finished=False):
        """Write what is known of this image as JSON."""
        record = {"name": self.name, "size": self.size, "finished": finished}
        record |= {"made_from": self.made_from, "iteration": self.args.iteration}
        record |= {"observation": self.scores, "columns": COLUMNS, "rows": self.rows}
        data = json.dumps(record, indent=1).encode()
        write_atomically(self.folder / "record.json", data)


def read_checkpoint(path):
    """Return what Result.save_checkpoint has written, on the CPU.

    Raises:
        InputError: the file is none; the text says why.
    """
    with suppress(Exception):  # a damaged file fails in many ways
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if saved["format"] == CHECKPOINT_FORMAT:
            return saved
    raise InputError(
        f"{path}: damaged, or no checkpoint of this version of the program; without it "
        "the run starts over"
    )


def make_room(folder, made_from, steps=0):
    """Remove a folder's results of the same pixels and settings, set others aside.

    Others are those of more steps, too.
    """
    if not any(folder.glob("[!.]*")):  # nothing but what a killed run was writing
        return
    same = False
    with suppress(OSError, ValueError, TypeError, KeyError):  # none, or not ours
        earlier = json.loads((folder / "record.json").read_text())
        same = (
            earlier["made_from"] == made_from and earlier.get("iteration", 0) <= steps
        )
    if not same:
        set_aside(folder)
        return
    tqdm.write(f"{folder}: replacing the earlier results")
    for file in itertools.chain.from_iterable(map(folder.glob, OWN_FILES)):
        file.unlink()


def set_aside(*paths):
    """Rename what stands at the paths to free names with one number, and say so."""

    def numbered(path, n):
        stem, suffix = (path.name, "") if path.is_dir() else (path.stem, path.suffix)
        return path.with_name(f"{stem}~{n}{suffix}")

    there = [path for path in paths if path.exists()]
    taken = (any(numbered(p, n).exists() for p in there) for n in itertools.count(1))
    n = 1 + next(n for n, is_taken in enumerate(taken) if not is_taken)
    for path in there:
        path.rename(numbered(path, n))
        tqdm.write(f"{path}: kept as {numbered(path, n)}")


# --- all images of a call ------------------------------------------------------------

SUMMARY = ("image", "size", "observation_psnr", "psnr", "ssim", "steps", "seconds")


class Run:
    """All images of one call of a script: which they are, the log, the exit status.

    What cannot be read or written, as far as it can be told now, exits with status 2.

    Args:
        args: the options' values.
        usual: what they are without flags; what differs stands in the folders' names.
        psf: the PSF's name, or None.
    """

    def __init__(self, args, usual, psf=None):
        self.args, self.results, self.failed = args, [], []
        self.stopped, self.bar, self.logged = None, None, False
        self.weights = {}  # number of channels -> those to begin with
        try:
            self._name_settings(usual, psf)
            self._name_logs()
            self.files = find_images(args.path)
            self._check()
            if args.init not in (None, "previous"):
                weights = read_checkpoint(args.init)["learner"]["weights"]
                self.weights[weights[0].shape[1]] = weights
        except (InputError, OSError) as error:
            sys.exit(fail(reason(error)))
        self.paths = self.files[self.rank :: self.world]
        counts = (
            Counter(filter(None, map(stack_of, x))) for x in (self.files, self.paths)
        )
        whole, ours = counts
        for stack, n in whole.items():
            print(f"{stack}: {n} planes, {ours[stack]} of them to restore")
        for path in list(self.paths) if len(self.files) > 1 else ():
            try:  # a bad one is better known before a long run
                read_picture(path, args.crop)
            except (InputError, OSError) as error:
                fail(reason(error))
                self.failed.append(path)
                self.paths.remove(path)

    def _name_settings(self, usual, psf):
        """Say what decides the restored pixels, as a dictionary and as a folder's name."""
        args = self.args
        told = {k: v for k, v in vars(args).items() if k not in IRRELEVANT + NAMED}
        if args.schedule == "constant":
            del told["iteration"]  # a longer run goes on from a shorter one
        named = {"observed": args.observed, "sigma": args.sigma, "psf": psf}
        if args.observed and args.sigma:
            del named["sigma"]  # nothing is added; 0 says that there is no noise
        parts = ["observed"] * args.observed
        parts += [f"sigma{args.sigma:g}"] * ("sigma" in named)
        mask = args.mask and contents_name(args.mask)
        parts += [f"mask-{mask}"] * bool(mask)
        parts += [psf, args.recipe] if psf else [args.recipe]
        init = args.init
        if init not in (None, "previous"):
            init = contents_name(init)
        self.settings = told | named | {"recipe": args.recipe, "mask": mask}
        self.settings |= {"init": init}
        for key, value in told.items():
            if value != usual[key]:
                parts += [f"{key}-{value}" if type(value) is str else f"{key}{value:g}"]
        parts += [f"init-{init}"] * bool(init)
        self.settings_name = "_".join(parts)

    def _name_logs(self):
        """Say where log, CSV, curves and totals go: no two processes write one file."""
        texts = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
        self.rank, self.world = (int(x) if x.isdecimal() else -1 for x in texts)
        if not 0 <= self.rank < self.world:
            raise InputError(f"RANK and WORLD_SIZE: {texts}; 0, 1 is one process")
        log = Path(self.args.log_path)
        if log.suffix in (".csv", ".png"):
            raise InputError(f"--log_path {log}: a text file, such as log.txt")
        stem = log.stem
        self.totals = log.with_name(f"{stem}-summary.csv")
        self.ends = [log.with_name(f"{stem}.rank{r}.done") for r in range(self.world)]
        stem += f".rank{self.rank}" if self.world > 1 else ""
        self.logs = [log.with_name(stem + end) for end in (log.suffix, ".csv", ".png")]

    def _check(self):
        """Raise InputError where a file would be written in another's place, or cannot."""
        args = self.args
        if self.world > 1 and args.init == "previous":
            raise InputError("--init previous goes with one process, not with several")
        if len(self.files) > 1 and args.reference:
            raise InputError("--reference goes with one image, not with several")
        for folder in (Path("images"), self.logs[0].parent):
            there = next(f for f in (folder, *folder.absolute().parents) if f.exists())
            if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
                raise InputError(f"{there}: make it a folder that can be written to")
        inputs = [stack_of(file) or file for file in self.files]
        inputs += [args.reference, args.mask, getattr(args, "kernel", None)]
        inputs += [None if args.init == "previous" else args.init]
        inputs = {Path(file).resolve() for file in inputs if file}
        for path in self.logs:
            if path.is_dir() or path.resolve() in inputs:
                raise InputError(f"--log_path: {path} is a folder or an input")
        for folder in map(self.folder, self.files):
            if any(path.is_file() for path in (folder, *folder.parents)):
                raise InputError(
                    f"{folder}: where results would go is a file; move it, or run from "
                    "another folder"
                )

    def initial_weights(self, channels):
        """Return what --init says a network of so many channels begins with, or None."""
        if (
            self.weights
            and self.args.init != "previous"
            and channels not in self.weights
        ):
            raise InputError(f"{self.args.init}: of a picture with other channels")
        return self.weights.get(channels)

    def keep_weights(self, learner):
        """With --init previous, let the next image begin where this one has ended."""
        if self.args.init == "previous":
            weights = learner.network_weights()
            self.weights[weights[0].shape[1]] = weights

    def folder(self, path):
        """Say where the results of an image go."""
        names = *result_names(path), self.args.model_type, self.settings_name
        return Path("images", *names)

    @contextmanager
    def image(self, path):
        """Give the Result of one image; report what goes wrong, so that the next goes on.

        Ctrl-C and SIGTERM stop the run after the step, at once the second time.
        """
        result = Result(path, self.folder(path), self.args, self.settings)
        self.results.append(result)
        signals = signal.SIGINT, signal.SIGTERM
        handlers = [(number, signal.signal(number, self._stop)) for number in signals]
        try:
            yield result
        except Exception as error:
            told = reason(error, result)
            if told is None:
                raise
            if result.rows:
                told += f"; the result of step {result.rows[-1][0]} is kept"
            fail(told)
            self.failed.append(path)
            with suppress(OSError):  # which may be what failed
                result.finish(failed=told)
        finally:
            with suppress(OSError):  # a full disk, which has been reported
                if result.begun:
                    self._write_log(curves=True)
            result.release()
            for number, handler in handlers:
                signal.signal(number, handler)

    def _stop(self, number, _):
        if self.stopped:
            fail("interrupted; --resume goes on from the last checkpoint")
            sys.exit(128 + number)
        self.stopped = number

    def advance(self, step):
        """Show the progress, log what is new, and end the run where it was told to stop.

        It ends once the step's checkpoint has been saved.

        Args:
            step: training steps done; 0 where the network has just started over.
        """
        result, steps = self.results[-1], self.args.iteration
        done = self.paths.index(result.path) * steps + step  # of all images
        if self.bar is None:
            counts = {"total": len(self.paths) * steps, "initial": done - 1}
            # None: no bar where stderr is a file, which it would fill
            self.bar = tqdm(unit="step", position=self.rank, disable=None, **counts)
        self.bar.set_description_str(result.name, refresh=False)
        self.bar.update(done - self.bar.n)
        if result.changed:
            self._write_log()
        if self.stopped and result.saved_step == step:
            command = shlex.join([*sys.argv, "--resume"])
            fail(f"{result.name}: stopped at step {step}; go on with: python {command}")
            sys.exit(128 + self.stopped)

    def finish(self):
        """Write and print the totals; return the exit status.

        That is 0, or where images failed 1, 2 if no training had begun. Of several
        processes the last one answers for all: torchrun would end the others at once
        when one has failed.
        """
        if self.bar is not None:
            self.bar.close()
        failed = list(map(str, self.failed))
        if failed and len(self.files) > 1:
            names = ", ".join(failed)
            fail(f"{len(failed)} of {len(self.files)} images failed: {names}")
        begun = self.world > 1 or any(result.begun for result in self.results)
        try:
            if self.world > 1:
                failed = self._failed_in_all(failed)
                if failed is None:
                    return 0
            files = [file for file in self.files if str(file) not in failed]
            finished = {file: self._finished(file) for file in files}
            self._write_totals(filter(None, finished.values()))
            for stack in dict.fromkeys(filter(None, map(stack_of, self.files))):
                found = {f: finished.get(f) for f in self.files if f.parent == stack}
                if all(found.values()):
                    self._write_stack(stack, found)
        except (InputError, OSError) as error:
            fail(reason(error))
            return 1
        return (1 if begun else 2) if failed else 0

    def _failed_in_all(self, failed):
        """Say which images failed here; return those of all processes, once all say it.

        Until then None. What they said is removed, so that no later run reads it.
        """
        write_atomically(self.ends[self.rank], json.dumps(failed).encode())
        try:
            told = [json.loads(end.read_text()) for end in self.ends]
        except (FileNotFoundError, ValueError):  # not done, or no mark of ours
            return None
        for end in self.ends:
            end.unlink(missing_ok=True)
        return list(itertools.chain.from_iterable(told))

    def _finished(self, file):
        """Return an image's record where it is finished, else None."""
        with suppress(OSError, ValueError, KeyError):  # none, or not ours
            record = json.loads((self.folder(file) / "record.json").read_text())
            finished = record["finished"] and record["rows"] and record["made_from"]
            return record if finished else None

    def _write_stack(self, stack, records):
        """Join a stack's restored pages, all of which are finished.

        Args:
            stack: the TIFF file.
            records: of its pages, path -> what _finished returned.
        """
        folder, key = self.folder(stack), [r["made_from"] for r in records.values()]
        make_room(folder, key)
        data = json.dumps({"made_from": key}).encode()
        write_atomically(folder / "record.json", data)
        path = folder / f"restored{stack.suffix.lower()}"
        join_planes(path, stack, [self.folder(p) / path.name for p in records])
        print(path)

    def _write_totals(self, records):
        """Write and print a line for every image that is finished, and the average."""
        table = []
        for record in records:
            step, _, psnr, ssim, _, seconds = record["rows"][-1]
            before = (record["observation"] or [None])[0]
            scores = record["size"], before, psnr, ssim, step, round(seconds, 1)
            table.append((record["name"], *scores))
        if not table:
            return
        scored = [row[2:5] for row in table if row[3] is not None]
        means = np.mean(scored, 0).tolist() if scored else [None] * 3
        table.append(("average", f"of {len(table)}", *means, None, None))
        write_atomically(self.totals, csv_text([SUMMARY, *table]))
        for row in [SUMMARY, *table]:
            cells = (f"{c:.3f}" if isinstance(c, float) else c or "-" for c in row[1:])
            print(f"{row[0]:32s}", *(f"{cell:>16}" for cell in cells))

    def _write_log(self, curves=False):
        """Write the log, its CSV and, where asked for, the curves."""
        values = vars(self.args).items()
        header = "\n".join(f"{k}: {v}" for k, v in values if k != "resume")
        log, table, picture = self.logs
        if not self.logged:
            self.logged = True
            self.ends[self.rank].unlink(missing_ok=True)
            ours = log.exists() and log.read_bytes().startswith(header.encode())
            if not (self.args.resume and ours):
                set_aside(*self.logs, *[self.totals] * (self.rank == 0))
        lines, rows = [header], [("image", *COLUMNS)]
        begun = [result for result in self.results if result.begun]
        for result in begun:
            lines += ["", result.heading, *result.notes, *map(row_text, result.rows)]
            rows += [(result.name, *row) for row in result.rows]
            result.changed = False
        write_atomically(log, "\n".join([*lines, ""]).encode())
        write_atomically(table, csv_text(rows))
        if curves:
            write_atomically(picture, plot(begun))


def reason(error, result=None):
    """Say in a line what went wrong; None where it is a mistake of this program."""
    if isinstance(error, OSError):
        named = f"{error.filename}: " if error.filename else ""
        return f"{named}{error.strerror or error}"
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, FloatingPointError):
        return f"{result.path}: {error}"
    if any(map(is_out_of_memory, chain(error))):
        return (
            f"{result.path}: out of memory at {result.size}; a --crop, a smaller --bs, "
            "--fuse off or --device cpu needs less"
        )
    return None


def chain(error):
    """Yield an error and those during whose handling it was raised.

    Where memory ends while a CUDA graph is captured, PyTorch raises another error on top.
    """
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def is_out_of_memory(error):
    """Tell whether an error, of PyTorch's or a library below it, says so."""
    if isinstance(error, RuntimeError):
        words = ("out of memory", "t allocate", "ALLOC_FAILED")
        return any(word in str(error) for word in words)
    return isinstance(error, MemoryError)


def first_line(error):
    """Return the first line of an error's text, or what kind it is."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def csv_text(rows):
    """Return rows of cells as a CSV file's bytes."""
    buffer = io.StringIO()
    csv.writer(buffer).writerows(rows)
    return buffer.getvalue().encode()


# --- for a person's eyes -------------------------------------------------------------


def row_text(row):
    """Write a test as a line of the log."""
    step, loss, psnr, ssim, ensemble, _ = row
    told = f"step {step:7d}  loss {loss:.6f}"
    if psnr is not None:
        told += f"  PSNR {psnr:.3f} dB  SSIM {ssim:.4f}"
    if ensemble != psnr:
        told += f"  plain ensemble {ensemble:.3f} dB"
    return told


def duration(seconds):
    """Write a time for a person."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def drawn(figure):
    """Return a figure as a PNG file's bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def comparison(panels, ends):
    """Draw labelled images side by side; return the PNG's bytes.

    Args:
        ends: the values that are black and white.
        panels: (label, image (C, H, W), (PSNR, SSIM) or None) each.
    """
    _, height, width = panels[0][1].shape
    every = math.ceil(max(height, width) / PANEL)
    size = len(panels) * 4, 4 * height / width + 0.4
    dpi = max(320, width // every) / 4
    figure = Figure(figsize=size, dpi=dpi)
    edges = {"left": 0, "right": 1, "bottom": 0, "top": 1 - 0.4 / size[1]}
    row = figure.subplots(
        1, len(panels), gridspec_kw=edges | {"wspace": 0.02}, subplot_kw=BARE
    )
    for axes, (label, image, scores) in zip(row, panels):
        pixels = (image[:, ::every, ::every] - ends[0]) / max(ends[1] - ends[0], 1e-30)
        pixels = pixels.clip(0, 1).transpose(1, 2, 0)
        axes.imshow(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))
        psnr = scores and scores[0] is not None and f" {scores[0]:.2f} dB"
        axes.set_title(label + (psnr or ""))
    return drawn(figure)


def uncertainty(deviation):
    """Draw the predictions' standard deviation (H, W), file's numbers, as a PNG's bytes."""
    height, width = deviation.shape
    every = math.ceil(max(height, width) / PANEL)
    figure = Figure(figsize=(6, max(5 * height / width, 4)), dpi=160)
    edges = {"left": 0.02, "right": 0.88, "bottom": 0.03, "top": 0.97}
    axes, scale = figure.subplots(
        1, 2, width_ratios=(30, 1), gridspec_kw=edges | {"wspace": 0.05}
    )
    axes.set(**BARE)
    shown = axes.imshow(deviation[::every, ::every], cmap="magma", vmin=0)
    label = "standard deviation of the predictions, in the file's numbers"
    figure.colorbar(shown, scale, label=label)
    return drawn(figure)


def plot(results):
    """Draw loss and PSNR over the steps, a line per image; return the PNG's bytes."""
    figure = Figure(figsize=(9, 4), dpi=120)
    axes = figure.subplots(1, 2, gridspec_kw={"left": 0.09, "right": 0.98})
    for column, title in enumerate(("loss", "PSNR (dB)"), 1):
        for result in results:
            points = [(row[0], row[column]) for row in result.rows]
            if points and points[0][1] is not None:
                axes[column - 1].plot(*zip(*points), marker=".", label=result.name)
        axes[column - 1].set(xlabel="step", ylabel=title)
        axes[column - 1].grid(alpha=0.3)
    if 0 < len(axes[0].lines) <= 12:
        axes[0].legend(fontsize="small")
    return drawn(figure)
