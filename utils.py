"""What both scripts need around the method: options, images in and out, noise, metrics, log and plots."""

import argparse
import csv
import ctypes
import hashlib
import io
import itertools
import json
import math
import os
import re
import shlex
import signal
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

# Both are read when a library is imported, below. Let PyTorch's threads spin for a tenth
# of a millisecond, not several, while they wait: as fast on a quiet machine, and beside
# one other busy program a step takes twice as long, not fifteen times.
os.environ.setdefault("GOMP_SPINCOUNT", "30000")
# Refuse a tiny file that claims a gigantic image.
os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(2**25))

import cv2
import numpy as np
import scipy.io
import scipy.ndimage
import skimage.data
import torch
from matplotlib.figure import Figure
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from tqdm import tqdm

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
SMALLEST_SIDE = 32  # pixels: five poolings
LOSS_EVERY = 100  # steps between two looks at the loss
SAVE_EVERY = 300  # seconds between two checkpoints, at most
EARLY = 1000  # steps within which a network that dies is started over
ATTEMPTS = 4  # networks that may die before an image is given up


class InputError(Exception):
    """Something that the user gave cannot be used; the text names it and the cure."""


class TrainingError(Exception):
    """The training of an image cannot go on."""


class Stopped(Exception):
    """The user or the system asked the run to stop; its state is saved."""


# --- options -------------------------------------------------------------------------


def number(kind, low, text, high=math.inf, include_low=True):
    """Make an argparse type: a finite number of `kind` from low up to, not including, high."""

    def convert(value):
        try:
            x = kind(value)
        except ValueError:
            x = math.nan
        if not (low <= x < high and (include_low or x != low)):
            raise argparse.ArgumentTypeError(f"{value!r} is not {text}")
        return x

    return convert


positive_int = number(int, 1, "a whole number from 1")
natural = number(int, 0, "a whole number from 0")
positive = number(float, 0, "a number above 0", include_low=False)
psf_side = number(int, 1, "a whole number from 1 to 4096", high=4097)
psf_sigma = number(float, 1e-3, "a number from 0.001")
seed = number(int, 0, "a whole number from 0 to 2**32 - 1", high=2**32)
non_negative = number(float, 0, "a number from 0")
rate = number(float, 0, "a rate in [0, 1)", high=1)


class Option(NamedTuple):
    """A command line option of either script; its default value stands in the script."""

    type: object
    help: str
    choices: tuple | None = None
    # What a value that is not the default adds to the results folder's name; None: the
    # option leaves the result as it is, or its value is always named.
    label: object = None


def file_label(path):
    """Name a file by its stem and contents."""
    return (
        f"{Path(path).stem}-{hashlib.sha256(Path(path).read_bytes()).hexdigest()[:8]}"
    )


OPTIONS = {
    "path": Option(str, "image file, folder, or name of an image of scikit-image"),
    "sigma": Option(non_negative, "noise added: standard deviation, 0-255 scale"),
    "recipe": Option(str, "how it learns: see RECIPES", ("paper", "fast"), "{}".format),
    "drop_rate": Option(rate, "p of the Bernoulli mask and of the decoder's dropout"),
    "kernel_size": Option(psf_side, "side of the Gaussian PSF, pixels"),
    "kernel_sigma": Option(psf_sigma, "standard deviation of the Gaussian PSF, pixels"),
    "kernel": Option(
        str, "file of any other PSF: .mat, .npy or an image", label=file_label
    ),
    "iteration": Option(positive_int, "training steps", label="{}steps".format),
    "lr": Option(positive, "learning rate", label="lr{}".format),
    "optimizer": Option(str, "optimiser", ("adam", "adamw", "muon"), "{}".format),
    "bs": Option(
        positive_int,
        "Bernoulli samples of the observation per step",
        label="bs{}".format,
    ),
    "test_frequency": Option(positive_int, "steps between ensemble predictions"),
    "num_prediction": Option(
        positive_int, "predictions averaged", label="num_prediction{}".format
    ),
    "seed": Option(
        seed, "seed of noise, weights, masks and dropout", label="seed{}".format
    ),
    "crop": Option(
        natural,
        "side of a centre crop, pixels; 0: the whole image",
        label="crop{}".format,
    ),
    "observed": Option(
        bool, "the image IS the observation: simulate nothing", label="observed".format
    ),
    "reference": Option(str, "clean image to score an --observed one against"),
    "fuse": Option(
        str,
        "give back to the ensemble what its residual holds besides noise",
        ("on", "off"),
        "fuse_{}".format,
    ),
    "noise_sigma": Option(
        positive,
        "noise of an --observed image, 0-255 scale; default: estimated",
        label="noise{}".format,
    ),
    "resume": Option(bool, "go on from the checkpoint of an interrupted run"),
    "device": Option(str, "auto, cpu, cuda, cuda:N or mps"),
    "model_type": Option(str, "name of the results folder"),
    "log_path": Option(str, "log file; its CSV and curves stand beside it"),
}


# What a recipe decides, and an explicit flag overrides; the rest stands in the scripts.
RECIPES = {
    "paper": {
        "anneal": False,  # raise the learning rate, then lower it to 0
        "average": 0,  # the training's predictions do not join the ensemble
        "ratio": "window",  # partial convolution: full windows scaled by 1/C
        "start": "default",  # PyTorch's initial weights
        "beta2": 0.999,  # Adam's
    },
    "fast": {
        "iteration": 1000,
        "drop_rate": {0: 0.2, 15: 0.3},  # from these sigmas on: see `decided`
        "optimizer": "muon",
        "lr": 3e-3,
        "beta2": 0.9,  # no step is larger than the learning rate
        "anneal": True,
        "average": {0: 3, 40: 1},  # they do: that of step t of T with (t / T)**average
        "ratio": "entries",  # full windows scaled by 1
        "start": "mean",  # the last bias makes the observation's mean
        "fuse": "on",
    },
}


