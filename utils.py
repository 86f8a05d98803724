"""Errors, files, options and progress. Imports nothing of this project."""

import argparse
import csv
import hashlib
import io
import itertools
import math
import os
import signal
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
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
        cure = "a --crop, a smaller --bs, --fuse off or --device cpu needs less"
        return f"{path}: out of memory at {size}; {cure}"
    return None


def is_out_of_memory(error):
    """Tell whether memory ran out: in this error, or in one that caused it."""
    words = ("out of memory", "t allocate", "ALLOC_FAILED")
    says = isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    below = error.__cause__ or error.__context__
    return says or isinstance(error, MemoryError) or (below and is_out_of_memory(below))


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
        first_line = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(f"{path} is damaged, or {wanted}: {first_line}") from None


# --- files ---------------------------------------------------------------------------

TIFF, JPEG = (".tif", ".tiff"), (".jpg", ".jpeg")
ANY_NAME = "backslashreplace"  # writes file names that are not UTF-8, too
SUFFIXES = (".png", *JPEG, *TIFF)


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


def set_aside(folder):
    """Rename a results folder, to keep what it holds."""
    if not any(folder.glob("[!.]*")):  # what a killed run was writing begins with a dot
        return
    numbered = (folder.with_name(f"{folder.name}~{n}") for n in itertools.count(1))
    free = next(path for path in numbered if not path.exists())
    folder.rename(free)
    tqdm.write(f"{folder}: kept as {free}")


def csv_text(rows):
    """Return rows of cells as the bytes of a CSV file."""
    buffer = io.StringIO()
    csv.writer(buffer).writerows(rows)
    return buffer.getvalue().encode(errors=ANY_NAME)


def digest(array):
    """Return the SHA-256 of an array, in hex; None for None."""
    if array is None:
        return None
    return hashlib.sha256(np.ascontiguousarray(array)).hexdigest()


def file_digest(path):
    """Return the SHA-256 of a file's contents, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sources_digest(root=Path(__file__).parent):
    """Return the SHA-256 of all sources, in hex: an edited program has another one."""
    sources = sorted([*root.glob("*.py"), *root.glob("network/**/*.py")])
    lines = (f"{file_digest(path)} {path.relative_to(root)}\n" for path in sources)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def contents_name(path):
    """Return a file's name for a results folder: its stem and a hash of its contents."""
    return f"{Path(path).stem[:60]}-{file_digest(path)[:8]}"


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
    if path.suffix.lower() in TIFF:
        # A damaged file counts as one plane here; reading it says what is wrong.
        with suppress(Exception), tifffile.TiffFile(path) as tiff:
            claimed = sum(n for _, n in full_series(tiff))
            count = claimed if claimed <= path.stat().st_size else 1
    numbers = (f"{plane:0{len(str(count))}d}" for plane in range(1, count + 1))
    return [path / number for number in numbers] if count > 1 else [path]


def result_names(path):
    """Return the names of a picture's folder and the picture; a plane's folder is its stack."""
    stack = stack_of(path)
    if stack:
        return "/".join(result_names(stack)), path.name
    if path.parent == Path(skimage.data.data_dir):
        return "skimage", path.stem
    return path.parent.resolve().name or "root", path.name


