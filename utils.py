"""What both scripts need around the method, in rooms that use only those above them.

Errors and files; options; pictures in and out; noise and scores; drawing; Result, the
files of one image; Run, all images of one call, with their log and exit status.
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
import re
import signal
import sys
import threading
import time
import warnings
import zlib
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import asdict
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
from tqdm import tqdm

# What libraries say of damaged files and odd names is said by us, in one line.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
logging.getLogger("tifffile").setLevel(logging.CRITICAL + 1)
warnings.filterwarnings("ignore", "Glyph .* missing")
warnings.filterwarnings("ignore", module="PIL")
Image.MAX_IMAGE_PIXELS = None  # refuse_size knows better
PngImagePlugin.MAX_TEXT_CHUNK = 2**24  # bytes; a scanner's colour profile has millions

# --- errors and files ----------------------------------------------------------------


class InputError(Exception):
    """Something that the user gave cannot be used; the text names it and the cure."""


def report(error):
    """Say on stderr, in one line, what cannot be done."""
    tqdm.write(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)


def reason(error, path="", size=""):
    """Say in a line what went wrong; None where it is a mistake of this program.

    Args:
        path, size: of the image at hand.
    """
    if isinstance(error, OSError):
        named = f"{error.filename}: " if error.filename else ""
        return f"{named}{error.strerror or error}"
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, FloatingPointError):
        return f"{path}: {error}"
    if is_out_of_memory(error):
        return (
            f"{path}: out of memory at {size}; a --crop, a smaller --bs, --fuse off or "
            "--device cpu needs less"
        )
    return None


def is_out_of_memory(error):
    """Tell whether an error says so, of PyTorch, or one during whose handling it was raised.

    Where memory ends while a CUDA graph is captured, PyTorch raises another error on top.
    """
    words = ("out of memory", "t allocate", "ALLOC_FAILED")
    says = isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    below = error.__cause__ or error.__context__
    return says or isinstance(error, MemoryError) or (below and is_out_of_memory(below))


def first_line(error):
    """Return the first line of an error's text, or what kind it is."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def is_utf8(path):
    """Tell whether a name can be written in a log."""
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
        message = error.strerror or str(error)
        raise OSError(error.errno, message, str(path)) from None
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


def csv_text(rows):
    """Return rows of cells as a CSV file's bytes."""
    buffer = io.StringIO()
    csv.writer(buffer).writerows(rows)
    return buffer.getvalue().encode()


def digest(arrays):
    """Return what tells arrays or CPU tensors from others; None where there are none."""
    if arrays is None:
        return None
    total = hashlib.sha256()
    for array in arrays:
        total.update(np.ascontiguousarray(array))
    return total.hexdigest()


def sources_digest(root=Path(__file__).parent):
    """Return what tells this program from an edited one: of all sources below a folder.

    Those are the scripts, the modules beside them and network/.
    """
    total = hashlib.sha256()
    for path in sorted([*root.glob("*.py"), *root.glob("network/**/*.py")]):
        for part in (str(path.relative_to(root)).encode(), path.read_bytes()):
            total.update(b"%d:" % len(part) + part)
    return total.hexdigest()


def contents_name(path):
    """Name a file in a results folder: its stem, and what tells other contents."""
    contents = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    return f"{Path(path).stem[:60]}-{contents[:8]}"


# --- options -------------------------------------------------------------------------


def number(kind, low, described, high=math.inf, include_low=True):
    """Make an argparse type: a finite number from low up to, not including, high."""

    def convert(value):
        try:
            x = kind(value)
        except ValueError:
            x = math.nan
        if not (low <= x < high and (include_low or x != low)):
            raise argparse.ArgumentTypeError(f"{value!r} is not {described}")
        return x

    return convert


def text(value):
    """An argparse type: what can be written in a log, and passed to OpenCV."""
    if not value or not is_utf8(value):
        raise argparse.ArgumentTypeError(f"{value!r} is empty or not UTF-8")
    return value


def device_name(value):
    """An argparse type: auto, cpu, cuda, cuda:N or mps. Opens nothing."""
    if not re.fullmatch(r"auto|cpu|mps|cuda(:(0|[1-9]\d*))?", value, re.ASCII):
        raise argparse.ArgumentTypeError(NO_DEVICE.format(value))
    return value


def open_device(value):
    """Turn a device's name into a torch.device that works.

    Of several processes on a machine (LOCAL_RANK, else RANK) each takes a GPU of its own.

    Raises:
        InputError: PyTorch cannot use it here.
    """
    import torch  # late: --help has no need of it, and it takes seconds

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
        torch.ones(1, device=device).add(1).item()  # without kernels it fails
        return device
    except (AssertionError, RuntimeError, ValueError) as error:  # PyTorch has them all
        if auto:
            print(f"This PyTorch cannot use {value} ({first_line(error)}): on the CPU.")
            return torch.device("cpu")
    raise InputError(f"argument --device: {NO_DEVICE.format(value)}")


NO_DEVICE = (
    "no device {!r} that this PyTorch can use on this machine; there are auto, cpu, "
    "cuda, cuda:N, mps"
)
COUNT = number(int, 1, "a whole number from 1 to 1e9", 10**9 + 1)
NATURAL = number(int, 0, "a whole number from 0 to 1e9", 10**9 + 1)
NOT_NEGATIVE = number(float, 0, "a number from 0 to 1e30", 1e30)  # squares are finite
POSITIVE = number(float, 0, "a number above 0, below 1e38", 1e38, include_low=False)
RATE = number(float, 0, "a rate in [0, 1)", 1)
SEED = number(int, 0, "a whole number from 0 to 2**32 - 1", 2**32)
SIDE = number(int, 1, "a whole number from 1 to 4096", 4097)
PSF_SIGMA = number(float, 1e-3, "a number from 0.001")
WIDTH = number(float, 0, "a share above 0, up to 1", math.nextafter(1, 2), False)

