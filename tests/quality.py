"""Measure recipes side by side, on the same observations, beside classical methods.

Run by hand: python tests/quality.py [--images FOLDER] [--task deblur] [--steps 1000] ...
Every run's scores are kept in a JSON file, --out; called again it goes on from there.

A recipe is one of network/recipes.py, with changes behind it: "fast" or "fast,lr=0.0005",
or "fast,-averaging_power": the ingredient taken away, as in the recipe "paper".
"""

import argparse
import dataclasses
import itertools
import json
import math
import sys
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from skimage.restoration import (
    denoise_nl_means,
    denoise_tv_chambolle,
    richardson_lucy,
    wiener,
)

import deblur
import denoise
import utils
from network import Self2Self, recipes

BUNDLED = ("camera", "brick", "coins", "astronaut", "chelsea", "coffee")
SCRIPTS = {"denoise": denoise, "deblur": deblur}


def settings(task, text, steps, seed, device, sigma, kernel):
    """Return the options' values for a recipe and a number of steps, and its changes."""
    name, *changes = text.split(",")
    flags = {"recipe": name, "seed": seed, "device": device, "sigma": sigma}
    flags |= {"iteration": steps} if steps else {}
    flags |= {"kernel": kernel} if kernel else {}
    words = [f"--{key}={value}" for key, value in flags.items()]
    args = utils.parse_arguments("", SCRIPTS[task].DEFAULTS, recipes.RECIPES, words)
    paper, changed = recipes.RECIPES["paper"], {}
    for change in changes:
        key, _, value = change.removeprefix("-").partition("=")
        changed[key] = json.loads(value) if value else getattr(paper, key)
    return args, changed


def choose(task, args, changes, y):
    """Return the recipe that the script chooses for an observation, changed."""
    known = np.ones((1, *y.shape[1:]), np.float32)
    result = SimpleNamespace(known=known, eight_bits=True, place=slice(None))
    recipe, _ = SCRIPTS[task].choose(args, y, result)
    return dataclasses.replace(recipe, **changes)


def learn(y, operator, clean, args, recipe):
    """Return one run's scores.

    PSNR, SSIM, seconds, whether the network lived, the plain ensemble's PSNR, predicted
    over true squared error, and their correlation.
    """
    started = time.perf_counter()
    learner = Self2Self(y, operator, None, recipe, args.seed, args.device)
    while learner.step < recipe.iteration:
        learner.train_step()
    ensemble = learner.predict(args.num_prediction)
    fused = learner.fuse(ensemble)
    restored, predicted, correlation = ensemble.image, math.nan, math.nan
    if fused:
        restored, error = fused
        true = (restored - clean) ** 2
        predicted = float(error.mean() / true.mean())
        correlation = float(np.corrcoef(error.ravel(), true.ravel())[0, 1])
    seconds = time.perf_counter() - started
    plain = utils.score(ensemble.image, clean)[0]
    scores = *utils.score(restored, clean), seconds, not learner.notes
    return [*scores, plain, predicted, correlation]


def denoise_classically(y, sigma):
    """Results of non-local means and total variation, (C, H, W), over a parameter."""
    y, s, axis = y.transpose(1, 2, 0), sigma / 255, -1
    means = [
        denoise_nl_means(y, 5, 9, h * s, sigma=s, fast_mode=True, channel_axis=axis)
        for h in (0.5, 0.7, 0.9, 1.1)
    ]
    variation = [
        denoise_tv_chambolle(y, w * s, channel_axis=axis) for w in (0.6, 0.9, 1.2, 1.6)
    ]
    results = {"non-local means": means, "total variation": variation}
    return {
        k: [np.moveaxis(x.reshape(y.shape), -1, 0) for x in v]
        for k, v in results.items()
    }


def deblur_classically(y, psf):
    """Results of Wiener's and Richardson-Lucy's methods, (C, H, W), over a parameter.

    scikit-image's work on one plane, and not circularly: the image is wrapped around.
    """
    around = max(psf.shape)
    wrapped = np.pad(y, ((0, 0), (around,) * 2, (around,) * 2), mode="wrap")

    def planes(method):
        done = np.stack([method(plane.astype(np.float64)) for plane in wrapped])
        return done[:, around:-around, around:-around]

    wieners = [
        planes(lambda plane, b=balance: wiener(plane, psf, b, clip=False))
        for balance in (0.003, 0.01, 0.03, 0.1, 0.3, 1, 3)
    ]
    richardson = [
        planes(lambda plane, n=n: richardson_lucy(np.clip(plane, 1e-4, 1), psf, n))
        for n in (2, 4, 7, 12, 20, 35)
    ]
    return {"Wiener": wieners, "Richardson-Lucy": richardson}


