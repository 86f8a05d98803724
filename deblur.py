"""Deblur images with Self2Self. Each is learnt from its own blurred pixels: y = k*x + n.

The PSF k is known, or estimated from the picture. The convolution is circular, or includes
pixels beyond the picture's edge, as in a camera.

Examples:
    python deblur.py photo.jpg --observed --kernel estimate --output sharp.jpg
    python deblur.py --crop 256  (blurs a test image by a Gaussian, and deblurs it)
"""

import sys

import numpy as np
import scipy.io

import network
import pictures
import results
import utils
from network import recipes
from network.blur import CircularBlur, gaussian_psf
from network.device import open_device
from network.forecast import Forecast
from network.noise import fill_unknown, gaussian_noise
from network.psf import (
    SECOND_SPARSE,
    doubt,
    estimate_psf,
    find_shift,
    off_centre,
    point,
    without_offset,
)
from network.unknown import at_white, beside_lamps, find_unknown

# The errors of a measured PSF, and of an estimated one, act like noise of at least this sigma,
# where 255 is the picture's range. With a smaller sigma the result rings.
MEASURED_ERROR, ESTIMATED_ERROR = 2.0, 2.8

DEFAULTS = {
    # What to restore
    "path": "camera",  # image file, folder, or name of a scikit-image image
    "crop": 0,  # pixels; 0: the whole image
    "sigma": 10.0,  # to add, 0-255 scale
    "observed": False,
    "noise_sigma": None,  # an observed image's, 0-255 scale
    "reference": None,
    "mask": None,
    "missing": 0.0,  # share, in [0, 1)
    # What blurred it
    "kernel_size": None,  # pixels; Gaussian 15, estimated 31
    "kernel_sigma": None,  # pixels; 1.0
    "kernel": None,  # file, estimate
    "boundary": None,  # wrap, valid
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
    "model_type": "deblur",
    "output": None,  # file, or folder for several pictures
    "log_path": "./logs/deblur/log.txt",
}


def choose_psf(args):
    """Return the PSF (h, w), and its name for the results folder.

    For a PSF to be estimated it is a point, in an array of the right size.
    """
    if args.kernel == "estimate":
        if not args.observed:
            raise utils.InputError(
                "--kernel estimate goes with --observed; a file of that name is "
                "./estimate"
            )
        size = (args.kernel_size or 31) // 2 * 2 + 1
        if size != (args.kernel_size or size):
            print(f"--kernel_size {args.kernel_size}: {size}, because it must be odd")
        return point(size), f"estimate{size}"
    if args.kernel:
        psf = pictures.read_psf(args.kernel)
        if not args.kernel.lower().endswith((".mat", ".npy")):  # a picture of a point
            given, psf = psf, without_offset(psf)
            if psf is not given:
                print(f"{args.kernel}: a camera's offset is subtracted")
        return psf, utils.contents_name(args.kernel)
    size, sigma = args.kernel_size or 15, args.kernel_sigma or 1.0
    return gaussian_psf(size, sigma), f"gaussian{size}-{sigma:g}"


def choose(args, y, source, clipped=None):
    """Return this picture's recipe and its noise, which is given by the user or found."""
    error = ESTIMATED_ERROR if args.kernel == "estimate" else MEASURED_ERROR
    try:
        return recipes.choose(args, y, source, error, clipped)
    except ValueError as fault:
        raise utils.InputError(f"{source.path}: {fault}") from None


def estimate(result, x, size):
    """Estimate the PSF (size, size) of an observed picture x (C, H, W); print how reliable it is.

    With --resume an earlier estimate from the same picture is read instead.
    """
    found = result.folder / "kernel.mat"
    record = (
        result.args.resume and found.exists() and results.read_record(result.folder)
    )
    if record and record["made_from"].get("image or noise") == utils.digest(x):
        return scipy.io.loadmat(found)["kernel"]
    if 2 * size > min(x.shape[1:]) or np.ptp(x) == 0:
        raise utils.InputError(
            f"{result.path}: flat, or not twice as large as a PSF of {size}x{size} "
            "pixels; try a smaller --kernel_size"
        )
    psf = estimate_psf(x, size)
    print(f"{result.name}: {doubt(psf, estimate_psf(x, size, SECOND_SPARSE))}")
    return psf


def restore(args, result, psf, blur):
    """Learn one picture, and write its results."""
    import torch  # late: see network/__init__.py

    wanted = args.boundary or ("valid" if args.observed else "wrap")
    source = result.read(blur.margin) if wanted == "valid" else result.read()
    x, known = source.image, source.known
    (height, width), (h, w) = psf.shape, x.shape[1:]
    if height > h or width > w:
        raise utils.InputError(
            f"{result.path}: the PSF of {width}x{height} pixels is larger than the image "
            f"of {w}x{h}; cut its empty border"
        )
    if args.observed:
        known = source.leave_out(*find_unknown(x, known > 0, guess=not args.mask))
    if args.kernel == "estimate":
        whole = fill_unknown(x[source.place], known[source.place] > 0)
        psf = estimate(result, whole, len(psf))
        blur = CircularBlur(psf)
    if args.observed and (args.kernel == "estimate" or off_centre(psf)):
        result.find_shift = find_shift
    n = gaussian_noise(x.shape, args.sigma, args.seed)
    blurred = x if args.observed else blur(torch.from_numpy(x)[None])[0].numpy()
    y = np.where(known, x if args.observed else blurred + n, 0)
    clipped = None
    if args.observed:
        clipped = at_white(y, known)
        known = source.known = known * ~beside_lamps(y, clipped)
    recipe, found = choose(args, y, source, clipped)
    learner = network.Self2Self(
        y, blur, known, recipe, args.seed, args.device, clipped=clipped
    )
    result.begin(learner, y, found, psf)
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
    try:
        psf, psf_name = choose_psf(args)
    except (utils.InputError, OSError) as error:
        utils.report(utils.reason(error))
        return 2
    run, blur = results.Run(args, DEFAULTS, psf_name), CircularBlur(psf)
    print(off_centre(psf), end="")
    for path in run.paths:
        with run.image(path) as result:  # reports an error, and the loop goes on
            restore(args, result, psf, blur)
    return run.finish()


if __name__ == "__main__":
    sys.exit(main())
