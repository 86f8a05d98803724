"""Errors, files, options and simulated noise. Imports nothing of this project."""

import argparse
import csv
import hashlib
import io
import itertools
import math
import os
import re
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import scipy.io
import skimage.data
import tifffile
from tqdm import tqdm

# --- errors --------------------------------------------------------------------------


class InputError(Exception):
    """The user's input cannot be used; the message names it and the cure."""


def report(error):
    """Print an error on stderr, in one line."""
    tqdm.write(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)


def reason(error, path="", size=""):
    """Return an expected error's message in one line; None for a bug in this program.

    Args:
        path, size: those of the current image, as text.
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
    """Tell whether memory ran out: in this error, or in one that caused it."""
    words = ("out of memory", "t allocate", "ALLOC_FAILED")
    says = isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    below = error.__cause__ or error.__context__
    return says or isinstance(error, MemoryError) or (below and is_out_of_memory(below))


def first_line(error):
    """Return the first line of an error's message, or its class where there is none."""
    return next(iter(str(error).splitlines()), type(error).__name__)


@contextmanager
def naming(path, wanted):
    """Turn the errors of reading a file into InputErrors that name it and what is wanted."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except Exception as error:  # a damaged file fails in many ways
        if getattr(error, "filename", None):  # the system's, whose message is clear
            raise
        fault = f"{path} is damaged, or {wanted}: {first_line(error)}"
        raise InputError(fault) from None


# --- files ---------------------------------------------------------------------------

TIFF, JPEG = (".tif", ".tiff"), (".jpg", ".jpeg")
SUFFIXES = (".png", *JPEG, *TIFF)


def is_utf8(path):
    """Tell whether a file name can be written in a log."""
    return not any("\ud800" <= c <= "\udfff" for c in str(path))


@contextmanager
def atomic_file(path):
    """Open a file for writing that replaces the old one only when it is complete."""
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
        with suppress(OSError):  # it was renamed, or the disk is read-only
            temporary.unlink()


def write_atomically(path, data):
    """Write bytes by atomic_file."""
    with atomic_file(path) as file:
        file.write(data)


def save_mat(path, key, array):
    """Write a PSF (h, w) or an image (C, H, W) as a MATLAB file, without a time stamp."""
    array = array.transpose(1, 2, 0).squeeze() if array.ndim == 3 else array
    buffer = io.BytesIO()
    scipy.io.savemat(buffer, {key: array})
    write_atomically(path, b"MATLAB 5.0 MAT-file".ljust(116) + buffer.getvalue()[116:])


def load_mat(path, key):
    """Return the matrix of that key in a MATLAB file, or the file's only matrix."""
    with open(path, "rb") as file:
        arrays = scipy.io.loadmat(file)
    found = {k: v for k, v in arrays.items() if k[:2] != "__" and np.ndim(v) == 2}
    if key not in found and len(found) != 1:
        raise InputError(f"neither `{key}` nor a single matrix")
    return found.get(key, next(iter(found.values())))


def csv_text(rows):
    """Return rows of cells as the bytes of a CSV file."""
    buffer = io.StringIO()
    csv.writer(buffer).writerows(rows)
    return buffer.getvalue().encode()


def digest(arrays):
    """Return the SHA-256 of arrays or CPU tensors, in hex; None for None."""
    if arrays is None:
        return None
    total = hashlib.sha256()
    for array in arrays:
        total.update(np.ascontiguousarray(array))
    return total.hexdigest()


def sources_digest(root=Path(__file__).parent):
    """Return the SHA-256 of all sources, in hex: an edited program has another one."""
    total = hashlib.sha256()
    for path in sorted([*root.glob("*.py"), *root.glob("network/**/*.py")]):
        for part in (str(path.relative_to(root)).encode(), path.read_bytes()):
            total.update(b"%d:" % len(part) + part)
    return total.hexdigest()


def contents_name(path):
    """Return a file's name for a results folder: its stem and a hash of its contents."""
    contents = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    return f"{Path(path).stem[:60]}-{contents[:8]}"


