"""Running the two scripts in the tests' own process, and looking at what they leave."""

import shlex
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np

import deblur
import denoise
import utils
from network.device import open_device

ROOT = Path(__file__).parents[1]
SCRIPTS = {"denoise": denoise, "deblur": deblur}
RNG = np.random.default_rng(0)
QUICK = "--iteration 4 --test_frequency 2 --num_prediction 2 --device cpu"
WHOLE = np.linspace(0, 1, 64 * 64).reshape(1, 64, 64)


def write(path, channels=1, side=32, dtype=np.uint8):
    """Write a random image."""
    shape = (side, side, channels) if channels > 1 else (side, side)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    pixels = RNG.integers(0, np.iinfo(dtype).max + 1, shape).astype(dtype)
    cv2.imwrite(str(path), pixels)


def run(task, flags):
    """Run a script in this process; return its exit status."""
    try:
        return SCRIPTS[task].main(shlex.split(f"{QUICK} {flags}"))
    except SystemExit as stop:
        return stop.code


def files(folder="."):
    """List the files below a folder, with their bytes."""
    found = sorted(f for f in Path(folder).rglob("*") if f.is_file())
    return {str(f.relative_to(folder)): f.read_bytes() for f in found}


def without_seconds(made):
    """Leave out of `files()` what says how long it took."""
    made = {k: v for k, v in made.items() if "record" not in k and "checkp" not in k}
    for name in made:
        if name.endswith(".csv"):
            lines = made[name].splitlines()
            made[name] = [line.rpartition(b",")[0] for line in lines]
    return made


def parse(flags, task="denoise"):
    """Read a command line; return the options' values."""
    script = SCRIPTS[task]
    words = [*shlex.split(flags), "--device", "cpu"]
    return utils.parse_arguments("", script.DEFAULTS, open_device, words)


def chosen(flags, task="denoise", y=None, eight_bits=True):
    """Return the recipe and noise that a script chooses for an observation."""
    args = parse(flags, task)
    y = WHOLE if y is None else y
    hidden = args.mask or args.missing
    known = np.ones((1, *y.shape[1:])) * (np.arange(y.shape[2]) % 2 if hidden else 1)
    result = SimpleNamespace(
        known=known, eight_bits=eight_bits, place=slice(None), stack=None
    )
    clipped = [None] if task == "deblur" else []
    return SCRIPTS[task].choose(args, y, result, *clipped)


def results_folder():
    """Return the only folder of results that deblurring in/a.png has made."""
    (found,) = Path("images/in/a.png/deblur").iterdir()
    return found
