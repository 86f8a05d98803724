"""How a network is trained: the settings, and the two recipes that choose them.

network/README.md has the measurements behind the choices.
"""

import dataclasses
from dataclasses import dataclass

import numpy as np

from network.checks import check_observation
from network.noise import MIN_SIGMA, find_noise
from network.scale import UNIT, Scale, find_scale

UNKNOWN_SIGMA = 25  # taken where the noise is not known


@dataclass(frozen=True)
class Recipe:
    """Every setting of a training.

    In RECIPES a setting may be a dictionary that goes by the noise: its keys are sigmas
    from which on a value holds, where 255 stands for the range that the picture fills.
    """

    # p of the Bernoulli mask and of the decoder's dropout, in [0, 1). 0: no sampling,
    # every entry is judged.
    drop_rate: float
    # Whether dropout takes entries of upsampled maps, too: see Punet.
    drop_upsampled: bool
    # Training steps, which the schedule goes by.
    iteration: int
    # adam, adamw, or muon: Muon for the wide convolutions' weights, Adam for the rest.
    optimizer: str
    # Learning rate.
    lr: float
    # Decay of Adam's mean of squared gradients. With 0.9, as the mean of the gradients
    # has, no step is larger than the learning rate.
    beta2: float
    # constant, or linear: the rate rises for the first twentieth of the steps and falls
    # to 0 in a straight line.
    schedule: str
    # The partial convolutions' numerator: window, k*k as the TensorFlow layer has it, or
    # entries, k*k*C, with which signals keep their size.
    ratio: str
    # Initial weights: pytorch, its default, or tensorflow: He's and Glorot's, see punet.py.
    initialisation: str
    # default: the last bias is as initialised; mean: it is such that the first
    # predictions have the observation's mean.
    start: str
    # Share of the published channels in the layers that take most time, (0, 1]: see Punet.
    width: float
    # Where the last sigmoid goes on as a straight line, in [0, 0.5): see Punet.
    bend: float
    # Whether an 8-bit picture, too, is learnt in units in which it fills about [0, 1].
    own_scale: bool
    # The training's own predictions join the ensemble, those of step t of T with weight
    # (t / T)**averaging_power; None: they do not.
    averaging_power: float | None
    # What is fused with the ensemble, see network/fusing: none; noise, an observation
    # with white noise; holes, one without noise of which entries are unknown.
    fuse: str
    # n, by which steps see the observation as drawn anew, Poisson(n y) / n, against noise
    # that neighbours share (TensorFlow's mode for real noise); None: as it is.
    photons: int | None
    # Of feature maps and convolutions: float32, bfloat16, or auto: bfloat16 on a CPU that
    # multiplies it. Weights, loss, optimisers and ensemble are float32.
    precision: str
    # Side of the windows that steps are trained on, pixels; a side of the picture that is
    # no longer is taken whole. 0: the picture is the window.
    window: int
    # Bernoulli samples of the observation per step.
    bs: int = 1
    # The map to the learner's units.
    scale: Scale = UNIT
    # Standard deviation of y's noise in those units, 0-255 scale; None: not known.
    noise: float | None = None
    # Whether photons are counted in y's units, not in the learner's.
    absolute: bool = False


RECIPES = {
    # The released TensorFlow code's training: the published method.
    "paper": Recipe(
        drop_rate=0.3,
        drop_upsampled=True,
        iteration=150_000,
        optimizer="adam",
        lr=1e-4,
        beta2=0.999,  # PyTorch's default
        schedule="constant",
        ratio="window",
        initialisation="tensorflow",
        start="default",
        width=1.0,
        bend=0.0,
        own_scale=False,
        averaging_power=None,
        fuse="none",
        photons=25,
        precision="float32",
        window=0,
    ),
    # Its quality and more in 500 steps.
    "fast": Recipe(
        drop_rate={0: 0.2, 40: 0.3},  # much noise is overfitted sooner
        drop_upsampled=False,  # a step takes three quarters of the time
        iteration=500,
        optimizer="muon",
        lr=3e-3,
        beta2=0.9,
        schedule="linear",
        ratio="entries",
        initialisation="pytorch",  # the other leaves the ensemble behind
        width=1.0,
        start="mean",  # a large rate does not run into the sigmoid's flat ends
        bend=0.1,  # what lies beyond the range of y can be reached
        own_scale=True,
        averaging_power={0: 3, 40: 1},  # of much noise more of the early ones
        fuse="noise",  # or holes, where the picture has no noise but these
        photons=100,  # 25 blurs fine detail
        precision="auto",
        window=384,  # large pictures cost no more than small ones
    ),
}

# What `fast` has instead where its result is fused, but for CUDA. That makes good what the
# network loses, and a step takes three quarters of the time. A GPU would gain nothing: its
# steps are many kernels that are short already.
FUSED = {"width": 0.5}
# Smaller windows save as much again. Of more pixels than SMALL they would see too few.
FUSED_SMALL, SMALL = FUSED | {"window": 256}, 2**18


