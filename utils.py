"""Errors and files, options, and simulated noise: what every other room may use."""

import argparse
import csv
import hashlib
import io
import math
import os
import re
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import scipy.io
from tqdm import tqdm

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


# --- noise ----------------------------------------------------------------------------


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