def decided(recipe, sigma=None):
    """Return what a recipe decides.

    Args:
        recipe: name of one of RECIPES.
        sigma: the noise's, 0-255 scale, for what goes by it; None, where it is not
            known or a blur is there too: as for 25.
    """
    level = 25 if sigma is None else sigma
    return {
        name: value[max(k for k in value if k <= level)]
        if type(value) is dict
        else value
        for name, value in RECIPES[recipe].items()
    }


class Parser(argparse.ArgumentParser):
    """Argument parser that reports an error in one line."""

    def error(self, message):
        """Print the message on stderr and exit with status 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def parse_arguments(description, defaults, argv=None):
    """Read the command line.

    Args:
        description: what the script does.
        defaults: option name -> default value; the names are keys of OPTIONS.
        argv: arguments, those of the process where it is None.

    Returns:
        The options' values, `device` as a torch.device. Errors exit with status 2.
    """
    parser = Parser(description=description, allow_abbrev=False)
    for name, default in defaults.items():
        option = OPTIONS[name]
        if option.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        else:
            kind = {"type": option.type, "choices": option.choices}
        text = f"{option.help} (default: {default})"
        parser.add_argument(f"--{name}", default=argparse.SUPPRESS, help=text, **kind)
    # The script's own values pass the same checks as those of the command line.
    written = [
        f"--{k}={v}" for k, v in defaults.items() if type(v) in (str, int, float)
    ]
    defaults = defaults | vars(parser.parse_args(written))
    explicit = vars(parser.parse_args(argv))
    args = argparse.Namespace(**(defaults | explicit))
    known = None if args.observed or "kernel" in defaults else args.sigma
    args = argparse.Namespace(**(defaults | decided(args.recipe, known) | explicit))
    # Without dropped entries, without noise and of one prediction there is nothing to
    # fuse; where a camera's noise is not white, or a Gaussian blur has taken away for
    # good what the network misses, it is for the user to say.
    nothing = not (args.drop_rate and args.sigma and args.num_prediction > 1)
    gaussian = "kernel" in defaults and not args.kernel
    if (nothing or args.observed or gaussian) and "fuse" not in explicit:
        args.fuse = "off"
    try:
        args.device = choose_device(args.device)
        if args.reference and not args.observed:
            raise InputError("--reference goes with --observed")
        if args.noise_sigma and not (args.observed and args.fuse == "on"):
            raise InputError("--noise_sigma goes with --observed and --fuse on")
        if not args.model_type or Path(args.model_type).name != args.model_type:
            raise InputError(f"--model_type {args.model_type!r}: no name of a folder")
        for name, value in vars(args).items():
            if not is_utf8(value):
                raise InputError(f"--{name} {value!r}: not UTF-8; rename it")
            if name in ("kernel", "reference") and value == "":
                raise InputError(f"--{name} is empty")
        if not Path(args.log_path).name:
            raise InputError(f"--log_path {args.log_path!r}: no name of a file")
        if args.fuse == "on" and not (args.drop_rate and args.num_prediction > 1):
            raise InputError("--fuse on needs a --drop_rate and several predictions")
        share()
    except InputError as error:
        parser.error(error)
    return args


def share():
    """Return this process's number and that of all, which torchrun or a person sets."""
    texts = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    rank, world = (int(text) if text.isdecimal() else -1 for text in texts)
    if not 0 <= rank < world:
        raise InputError(
            "RANK and WORLD_SIZE: {}, {}; 0, 1 is one process".format(*texts)
        )
    return rank, world


def learner_settings(args):
    """Return what network.Self2Self is made with, from the options' values."""
    names = ("drop_rate", "lr", "optimizer", "bs", "seed", "device")
    names += ("average", "ratio", "start", "beta2")
    settings = {name: getattr(args, name) for name in names}
    return settings | {"anneal": args.iteration if args.anneal else None}


def choose_device(name):
    """Turn auto, cpu, cuda, cuda:N or mps into a torch.device that is there.

    Of several processes on a machine (LOCAL_RANK) each takes a GPU of its own.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and torch.cuda.is_available() and "LOCAL_RANK" in os.environ:
        name = f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"
    if not re.fullmatch(r"cpu|mps|cuda(:(0|[1-9]\d?))?", name):
        raise InputError(f"unknown device {name!r}: auto, cpu, cuda, cuda:N or mps")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"no device {name!r} on this machine; --device auto finds one")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise InputError("no device 'mps' on this machine; --device auto finds one")
    return device


# --- images in and out ---------------------------------------------------------------


class Picture(NamedTuple):
    """An image file's pixels, and what it takes to write their like."""

    name: str  # unique in its folder, so with its suffix
    folder: str  # name of the folder it lies in; "skimage" for a bundled image
    image: np.ndarray  # (C, H, W) float32, [0, 1], C = 1 or 3 (R, G, B)
    alpha: np.ndarray | None  # (H, W) in the file's own type and scale
    dtype: np.dtype  # uint8, uint16, float32 or float64
    suffix: str

    def save(self, path, image):
        """Write an image (C, H, W), [0, 1], in this picture's depth, with its alpha.

        The path's suffix says the format; a PNG of a float picture has 16 bits.
        """
        dtype = self.dtype
        if dtype.kind == "f" and Path(path).suffix == ".png":
            dtype = np.dtype(np.uint16)
        pixels = quantise(image, dtype).transpose(1, 2, 0)[..., ::-1]  # OpenCV has BGR
        if self.alpha is not None:
            alpha = self.alpha / peak(self.alpha.dtype)
            color = np.broadcast_to(pixels, (*pixels.shape[:2], 3))
            pixels = np.dstack([color, quantise(alpha, dtype)])
        write_atomically(path, encode(Path(path).suffix, pixels))


