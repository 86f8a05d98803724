"""How a network is trained: its settings, two recipes, and their values for one picture.

network/README.md has the measurements behind the choices.
"""

import dataclasses
from dataclasses import dataclass

import numpy as np

from network.checks import check_observation
from network.noise import MIN_SIGMA, find_noise, noise_of, white
from network.scale import UNIT, Scale, find_scale
from network.unknown import at_white, find_unknown

UNKNOWN_SIGMA = 25  # stands in for a sigma that is not known
MAX_SIGMA = 100 * 255  # 100 times the picture's range
# Shared noise is strong above this noise.Noise.strength, where 255 is 1 in the photons' units.
# Then fewer photons are counted, but at least this share of the recipe's.
STRONG_SIGMA, MIN_PHOTON_SHARE = 3.5, 0.25


@dataclass(frozen=True)
class Recipe:
    """Every setting of a training.

    In RECIPES a setting may depend on the noise. Then it is a dictionary: smallest sigma
    -> value, where 255 is the range that the picture fills.
    """

    # p of the Bernoulli mask and of the decoder's dropout, in [0, 1). 0: no sampling, and
    # the loss counts every known entry.
    drop_rate: float
    # Whether dropout also drops entries of upsampled maps: see Punet.
    drop_upsampled: bool
    # Number of training steps. The schedule ends with the last one.
    iteration: int
    # adam, adamw, or muon: Muon for the wide convolutions' weights, Adam for the rest.
    optimizer: str
    # Learning rate.
    lr: float
    # Decay of Adam's mean of squared gradients. With 0.9, the decay of its mean of
    # gradients, no step is larger than the learning rate.
    beta2: float
    # constant, or linear: the learning rate rises over the first twentieth of the steps,
    # and falls to 0 along a straight line.
    schedule: str
    # The partial convolutions' numerator: window for k*k, as in the TensorFlow layer, or
    # entries for k*k*C, which keeps the size of signals.
    ratio: str
    # Initial weights: pytorch for its default; tensorflow for He's and Glorot's, see
    # Punet.initialise_like_tensorflow.
    initialisation: str
    # The last bias: default as initialised; mean for first predictions with the mean of
    # the observation.
    start: str
    # Share of the published channels in the layers that take most time, (0, 1]: see Punet.
    width: float
    # Where the last sigmoid turns into a straight line, in [0, 0.5): see Punet.
    bend: float
    # Whether even an 8-bit picture is mapped to units in which it fills about [0, 1].
    own_scale: bool
    # The predictions that training makes join the ensemble, those of step t of T with the
    # weight (t / T)**averaging_power. None: they do not.
    averaging_power: float | None
    # What is fused with the ensemble: none; noise for an observation with white noise,
    # shared for one whose noise neighbours share; holes for one without noise that has
    # unknown entries. See network/fusing.
    fuse: str
    # n. Each step replaces the observation by photon counts, Poisson(n y) / n, against noise
    # that neighbours share (TensorFlow's mode for real noise). None: no step does.
    photons: int | None
    # Type of feature maps and convolutions: float32, bfloat16, or auto for bfloat16 on a CPU
    # with instructions for it. Weights, loss, optimisers and ensemble are float32.
    precision: str
    # Side of the training's windows, pixels. A picture is not cut along a side that is no
    # longer than that. 0: the window is the whole picture.
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
    # The published method, trained as in the released TensorFlow code.
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
    # At least the quality of `paper`, in 500 steps.
    "fast": Recipe(
        drop_rate={0: 0.2, 40: 0.3},  # much noise is overfitted sooner
        drop_upsampled=False,  # a step takes three quarters of the time
        iteration=500,
        optimizer="muon",
        lr=3e-3,
        beta2=0.9,
        schedule="linear",
        ratio="entries",
        initialisation="pytorch",  # TensorFlow's makes a worse ensemble
        width=1.0,
        start="mean",  # a large rate does not run into the sigmoid's flat ends
        bend=0.1,  # the network can predict values beyond the range of y
        own_scale=True,
        averaging_power={0: 3, 40: 1},  # with much noise early predictions help more
        fuse="noise",  # `adapt` may change it to shared, holes or none
        photons=100,  # 25 blurs fine detail; for strong noise `adapt` takes fewer
        precision="auto",
        window=384,  # large pictures cost no more than small ones
    ),
}

