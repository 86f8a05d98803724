"""Deblur images with Self2Self, each learnt from its own blurred pixels: y = k*x + n.

The PSF k is known (non-blind); the convolution is circular, or has seen what lies
beyond the picture, as a camera's has.
"""

import sys
from pathlib import Path

import numpy as np
import scipy.io
import torch

import utils
from network import Self2Self, recipes

LARGEST_PSF = 4096  # side, pixels; as --kernel_size

DEFAULTS = {
    # What to restore
    "path": "camera",  # image file, folder of images, or name of a scikit-image image
    "crop": 0,  # side of a centre crop, pixels; 0 = whole image
    "sigma": 10.0,  # noise added: standard deviation on the 0-255 scale; 0 = none
    "observed": False,  # True: the image is blurred already, nothing is simulated
    "reference": None,  # clean image file to score an observed one against, or None
    "mask": None,  # image file, 0 where a pixel is missing, or None
    "missing": 0.0,  # share of the pixels to hide, in [0, 1)
    # What blurred it
    "kernel_size": 15,  # side of the Gaussian PSF, pixels
    "kernel_sigma": 1.0,  # its standard deviation, pixels
    "kernel": None,  # file of any other PSF (.mat, .npy or an image), or None
    "boundary": None,  # wrap: circular; valid: a camera's; None: valid if observed
    # How it learns; None: as the recipe has it, in network/recipes.py
    "recipe": "fast",  # fast: 500 steps; paper: as published, 150,000
    "drop_rate": None,  # p of the Bernoulli mask and of the dropout, in [0, 1)
    "iteration": None,  # training steps
    "lr": None,  # learning rate
    "optimizer": None,  # adam, adamw or muon
    "window": None,  # side of the windows that it learns from, pixels; 0 = the whole
    "precision": None,  # float32, or bfloat16 on a CPU: faster if it has instructions
    "fuse": None,  # on: give the ensemble back what its residual holds besides noise
    "bs": 1,  # Bernoulli samples of the observation per step
    "real_noise": None,  # True: steps see the image drawn anew, as photons
    "seed": 0,  # of noise, weights, masks and dropout
    "device": "auto",  # auto, cpu, cuda, cuda:N or mps
    # What it predicts and writes
    "init": None,  # checkpoint whose weights to begin with, previous (image's), or None
    "resume": False,  # True: go on from the checkpoint of an interrupted run
    "test_frequency": 1000,  # steps between ensemble predictions
    "num_prediction": 100,  # predictions averaged
    "noise_sigma": None,  # an observed image's sigma, for fusing; None: estimated
    "model_type": "deblur",  # name of the results folder
    "log_path": "./logs/deblur/log.txt",  # its .csv and .png stand beside it
}


def decide(args):
    """Return what the recipe decides; a camera's noise is not known, nor white."""
    fuse = bool(args.sigma) and not (args.observed or args.mask or args.missing)
    others = {"boundary": "valid" if args.observed else "wrap", "real_noise": False}
    return others | recipes.decided(args.recipe, args.device, fuse=fuse)


def gaussian_psf(size, sigma):
    """Return a Gaussian PSF (size, size) of standard deviation sigma, both in pixels."""
    exponent = ((np.arange(size) - (size - 1) / 2) / sigma) ** 2 / 2
    profile = np.exp(exponent.min() - exponent)  # of a tiny sigma, too, not all zeros
    return np.outer(profile, profile) / profile.sum() ** 2


def choose_matrix(path):
    """Return the name and shape of `kernel` in a .mat file, or of its only matrix."""
    other = ("cell", "struct", "object", "char", "sparse", "function", "opaque")
    found = {
        name: shape
        for name, shape, kind in scipy.io.whosmat(path)
        if len(shape) == 2 and kind not in other
    }
    name = "kernel" if "kernel" in found or len(found) != 1 else next(iter(found))
    if name not in found:
        raise utils.InputError(
            f"{path}: neither a matrix called kernel nor a single matrix"
        )
    return name, found[name]