def peak(dtype):
    """Return the value that stands for 1 in a type."""
    return np.iinfo(dtype).max if np.dtype(dtype).kind == "u" else 1


def quantise(image, dtype):
    """Clip to [0, 1], scale to a type's peak and round."""
    scaled = np.clip(np.asarray(image, np.float64), 0, 1) * peak(dtype)
    return (np.rint(scaled) if np.dtype(dtype).kind == "u" else scaled).astype(dtype)


def encode(suffix, pixels):
    """Encode pixels (H, W, channels in OpenCV's order) in the format of a suffix."""
    best = [cv2.IMWRITE_JPEG_QUALITY, 100] if suffix in (".jpg", ".jpeg") else []
    return cv2.imencode(suffix, np.ascontiguousarray(pixels), best)[1].tobytes()


def write_atomically(path, data):
    """Write bytes so that the file is the old one or the new one, whole, at any moment."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        with suppress(OSError):  # none, or the disk has become read-only
            temporary.unlink()


@contextmanager
def silent_decoder():
    """Keep the image libraries' own messages, which C code prints, off stderr."""
    sys.stderr.flush()
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


def is_utf8(path):
    """Tell whether a name can be written in a log, and passed to OpenCV."""
    return not any("\ud800" <= c <= "\udfff" for c in str(path))


def decode(path):
    """Read a PNG, JPEG or TIFF file's pixels as OpenCV has them: (H, W) or BGR(A)."""
    if not path.exists():
        raise InputError(f"{path}: no such file")
    if not is_utf8(path):
        raise InputError(f"{path}: a file name that is not UTF-8; rename it")
    try:
        data = np.fromfile(path, np.uint8)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    pixels = None
    if data.size:
        # A camera's JPEG may be stored turned; other formats keep alpha and palette.
        jpeg = data[:2].tobytes() == b"\xff\xd8"
        turned = cv2.IMREAD_ANYCOLOR | cv2.IMREAD_ANYDEPTH
        with silent_decoder():
            try:
                pages = cv2.imcount(str(path))
                pixels = cv2.imdecode(data, turned if jpeg else cv2.IMREAD_UNCHANGED)
            except cv2.error as error:
                if "CV_IO_MAX_IMAGE" in str(error):
                    raise InputError(
                        f"{path}: over 33 million pixels; cut a part out of it"
                    ) from None
    if pixels is None:
        what = (
            "is damaged, or not a PNG, JPEG or TIFF image" if data.size else "is empty"
        )
        raise InputError(f"{path} {what}")
    if pages > 1:
        raise InputError(f"{path}: {pages} pages; save the one to restore by itself")
    return pixels


def read_picture(path, crop=0, folder=None):
    """Read an image file.

    Args:
        path: a PNG, JPEG or TIFF file: gray or colour, 8 or 16 bits or float in [0, 1].
        crop: side of the centre crop, pixels; 0 = whole.
        folder: the folder's name in the results, where it is not the file's own.

    Raises:
        InputError: it cannot be restored; the text says why.
    """
    path = Path(path)
    pixels = decode(path)
    if pixels.dtype not in (np.uint8, np.uint16, np.float32, np.float64):
        raise InputError(f"{path}: {pixels.dtype} pixels; convert it to 8 or 16 bits")
    pixels = pixels.reshape(*pixels.shape[:2], -1)
    if path.suffix.lower() in (".jpg", ".jpeg") and (
        pixels.dtype != np.uint8 or pixels.shape[2] == 4
    ):
        raise InputError(f"{path}: no JPEG, whatever its name says; rename it")
    height, width, channels = pixels.shape
    if crop:
        top, left = max(0, height - crop) // 2, max(0, width - crop) // 2
        pixels = pixels[top : top + crop, left : left + crop]
    height, width, channels = pixels.shape
    if channels not in (1, 3, 4):
        raise InputError(f"{path}: {channels} channels; gray or colour is needed")
    if min(height, width) < SMALLEST_SIDE:
        raise InputError(
            f"{path}: {width}x{height} pixels; a side needs {SMALLEST_SIDE} or more"
        )
    color, alpha = pixels[..., :3], pixels[..., 3] if channels == 4 else None
    if not np.isfinite(pixels).all():
        raise InputError(f"{path}: it holds NaN or infinite pixels")
    if pixels.dtype.kind == "f" and abs(color).max() > 2:
        raise InputError(
            f"{path}: float pixels up to {abs(color).max():g}; scale them to [0, 1]"
        )
    if alpha is not None and (color == color[..., :1]).all():
        color = color[..., :1]  # gray with alpha comes as four channels
    image = color[..., ::-1].transpose(2, 0, 1)
    image = np.divide(image, peak(pixels.dtype), dtype=np.float32, order="C")
    return Picture(
        *reversed(picture_name(path, folder)),
        image,
        alpha,
        pixels.dtype,
        path.suffix.lower(),
    )


def picture_name(path, folder):
    """Return the names of an image's folder and of the image, in the results."""
    if folder is not None:  # a bundled image
        return folder, path.stem
    return path.parent.resolve().name or "root", path.name


