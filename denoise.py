"""Denoise images with Self2Self. Each is learnt from its own noisy pixels: y = x + n.

Examples:
    python denoise.py photo.jpg --observed --output clean.jpg
    python denoise.py --crop 256  (adds noise of sigma 25 to a test image, and removes it)
"""

import sys

import numpy as np

import network
import results
import utils
from network import recipes
from network.blur import identity
from network.device import open_device
from network.forecast import Forecast
from network.noise import gaussian_noise
from network.unknown import find_unknown

DEFAULTS = {
    # What to restore
    "path": "camera",  # image file, folder, or name of a scikit-image image
    "crop": 0,  # pixels; 0: the whole image
    "sigma": 25.0,  # to add, 0-255 scale
    "observed": False,
    "noise_sigma": None,  # an observed image's, 0-255 scale
    "reference": None,
    "mask": None,
    "missing": 0.0,  # share, in [0, 1)
    # How it learns; None: the recipe decides, in network/recipes.py
    "recipe": "fast",  # fast, paper
    "drop_rate": None,  # in [0, 1)
    "iteration": None,  # steps
    "lr": None,
    "width": None,  # of the network, in (0, 1]
    "optimizer": None,  # adam, adamw, muon
    "window": None,  # pixels; 0: the whole picture
    "precision": None,  # auto, float32, bfloat16
    "fuse": None,  # on, off
    "bs": 1,
    "real_noise": None,
    "seed": 0,
    "device": "auto",  # auto, cpu, cuda, cuda:N, mps
    # What it predicts and writes
    "resume": False,
    "test_frequency": 1000,  # steps
    "num_prediction": 100,
    "model_type": "denoise",
    "output": None,  # file, or folder for several pictures
    "log_path": "./logs/denoise/log.txt",
}


def choose(args, y, source):
    """Return this picture's recipe and its noise, which is given by the user or found."""
    try:
        return recipes.choose(args, y, source)
    except ValueError as fault:
        raise utils.InputError(f"{source.path}: {fault}") from None


def restore(args, result):
    """Learn one picture, and write its results."""
    source = result.read()
    x, known = source.image, source.known
    if args.observed:
        known = source.leave_out(*find_unknown(x, known > 0, guess=not args.mask))
    n = gaussian_noise(x.shape, args.sigma, args.seed)
    y = np.where(known, x if args.observed else x + n, 0)
    recipe, found = choose(args, y, source)
    learner = network.Self2Self(y, identity, known, recipe, args.seed, args.device)
    result.begin(learner, y, found)
    result.resume(Forecast(learner, args.test_frequency, args.num_prediction))
    while not result.is_complete():
        if result.awaits_test():
            restored = learner.predict(args.num_prediction, result.advance)
            result.add(restored, *learner.fuse(restored))
            learner.reset_mean_loss()
        else:
            learner.train_step()  # a network that dies starts over, at step 0
        result.keep()
    result.finish()


def main(argv=None):
    """Run the script; return its exit status."""
    args = utils.parse_arguments(__doc__, DEFAULTS, open_device, argv)
    run = results.Run(args, DEFAULTS)
    for path in run.paths:
        with run.image(path) as result:  # reports an error, and the loop goes on
            restore(args, result)
    return run.finish()


if __name__ == "__main__":
    sys.exit(main())