def classical(y, known, clean):
    """Return each method's best PSNR and SSIM; known is the PSF, or the noise's sigma."""
    by_method = (denoise_classically if np.isscalar(known) else deblur_classically)(
        y, known
    )
    return {
        name: max(utils.score(x, clean) for x in results)
        for name, results in by_method.items()
    }


def main():
    """Measure what is missing, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", choices=SCRIPTS, default="denoise")
    parser.add_argument("--images", help="folder; default: images of scikit-image")
    parser.add_argument("--observation", help=".npz of one, and of its clean image")
    parser.add_argument("--crop", type=int, default=128)
    parser.add_argument("--sigmas", type=float, nargs="+", default=[25.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--kernel", help="PSF file; default: the script's Gaussian")
    parser.add_argument("--recipes", nargs="*", default=["fast"])
    parser.add_argument("--steps", type=int, nargs="+", default=[0], help="0: recipe's")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", default="logs/quality.json")
    args = parser.parse_args()
    device = utils.choose_device(args.device)
    out = Path(args.out)
    scores = json.loads(out.read_text()) if out.exists() else {}
    names = [args.images] if args.images else BUNDLED
    files = [file for name in names for file in utils.find_images(name)]
    if args.observation:
        given, files = np.load(args.observation), [Path(args.observation)]
    operator, psf = denoise.identity, None
    if args.task == "deblur":
        psf = deblur.gaussian_psf(15, 1.0)
        psf = deblur.read_psf(args.kernel) if args.kernel else psf
        operator = deblur.CircularBlur(psf)
    blur_name = (args.kernel or "Gaussian") if args.task == "deblur" else "-"

    def measured(key, measure, *arguments):
        """Measure what is not known yet, and keep it."""
        key = "|".join(map(str, key))
        if key not in scores:
            scores[key] = measure(*arguments)
            utils.write_atomically(out, json.dumps(scores, indent=0).encode())
            print(key, scores[key])
        return scores[key]

    tables = {}
    cases = itertools.product(args.sigmas, args.seeds, files)
    for sigma, seed, file in cases:
        if args.observation:
            y, clean = given["observation"], given["clean"]
        else:
            clean = utils.read_picture(file, args.crop).image
            blurred = operator(torch.from_numpy(clean)[None])[0].numpy()
            y = blurred + utils.gaussian_noise(clean.shape, sigma, seed)
        case = (args.task, blur_name, sigma)
        place = (*case, *utils.result_names(file), args.crop, seed, device.type)
        rows = tables.setdefault(case, {})
        values = [*utils.score(y, clean), 0.0, True]
        values += [values[0], math.nan, math.nan]
        rows.setdefault("observation", []).append(values)
        for text, steps in itertools.product(args.recipes, args.steps):
            args_of = settings(args.task, text, steps, seed, device, sigma, args.kernel)
            recipe = choose(args.task, *args_of, y)
            chosen = args_of[0]
            values = measured(
                (*place, chosen.num_prediction, dataclasses.astuple(recipe)),
                *(learn, y, operator, clean, chosen, recipe),
            )
            rows.setdefault(f"{text}, {recipe.iteration} steps", []).append(values)

        known = sigma if psf is None else psf
        values = measured((*place, "classical"), classical, y, known, clean)
        for name, (psnr, ssim) in values.items():
            values = [psnr, ssim, 0.0, True, psnr, math.nan, math.nan]
            rows.setdefault(name, []).append(values)

    for case, rows in tables.items():
        print(f"\n{case[0]}, PSF {case[1]}, sigma {case[2]:g}; {len(files)} images,")
        print(f"{args.crop} crops, seeds {args.seeds}, {device}\n")
        print(
            "| method | PSNR, dB | SSIM | lowest | seeds' spread | seconds | died |",
            end="",
        )
        print(" plain ensemble | least gain | predicted / true error | correlation |")
        print("|---" * 11 + "|")
        for name, values in rows.items():
            values = np.array(values, float)
            psnr, ssim, seconds, lived, plain, *error = values.mean(0)
            gain = (values[:, 0] - values[:, 4]).min()
            runs = values[:, 0].reshape(len(args.seeds), -1)  # seed, image
            spread = runs.mean(1).std(ddof=1) if len(runs) > 1 else float("nan")
            cells = f"{psnr:.2f}", f"{ssim:.4f}", f"{runs.min():.2f}", f"{spread:.2f}"
            died = f"{(1 - lived) * len(values):.0f}"
            cells += f"{seconds:.1f}", died, f"{plain:.2f}", f"{gain:+.2f}"
            cells += tuple(f"{x:.2f}" for x in error)
            print("|", " | ".join([name, *cells]), "|")


if __name__ == "__main__":
    main()