def find_images(path):
    """List the image files that --path means.

    Returns:
        A list of (file, name of its folder in the results, or None for its own).

    Raises:
        InputError: there are none.
    """
    if not path:
        raise InputError("--path is empty")
    given = Path(path)
    if given.is_dir():
        files = sorted(f for f in given.iterdir() if not f.name.startswith("."))
        images = [f for f in files if f.suffix.lower() in SUFFIXES and f.is_file()]
        for file in sorted(set(files) - set(images)):
            print(f"{file}: skipped, no PNG, JPEG or TIFF image")
        if not images:
            raise InputError(f"{path}: no PNG, JPEG or TIFF image in this folder")
        return [(file, None) for file in images]
    if given.exists():
        if given.suffix.lower() not in SUFFIXES:
            raise InputError(f"{path}: not a PNG, JPEG or TIFF file by its name")
        return [(given, None)]
    bundled = {
        f.stem: f
        for f in Path(skimage.data.data_dir).iterdir()
        if f.suffix.lower() in SUFFIXES
    }
    if path in bundled:
        return [(bundled[path], "skimage")]
    raise InputError(
        f"{path}: no such file or folder, nor an image of scikit-image "
        f"({', '.join(sorted(bundled))})"
    )


# --- observation and metrics ---------------------------------------------------------


def gaussian_noise(shape, sigma, seed):
    """White Gaussian noise, float32 on the [0, 1] scale, from the seed and shape alone.

    Args:
        shape: (C, H, W).
        sigma: standard deviation on the 0-255 scale.
        seed: natural number.
    """
    draws = np.random.default_rng(seed).standard_normal(shape)
    return (draws * (sigma / 255)).astype(np.float32)


def estimate_sigma(observation):
    """Estimate the standard deviation of white noise, on the 0-255 scale.

    From the median size of a detail that planes do not have (Immerkaer 1996, made
    robust), where few entries around are 0 or 1: a camera clips noise there. Perfectly
    flat places, a frame's, do not count. Texture adds to it.

    Args:
        observation: (C, H, W), [0, 1] scale.

    Raises:
        InputError: nothing is left to estimate it from.
    """
    detail = np.array([1, -2, 1]) / math.sqrt(6)
    size = observation.astype(np.float64)
    for axis in (1, 2):
        size = scipy.ndimage.correlate1d(size, detail, axis)
    size = np.abs(size)
    inside = ((observation > 0) & (observation < 1)).astype(np.float64)
    around = scipy.ndimage.uniform_filter(inside, (0, 9, 9))
    varied = size > 1e-9
    few = np.quantile(around[varied], 0.75) - 0.05 if varied.any() else 0
    size = size[varied & (around >= few)]
    if not size.size:
        raise InputError("no noise is found in this image; --noise_sigma names it")
    return float(255 * np.median(size) / 0.67449)


def score(image, clean):
    """PSNR in dB (peak 1) and SSIM (Wang et al. 2004) of the clipped image (C, H, W)."""
    image = np.clip(image, 0, 1).astype(np.float64)
    clean = clean.astype(np.float64)
    with np.errstate(divide="ignore"):
        psnr = peak_signal_noise_ratio(clean, image, data_range=1)
    ssim = structural_similarity(
        clean,
        image,
        data_range=1,
        channel_axis=0,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
    )
    return float(psnr), float(ssim)


def save_mat(path, **arrays):
    """Write a MATLAB file without the time of day in its header, so that it repeats."""
    buffer = io.BytesIO()
    scipy.io.savemat(buffer, arrays)
    data = buffer.getvalue()
    write_atomically(path, b"MATLAB 5.0 MAT-file".ljust(116) + data[116:])


# --- results and log -----------------------------------------------------------------

OWN_FILES = (
    *("noisy.png", "noise.mat", "blurred.png", "kernel.mat", "error.mat"),
    *("Self2Self-*.png", "restored.*", "comparison.png"),
    *("record.json", "checkpoint*.pt"),
)
CHECKPOINTS = ("checkpoint.pt", "checkpoint.previous.pt")


def results_folder(run, folder, name):
    """Say where the results of an image go."""
    return Path("images", folder, name, run.args.model_type, run.settings_name)