def stack_of(path):
    """Return the TIFF file of a plane's path such as cells.tif/007; None for other paths."""
    return path.parent if path.name.isdecimal() and path.parent.is_file() else None


def full_series(tiff):
    """List a TIFF's series, without thumbnails, each with its number of planes."""
    full = [series for series in tiff.series if not series.keyframe.is_reduced]
    sizes = [math.prod(s.shape) // max(1, math.prod(s.keyframe.shape)) for s in full]
    return list(zip(full, sizes))


def planes(path):
    """List the paths of a TIFF file's planes if it has several, else the file alone."""
    count = 1
    if path.suffix.lower() in TIFF and is_utf8(path):
        # A damaged file counts as one plane here; reading it says what is wrong.
        with suppress(Exception), tifffile.TiffFile(path) as tiff:
            claimed = sum(n for _, n in full_series(tiff))
            count = claimed if claimed <= path.stat().st_size else 1
    numbers = (f"{plane:0{len(str(count))}d}" for plane in range(1, count + 1))
    return [path / number for number in numbers] if count > 1 else [path]


def result_names(path):
    """Return the names of a picture's folder (a plane's: its stack) and of the picture."""
    stack = stack_of(path)
    if stack:
        return "/".join(result_names(stack)), path.name
    if path.parent == Path(skimage.data.data_dir):
        return "skimage", path.stem
    return path.parent.resolve().name or "root", path.name


def find_images(path):
    """List the image files that --path names; a stack is listed by its planes.

    Raises:
        InputError, OSError: there are none.
    """
    given, bundled = Path(path), Path(skimage.data.data_dir)
    named = {f.stem: f for f in sorted(bundled.iterdir()) if f.suffix in SUFFIXES}
    if given.is_dir():
        files = sorted(f for f in given.iterdir() if not f.name.startswith("."))
        images = [f for f in files if f.suffix.lower() in SUFFIXES and f.is_file()]
        for file in sorted(set(files) - set(images)):
            print(f"{file}: skipped, no PNG, JPEG or TIFF image")
        if not images:
            raise InputError(f"{path}: no PNG, JPEG or TIFF image in this folder")
    elif given.exists():
        if given.suffix.lower() not in SUFFIXES:
            raise InputError(f"{path}: not a PNG, JPEG or TIFF file by its name")
        images = [given]
    elif path in named:
        images = [named[path]]
    else:
        raise InputError(
            f"{path}: no such file or folder, nor an image of scikit-image "
            f"({', '.join(named)})"
        )
    return list(itertools.chain.from_iterable(map(planes, images)))


# --- options -------------------------------------------------------------------------


def number(kind, low, described, high=math.inf, include_low=True):
    """Return an argparse type: numbers x with low <= x < high, or low < x < high."""

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
    """Check text, as an argparse type: not empty, and UTF-8, for it is logged."""
    if not value or not is_utf8(value):
        raise argparse.ArgumentTypeError(f"{value!r} is empty or not UTF-8")
    return value


def device_name(value):
    """Check a device's name, as an argparse type, without opening the device."""
    if not re.fullmatch(r"auto|cpu|mps|cuda(:(0|[1-9]\d*))?", value, re.ASCII):
        raise argparse.ArgumentTypeError(NO_DEVICE.format(value))
    return value


def open_device(value):
    """Return the torch.device of a name, after a first computation on it.

    Several processes on a machine (LOCAL_RANK, else RANK) take a GPU each.

    Raises:
        InputError: PyTorch cannot use the device.
    """
    import torch  # late: it takes seconds, and --help does not need it

    auto = value == "auto"
    if auto:
        value = "cuda" if torch.cuda.is_available() else "cpu"
    rank = os.environ.get("LOCAL_RANK", os.environ.get("RANK", ""))
    if value == "cuda" and torch.cuda.is_available() and rank.isdecimal():
        value = f"cuda:{int(rank) % torch.cuda.device_count()}"
    try:
        device = torch.device(value)
        if device.type == "cuda" and device.index and torch.cuda.is_available():
            torch.cuda.set_device(device)  # else each process opens GPU 0, too
        torch.ones(1, device=device).add(1).item()  # fails without kernels for it
        return device
    except (AssertionError, RuntimeError, ValueError) as error:  # PyTorch raises any
        if auto:
            print(
                f"PyTorch cannot use {value}, so the CPU is used: {first_line(error)}"
            )
            return torch.device("cpu")
    raise InputError(f"argument --device: {NO_DEVICE.format(value)}")


NO_DEVICE = (
    "no device {!r} that PyTorch can use on this machine; choose auto, cpu, cuda, cuda:N "
    "or mps"
)
COUNT = number(int, 1, "a whole number from 1 to 1e9", 10**9 + 1)
NATURAL = number(int, 0, "a whole number from 0 to 1e9", 10**9 + 1)
NOT_NEGATIVE = number(float, 0, "a number from 0 to 1e30", 1e30)  # its square is finite
POSITIVE = number(float, 0, "a number above 0, below 1e38", 1e38, include_low=False)
RATE = number(float, 0, "a rate in [0, 1)", 1)
SEED = number(int, 0, "a whole number from 0 to 2**32 - 1", 2**32)
SIDE = number(int, 1, "a whole number from 1 to 4096", 4097)
PSF_SIGMA = number(float, 1e-3, "a number from 0.001")
WIDTH = number(float, 0, "a share above 0, up to 1", math.nextafter(1, 2), False)

# The scripts' options: type or choices, and help. The scripts hold the default values;
# None leaves the choice to the recipe or to the picture.
OPTIONS = {
    "path": (text, "image file, folder, or name of an image of scikit-image"),
    "crop": (NATURAL, "side of a centre crop, pixels; 0: the whole image"),
    "sigma": (NOT_NEGATIVE, "noise to add: standard deviation, 0-255 scale"),
    "observed": (bool, "the image is already noisy or blurred: simulate nothing"),
    "noise_sigma": (NOT_NEGATIVE, "sigma of an --observed image's white noise, 0-255"),
    "reference": (text, "clean image to score the result of an --observed one"),
    "mask": (text, "image file, 0 or transparent where a pixel is missing"),
    "missing": (RATE, "share of the pixels to hide at random, and to score"),
    "kernel_size": (SIDE, "side of the PSF, pixels (Gaussian 15, estimated 31)"),
    "kernel_sigma": (PSF_SIGMA, "standard deviation of the Gaussian PSF, pixels (1.0)"),
    "kernel": (
        text,
        "file of the PSF (.mat, .npy, image; turn it if the result rings), or estimate",
    ),
    "boundary": (("wrap", "valid"), "wrap: a circular blur; valid: a camera's"),
    "recipe": (None, "fast: 500 steps; paper: as published, 150,000"),
    "drop_rate": (RATE, "p of the Bernoulli mask and of the decoder's dropout"),
    "iteration": (COUNT, "training steps"),
    "lr": (POSITIVE, "learning rate"),
    "width": (WIDTH, "share of the paper's channels in the slowest layers"),
    "optimizer": (("adam", "adamw", "muon"), "adamw has PyTorch's weight decay, 0.01"),
    "window": (NATURAL, "side of the training's windows, pixels; 0: the whole picture"),
    "precision": (("auto", "float32", "bfloat16"), "type of the feature maps"),
    "fuse": (("on", "off"), "add the details that the residual still holds"),
    "bs": (COUNT, "Bernoulli samples of the observation per step"),
    "real_noise": (bool, "camera noise: each step adds fresh Poisson noise"),
    "seed": (SEED, "seed of noise, weights, masks and dropout"),
    "device": (device_name, "auto, cpu, cuda, cuda:N or mps"),
    "resume": (bool, "continue an interrupted run from its checkpoint"),
    "test_frequency": (COUNT, "steps between ensemble predictions"),
    "num_prediction": (COUNT, "predictions to average; fewer for a large picture"),
    "model_type": (text, "name of the results folder"),
    "log_path": (text, "log file; its CSV and curves lie beside it"),
}
# These options do not change the restored pixels.
IRRELEVANT = ["path", "reference", "resume", "test_frequency", "device", "model_type"]
IRRELEVANT += ["log_path", "given", "schedule"]
# A results folder's name begins with these options, and ends with the edited others.
NAMED = ["sigma", "observed", "mask", "recipe", "kernel_size", "kernel_sigma", "kernel"]


def parse_arguments(description, defaults, recipes, argv=None):
    """Read the command line. A flag overrides the script's value; errors exit with 2.

    Args:
        description: what the script does.
        defaults: option name -> the script's value; the names are keys of OPTIONS.
        recipes: name -> Recipe.
        argv: arguments; None: those of the process.

    Returns:
        A Namespace of all options. `device` is a torch.device, `fuse` a bool; None leaves
        the choice to the recipe or the picture. `given` has the names of the flags whose
        values differ from the script's, `schedule` is the recipe's.
    """
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.error = lambda text: parser.exit(2, f"{parser.prog}: error: {text}\n")
    with suppress(AttributeError):  # a notebook's shows any file name
        sys.stdout.reconfigure(errors="backslashreplace")
    words = []  # the script's values as flags: both are checked alike
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
    how = {"nargs": "?", "type": text, "default": argparse.SUPPRESS}
    parser.add_argument("picture", help="the same as --path", **how)
    line = vars(parser.parse_args(sys.argv[1:] if argv is None else argv))
    if {"picture", "path"} <= line.keys():
        parser.error(f"{line['picture']!r} and --path: one of them")
    line = {"path" if key == "picture" else key: line[key] for key in line}
    script = vars(parser.parse_args(words))
    args = argparse.Namespace(**dict.fromkeys(defaults) | script | line)
    args.given = {key for key, value in line.items() if value != script.get(key)}
    args.fuse = {"on": True, "off": False}.get(args.fuse)
    args.schedule = recipes[args.recipe].schedule
    refuse_contradictions(parser, args)
    try:
        args.device = open_device(args.device)  # last: no error follows
    except InputError as error:
        parser.error(str(error))
    if not args.observed and "sigma" not in line and os.path.exists(args.path):
        print(f"{args.path}: noise is ADDED; --observed restores the picture itself")
    return args


def refuse_contradictions(parser, args):
    """Exit with status 2 where options contradict each other."""
    if args.fuse and (args.drop_rate == 0 or args.num_prediction == 1):
        parser.error("--fuse on needs a --drop_rate and several predictions")
    if args.mask and args.missing:
        parser.error("--mask and --missing both say which pixels are missing: drop one")
    if Path(args.model_type).name != args.model_type or args.model_type == "..":
        parser.error(f"--model_type {args.model_type!r} is not the name of a folder")
    if args.reference and not args.observed:
        parser.error("--reference needs --observed")
    if args.noise_sigma is not None and not args.observed:
        parser.error("--noise_sigma needs --observed; --sigma is noise to add")
    if args.precision == "bfloat16" and args.device == "mps":
        parser.error("--precision bfloat16 needs --device cpu or cuda")


def named_settings(args, defaults, psf):
    """Return the settings that decide the restored pixels, and their folder's name.

    Args:
        args: what parse_arguments returns.
        defaults: the script's values; the name shows those that differ.
        psf: the PSF's name, or None.
    """
    others = {k: v for k, v in vars(args).items() if k not in IRRELEVANT + NAMED}
    if args.schedule == "constant":
        del others["iteration"]  # a longer run may continue a shorter one
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


# --- noise ----------------------------------------------------------------------------


def gaussian_noise(shape, sigma, seed):
    """Return white Gaussian noise, float32, for pictures in [0, 1].

    The same shape, sigma and seed always give the same noise.

    Args:
        shape: (C, H, W).
        sigma: standard deviation on the 0-255 scale.
        seed: natural number.
    """
    generator, noise = np.random.default_rng(seed), np.empty(shape, np.float32)
    for channel in noise:  # saves memory: the draws are float64
        channel[:] = generator.standard_normal(shape[1:]) * (sigma / 255)
    return noise