def read_psf(path):
    """Read a PSF (h, w), normalised to sum 1.

    Args:
        path: .mat (the array `kernel`, or the file's only matrix), .npy or an image.

    Raises:
        utils.InputError: it is none; the text says why.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    try:
        if not path.is_file():
            raise utils.InputError(f"{path}: no such file")
        if suffix == ".mat":
            name, shape = choose_matrix(path)
            if max(shape) <= LARGEST_PSF:  # a tiny file may claim any size
                psf = scipy.io.loadmat(path, variable_names=[name])[name]
        elif suffix == ".npy":
            psf = np.load(path, mmap_mode="r", allow_pickle=False)
            shape = psf.shape
        else:
            pixels, colours, *_ = utils.read_pixels(path)
            psf = pixels[..., :colours].mean(2)
            shape = psf.shape
        if max(shape, default=0) > LARGEST_PSF:
            raise utils.InputError(f"{path}: a PSF has sides of up to {LARGEST_PSF}")
        if psf.dtype.kind not in "biuf":
            raise utils.InputError(f"{path}: a PSF is a matrix of real numbers")
        with np.errstate(over="ignore", invalid="ignore"):
            psf = np.asarray(psf, np.float64)
            psf = psf / psf.sum() if psf.sum() > 0 else psf * np.nan
    except utils.InputError:
        raise
    except Exception as error:  # noqa: BLE001 - a damaged file fails in many ways
        reason = utils.first_line(error)
        raise utils.InputError(f"{path}: no PSF can be read: {reason}") from None
    if psf.ndim != 2 or not np.isfinite(psf).all() or not 0.999 < psf.sum() < 1.001:
        raise utils.InputError(
            f"{path}: a PSF is a matrix of finite numbers with a sum above 0"
        )
    return psf


class CircularBlur:
    """The forward operator A of deblurring: circular convolution with a PSF.

    A true convolution (the PSF is flipped), the same that scipy.ndimage.convolve
    computes with mode="wrap", each channel by itself.

    Args:
        psf: k, (h, w).

    `reach` is how many pixels around an entry it looks at. `margin`, pixels above,
    below; left, right, is how many it looks beyond what it is known of: elsewhere it is
    what scipy.signal.convolve2d computes with mode="valid".
    """

    def __init__(self, psf):
        self.psf = torch.from_numpy(psf)
        self.copies = {}  # of a device and a type: what a captured step reads stays there
        self.reach = max(psf.shape) // 2
        self.margin = [((s - 1) // 2, s // 2) for s in psf.shape]

    def __call__(self, x):
        """Blur images (N, C, H, W); H and W not less than the PSF's."""
        size, (height, width) = x.shape[-2:], self.psf.shape
        if height > size[0] or width > size[1]:
            raise utils.InputError(
                f"the PSF of {width}x{height} pixels is larger than the image of "
                f"{size[1]}x{size[0]}"
            )
        if (x.device, x.dtype) not in self.copies:
            self.copies[x.device, x.dtype] = self.psf.to(x.dtype).to(x.device)
        padded = x.new_zeros(size)
        padded[:height, :width] = self.copies[x.device, x.dtype]
        transfer = torch.fft.rfft2(padded.roll((-(height // 2), -(width // 2)), (0, 1)))
        return torch.fft.irfft2(torch.fft.rfft2(x) * transfer, s=size)


def off_centre(psf):
    """Say in a sentence that a PSF (h, w) moves the picture; None for under a pixel."""
    down, right = (
        (psf.sum(1 - axis) * np.arange(size)).sum() - size // 2
        for axis, size in enumerate(psf.shape)
    )
    if np.hypot(down, right) <= 1:
        return None
    return (
        f"The PSF's mass lies {abs(right):.1f} pixels {'right' if right > 0 else 'left'} "
        f"of its array's centre and {abs(down):.1f} {'below' if down > 0 else 'above'}: "
        "the restored picture is moved as far the other way."
    )


def chosen_psf(args):
    """Return the PSF (h, w), and its name for the results folder."""
    if args.kernel:
        psf = read_psf(args.kernel)
        return psf, utils.contents_name(args.kernel)
    psf = gaussian_psf(args.kernel_size, args.kernel_sigma)
    return psf, f"gaussian{args.kernel_size}-{args.kernel_sigma:g}"


def main(argv=None):
    """Run the script; return its exit status."""
    args = utils.parse_arguments(__doc__, DEFAULTS, decide, argv)
    try:
        psf, psf_name = chosen_psf(args)
    except utils.InputError as error:
        return utils.fail(error)
    run = utils.Run(args, DEFAULTS | decide(args), psf_name)
    blur = CircularBlur(psf)
    valid, note = args.boundary == "valid", off_centre(psf)
    if note:
        print(note)
    for path in run.paths:
        with run.image(path) as result:  # an error is reported, the next image goes on
            x, known = result.read(blur.margin) if valid else result.read()
            noise = utils.gaussian_noise(x.shape, args.sigma, args.seed)
            blurred = blur(torch.from_numpy(x)[None])[0].numpy()
            y = known * (x if args.observed else blurred + noise)
            scale = recipes.choose_scale(args, y, known, result.eight_bits, True)
            weights = run.initial_weights(len(x))
            learner = Self2Self(**recipes.learner_settings(args, scale.span))
            learner.begin(y, blur, known, weights, scale, result.start_over)
            # with --resume: at its checkpoint
            result.begin(learner, y, noise=noise, blurred=blurred, kernel=psf)
            while learner.step < args.iteration:
                learner.train_step()  # a network that dies starts over, at step 0
                if result.is_test(learner.step) and learner.alive():
                    ensemble = learner.predict(args.num_prediction)
                    fuse = args.fuse == "on"
                    fused = learner.fuse(ensemble, result.sigma) if fuse else ()
                    result.add(learner, ensemble, *fused)
                if run.stopped or result.is_due(learner.step):
                    result.save_checkpoint(learner)
                run.advance(learner.step)
            result.finish()
            run.keep_weights(learner)
    return run.finish()


if __name__ == "__main__":
    sys.exit(main())