class Record:
    """One image of a run: its observation, its results folder, its rows of the log.

    `image` is the picture (C, H, W) that stands at --path, `observation` what is learnt
    from, `clean` what it is scored against, None where there is nothing.
    """

    def __init__(self, run, file, folder):
        self.run, self.args, self.file, self.failed = run, run.args, file, False
        self.picture = read_picture(file, self.args.crop, folder)
        self.image, self.size = self.picture.image, describe(self.picture.image)
        if self.args.reference:
            clean, image = (read_picture(f).image for f in (self.args.reference, file))
            if clean.shape != image.shape:
                raise InputError(
                    f"{self.args.reference}: {describe(clean)}, but {file} is "
                    f"{describe(image)}"
                )
            self.clean = read_picture(self.args.reference, self.args.crop).image
        else:
            self.clean = None if self.args.observed else self.image
        self.name = f"{self.picture.folder}/{self.picture.name}"
        self.folder = results_folder(run, self.picture.folder, self.picture.name)
        self.rows, self.notes, self.seconds = [], [], 0.0
        self.latest = self.restored = None  # of the last test; of one seen to be alive

    def observe(self, observation, **parts):
        """Take the observation, and write it with what it was made of.

        Args:
            observation: y, (C, H, W), [0, 1] scale, not clipped.
            parts: noise (C, H, W), blurred (C, H, W) and kernel (h, w), where known.

        For fusing, `sigma` is then its noise's standard deviation on the 0-255
        scale: simulated, given or estimated.
        """
        self.observation = observation
        self.observed = None if self.clean is None else score(observation, self.clean)
        self.sigma = self.args.noise_sigma or self.args.sigma
        if self.args.observed and self.args.fuse == "on" and not self.args.noise_sigma:
            self.sigma = estimate_sigma(observation)
        saved = self._load() if self.args.resume else None
        if saved is None:
            self._clear()
        else:
            self.rows, self.notes = list(map(tuple, saved["rows"])), saved["notes"]
            step, tested = saved["step"], self.rows[-1][0] if self.rows else 0
            if step > self.args.iteration and step != tested:
                raise InputError(
                    f"{self.name}: the checkpoint is of step {step} already, between "
                    "two tests; a larger --iteration goes on from it"
                )
            self.seconds, self.latest = saved["seconds"], saved["restored"].numpy()
            self.restored = self.latest
        self.saved = saved
        self._write_record()
        self.picture.save(self.folder / "noisy.png", observation)
        if "blurred" in parts:
            self.picture.save(self.folder / "blurred.png", parts["blurred"])
        for key in parts.keys() & {"noise", "kernel"}:
            self._save_mat(key, parts[key])
        self.run.begin(self)

    def steps(self, learner):
        """Count the training steps from 1, with a progress bar; then write the results.

        Args:
            learner: the network.Self2Self that the loop trains.
        """
        step = 0
        if self.saved is not None:
            learner.load_state_dict(self.saved["learner"])
            step = self.saved["step"]
            self.saved = None  # as large as the network and its optimiser
            if step >= self.args.iteration:
                tqdm.write(f"{self.name}: finished already, at step {step}")
                self._finish(step)
                return
            tqdm.write(f"{self.name}: going on from step {step}")
        begun, started = step, time.perf_counter() - self.seconds
        saved = time.perf_counter()
        first = LOSS_EVERY if self.args.device.type == "cuda" else 10
        first = min(first, max(2, self.args.test_frequency - 1))  # tests take longer
        bar = tqdm(
            total=self.args.iteration,
            desc=self.name,
            unit="step",
            initial=step,
            position=self.run.rank,
            disable=None,  # where stderr is a file, which it would fill
        )
        with bar:
            while step < self.args.iteration:
                step += 1
                yield step
                bar.update()
                self.seconds = time.perf_counter() - started
                if step == begun + 1:
                    warm = time.perf_counter()
                elif step == begun + first:
                    learner.recent_loss()  # waits for the device
                    self._announce((time.perf_counter() - warm) / (first - 1))
                if step % LOSS_EVERY == 0 or self.is_test(step):
                    if step >= LOSS_EVERY and not learner.alive():
                        self._restart(learner, step)
                        step = begun = 0
                        bar.reset()
                        continue
                    self.restored = self.latest
                    psnr = f", {self.rows[-1][2]:.2f} dB" if self._scored() else ""
                    bar.set_postfix_str(f"loss {learner.recent_loss():.5f}{psnr}")
                late = time.perf_counter() - saved > SAVE_EVERY
                if late or self.run.stopped or self.is_test(step):
                    self._save(learner, step)
                    saved = time.perf_counter()
                if self.run.stopped:
                    raise Stopped(f"{self.name}: stopped at step {step}")
        self._finish(step)

    def _restart(self, learner, step):
        """Start a network that died over, if it may be worth it."""
        told = f"{self.name}: the network died (constant or non-finite output) by step {step}"
        (self.folder / "error.mat").unlink(missing_ok=True)  # of the dead one
        good = [row for row in self.rows if LOSS_EVERY <= row[0] < step]
        if step > EARLY and good:
            self.rows = good
            self._write_results()
            self._write_record()
            raise TrainingError(f"{told}; the result of step {good[-1][0]} is kept")
        if learner.attempt == ATTEMPTS:
            raise TrainingError(f"{told}; a lower --lr than {self.args.lr:g} cures it")
        learner.begin_again()
        self.rows.clear()
        self.restored = self.latest = None
        for file in self.folder.glob("Self2Self-*.png"):
            file.unlink()
        note = f"{told}: started over at the mean, learning rate {learner.lr:g}"
        self.notes.append(note)
        tqdm.write(note)

    def is_test(self, step):
        """Tell whether the ensemble is to be predicted after this step."""
        return step % self.args.test_frequency == 0 or step == self.args.iteration

    def add(self, step, loss, ensemble, fused=None, error=None):
        """Log a test and save its picture.

        Args:
            step: training steps done.
            loss: mean loss since the last test.
            ensemble: the ensemble's mean, (C, H, W).
            fused: that, fused with the observation, which then is the result.
            error: the fused one's predicted squared error, (C, H, W).
        """
        restored = ensemble if fused is None else fused
        if not np.isfinite(restored).all():
            return  # dead, which `steps` will see
        psnr = ssim = plain = None
        if self.clean is not None:
            psnr, ssim = score(restored, self.clean)
            plain = psnr if fused is None else score(ensemble, self.clean)[0]
        self.rows.append((step, loss, psnr, ssim, plain, self.seconds))
        self.latest = restored
        if error is not None:
            self._save_mat("error", error)
        self.picture.save(self.folder / f"Self2Self-{step}.png", restored)
        self._write_record()
        self.run.write_log()
        tqdm.write(f"{self.name}: {row_text(self.rows[-1])}")

    def _save_mat(self, key, array):
        """Write a PSF (h, w) or an image (C, H, W) as <key>.mat."""
        if array.ndim == 3:
            array = array.transpose(1, 2, 0).squeeze()
        save_mat(self.folder / f"{key}.mat", **{key: array})

    def heading(self):
        """Name the image, its size and what its observation scores."""
        text = f"{self.name}: {self.size}"
        if self.observed:
            text += f", observation {self.observed[0]:.3f} dB, {self.observed[1]:.4f}"
        if self.args.fuse == "on":
            text += f", noise sigma {self.sigma:.4g}"
        return text

    def release(self):
        """Let go of the pixels, once the image is done: the log needs none."""
        self.picture = self.image = self.clean = self.observation = None
        self.latest = self.restored = self.saved = None

    def _scored(self):
        return self.rows and self.rows[-1][2] is not None

    def _made_from(self):
        """Say, by name, all that a checkpoint depends on."""
        parts = {"image or noise": self.observation, "reference": self.clean}
        parts = {
            name: None
            if pixels is None
            else hashlib.sha256(pixels.tobytes()).hexdigest()
            for name, pixels in parts.items()
        }
        return self.run.identity | parts | {"device": self.args.device.type}

    def _save(self, learner, step):
        """Write a checkpoint; the one before is kept until this one is whole."""
        restored = np.zeros(0) if self.restored is None else self.restored
        buffer = io.BytesIO()
        torch.save(
            {
                "made_from": self._made_from(),
                "step": step,
                "rows": self.rows,
                "notes": self.notes,
                "seconds": self.seconds,
                "restored": torch.from_numpy(restored),
                "learner": learner.state_dict(),
            },
            buffer,
        )
        newest, previous = (self.folder / name for name in CHECKPOINTS)
        if newest.exists():
            os.replace(newest, previous)
        write_atomically(newest, buffer.getvalue())

    def _load(self):
        """Return the newest checkpoint that is whole, or None where there is none."""
        for path in (self.folder / name for name in CHECKPOINTS):
            if not path.exists():
                continue
            try:
                saved = torch.load(path, map_location="cpu", weights_only=True)
                before = saved["made_from"]
            except Exception:  # noqa: BLE001 - a damaged file fails in many ways
                tqdm.write(f"{path}: damaged, or no checkpoint; left aside")
                continue
            now = self._made_from()
            other = [key for key in now if key not in before or before[key] != now[key]]
            if other:
                raise InputError(
                    f"{path}: the checkpoint is of another {', another '.join(other)}; "
                    "without --resume the run starts over"
                )
            return saved
        return None

    def _announce(self, seconds_per_step):
        """Say how long the image will take."""
        total = seconds_per_step * self.args.iteration
        tests = math.ceil(self.args.iteration / self.args.test_frequency)
        total += tests * self.args.num_prediction * seconds_per_step / 3
        tqdm.write(
            f"{self.name}: {seconds_per_step:.3g} s a step, about {duration(total)} in all"
        )
        if total > 3600 and self.args.device.type == "cpu":
            tqdm.write(
                "That is long, on a CPU. Shorter: --recipe fast, --iteration 2000, "
                "--crop 128, a rarer --test_frequency; or a GPU."
            )

    def _identity(self):
        """Say what decides the results: the picture's pixels and the settings."""
        pixels = hashlib.sha256(self.image.tobytes()).hexdigest()
        return {"image": f"{self.name} {pixels}", "settings": self.run.identity}

    def _clear(self):
        """Make room: remove earlier results of the same, set others aside."""
        try:
            earlier = json.loads((self.folder / "record.json").read_text())
        except (OSError, ValueError):
            earlier = None
        if isinstance(earlier, dict):
            if all(earlier.get(k) == v for k, v in self._identity().items()):
                tqdm.write(f"{self.folder}: replacing the earlier results")
            else:
                set_aside(self.folder)  # results of another picture or other settings
        for pattern in OWN_FILES:
            for file in self.folder.glob(pattern):
                file.unlink()

    def _write_record(self, finished=False):
        """Write what is known of this image as JSON."""
        record = {
            "name": self.name,
            "size": self.size,
            "finished": finished,
            **self._identity(),
            "iteration": self.args.iteration,
            "device": str(self.args.device),
            "observation": self.observed,
            "columns": COLUMNS[1:],
            "rows": self.rows,
        }
        data = json.dumps(record, indent=1).encode()
        write_atomically(self.folder / "record.json", data)

    def _finish(self, step):
        """Write the restored image of the last step, and the comparison."""
        if not self.rows or self.rows[-1][0] != step:
            raise TrainingError(f"{self.name}: the output is not finite; lower --lr")
        self._write_results()
        self._write_record(finished=True)
        self.run.write_log(curves=True)

    def _write_results(self):
        path = self.folder / f"restored{self.picture.suffix}"
        self.picture.save(path, self.restored)
        panels = [("observation", self.observation, self.observed)]
        panels += [("restored", self.restored, self.rows[-1][2:4])]
        if self.clean is not None:
            panels += [("clean", self.clean, None)]
        write_atomically(self.folder / "comparison.png", encode(".png", strip(panels)))
        print(f"{path}")