def find_images(path):
    """List the image files that --path names; a stack is listed plane by plane.

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
            fault = "no PNG, JPEG or TIFF image in this folder; convert to PNG or TIFF"
            raise InputError(f"{path}: {fault}")
    elif given.exists():
        if given.suffix.lower() not in SUFFIXES:
            fault = "not a PNG, JPEG or TIFF file by its name; convert to PNG or TIFF"
            raise InputError(f"{path}: {fault}")
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
    """Return text, as an argparse type; it must not be empty."""
    if not value:
        raise argparse.ArgumentTypeError("it is empty")
    return value


COUNT = number(int, 1, "a whole number from 1 to 1e9", 10**9 + 1)
NATURAL = number(int, 0, "a whole number from 0 to 1e9", 10**9 + 1)
NOT_NEGATIVE = number(float, 0, "a number from 0 to 1e30", 1e30)  # its square is finite
POSITIVE = number(float, 0, "a number above 0, below 1e38", 1e38, include_low=False)
RATE = number(float, 0, "a rate in [0, 1)", 1)
SEED = number(int, 0, "a whole number from 0 to 2**32 - 1", 2**32)
SIDE = number(int, 1, "a whole number from 1 to 4096", 4097)
PSF_SIGMA = number(float, 1e-3, "a number from 0.001")
WIDTH = number(float, 0, "a share above 0, up to 1", math.nextafter(1, 2), False)

OUTPUT = """copy the restored image to this file, or several images to this folder; the
suffix is the format; a file is replaced only if --output wrote it and nobody changed it"""
# The scripts' options: type or choices, and help. The scripts hold the default values; None
# leaves the choice to the recipe or to the picture.
OPTIONS = {
    "path": (text, "image file, folder, or name of an image of scikit-image"),
    "crop": (NATURAL, "use the central square of this side, pixels; 0: all"),
    "sigma": (NOT_NEGATIVE, "add white noise of this standard deviation, 0-255 scale"),
    "observed": (bool, "restore the image as it is: add no noise and no blur"),
    "noise_sigma": (NOT_NEGATIVE, "sigma of an --observed image's white noise, 0-255"),
    "reference": (text, "score an --observed image's result against this clean one"),
    "mask": (text, "fill in the pixels where this image is 0 or transparent"),
    "missing": (RATE, "hide this share of the pixels at random, and fill them in"),
    "kernel": (text, "read the PSF from a .mat, .npy or image; or find it: estimate"),
    "kernel_size": (SIDE, "take a PSF of this side, pixels (Gaussian 15, found 31)"),
    "kernel_sigma": (PSF_SIGMA, "blur by a Gaussian of this deviation, pixels (1.0)"),
    "boundary": (("wrap", "valid"), "take the blur as circular, or as a camera's"),
    "recipe": (("fast", "paper"), "train 500 steps, or 150,000 as published"),
    "drop_rate": (RATE, "drop this share: in the Bernoulli mask, and in the decoder"),
    "iteration": (COUNT, "train for this number of steps"),
    "lr": (POSITIVE, "train at this learning rate"),
    "width": (WIDTH, "use this share of the paper's channels in the slowest layers"),
    "optimizer": (("adam", "adamw", "muon"), "use this optimiser (adamw: decay 0.01)"),
    "window": (NATURAL, "train on windows of this side, pixels; 0: the whole image"),
    "precision": (("auto", "float32", "bfloat16"), "hold feature maps in this type"),
    "fuse": (("on", "off"), "fuse the network's result with the observation"),
    "bs": (COUNT, "train on this many Bernoulli samples a step"),
    "real_noise": (bool, "add Poisson noise at each step, against a camera's noise"),
    "num_prediction": (COUNT, "average this many predictions; fewer in large images"),
    "seed": (SEED, "seed the noise, weights, masks and dropout"),
    "device": (text, "compute on auto, cpu, cuda, cuda:N or mps"),
    "output": (text, OUTPUT),
    "resume": (bool, "continue an interrupted run from its checkpoint"),
    "test_frequency": (COUNT, "restore the image each time after this many steps"),
    "model_type": (text, "put results into a folder of this name"),
    "log_path": (text, "write the log here; its CSV and curves lie beside it"),
}
# --help has a heading before these options.
HEADINGS = {"path": "picture", "kernel": "blur", "recipe": "method", "output": "output"}
# These options do not change the restored pixels.
IRRELEVANT = ["path", "reference", "resume", "test_frequency", "device", "model_type"]
IRRELEVANT += ["log_path", "output", "given"]
# A results folder's name has these options first, then others that differ from DEFAULTS.
NAMED = ["sigma", "observed", "mask", "recipe", "kernel_size", "kernel_sigma", "kernel"]


def parse_arguments(description, defaults, open_device, argv=None):
    """Read the command line. A flag overrides the script's value; errors exit with 2.

    Args:
        description: what the script does, and examples after "Examples:".
        defaults: option name -> the script's value; OPTIONS has the names.
        open_device: function from a device's name to its torch.device; ValueError says what
            is wrong with it.
        argv: arguments; None: those of the process.

    Returns:
        A Namespace of all options. `device` is a torch.device, `fuse` a bool; None leaves
        the choice to the recipe or the picture. `given` has the names of the flags whose
        values differ from the script's.
    """
    described, _, examples = description.partition("Examples:")
    raw = argparse.RawDescriptionHelpFormatter
    how = {"description": described, "epilog": "Examples:" + examples}
    parser = argparse.ArgumentParser(**how, formatter_class=raw, allow_abbrev=False)
    parser.error = lambda text: parser.exit(2, f"{parser.prog}: error: {text}\n")
    with suppress(AttributeError):  # a notebook's needs no change
        sys.stdout.reconfigure(errors=ANY_NAME)
    how = {"nargs": "?", "type": text, "default": argparse.SUPPRESS}
    parser.add_argument("picture", help="the same as --path", **how)
    words = []  # the script's values as flags: both are checked alike
    for key in filter(defaults.__contains__, OPTIONS):
        if key in HEADINGS:
            group = parser.add_argument_group(HEADINGS[key])
        (kind, help_text), default = OPTIONS[key], defaults[key]
        how = {"choices": kind} if isinstance(kind, tuple) else {"type": kind}
        if kind is bool:
            how = {"action": argparse.BooleanOptionalAction}
        if kind is bool and default is not None:
            words += [f"--{key}" if default else f"--no-{key}"]
        elif default is not None:
            words += [f"--{key}={default}"]
        shown = "" if default is None else f" (default: {default})".replace("%", "%%")
        how |= {"help": help_text + shown, "default": argparse.SUPPRESS}
        group.add_argument(f"--{key}", **how)
    line = vars(parser.parse_args(sys.argv[1:] if argv is None else argv))
    if {"picture", "path"} <= line.keys():
        parser.error(f"{line['picture']!r} and --path: one of them")
    line = {"path" if key == "picture" else key: line[key] for key in line}
    script = vars(parser.parse_args(words))
    args = argparse.Namespace(**dict.fromkeys(defaults) | script | line)
    args.given = {key for key, value in line.items() if value != script.get(key)}
    args.fuse = {"on": True, "off": False}.get(args.fuse)
    refuse_contradictions(parser, args)
    try:
        args.device = open_device(args.device)  # last: no error follows
    except ValueError as error:
        parser.error(f"argument --device: {error}")
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


# --- progress ------------------------------------------------------------------------

EVERY, FIRST = 60, 5  # seconds between two lines or checkpoints; before the first line


class Progress:
    """One picture's progress in time: a bar, or lines if stderr is no terminal.

    A thread draws it, so it goes on while fusing takes its minutes. Between `start` and
    `close` a signal to end only sets `stopping` to the exit status.
    """

    def __init__(self, name):
        self.name, self.bar, self.stopping, self.handlers = name, None, None, {}
        self.started, self.end, self.closed = 0.0, None, threading.Event()

    def start(self):
        """Start the clock."""
        how = {"desc": self.name, "disable": None, "leave": False}
        self.bar = tqdm(bar_format="{l_bar}{bar}| {elapsed}<{remaining}", **how)
        self.started = time.perf_counter()
        self.thread = threading.Thread(target=self._draw_until_closed, daemon=True)
        self.thread.start()
        main = threading.current_thread() is threading.main_thread()  # sets handlers
        for number in (signal.SIGINT, signal.SIGTERM) if main else ():
            # A shell lets a command that it runs behind "&" ignore Ctrl-C.
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                self.handlers[number] = signal.signal(number, self._stop)

    def expect(self, left):
        """Note the seconds left."""
        self.end = time.perf_counter() + left

    def draw(self):
        """Show the share of the time that has passed, and the seconds left."""
        now = time.perf_counter()
        self.bar.n, left = now - self.started, max(0, self.end - now)
        self.bar.total = self.bar.n + left
        self.bar.refresh()
        if self.bar.disable:  # stderr is no terminal, and a bar would fill it
            share, time_left = self.bar.n / self.bar.total, tqdm.format_interval(left)
            print(f"{self.name}: {share:.0%} done, {time_left} left", file=sys.stderr)

    def _draw_until_closed(self):
        first, every = (FIRST, EVERY) if self.bar.disable else (0.5, 0.5)
        while not self.closed.wait(first if self.end is None else every):
            if self.end is not None:
                self.draw()

    def close(self):
        """Remove the bar, and handle signals as before."""
        self._restore_handlers()
        self.closed.set()
        if self.bar is not None:
            self.thread.join()
            self.bar.close()
        self.bar = None

    def _restore_handlers(self):
        while self.handlers:
            signal.signal(*self.handlers.popitem())

    def _stop(self, number, _frame):
        """Note a signal. A second one does not wait for the end of the step."""
        self.stopping = 128 + number
        self._restore_handlers()