# Changes to `fast` on every device but CUDA if its result is fused. A step takes three
# quarters of the time, and fusing restores what the narrow network loses. CUDA would gain
# nothing, because its steps consist of many kernels that are short already.
FUSED = {"width": 0.5}
# Smaller windows save as much again. They would cover too little of a picture with more than
# MAX_SMALL pixels.
FUSED_SMALL, MAX_SMALL = FUSED | {"window": 256}, 2**18


def adapt(
    name, y, known=None, noise=None, *, given=None, eight_bits=False, blurred=False
):
    """Return a recipe with the values that suit one picture.

    A picture with noise is fused; white noise that grows with the signal is made even
    first. Against noise that neighbours share, each step adds fresh Poisson noise. `paper`
    does none of this by itself.

    Args:
        name: a key of RECIPES.
        y, known: the observation and its known entries: see Self2Self.
        noise: y's noise, a noise.Noise. None: it is found in the known entries.
        given: values that override the recipe's, by the names of its fields; but `fuse` is
            True or False. Also `real_noise`, `num_prediction` and `device`, a torch.device.
            Other keys, and values of None, are ignored.
        eight_bits: whether y comes from an 8-bit file, in which 255 is 1. `paper` keeps
            these units, and photons are counted in them.
        blurred: whether y is blurred.

    Returns:
        A Recipe without dictionaries and without `auto`.

    Raises:
        ValueError: y or known has another shape or type; the message says which.
    """
    recipe, (y, known) = RECIPES[name], check_observation(y, known)
    given = {k: v for k, v in (given or {}).items() if v is not None}
    noise = noise or find_noise(y, known)
    holes = not blurred and not known.all()  # under a blur the margin is unknown
    values = _units(recipe, y, known, noise, eight_bits, blurred)
    if not blurred and values["noise"] is not None:
        # Next to no noise counts as none, so that fill_holes keeps the known entries.
        values["noise"] *= not (holes and values["noise"] < MIN_SIGMA)
        if not holes and values["noise"] == 0:
            values["iteration"] = 0  # there is nothing to learn
    values |= _values_by_noise(recipe, noise, values["noise"], blurred)
    camera = recipe.own_scale and not blurred and not noise.is_white()
    if camera:
        values["photons"] = _photons(recipe, noise, values)
    values |= {k: v for k, v in given.items() if hasattr(recipe, k) and k != "fuse"}
    if not given.get("real_noise", camera):
        values["photons"] = None
    values["fuse"] = _what_is_fused(recipe, noise, values, holes, blurred, given)
    device = given.get("device")
    on_cuda = device is not None and device.type == "cuda"
    if not on_cuda and "none" not in (recipe.fuse, values["fuse"]):
        less = _less_for_cpu(y, known)
        values |= {field: given.get(field, value) for field, value in less.items()}
    recipe = dataclasses.replace(recipe, **values)
    if recipe.precision == "auto":
        precision = "bfloat16" if multiplies_bfloat16(device) else "float32"
        recipe = dataclasses.replace(recipe, precision=precision)
    return recipe


def _units(recipe, y, known, noise, eight_bits, blurred):
    """Return the fields `scale`, `noise` (sigma in the learner's units) and `absolute`."""
    nothing = noise.kind == "none" and not blurred
    evened = recipe.own_scale and not (blurred or nothing or noise.is_even())
    lines = noise.lines if evened else ()
    as_published = eight_bits and not recipe.own_scale
    scale = UNIT if as_published else find_scale(y, known, blurred, lines)
    # Under a blur the residual of a JPEG is nearly all noise, so its sigma is taken.
    from_residual = blurred and noise.jpeg
    sigma = 0.0 if nothing else None if from_residual else noise.sigma()
    sigma = None if sigma is None else scale.sigma(sigma)
    absolute = eight_bits and recipe.own_scale and not lines
    return {"scale": scale, "noise": sigma, "absolute": absolute}


def _values_by_noise(recipe, noise, sigma, blurred):
    """Return the fields that depend on the noise, with their values at a sigma."""
    sigma = sigma if noise.is_white() and not blurred else UNKNOWN_SIGMA
    return {
        field: next(
            value for least, value in reversed(values.items()) if least <= sigma
        )
        for field, values in vars(recipe).items()
        if isinstance(values, dict)
    }


