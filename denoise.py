"""Denoise images with Self2Self, each learnt from its own noisy pixels: y = x + n."""

import sys

import utils
from network import Self2Self, recipes

DEFAULTS = {
    # What to restore
    "path": "camera",  # image file, folder of images, or name of a scikit-image image
    "crop": 0,  # side of a centre crop, pixels; 0 = whole image
    "sigma": 25.0,  # noise added: standard deviation on the 0-255 scale; 0 = none
    "observed": False,  # True: the image is noisy already, nothing is added
    "reference": None,  # clean image file to score an observed one against, or None
    "mask": None,  # image file, 0 where a pixel is missing, or None
    "missing": 0.0,  # share of the pixels to hide, in [0, 1)
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
    "model_type": "denoise",  # name of the results folder
    "log_path": "./logs/denoise/log.txt",  # its .csv and .png stand beside it
}


def decide(args):
    """Return what the recipe decides for this noise; a camera's is not known, nor white."""
    camera = args.observed and args.sigma > 0  # --sigma 0 says: no noise
    sigma = None if camera else args.sigma
    fuse = sigma == 0 if args.mask or args.missing else bool(sigma)
    others = {"real_noise": camera and args.recipe == "fast"}
    return others | recipes.decided(args.recipe, args.device, sigma, fuse)


def identity(x):
    """The forward operator A of denoising."""
    return x


def main(argv=None):
    """Run the script; return its exit status."""
    args = utils.parse_arguments(__doc__, DEFAULTS, decide, argv)
    run = utils.Run(args, DEFAULTS | decide(args))
    for path in run.paths:
        with run.image(path) as result:  # an error is reported, the next image goes on
            x, known = result.read()
            noise = utils.gaussian_noise(x.shape, args.sigma, args.seed)
            y = known * (x if args.observed else x + noise)
            scale = recipes.choose_scale(args, y, known, result.eight_bits)
            weights = run.initial_weights(len(x))
            learner = Self2Self(**recipes.learner_settings(args, scale.span))
            learner.begin(y, identity, known, weights, scale, result.start_over)
            result.begin(learner, y, noise=noise)  # with --resume: at its checkpoint
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