# Options of either script: type or choices, help. Default values stand in the scripts;
# where they are None the recipe or the picture decides.
OPTIONS = {
    "path": (text, "image file, folder, or name of an image of scikit-image"),
    "crop": (NATURAL, "side of a centre crop, pixels; 0: the whole image"),
    "sigma": (NOT_NEGATIVE, "noise to add: standard deviation, 0-255 scale"),
    "observed": (bool, "the image is degraded already: simulate nothing"),
    "noise_sigma": (NOT_NEGATIVE, "an --observed image's white noise, 0-255 scale"),
    "reference": (text, "clean image to score an --observed one against"),
    "mask": (text, "image file, 0 or transparent where a pixel is missing"),
    "missing": (RATE, "share of the pixels to hide, from the seed, to score them"),
    "kernel_size": (SIDE, "side of the PSF, pixels (Gaussian 15, estimated 31)"),
    "kernel_sigma": (PSF_SIGMA, "standard deviation of the Gaussian PSF, pixels (1.0)"),
    "kernel": (
        text,
        (
            "file of the PSF (.mat, .npy, image), for a convolution: if the result rings, "
            "turn it by 180 degrees; estimate: it is found"
        ),
    ),
    "boundary": (("wrap", "valid"), "wrap: a circular blur; valid: a camera's"),
    "recipe": (None, "fast: 500 steps; paper: as published, 150,000"),
    "drop_rate": (RATE, "p of the Bernoulli mask and of the decoder's dropout"),
    "iteration": (COUNT, "training steps"),
    "lr": (POSITIVE, "learning rate"),
    "width": (WIDTH, "share of the paper's channels in the layers that take most time"),
    "optimizer": (("adam", "adamw", "muon"), "adamw has PyTorch's weight decay, 0.01"),
    "window": (NATURAL, "side of the training's windows, pixels; 0: the whole picture"),
    "precision": (("auto", "float32", "bfloat16"), "of feature maps"),
    "fuse": (("on", "off"), "give back what the residual holds besides noise"),
    "bs": (COUNT, "Bernoulli samples of the observation per step"),
    "real_noise": (bool, "against a camera's noise: steps see the image drawn anew"),
    "seed": (SEED, "of noise, weights, masks and dropout"),
    "device": (device_name, "auto, cpu, cuda, cuda:N or mps"),
    "resume": (bool, "go on from the checkpoint of an interrupted run"),
    "test_frequency": (COUNT, "steps between ensemble predictions"),
    "num_prediction": (COUNT, "predictions averaged; of a large picture fewer"),
    "model_type": (text, "name of the results folder"),
    "log_path": (text, "log file; its CSV and curves stand beside it"),
}
# Options that do not decide the restored pixels, and those that a results folder's name
# begins with; it ends with all others that were given.
IRRELEVANT = ["path", "reference", "resume", "test_frequency", "device", "model_type"]
IRRELEVANT += ["log_path", "given", "schedule"]
NAMED = ["sigma", "observed", "mask", "recipe", "kernel_size", "kernel_sigma", "kernel"]


def parse_arguments(description, defaults, recipes, argv=None):
    """Read the command line: a flag wins over the script's value.

    Args:
        description: what the script does.
        defaults: option name -> default value; the names are keys of OPTIONS.
        recipes: name -> what it decides, as network/recipes.py has them.
        argv: arguments, those of the process where it is None.

    Returns:
        The options' values, `device` as a torch.device, `fuse` as a bool; None: the recipe
        or the picture decides. `given` holds the names of those that the command line
        has, with other values than the script's. Errors exit with status 2.
    """
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.error = lambda text: parser.exit(2, f"{parser.prog}: error: {text}\n")
    with suppress(AttributeError):  # a notebook's, which can show any file's name
        sys.stdout.reconfigure(errors="backslashreplace")
    words = []  # the script's values, as flags: they are checked alike
    for key, default in defaults.items():
        kind, help_text = OPTIONS[key]
        kind = tuple(recipes) if key == "recipe" else kind
        how = {"choices": kind} if isinstance(kind, tuple) else {"type": kind}
        if kind is bool:
            how = {"action": argparse.BooleanOptionalAction}
        if kind is bool and default is not None:
            words += [f"--{key}" if default else f"--no-{key}"]
        elif default is not None:
            words += [f"--{key}={default}"]
        shown = "" if default is None else f" (default: {default})".replace("%", "%%")
        how |= {"help": help_text + shown, "default": argparse.SUPPRESS}
        parser.add_argument(f"--{key}", **how)
    line = vars(parser.parse_args(sys.argv[1:] if argv is None else argv))
    script = vars(parser.parse_args(words))
    args = argparse.Namespace(**dict.fromkeys(defaults) | script | line)
    args.given = {key for key, value in line.items() if value != script.get(key)}
    args.fuse = {"on": True, "off": False}.get(args.fuse)
    args.schedule = recipes[args.recipe].schedule
    refuse_contradictions(parser, args)
    try:
        args.device = open_device(args.device)  # last: nothing is opened in vain
    except InputError as error:
        parser.error(str(error))
    return args


def refuse_contradictions(parser, args):
    """Exit where flags contradict each other."""
    if args.fuse and (args.drop_rate == 0 or args.num_prediction == 1):
        parser.error("--fuse on needs a --drop_rate and several predictions")
    if args.mask and args.missing:
        parser.error("--mask and --missing: one of them says which pixels are missing")
    if Path(args.model_type).name != args.model_type or args.model_type == "..":
        parser.error(f"--model_type {args.model_type!r}: no name of a folder")
    if args.reference and not args.observed:
        parser.error("--reference goes with --observed")
    if args.noise_sigma is not None and not args.observed:
        parser.error("--noise_sigma goes with --observed; --sigma is noise to add")
    if args.precision == "bfloat16" and args.device == "mps":
        parser.error("--precision bfloat16 is for --device cpu and cuda")


