"""Denoise images with Self2Self, each learnt from its own noisy pixels: y = x + n."""

import sys

import utils
from network import Self2Self

DEFAULTS = {
    # What to restore
    "path": "camera",  # image file, folder of images, or name of a scikit-image image
    "crop": 0,  # side of a centre crop, pixels; 0 = whole image
    "sigma": 25.0,  # noise added: standard deviation on the 0-255 scale; 0 = none
    "observed": False,  # True: the image is noisy already, nothing is added
    "reference": None,  # clean image file to score an observed one against, or None
    # How it learns
    "recipe": "paper",  # paper or fast: utils.RECIPES says what each decides, and wins
    "drop_rate": 0.3,  # p of the Bernoulli mask and of the dropout, in [0, 1)
    "iteration": 150000,  # training steps
    "lr": 1e-4,  # learning rate
    "optimizer": "adam",  # adam, adamw or muon
    "bs": 1,  # Bernoulli samples of the observation per step
    "seed": 0,  # of noise, weights, masks and dropout
    "device": "auto",  # auto, cpu, cuda, cuda:N or mps
    # What it predicts and writes
    "resume": False,  # True: go on from the checkpoint of an interrupted run
    "test_frequency": 1000,  # steps between ensemble predictions
    "num_prediction": 100,  # predictions averaged
    "fuse": "off",  # on: give the ensemble back what its residual holds besides noise
    "noise_sigma": None,  # an observed image's sigma, for fusing; None: estimated
    "model_type": "denoise",  # name of the results folder
    "log_path": "./logs/denoise/log.txt",  # its .csv and .png stand beside it
}


def identity(x):
    """The forward operator A of denoising."""
    return x


def restore(record, learner, args):
    """Restore one image: make its observation, learn it, predict at every test."""
    if args.observed:
        record.observe(record.image)
    else:
        noise = utils.gaussian_noise(record.image.shape, args.sigma, args.seed)
        record.observe(record.image + noise, noise=noise)
    learner.begin(record.observation, identity)
    for step in record.steps(learner):
        learner.train_step()
        if record.is_test(step):
            ensemble = learner.predict(args.num_prediction)
            fused = learner.fuse(ensemble, record.sigma) if args.fuse == "on" else ()
            record.add(step, learner.mean_loss(), ensemble, *fused)


def main(argv=None):
    """Run the script; return its exit status."""
    utils.tune_cpu()
    args = utils.parse_arguments(__doc__, DEFAULTS, argv)
    learner = Self2Self(**utils.learner_settings(args))
    run = utils.Run(args, DEFAULTS, named=("sigma", "drop_rate"))
    return run.restore(lambda record: restore(record, learner, args))


if __name__ == "__main__":
    sys.exit(main())