SUMMARY = ("image", "size", "observation_psnr", "psnr", "ssim", "steps", "seconds")
SIGNALS = (signal.SIGINT, signal.SIGTERM)
COLUMNS = ("image", "step", "loss", "psnr", "ssim", "ensemble_psnr", "seconds")


class Run:
    """All images of one call of a script.

    Args:
        args: the options' values.
        defaults: the script's default values.
        named: options whose values always stand in the results folder's name, in order.
    """

    def __init__(self, args, defaults, named):
        self.args = args
        values, usual = vars(args), defaults | RECIPES[args.recipe]
        deciding = [k for k in OPTIONS if k in defaults and OPTIONS[k].label]
        deciding.remove("iteration")
        labels = [
            OPTIONS[k].label(values[k])
            for k in deciding
            if values[k] != (defaults if k == "recipe" else usual)[k]
        ]
        if args.anneal:  # another number of steps is another schedule
            labels.append(OPTIONS["iteration"].label(args.iteration))
            deciding.append("iteration")
        self.settings_name = "_".join([*(str(values[k]) for k in named), *labels])
        self.identity = {k: values[k] for k in (*named, *deciding, *RECIPES["paper"])}
        self.records, self.failed = [], []
        self.rank, self.world = share()
        self.log = Path(args.log_path)
        stem = self.log.name.removesuffix(".txt")
        self.totals = self.log.with_name(f"{stem}-summary.csv")
        self.ends = [
            self.log.with_name(f"{stem}.rank{r}.done") for r in range(self.world)
        ]
        if self.world > 1:  # no two processes write the same file
            stem += f".rank{self.rank}"
            self.log = self.log.with_name(stem + self.log.suffix)
        self.csv, self.curves = (self.log.with_name(stem + e) for e in (".csv", ".png"))
        self.started, self.stopped = False, None

    def restore(self, restore):
        """Restore every image of --path; return the process's exit status.

        Args:
            restore: called with the Record of one image.
        """
        try:
            files = find_images(self.args.path)
            if len(files) > 1 and self.args.reference:
                raise InputError("--reference goes with one image, not with a folder")
            check_writable("images")
            check_writable(self.log.parent)
            self._check_log([file for file, _ in files])
            self._check_results(files)
        except InputError as error:
            return fail(error)
        except OSError as error:
            return fail(f"{self.args.path}: {error.strerror}")
        self.files = files
        files = files[self.rank :: self.world]
        files = [f for f in files if len(self.files) == 1 or self._readable(*f)]
        handlers = {s: signal.signal(s, self._stop) for s in SIGNALS}
        try:
            return self._restore_each(files, restore)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _stop(self, number, _):
        """Stop after the step, the first time; at once, the second."""
        if self.stopped:
            raise KeyboardInterrupt
        self.stopped = number

    def _restore_each(self, files, restore):
        for file, folder in files:
            if self.records:
                self.records[-1].release()
            try:
                restore(Record(self, file, folder))
            except (InputError, TrainingError) as error:
                told = str(error)
            except OSError as error:
                told = f"{error.filename or file}: {error.strerror or error}"
            except (MemoryError, RuntimeError) as error:
                known = MemoryError, torch.OutOfMemoryError
                if not isinstance(error, known) and "t allocate" not in str(error):
                    raise
                size = self.records[-1].size if self.records else "its size"
                told = f"{file}: out of memory at {size}; a --crop, a smaller --bs,"
                told += " --fuse off or --device cpu needs less"
            except Stopped as stop:
                command = shlex.join([*sys.argv, "--resume"])
                fail(f"{stop}; go on with: python {command}")
                return 128 + self.stopped
            except KeyboardInterrupt:
                fail(f"{file}: interrupted; --resume goes on from the last checkpoint")
                return 130
            else:
                continue
            fail(told)
            self.failed.append(file)
            if self.records and self.records[-1].file == file:
                self.records[-1].failed = True
                self.records[-1].notes.append(f"failed: {told}")
                with suppress(OSError):  # which is what failed
                    self.write_log(curves=True)
        if self.failed and len(self.files) > 1:
            names = ", ".join(map(str, self.failed))
            fail(f"{len(self.failed)} of {len(self.files)} images failed: {names}")
        try:
            return self._finish()
        except OSError as error:
            fail(f"{error.filename}: {error.strerror}")
            return 1

    def _finish(self):
        """Write and print the totals; return the exit status.

        Of several processes the last one does, and answers for all: torchrun would end
        the others at once when one has failed.
        """
        status = (1 if self.started else 2) if self.failed else 0
        if self.world > 1:
            write_atomically(self.ends[self.rank], b"failed" if self.failed else b"")
            if not all(end.exists() for end in self.ends):
                return 0
            status = int(any(end.read_bytes() for end in self.ends))
        table = []
        for file, folder in self.files:
            path = results_folder(self, *picture_name(file, folder)) / "record.json"
            with suppress(OSError, ValueError, KeyError):  # none, or not ours
                record = json.loads(path.read_text())
                if record["finished"]:
                    step, _, psnr, ssim, _, seconds = record["rows"][-1]
                    before = (record["observation"] or [None])[0]
                    scores = record["size"], before, psnr, ssim, step, round(seconds, 1)
                    table.append((record["name"], *scores))
        if not table:
            return status
        scored = [row[2:5] for row in table if row[3] is not None]
        means = np.mean(scored, 0).tolist() if scored else [None] * 3
        count = f"{len(table)} image{'s' * (len(table) != 1)}"
        table.append(("average", count, *means, None, None))
        text = io.StringIO()
        csv.writer(text).writerows([SUMMARY, *table])
        write_atomically(self.totals, text.getvalue().encode())
        for row in [SUMMARY, *table]:
            cells = (f"{c:.3f}" if isinstance(c, float) else c or "-" for c in row[1:])
            print(f"{row[0]:32s}", *(f"{cell:>16}" for cell in cells))
        return status

    def _readable(self, file, folder):
        """Look at one of many images before any training, and report a bad one."""
        try:
            read_picture(file, self.args.crop, folder)
        except InputError as error:
            fail(error)
            self.failed.append(file)
            return False
        return True

    def _check_log(self, files):
        """Raise InputError where a log file would take a folder's or an input's place."""
        inputs = [*files, self.args.reference, getattr(self.args, "kernel", None)]
        inputs = {Path(file).resolve() for file in inputs if file}
        for path in (self.log, self.csv, self.curves):
            if path.is_dir() or path.resolve() in inputs:
                raise InputError(
                    f"--log_path {self.log}: {path} is a folder or an input"
                )

    def _check_results(self, files):
        """Raise InputError where an image itself stands where its results would go."""
        for file, folder in files:
            place = results_folder(self, *picture_name(file, folder))
            if any(path.is_file() for path in (place, *place.parents)):
                raise InputError(
                    f"{file}: its results would go to {place}, where a file is in the "
                    "way; move the picture, or run from another folder"
                )

    def begin(self, record):
        """Log an image whose training starts now."""
        if not self.started:
            self.started = True
            self.ends[self.rank].unlink(missing_ok=True)
            header = self._header().encode()
            ours = self.log.exists() and self.log.read_bytes().startswith(header)
            if not (self.args.resume and ours):
                totals = [self.totals] if self.rank == 0 else []
                set_aside(self.log, self.csv, self.curves, *totals)
        self.records.append(record)
        self.write_log()
        tqdm.write(record.heading())

    def summary(self):
        """Average the last scores over the images."""
        going = [r for r in self.records if not r.failed]
        last = [r.rows[-1][2:4] for r in going if r._scored()]
        text = f"{len(going)} image{'s' * (len(going) != 1)}"
        if last:
            psnr, ssim = np.mean(last, 0)
            text += f", average PSNR {psnr:.3f} dB, SSIM {ssim:.4f}"
        return text

    def _header(self):
        """Write the settings as the log's first lines."""
        values = vars(self.args).items()
        return "\n".join(f"{k}: {v}" for k, v in values if k != "resume")

    def write_log(self, curves=False):
        """Write the log, its CSV and, where asked for, the curves."""
        lines, table = [self._header()], []
        for record in self.records:
            lines += ["", record.heading(), *record.notes]
            lines += [row_text(row) for row in record.rows]
            table += [(record.name, *row) for row in record.rows]
        lines += ["", self.summary(), ""]
        write_atomically(self.log, "\n".join(lines).encode())
        text = io.StringIO()
        csv.writer(text).writerows([COLUMNS, *table])
        write_atomically(self.csv, text.getvalue().encode())
        if curves:
            write_atomically(self.curves, plot(self.records))