def _photons(recipe, noise, values):
    """Return the field `photons`: the stronger the noise that neighbours share, the fewer."""
    unit = 1 if values["absolute"] else values["scale"].span
    weakness = STRONG_SIGMA * unit / max(255 * noise.strength, 1e-30)
    return round(recipe.photons * min(max(weakness**2, MIN_PHOTON_SHARE), 1))


def _what_is_fused(recipe, noise, values, holes, blurred, given):
    """Return the field `fuse`: none, noise, shared or holes.

    Args:
        recipe, noise, blurred, given: see adapt.
        values: fields -> values that adapt has chosen so far.
        holes: whether entries are unknown, without a blur.
    """
    scale, sigma = values["scale"], values["noise"]
    filled = holes and sigma == 0
    even = noise.is_white() and (bool(scale.lines) or noise.is_even())
    jpeg = blurred and noise.jpeg  # its noise is the residual's
    photons = values.get("photons", recipe.photons)
    shared = not blurred and not noise.is_white() and bool(photons)
    known = filled or jpeg or shared or (even and sigma > 0)
    known = known and recipe.fuse != "none"
    variance = values.get("drop_rate", recipe.drop_rate) > 0
    variance &= given.get("num_prediction", 2) > 1
    if not (variance and given.get("fuse", known)):
        return "none"
    return "holes" if filled else "shared" if shared else "noise"


def _less_for_cpu(y, known):
    """Return the fields that save time on a CPU if the result is fused."""
    known = np.broadcast_to(known.any(0), y.shape[1:])  # a blur's margin does not count
    small = known.any(0).sum() * known.any(1).sum() <= MAX_SMALL
    return FUSED_SMALL if small else FUSED


def multiplies_bfloat16(device):
    """Tell whether a torch.device (None: the CPU) has instructions to multiply bfloat16."""
    import torch

    able = torch.cpu.get_capabilities()
    on_cpu = device is None or device.type == "cpu"
    return on_cpu and any(map(able.get, ("avx512_bf16", "amx_bf16")))


def choose(args, y, source, psf_error=None, clipped=None):
    """Return a script's recipe for one picture, and the picture's noise.

    Args:
        args: the script's options. `sigma` or `noise_sigma` is the noise, `real_noise` says
            that it is a camera's; otherwise it is found.
        y: the observation, (C, H, W).
        source: has y's `known` entries, the `place` without margin, `eight_bits`, and the
            `stack` that y is a plane of, or None: its noise is found once for all planes.
        psf_error: under a blur the sigma of noise that acts like the PSF's errors, where 255
            is the picture's range. The recipe uses it if lower noise was found.
        clipped: see Self2Self; noise is not looked for there.

    Raises:
        ValueError: the noise is too strong, or --fuse on has no sigma.
    """
    sigma = args.noise_sigma if args.observed else args.sigma
    inner, known = y[source.place], source.known[source.place]
    measured = known if clipped is None else known * ~clipped[source.place]
    blurred, stack = psf_error is not None, source.stack
    if stack and sigma is None and not args.real_noise:
        if not stack.noise:
            planes = _usable(*source.whole_stack(), not args.mask, blurred)
            stack.noise = find_noise(*planes)
        found = stack.noise
    else:
        found = noise_of(inner, measured, sigma, args.real_noise)
    taken = found
    if blurred and sigma is None:
        span = find_scale(inner, known, blurred=True).span  # without hot pixels
        least = psf_error * min(np.ptp(inner), span)
        taken = white(least) if (found.sigma() or least) < least else found
    options = {"given": vars(args), "eight_bits": source.eight_bits, "blurred": blurred}
    recipe = adapt(args.recipe, y, source.known, taken, **options)
    if recipe.fuse == "noise" and recipe.noise is None:
        fault = f"its noise is {found.describe()}; --fuse on needs a --noise_sigma"
        raise ValueError(fault)
    if (recipe.noise or 0) > MAX_SIGMA:
        raise ValueError("noise over 100 times the picture's range; lower sigma")
    return recipe, found


def _usable(planes, known, guess, blurred):
    """Return planes, and where their noise can be looked for: see find_unknown, at_white."""
    gaps, outliers = find_unknown(planes, known, guess)
    known = known & ~(gaps | outliers)
    return planes, known & ~at_white(planes, known) if blurred else known
