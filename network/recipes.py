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
    # Whether ensemble and observation are fused.
    fuse: bool
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
        fuse=False,
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
        fuse=True,
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
    name,
    y,
    known=None,
    noise=None,
    *,
    given=None,
    eight_bits=False,
    blurred=False,
):
    """Return a recipe as it is for one picture.

    White noise is fused, and made even beforehand where it is not; so are blurred JPEGs.
    Against other noise steps see photons. `paper` does neither.

    Args:
        name: of one of RECIPES.
        y, known: the observation and what is known of it: see Self2Self.
        noise: y's, a noise.Noise; None: it is found, from what is known of y.
        given: what is to be otherwise: Recipe's fields, `real_noise`, `num_prediction` and
            `device` (a torch.device) -> value. None, and any other key, says nothing.
        eight_bits: whether y comes from a file of 8 bits, 255 being 1: `paper` takes it as
            it is, and photons are counted in its units.
        blurred: whether y is blurred.

    Raises:
        ValueError: y or known has another shape or type; a sentence says which.
    """
    recipe, (y, known) = RECIPES[name], check_observation(y, known)
    given = {k: v for k, v in (given or {}).items() if v is not None}
    holes = not blurred and not known.all()  # a blur's margin is none
    noise = noise or find_noise(y, known)
    nothing = noise.kind == "none" and not blurred
    evened = recipe.own_scale and not (blurred or nothing or noise.is_even())
    as_published = eight_bits and not recipe.own_scale
    lines = noise.lines if evened else ()
    scale = UNIT if as_published else find_scale(y, known, blurred, lines)
    # A blur leaves little of the network's error in a JPEG: the residual is the noise.
    from_residual = blurred and noise.jpeg
    sigma = 0.0 if nothing else None if from_residual else noise.sigma()
    sigma = None if sigma is None else scale.sigma(sigma)
    if holes and noise.is_white() and sigma < MIN_SIGMA:
        nothing, sigma = True, 0.0  # known entries help more as they are
    even = evened or noise.is_even()
    fuse = from_residual or (noise.is_white() and even and sigma > 0)
    fuse = recipe.fuse and (fuse or (holes and nothing))
    level = sigma if noise.is_white() and not blurred else UNKNOWN_SIGMA
    values = dataclasses.asdict(recipe) | {"scale": scale, "noise": sigma, "fuse": fuse}
    values["absolute"] = eight_bits and recipe.own_scale and not lines
    if nothing and not holes:
        values["iteration"] = 1  # there is nothing to learn
    for field, value in values.items():
        if isinstance(value, dict):
            values[field] = next(v for k, v in reversed(value.items()) if k <= level)
        values[field] = given.get(field, values[field])
    values["fuse"] &= values["drop_rate"] > 0 and given.get("num_prediction", 2) > 1
    device = given.get("device")
    if recipe.fuse and values["fuse"] and not (device and device.type == "cuda"):
        seen = np.broadcast_to(known.any(0), y.shape[1:])  # without a blur's margin
        small = seen.any(0).sum() * seen.any(1).sum() <= SMALL
        less = FUSED_SMALL if small else FUSED
        values |= {field: given.get(field, value) for field, value in less.items()}
    camera = recipe.own_scale and not blurred and not noise.is_white()
    if not given.get("real_noise", camera):
        values["photons"] = None
    if values["precision"] == "auto":
        fast = multiplies_bfloat16(device)
        values["precision"] = "bfloat16" if fast else "float32"
    return Recipe(**values)


def multiplies_bfloat16(device):
    """Tell whether a torch.device, None for the CPU, multiplies bfloat16 by instructions."""
    import torch

    able = torch.cpu.get_capabilities()
    on_cpu = device is None or device.type == "cpu"
    return on_cpu and any(map(able.get, ("avx512_bf16", "amx_bf16")))