def fail(error):
    """Report on stderr what cannot be done; return the exit status 2."""
    tqdm.write(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
    return 2


def row_text(row):
    """Write a test as a line of the log."""
    step, loss, psnr, ssim, ensemble, _ = row
    text = f"step {step:7d}  loss {loss:.6f}"
    if psnr is not None:
        text += f"  PSNR {psnr:.3f} dB  SSIM {ssim:.4f}"
    if ensemble != psnr:
        text += f"  plain ensemble {ensemble:.3f} dB"
    return text


def describe(image):
    """Say an image's size and kind."""
    channels, height, width = image.shape
    return f"{width}x{height} {'gray' if channels == 1 else 'colour'}"


def duration(seconds):
    """Write a time for a person."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def set_aside(*paths):
    """Rename what stands at the paths to free names with one number, and say so."""

    def numbered(path, n):
        stem, suffix = (path.name, "") if path.is_dir() else (path.stem, path.suffix)
        return path.with_name(f"{stem}~{n}{suffix}")

    there = [path for path in paths if path.exists()]
    n = next(
        n for n in itertools.count(1) if not any(numbered(p, n).exists() for p in there)
    )
    for path in there:
        kept = numbered(path, n)
        path.rename(kept)
        tqdm.write(f"{path}: kept as {kept}")


def check_writable(folder):
    """Raise InputError where no file can be made in a folder that may yet have to be made."""
    folder = Path(folder)
    there = next(f for f in (folder, *folder.absolute().parents) if f.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"{folder}: cannot be written; make {there} a writable folder")


def strip(panels):
    """Draw labelled images side by side.

    Args:
        panels: (label, image (C, H, W), (PSNR, SSIM) or None) each.

    Returns:
        Pixels (H', W', 3), uint8, in OpenCV's order.
    """
    drawn = []
    for label, image, scores in panels:
        pixels = quantise(image, np.uint8).transpose(1, 2, 0)[..., ::-1]
        pixels = np.broadcast_to(pixels, (*pixels.shape[:2], 3))
        zoom = math.ceil(256 / pixels.shape[1])  # room for the label
        pixels = pixels.repeat(zoom, 0).repeat(zoom, 1)
        pixels = cv2.copyMakeBorder(
            pixels, 24, 4, 4, 4, cv2.BORDER_CONSTANT, value=[255] * 3
        )
        if scores and scores[0] is not None:
            label += f" {scores[0]:.2f} dB"
        cv2.putText(
            pixels,
            label,
            (6, 17),
            cv2.FONT_HERSHEY_SIMPLEX,
            0.5,
            [0] * 3,
            1,
            cv2.LINE_AA,
        )
        drawn.append(pixels)
    return np.hstack(drawn)


def plot(records):
    """Draw loss and PSNR over the steps, a line per image; return the PNG's bytes."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, column, title in zip(
        figure.subplots(1, 2), (1, 2), ("loss", "PSNR (dB)")
    ):
        for record in records:
            points = [(row[0], row[column]) for row in record.rows]
            if points and points[0][1] is not None:
                axes.plot(*zip(*points), marker=".", label=record.name)
        axes.set(xlabel="step", ylabel=title)
        axes.grid(alpha=0.3)
        if 0 < len(axes.lines) <= 12:
            axes.legend(fontsize="small")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def tune_cpu():
    """Keep PyTorch fast on a CPU; called once, before any tensor work.

    Denormal numbers, which a training network meets, are slow. So is handing every
    large tensor's memory back to the system, to be mapped and cleared again.
    """
    torch.set_flush_denormal(True)
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # glibc alone has it
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(-3, 2**30)  # M_MMAP_THRESHOLD, bytes
            mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD, bytes
