"""What a recipe decides, and why; network/README.md has the measurements behind it.

Where a value is a dictionary it goes by the noise: from these sigmas on, where 255 stands
for the range that the picture fills.
"""

import torch

from network.scale import UNIT, find_scale

RECIPES = {
    # The released TensorFlow code's training: the published method.
    "paper": {
        "iteration": 150_000,
        "drop_rate": 0.3,
        "drop_upsampled": True,
        "optimizer": "adam",
        "lr": 1e-4,
        "beta2": 0.999,  # PyTorch's default
        "schedule": "constant",
        "ratio": "window",  # full windows scaled by 1/C, as the TensorFlow layer does
        "start": "default",  # PyTorch's initial weights
        "bend": 0.0,  # the last layer's sigmoid as it is
        "own_scale": False,  # an 8-bit picture is learnt on the [0, 1] scale
        "averaging_power": None,  # the ensemble is of the last weights alone
        "fuse": "off",
        "precision": "float32",
        "window": 0,  # the whole picture
        "photons": 25,  # with --real_noise
    },
    # Its quality and more in 500 steps.
    "fast": {
        "iteration": 500,
        "drop_rate": {0: 0.2, 40: 0.3},  # much noise is overfitted sooner
        "drop_upsampled": False,  # a step takes three quarters of the time
        "optimizer": "muon",
        "lr": 3e-3,
        "beta2": 0.9,  # no step of Adam's is larger than the learning rate
        "schedule": "linear",
        "ratio": "entries",  # full windows scaled by 1: signals keep their size
        "start": "mean",  # a large rate does not run into the sigmoid's flat ends
        "bend": 0.1,  # what lies beyond the range of y can be reached
        "own_scale": True,
        # The training's predictions join the ensemble; of much noise more of the early.
        "averaging_power": {0: 3, 40: 1},
        "fuse": "on",
        "photons": 100,  # with --real_noise: 25 blurs fine detail
        "window": 384,  # pixels a side: large pictures cost no more than small ones
        "precision": "auto",  # bfloat16 on a CPU that multiplies it, else float32
    },
}
UNKNOWN_SIGMA = 25  # taken where the noise is not known


def multiplies_bfloat16(device):
    """Tell whether a torch.device is a CPU that has instructions for bfloat16."""
    able = torch.cpu.get_capabilities()
    return device.type == "cpu" and any(map(able.get, ("avx512_bf16", "amx_bf16")))


def decided(recipe, device, sigma=None, fuse=True):
    """Return what a recipe decides, option or ingredient -> value.

    What goes by the noise is a list of pairs, [sigma, value]: see learner_settings.

    Args:
        recipe: name of one of RECIPES.
        device: a torch.device, where to compute.
        sigma: standard deviation of the noise, 0-255 scale; None where it is not known,
            or where a blur is there too.
        fuse: whether fusing may be worth it: the noise is white and of a known level.
    """
    values = {
        name: [*map(list, value.items())] if isinstance(value, dict) else value
        for name, value in RECIPES[recipe].items()
    }
    values["recipe_sigma"] = sigma
    if not fuse:
        values["fuse"] = "off"
    if values["precision"] == "auto":
        fast = multiplies_bfloat16(device)
        values["precision"] = "bfloat16" if fast else "float32"
    return values


def choose_scale(args, y, known, eight_bits, blurred=False):
    """Return the map to the learner's units: see find_scale.

    Args:
        eight_bits: whether the picture's file has 8 bits: `paper` takes it as it is.
    """
    as_published = eight_bits and not args.own_scale
    return UNIT if as_published else find_scale(y, known, blurred)


def learner_settings(args, span=1.0):
    """Return what network.Self2Self is made with, from the options' values.

    Args:
        span: the range that the picture fills, by which the noise is measured.
    """
    names = ("drop_rate", "drop_upsampled", "iteration", "optimizer", "lr", "beta2")
    names += ("schedule", "ratio", "start", "averaging_power", "bs", "seed")
    names += ("precision", "window", "device", "bend")
    level = UNKNOWN_SIGMA if args.recipe_sigma is None else args.recipe_sigma / span
    settings = {name: getattr(args, name) for name in names}
    for name, value in settings.items():
        if isinstance(value, list):
            settings[name] = next(v for sigma, v in reversed(value) if sigma <= level)
    return settings | {"photons": args.photons if args.real_noise else None}