def named_settings(args, defaults, psf):
    """Say which options decide the restored pixels: a dictionary, and a folder's name.

    Args:
        defaults: the script's values; others stand in the name.
        psf: the PSF's name, or None.
    """
    others = {k: v for k, v in vars(args).items() if k not in IRRELEVANT + NAMED}
    if args.schedule == "constant":
        del others["iteration"]  # a longer run goes on from a shorter one
    sigma = None if args.observed else args.sigma
    mask = args.mask and contents_name(args.mask)
    parts = ["observed"] if args.observed else [f"sigma{sigma:g}"]
    parts += [f"mask-{mask}"] if mask else []
    parts += [psf, args.recipe] if psf else [args.recipe]
    for key, value in others.items():
        if key == "fuse":
            value = {True: "on", False: "off"}.get(value)
        if value != defaults[key]:
            shown = f"{value:g}" if isinstance(value, bool | float) else value
            parts += [f"{key}-{value}" if type(value) is str else f"{key}{shown}"]
    settings = others | {"observed": args.observed, "sigma": sigma, "psf": psf}
    settings |= {"recipe": args.recipe, "mask": mask, "program": sources_digest()}
    return settings, "_".join(parts)


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


# --- drawing -------------------------------------------------------------------------

PANEL = 1024  # pixels a side in comparison.png, at most
TALL = 4  # a picture's height over its width, at most
TAIL = 0.001  # share of the pixels beyond its black, and its white, if not of 8 bits
BARE = {"xticks": [], "yticks": [], "frame_on": False}  # axes with an image alone
COLUMNS = ("step", "loss", "psnr", "ssim", "ensemble_psnr")
COLUMNS += ("moved_psnr", "down", "right", "seconds")  # see score_moved


def row_text(row):
    """Write a test as a line of the log."""
    step, loss, psnr, ssim, ensemble, *moved, _ = row
    line = f"step {step:7d}  loss {loss:.6f}"
    if psnr is not None:
        line += f"  PSNR {psnr:.3f} dB  SSIM {ssim:.4f}"
    if ensemble != psnr:
        line += f"  plain ensemble {ensemble:.3f} dB"
    if moved[0] is not None:
        line += f"  ({Moved(*moved)})"
    return line


def new_figure(size, dpi):
    """Return a Matplotlib figure of so many inches."""
    from matplotlib.figure import Figure  # late, as PyTorch is

    return Figure(figsize=size, dpi=dpi)