def adapt(
    name, y, known=None, noise=None, *, given=None, eight_bits=False, blurred=False
):
    """Return a recipe as it is for one picture.

    White noise is fused; where it grows with the signal it is made even before. Against
    noise that neighbours share, steps see fresh Poisson noise. `paper` does neither.

    Args:
        name: of one of RECIPES.
        y, known: the observation and what is known of it: see Self2Self.
        noise: y's, a noise.Noise; None: it is found, from what is known of y.
        given: overrides. Recipe's fields -> value, but `fuse`: True, False; `real_noise`,
            `num_prediction`, `device` (a torch.device). None, and any other key, says nothing.
        eight_bits: whether y comes from a file of 8 bits, 255 being 1: `paper` takes it as
            it is, and photons are counted in its units.
        blurred: whether y is blurred.

    Raises:
        ValueError: y or known has another shape or type; a sentence says which.
    """
    recipe, (y, known) = RECIPES[name], check_observation(y, known)
    given = {k: v for k, v in (given or {}).items() if v is not None}
    noise = noise or find_noise(y, known)
    holes = not blurred and not known.all()  # a blur's margin is no hole
    values = _units(recipe, y, known, noise, eight_bits, blurred)
    if not blurred and values["noise"] is not None:
        # Noise that is next to nothing: the known entries help more as they are.
        values["noise"] *= not (holes and values["noise"] < MIN_SIGMA)
        if not holes and values["noise"] == 0:
            values["iteration"] = 0  # there is nothing to learn
    values |= _values_by_noise(recipe, noise, values["noise"], blurred)
    camera = recipe.own_scale and not blurred and not noise.is_white()
    values |= {k: v for k, v in given.items() if hasattr(recipe, k) and k != "fuse"}
    if not given.get("real_noise", camera):
        values["photons"] = None
    values["fuse"] = _what_is_fused(recipe, noise, values, holes, blurred, given)
    device = given.get("device")
    on_cuda = device is not None and device.type == "cuda"
    if not on_cuda and "none" not in (recipe.fuse, values["fuse"]):
        values |= {k: given.get(k, v) for k, v in _less_for_cpu(y, known).items()}
    recipe = dataclasses.replace(recipe, **values)
    if recipe.precision == "auto":
        precision = "bfloat16" if multiplies_bfloat16(device) else "float32"
        recipe = dataclasses.replace(recipe, precision=precision)
    return recipe


def _units(recipe, y, known, noise, eight_bits, blurred):
    """Return the learner's units, and the noise's sigma in them, as Recipe's fields."""
    nothing = noise.kind == "none" and not blurred
    evened = recipe.own_scale and not (blurred or nothing or noise.is_even())
    lines = noise.lines if evened else ()
    as_published = eight_bits and not recipe.own_scale
    scale = UNIT if as_published else find_scale(y, known, blurred, lines)
    # A blur leaves little of the network's error in a JPEG: the residual is the noise.
    from_residual = blurred and noise.jpeg
    sigma = 0.0 if nothing else None if from_residual else noise.sigma()
    sigma = None if sigma is None else scale.sigma(sigma)
    absolute = eight_bits and recipe.own_scale and not lines
    return {"scale": scale, "noise": sigma, "absolute": absolute}


def _values_by_noise(recipe, noise, sigma, blurred):
    """Return the fields that go by the noise, with their values at a sigma."""
    level = sigma if noise.is_white() and not blurred else UNKNOWN_SIGMA
    return {
        field: next(
            value for least, value in reversed(values.items()) if least <= level
        )
        for field, values in vars(recipe).items()
        if isinstance(values, dict)
    }


def _what_is_fused(recipe, noise, values, holes, blurred, given):
    """Return what is fused: none, noise or holes.

    Args:
        values: of the recipe's fields.
        given: see adapt.
    """
    scale, sigma = values["scale"], values["noise"]
    filled = holes and sigma == 0
    even = noise.is_white() and (bool(scale.lines) or noise.is_even())
    jpeg = blurred and noise.jpeg  # its noise is the residual's
    known = recipe.fuse != "none" and (filled or jpeg or (even and sigma > 0))
    variance = values.get("drop_rate", recipe.drop_rate) > 0
    variance &= given.get("num_prediction", 2) > 1
    if not (variance and given.get("fuse", known)):
        return "none"
    return "holes" if filled else "noise"


def _less_for_cpu(y, known):
    """Return the fields by which a CPU saves time where the result is fused."""
    known = np.broadcast_to(known.any(0), y.shape[1:])  # without a blur's margin
    small = known.any(0).sum() * known.any(1).sum() <= SMALL
    return FUSED_SMALL if small else FUSED


def multiplies_bfloat16(device):
    """Tell whether a torch.device, None for the CPU, multiplies bfloat16 by instructions."""
    import torch

    able = torch.cpu.get_capabilities()
    on_cpu = device is None or device.type == "cpu"
    return on_cpu and any(map(able.get, ("avx512_bf16", "amx_bf16")))