def drawn(figure):
    """Return a figure as a PNG file's bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def comparison(panels, ends):
    """Draw labelled images side by side; return the PNG's bytes.

    Args:
        panels: (label, image (C, H, W), its score as text or None) each.
        ends: the values that are black and white.
    """
    _, height, width = panels[0][1].shape
    every = math.ceil(max(height, width) / PANEL)
    size = len(panels) * 4, 4 * min(height / width, TALL) + 0.4
    figure = new_figure(size, max(320, width // every) / 4)
    edges = {"left": 0, "right": 1, "bottom": 0, "top": 1 - 0.4 / size[1]}
    row = figure.subplots(
        1, len(panels), gridspec_kw=edges | {"wspace": 0.02}, subplot_kw=BARE
    )
    for axes, (label, image, scored) in zip(row, panels):
        pixels = (image[:, ::every, ::every] - ends[0]) / max(ends[1] - ends[0], 1e-30)
        pixels = pixels.clip(0, 1).transpose(1, 2, 0)
        axes.imshow(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))
        title = f"{label} {scored}" if scored else label
        axes.set_title(title, fontsize="large" if len(title) < 40 else "small")
    return drawn(figure)


def uncertainty(deviation):
    """Draw the predictions' standard deviation (H, W), in a file's numbers, as a PNG."""
    height, width = deviation.shape
    every = math.ceil(max(height, width) / PANEL)
    figure = new_figure((6, max(5 * min(height / width, TALL), 4)), 160)
    edges = {"left": 0.02, "right": 0.88, "bottom": 0.03, "top": 0.97}
    axes, scale = figure.subplots(
        1, 2, width_ratios=(30, 1), gridspec_kw=edges | {"wspace": 0.05}
    )
    axes.set(**BARE)
    shown = axes.imshow(deviation[::every, ::every], cmap="magma", vmin=0)
    label = "standard deviation of the predictions, in the file's numbers"
    figure.colorbar(shown, scale, label=label)
    return drawn(figure)


def psf_shown(psf):
    """Draw a PSF (h, w), enlarged, with a scale in pixels; return the PNG's bytes."""
    figure = new_figure((4, 4), 120)
    edges = {"left": 0.12, "right": 0.97, "bottom": 0.12, "top": 0.97}
    axes = figure.subplots(gridspec_kw=edges)
    (top, left), (h, w) = (n // 2 for n in psf.shape), psf.shape
    sides = (-left - 0.5, w - left - 0.5, h - top - 0.5, -top - 0.5)
    axes.imshow(psf, cmap="gray", vmin=0, extent=sides, interpolation="nearest")
    axes.set(xlabel="pixels")
    return drawn(figure)


def curves(records):
    """Draw loss and PSNR over the steps, a line per image; return the PNG's bytes."""
    figure = new_figure((9, 4), 120)
    axes = figure.subplots(1, 2, gridspec_kw={"left": 0.09, "right": 0.98})
    for record in records:
        # Of "$" Matplotlib makes formulas; "_" it leaves out at the beginning.
        name = " " + record["name"].replace("$", r"\$")
        every = record["loss_every"]
        losses = [(every * n, loss) for n, loss in enumerate(record["losses"], 1)]
        scores = [(row[0], row[2]) for row in record["rows"] if row[2] is not None]
        for axis, points in zip(axes, (losses, scores)):
            if points:
                axis.plot(*zip(*points), marker=".", label=name)
    for axis, title in zip(axes, ("loss", "PSNR (dB)")):
        axis.set(xlabel="step", ylabel=title)
        axis.grid(alpha=0.3)
    if 0 < len(axes[0].lines) <= 12:
        axes[0].legend(fontsize="small")
    return drawn(figure)


# --- one image -----------------------------------------------------------------------

RESULTS = ["error.mat", "Self2Self-[0-9]*.png", "comparison.png", "uncertainty.png"]
RESULTS += [f"restored{suffix}" for suffix in SUFFIXES]
OWN_FILES = ["noisy.png", "noise.mat", "blurred.png", "kernel.mat", "kernel.png"]
OWN_FILES += ["checkpoint.pt", *RESULTS]
CHECKPOINT_FORMAT = 8
# Seconds between two checkpoints; where saving is slow, so many times what the last one took.
SAVE_EVERY, SAVING = 60, 20
SPEAK_EVERY = 60  # seconds between two lines on stderr where it is no terminal


class Result:
    """One image: its picture, its scores, and the files in its results folder.

    Args:
        path: the image file.
        args: the options' values.
        settings, settings_name: see named_settings.
        write_logs: called after every test.
    """

    def __init__(self, path, args, settings, settings_name, write_logs):
        self.path, self.args, self.settings = path, args, settings
        self.name, self.size = "/".join(result_names(path)), "its size"
        self.write_logs = write_logs
        self.folder = results_folder(path, args.model_type, settings_name)
        self.rows, self.losses, self.notes = [], [], []
        self.gaps = self.as_read = None
        self.may_be_moved = False  # by its PSF: it is scored at the best shift, too
        self.seconds, self.begun, self.bar = 0.0, False, None
        self.state = self.saved_step = None  # to go on from; the last checkpoint's step
        self.learner = self.stopping = (
            None  # that trains; exit status that is asked for
        )
        # A training whose schedule has come to its end cannot be made longer.
        self.extends = args.schedule == "constant"

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
        sides = zip(margin, image.shape[1:])
        self.place = (slice(None), *(slice(a, n - b) for (a, b), n in sides))
        self.picture = picture if self.args.observed else picture.part(self.place)
        self.eight_bits = picture.dtype == np.uint8 and picture.peak == 255
        height, width = self.picture.image.shape[1:]
        if min(height, width) < SMALLEST_SIDE:
            raise InputError(
                f"{self.path}: the PSF leaves {width}x{height} pixels; a side needs "
                f"{SMALLEST_SIDE} or more"
            )
        self.size = describe(*self.picture.image.shape)
        self.clean = None if self.args.observed else self.picture.image
        if self.args.reference:
            reference = read_picture(self.args.reference, self.args.crop)
            fits = len(reference.image) <= len(picture.image)
            self._refuse_misfit(self.args.reference, reference, picture, fits)
            self.clean = np.broadcast_to(reference.image, picture.image.shape)
            if reference.absent is not None:
                self.clean = np.where(reference.absent, np.nan, self.clean)
        if not self.args.observed and not np.isfinite(image).all():
            raise InputError(
                f"{self.path}: it holds NaN or infinite pixels; with --observed they "
                "are unknown"
            )
        inner = np.zeros((1, *image.shape[1:]), np.float32)
        inner[self.place] = 1
        self.known = known * inner
        if self.args.observed and picture.absent is not None:
            absent = np.zeros(image.shape, bool)
            absent[self.place] = picture.absent
            image = np.where(absent, np.nan, image)
        self._refuse_nothing()
        return image, self.known

    def _refuse_nothing(self):
        if not self.known.any():
            raise InputError(f"{self.path}: every pixel is missing")

    def leave_out(self, gaps, outliers):
        """Take entries for unknown; say how many, and why.

        Args:
            gaps, outliers: (C, H, W), bool, with a margin: see network.unknown. Gaps come
                back as they were, outliers as they are predicted.

        Returns:
            What is known then: see `read`.
        """
        known = np.where(gaps | outliers, np.float32(0), self.known)
        if (known == known[:1]).all():
            known = known[:1]
        gaps, outliers = ((x & (self.known > 0))[self.place] for x in (gaps, outliers))
        self.known = known
        self._refuse_nothing()
        if not (gaps.any() or outliers.any()):
            return known
        self.gaps, self.as_read = gaps, self.picture.image
        self.picture = self.picture._replace(
            image=np.where(gaps | outliers, np.nan, self.picture.image)
        )
        if self.clean is not None:
            self.clean = np.where(gaps, np.nan, self.clean)
            self.clean = self.clean if np.isfinite(self.clean).any() else None
        why = ("not measured (they come back as they are)", gaps.sum())
        why = why, ("far off all their neighbours (they are predicted)", outliers.sum())
        why = ", ".join(f"{n} {reason}" for reason, n in why if n)
        tqdm.write(f"{self.name}: {why}: unknown, of {gaps.size} entries")
        return known

    def _known(self, picture):
        """Return what --mask or --missing say is known of a picture: see `read`."""
        known = np.ones((1, *picture.image.shape[1:]), np.float32)
        if self.args.missing:  # other draws than the noise's
            draws = np.random.default_rng((self.args.seed, 1)).random(known.shape)
            known = (draws >= self.args.missing).astype(np.float32)
        if self.args.mask:
            mask, known = read_mask(self.args.mask, self.args.crop)
            fits = len(known) in {1, len(picture.image)}
            self._refuse_misfit(self.args.mask, mask, picture, fits)
        return known

    def _refuse_misfit(self, path, other, picture, fits):
        """Raise InputError where another picture is not of this one's size and kind."""
        sizes = {x.uncropped.split()[0] for x in (other, picture)}
        if len(sizes) > 1 or not fits:
            raise InputError(
                f"{path}: {other.uncropped}, but {self.path} is {picture.uncropped}"
            )

    def begin(self, learner, observation, noise, psf=None, **simulated):
        """Make the folder ready, and write the observation and what it was made of.

        Earlier results of the same picture and settings are replaced, others set aside.
        With --resume a checkpoint is read, and checked, before anything is touched.

        Args:
            learner: the network.Self2Self of the observation.
            observation: y, (C, H, W), not clipped, with its margin.
            noise: what noise it has, a network.noise.Noise.
            psf: the PSF (h, w), or None.
            simulated: n, the noise, and blurred, of y's shape, that an --observed image has not.
        """
        if learner.recipe.fuse and learner.recipe.noise is None and psf is None:
            raise InputError(
                f"{self.path}: its noise is {noise.describe()}: to fuse, --noise_sigma "
                "says how strong it is"
            )
        if (learner.recipe.noise or 0) > 100 * 255:
            raise InputError(f"{self.path}: noise over 100 times the picture's range")
        observation = np.ascontiguousarray(observation[self.place])
        if self.as_read is not None:
            left_out = np.isnan(self.picture.image)
            observation = np.where(left_out, self.as_read, observation)
        self.observation = observation
        # Without noise and blur what is known is the result.
        self.noiseless = noise.kind == "none" and psf is None
        self.iteration, self.loss_every = learner.recipe.iteration, learner.LOSS_EVERY
        self.scores = None if self.clean is None else score(observation, self.clean)
        self._describe(learner, noise)
        recipe = asdict(learner.recipe) | {"kind of noise": noise.kind}
        for field in ("scale", "noise"):  # which the observation decides
            del recipe[field]
        if self.extends:
            del recipe["iteration"]
        arrays = {"image or noise": [observation]}
        arrays["reference"] = None if self.clean is None else [self.clean]
        sums = {key: digest(array) for key, array in arrays.items()}
        self.made_from = self.settings | recipe | sums
        self.made_from["device"] = self.args.device.type
        if not self.args.resume or not self._take_up():
            make_room(self.folder, self.made_from, self.iteration)
        self.begun = True
        self._write_record()
        self.picture.save(self.folder / "noisy.png", observation)
        if psf is not None:
            save_mat(self.folder / "kernel.mat", "kernel", psf)
            write_atomically(self.folder / "kernel.png", psf_shown(psf))
        if not self.args.observed:
            save_mat(self.folder / "noise.mat", "noise", simulated["n"][self.place])
        if not self.args.observed and "blurred" in simulated:
            blurred = simulated["blurred"][self.place]
            self.picture.save(self.folder / "blurred.png", blurred)

    def _describe(self, learner, noise):
        """Say what the picture is: `heading`, a line for the log, and what to know of it."""
        peak, shown = self.picture.peak, black_and_white(self.picture.image)
        self.heading = f"{self.name}: {self.size}"
        if self.scores:
            self.heading += f", observation {self.scores[0]:.3f} dB"
            low, high = black_and_white(self.clean)
            if (low, high) != (0, 1):
                self.heading += (
                    f" (peak: the reference's range, {peak * (high - low):.4g})"
                )
        self.noise = noise.describe(peak)
        self.heading += f", noise: {self.noise}"
        if noise.lines and not self.eight_bits:
            self.heading += " (in the file's numbers"
            if self.args.observed and noise.kind == "white":
                self.heading += f", --noise_sigma {float(f'{noise.sigma():.3g}'):g}"
            self.heading += ")"
        missing = 1 - self.known[self.place].mean(dtype=np.float64)
        if missing:
            self.heading += f", {missing:.2%} missing"
        elif self.noiseless:
            self.heading += ": it comes back as it is"
        tqdm.write(self.heading)
        if shown != (0, 1):
            low, high = (peak * end for end in shown)
            tqdm.write(f"{self.name}: PNGs show {low:.4g} black and {high:.4g} white")
        wanted = self.args.num_prediction
        made = learner.ensemble_size(wanted)
        if made < wanted and "num_prediction" in self.args.given:
            tqdm.write(f"{self.name}: --num_prediction {wanted}: {made} for its size")

    def _take_up(self):
        """Take up the tests of a checkpoint or, where a run is complete, of its record.

        Returns:
            Whether there is one of them.

        Raises:
            InputError: it cannot be gone on from; the text says why.
        """
        path = self.folder / "checkpoint.pt"
        if path.exists():
            saved = read_checkpoint(path)
            self.state, self.seconds = saved["learner"], saved["seconds"]
        else:
            path, saved = self.folder / "record.json", read_record(self.folder)
            complete = saved and self._reaches_end(saved["rows"])
            if not complete or not self._restored_path().exists():
                return False
        was, now = saved["made_from"], self.made_from
        changed = [k for k in was.keys() | now.keys() if was.get(k) != now.get(k)]
        if changed:
            what = f"it is of another {', another '.join(sorted(changed))}"
            what = "the program has changed since" if "program" in changed else what
            raise InputError(f"{path}: {what}; without --resume the run starts over")
        self.rows = [*map(tuple, saved["rows"])]
        self.losses, self.notes = saved["losses"], saved["notes"]
        step = self.state["step"] if self.state else self.rows[-1][0]
        if step > self.iteration and (not self.rows or step != self.rows[-1][0]):
            raise InputError(
                f"{self.name}: the checkpoint is of step {step} already, between "
                "two tests; a larger --iteration goes on from it"
            )
        return True

    def _reaches_end(self, rows):
        return bool(rows) and rows[-1][0] >= self.iteration

    def is_complete(self):
        """Tell whether the last step's test has been taken into the record."""
        return self._reaches_end(self.rows)

    def resume(self, learner):
        """With --resume, let the learner go on from the checkpoint, where there is one."""
        step = self.rows[-1][0] if self.rows else 0
        if self.state:
            learner.load_state_dict(self.state)
            self.state, step = None, learner.step
            self.saved_step = step
        if step:
            at = "finished already, at" if self.is_complete() else "going on from"
            tqdm.write(f"{self.name}: {at} step {step}")
        self.learner = learner
        self.saved_at = self.spoken_at = time.perf_counter()
        self.started, self.saving = self.saved_at - self.seconds, 0.0
        tests = self.iteration // self.args.test_frequency
        tests += self.iteration % self.args.test_frequency > 0
        test = learner.ensemble_size(self.args.num_prediction) + 1  # its files
        total, done = self.iteration + tests * test, step + len(self.rows) * test
        self.bar = tqdm(
            total=total, initial=done, desc=self.name, disable=None, leave=False
        )

    def awaits_test(self, learner):
        """Tell whether the ensemble is to be predicted now, before another step."""
        step, every = learner.step, self.args.test_frequency
        due = step > 0 and (step % every == 0 or step == self.iteration)
        return due and not self._tested(step) and learner.alive()

    def _tested(self, step):
        return bool(self.rows) and self.rows[-1][0] == step

    def add(self, learner, restored, image, error):
        """Take a test into the record, and write its pictures.

        Args:
            learner: the network.Self2Self, which has just predicted.
            restored: the ensemble's Restoration, with its margin.
            image, error: what the learner's `fuse` made of it.

        Raises:
            FloatingPointError: the restoration is not finite; nothing is written.
        """
        images = [x[self.place] for x in (restored.image, image)]
        if not all(np.isfinite(image).all() for image in images):
            raise FloatingPointError("the output is not finite; lower --lr")
        if self.noiseless:
            known = self.known[self.place]
            images = [np.where(known, self.observation, x) for x in images]
        if self.gaps is not None:
            images = [np.where(self.gaps, self.as_read, x) for x in images]
        peak, step = self.picture.peak, learner.step
        result, scores, plain, moved = images[-1], None, None, None
        if self.clean is not None:
            scores = score(result, self.clean)
            plain = scores[0] if error is None else score(images[0], self.clean)[0]
            moved = score_moved(result, self.clean) if self.may_be_moved else None
        seconds = time.perf_counter() - self.started
        row = step, learner.mean_loss(), *(scores or (None, None)), plain
        self.rows.append((*row, *(moved or (None, None, None)), seconds))
        self.losses = learner.read_losses().copy()
        if error is not None:
            save_mat(self.folder / "error.mat", "error", peak**2 * error[self.place])
        for name in (f"Self2Self-{step}.png", f"restored{self.picture.suffix}"):
            self.picture.save(self.folder / name, result)
        rounding = self.picture.rounding(result)
        if rounding > MOST_ROUNDING and step == self.iteration:
            tqdm.write(
                f"{self.name}: rounding to whole numbers changes its mean by "
                f"{rounding:.0%}; save the picture as float, in a TIFF"
            )
        deviation = peak * np.sqrt(restored.variance[self.place].mean(0))
        write_atomically(self.folder / "uncertainty.png", uncertainty(deviation))
        shown = [x and f"{x[0]:.2f} dB" for x in (self.scores, scores)]
        shown[1] = f"{shown[1]}, {moved}" if moved else shown[1]
        panels = [("observation", self.observation, shown[0])]
        panels += [("restored", result, shown[1])]
        panels += [] if self.clean is None else [("clean", self.clean, None)]
        # of a dark picture of 16 bits nothing would be seen
        ends = (0, 1) if self.eight_bits else np.nanquantile(result, (TAIL, 1 - TAIL))
        write_atomically(self.folder / "comparison.png", comparison(panels, ends))
        self._write_record()
        self.write_logs()
        tqdm.write(f"{self.name}: {row_text(self.rows[-1])}")

    def advance(self, n=1):
        """Show the progress: steps and predictions, on one bar, or now and then in a line.

        Where a signal has come, save a checkpoint, and exit.
        """
        self.bar.update(n)
        now = time.perf_counter()
        if self.bar.disable:  # stderr is no terminal, and would be filled
            self.bar.n += n
            if now - self.spoken_at > SPEAK_EVERY:
                self.spoken_at, share = now, self.bar.n / self.bar.total
                print(f"{self.name}: {share:.0%} done", file=sys.stderr)
        if self.stopping:
            try:
                if self.learner.step:
                    self._save_checkpoint(self.learner)
            except OSError as error:
                report(reason(error))
            sys.exit(self.stopping)

    def stop(self, number, _frame):
        """Handle a signal: exit, or let the step at hand end first, so that it can be saved.

        A second one does not wait.
        """
        if self.learner is None or self.stopping:
            sys.exit(128 + number)
        self.stopping = 128 + number

    def whats_left(self):
        """Say, of a run that was interrupted, where --resume goes on."""
        if self.saved_step:
            return f"--resume goes on from step {self.saved_step}"
        steps = self.learner.step if self.learner else 0
        return f"its {steps} steps are lost" if steps else "nothing is lost"

    def keep(self, learner):
        """Take a step or a test into account: progress, a network's new start, a checkpoint."""
        if len(learner.notes) > len(self.notes):  # the tests of a dead network go
            self.notes = learner.notes.copy()
            self.rows.clear()
            self.losses.clear()
            for pattern in RESULTS:
                for file in self.folder.glob(pattern):
                    file.unlink()
            self._write_record()
            tqdm.write(f"{self.name}: {self.notes[-1]}")
        self.advance()
        late = time.perf_counter() - self.saved_at
        due = self._tested(learner.step) or late > max(SAVE_EVERY, SAVING * self.saving)
        if due and (self.extends or not self.is_complete()):
            self._save_checkpoint(learner)

    def _save_checkpoint(self, learner):
        """Save all that the coming steps and the results depend on."""
        import torch

        started = time.perf_counter()
        state = {"format": CHECKPOINT_FORMAT, "made_from": self.made_from}
        state |= {"rows": self.rows, "seconds": started - self.started}
        state |= {"learner": learner.state_dict(), "notes": self.notes}
        state["losses"] = learner.losses
        with atomic_file(self.folder / "checkpoint.pt") as file:
            try:
                torch.save(state, file)
            except RuntimeError:  # PyTorch's, which says "unexpected pos"
                raise OSError(None, "cannot be written; is the disk full?") from None
        self.saved_at, self.saved_step = time.perf_counter(), learner.step
        self.saving = self.saved_at - started

    def finish(self, failed=None):
        """Mark the record: there is no more to come. Remove a checkpoint of no more use.

        Args:
            failed: why there is not, where something went wrong.
        """
        self.learner = None
        if self.bar is not None:
            self.bar.close()
        if self.begun:
            self._write_record(finished=not failed, failed=failed)
        if not failed and not self.extends:
            (self.folder / "checkpoint.pt").unlink(missing_ok=True)
        if self.rows:
            print(self._restored_path())

    def _restored_path(self):
        return self.folder / f"restored{self.picture.suffix}"

    def _write_record(self, finished=False, failed=None):
        """Write what is known of this image as JSON."""
        record = {"name": self.name, "size": self.size, "finished": finished}
        record["failed"] = failed
        record |= {
            "heading": self.heading,
            "noise": self.noise,
            "notes": self.notes,
            "written": time.time(),
        }
        reached = max([self.iteration, *(row[0] for row in self.rows)])
        record |= {"made_from": self.made_from, "iteration": reached}
        record |= {"observation": self.scores, "columns": COLUMNS, "rows": self.rows}
        record |= {"loss_every": self.loss_every, "losses": self.losses}
        data = json.dumps(record, indent=1).encode()
        write_atomically(self.folder / "record.json", data)


def results_folder(path, model_type, settings_name):
    """Say where the results of an image go."""
    return Path("images", *result_names(path), model_type, settings_name)


def read_record(folder):
    """Return the record of a results folder; None where there is none of ours."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        record = json.loads((folder / "record.json").read_text())
        ours = {"made_from", "iteration", "rows", "losses", "finished", "written"}
        return record if ours <= record.keys() else None


def read_checkpoint(path):
    """Return what a checkpoint holds, on the CPU.

    Raises:
        InputError: the file is none; the text says why.
    """
    import torch

    with suppress(Exception):  # a damaged file fails in many ways
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if saved["format"] == CHECKPOINT_FORMAT:
            return saved
    raise InputError(
        f"{path}: damaged, or no checkpoint of this version of the program; without it "
        "the run starts over"
    )


def make_room(folder, made_from, steps):
    """Remove a folder's results of the same pixels and settings, set others aside.

    Others are those of more steps, too.
    """
    if not any(folder.glob("[!.]*")):  # nothing but what a killed run was writing
        return
    record = read_record(folder)
    if record and record["made_from"] == made_from and record["iteration"] <= steps:
        tqdm.write(f"{folder}: replacing the earlier results")
        for file in itertools.chain.from_iterable(map(folder.glob, OWN_FILES)):
            file.unlink()
        return
    numbered = (folder.with_name(f"{folder.name}~{n}") for n in itertools.count(1))
    free = next(path for path in numbered if not path.exists())
    folder.rename(free)
    tqdm.write(f"{folder}: kept as {free}")


def mark_failed(folder):
    """Note in an earlier record that its picture fails now, for other processes to see."""
    record = read_record(folder)
    if record:
        record["failed_at"] = time.time()
        write_atomically(folder / "record.json", json.dumps(record, indent=1).encode())


@contextmanager
def signals_handled(handler):
    """Let a function handle Ctrl-C and the wish to end; not outside the main thread."""
    main = threading.current_thread() is threading.main_thread()
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM) if main}
    # Behind a "&" a shell has Ctrl-C ignored.
    before = {n: f for n, f in before.items() if f not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)


# --- all images of a call ------------------------------------------------------------

SKEW = 60  # seconds between the starts of several processes, at most
LOGGING = 20  # logs are written no sooner than so many times what the last time took
SUMMARY = ("image", "size", "observation_psnr", "psnr", "ssim", "steps", "seconds")


class Run:
    """All images of one call of a script: which they are, their log, the exit status.

    What cannot be read or written, as far as it can be known now, exits with status 2.

    Args:
        args: the options' values.
        defaults: the script's.
        psf: the PSF's name, or None.
    """

    def __init__(self, args, defaults, psf=None):
        self.args, self.failed, self.begun = args, [], False
        self.started = time.time()
        self.logged, self.drawn = {}, []  # records; their tests
        self.logged_at, self.logging = -math.inf, 0.0  # when, and how long it took
        self.behind = False  # whether a test is not in the logs yet
        try:
            self.settings = named_settings(args, defaults, psf)
            self.log = Path(args.log_path)
            self.files = find_images(args.path)
            self._share_out()
            self._check()
        except (InputError, OSError) as error:
            report(reason(error))
            sys.exit(2)

    def _share_out(self):
        """Say which of the images are this process's: `paths`."""
        texts = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
        self.rank, self.world = (int(x) if x.isdecimal() else -1 for x in texts)
        if not 0 <= self.rank < self.world:
            raise InputError(f"RANK and WORLD_SIZE: {texts}; 0, 1 is one process")
        self.paths = self.files[self.rank :: self.world]
        ours = Counter(filter(None, map(stack_of, self.paths)))
        for stack, n in Counter(filter(None, map(stack_of, self.files))).items():
            print(f"{stack}: {n} planes, {ours[stack]} of them to restore")

    def _check(self):
        """Raise InputError where a file would be written in another's place."""
        args, log = self.args, self.log
        if not log.name or log.suffix in (".csv", ".png"):
            raise InputError(f"--log_path {log}: a text file, such as log.txt")
        if len(self.files) > 1 and args.reference:
            raise InputError("--reference goes with one image, not with several")
        inputs = [stack_of(file) or file for file in self.files]
        inputs += [args.reference, args.mask, getattr(args, "kernel", None)]
        inputs = {Path(file).resolve() for file in inputs if file}
        logs = [log, log.with_suffix(".csv"), log.with_suffix(".png"), self._totals()]
        for path in logs:
            if path.is_dir() or path.resolve() in inputs:
                raise InputError(f"--log_path: {path} is a folder or an input")
        there = [path for path in logs if path.exists()]
        if there and not (log.exists() and log.read_bytes().startswith(b"path: ")):
            raise InputError(f"--log_path: {there[0]} is no log of ours; name another")
        for folder in (log.parent, *map(self._folder, self.files)):
            there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
            if there.resolve() in inputs:
                raise InputError(f"{there}: its results would lie within; move it")
            if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
                raise InputError(f"{there}: make it a folder that can be written to")

    def _totals(self):
        return self.log.with_name(f"{self.log.stem}-summary.csv")

    def _folder(self, path):
        return results_folder(path, self.args.model_type, self.settings[1])

    @contextmanager
    def image(self, path):
        """Give the Result of one image; report what goes wrong, so that the next goes on."""
        result = Result(path, self.args, *self.settings, self._log_a_test)
        try:
            with signals_handled(result.stop):
                yield result
        except (KeyboardInterrupt, SystemExit) as stop:
            report(f"{result.name}: interrupted; {result.whats_left()}")
            with suppress(OSError):
                if self.behind:
                    self.write_logs()
            sys.exit(stop.code if isinstance(stop, SystemExit) else 130)
        except Exception as error:
            message = reason(error, result.path, result.size)
            if message is None:
                raise
            if result.rows:
                message += f"; the result of step {result.rows[-1][0]} is kept"
            report(message)
            self.failed.append(str(path))
            with suppress(OSError):  # which may be what failed
                result.finish(failed=message)
                if self.world > 1 and not result.begun:
                    mark_failed(result.folder)
        finally:
            self.begun |= result.begun

    def finish(self):
        """Write and print the totals; return the exit status.

        That is 0, or where images failed 1, 2 if no training had begun. Of several
        processes each ends with 0: torchrun would end the others when one has failed.
        """
        if self.failed and len(self.files) > 1:
            names = ", ".join(self.failed)
            report(f"{len(self.failed)} of {len(self.files)} images failed: {names}")
        try:
            table = self.write_logs()
            # Others may have finished meanwhile. In text a NaN equals itself.
            while self.world > 1 and str(self._records()) != str(self.logged):
                table = self.write_logs()
            for row in table:
                cells = (
                    f"{c:.3f}" if isinstance(c, float) else c or "-" for c in row[1:]
                )
                print(f"{row[0]:32s}", *(f"{cell:>16}" for cell in cells))
            self._join_stacks()
        except (InputError, OSError) as error:
            report(reason(error))
            return 1
        if self.world > 1:
            return 0
        return (1 if self.begun else 2) if self.failed else 0

    def _records(self):
        """Return the records of this call's images so far, path -> record.

        An earlier call's do not count, unless it is resumed and has not failed now. Other
        processes may have begun up to SKEW before this one.
        """
        found, ours, failed = {}, set(self.paths), set(self.failed)
        for file in self.files:
            record = read_record(self._folder(file))
            # No joined stack's, nor another version's.
            if not record or record.get("columns") != [*COLUMNS]:
                continue
            since = self.started - (0 if file in ours else SKEW)
            marked = record.get("failed_at", 0) >= since  # by another process
            resumed = self.args.resume and str(file) not in failed
            if not marked and (resumed or record["written"] >= since):
                found[file] = record
        return found

    def _log_a_test(self):
        """Write the logs, but for where that would take much of the time: of many images."""
        started = time.perf_counter()
        self.behind = started - self.logged_at < LOGGING * self.logging
        if not self.behind:
            self.write_logs()
            self.logged_at = time.perf_counter()
            self.logging = self.logged_at - started

    def write_logs(self):
        """Write the log, its CSV, the curves and the summary, of all records there are.

        Every process writes them alike. Returns the summary's rows.
        """
        values = vars(self.args).items()
        lines = [
            f"{k}: {v}" for k, v in values if k not in ("resume", "given", "schedule")
        ]
        rows, table, self.logged = [("image", *COLUMNS)], [], self._records()
        records = self.logged.values()
        for record in records:
            lines += ["", record["heading"], *record["notes"]]
            lines += map(row_text, record["rows"])
            lines += [f"failed: {record['failed']}"] if record["failed"] else []
            rows += [(record["name"], *row) for row in record["rows"]]
            if record["finished"]:
                step, _, psnr, ssim, *_, seconds = record["rows"][-1]
                before = (record["observation"] or [None])[0]
                cells = record["size"], before, psnr, ssim, step, round(seconds, 1)
                table.append((record["name"], *cells))
        if not records:
            return []
        write_atomically(self.log, "\n".join([*lines, ""]).encode())
        write_atomically(self.log.with_suffix(".csv"), csv_text(rows))
        if rows != self.drawn:  # drawing takes longer than all else here
            write_atomically(self.log.with_suffix(".png"), curves(records))
            self.drawn = rows
        if not table:
            return []
        scored = [row[2:5] for row in table if row[3] is not None]
        means = np.mean(scored, 0).tolist() if scored else [None] * 3
        table = [SUMMARY, *table, ("average", f"of {len(table)}", *means, None, None)]
        write_atomically(self._totals(), csv_text(table))
        return table

    def _join_stacks(self):
        """Join the restored planes of every stack all of whose planes are finished."""
        finished = {path: r for path, r in self._records().items() if r["finished"]}
        stacks = {}
        for file in self.files:
            stacks.setdefault(stack_of(file), []).append(file)
        stacks.pop(None, None)
        for stack, own in stacks.items():
            if all(file in finished for file in own):
                folder, name = self._folder(stack), f"restored{stack.suffix.lower()}"
                record = {"made_from": [finished[file]["made_from"] for file in own]}
                record |= {"iteration": max(finished[f]["iteration"] for f in own)}
                record |= {"rows": [], "losses": [], "finished": True}
                record["written"] = time.time()
                earlier = read_record(folder) or {}
                if any(earlier.get(k) != record[k] for k in ("made_from", "iteration")):
                    make_room(folder, record["made_from"], record["iteration"])
                restored = [self._folder(file) / name for file in own]
                join_planes(folder / name, stack, restored)
                write_atomically(folder / "record.json", json.dumps(record).encode())
                print(folder / name)
