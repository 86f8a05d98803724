"""Measure recipes side by side, on the same observations, beside classical methods.

Run by hand: python tests/quality.py [--images FOLDER] [--task deblur] [--steps 1000] ...
Every run's scores are kept in a JSON file, --out; called again it goes on from there.

A recipe is a name of utils.RECIPES, with changes behind it: "fast" or "fast,lr=0.0005",
or "fast,-average": the ingredient taken away, as in the recipe "paper".
"""

import argparse
import itertools
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import utils  # before PyTorch, for which it sets the environment

# isort: split
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
from network import Self2Self

BUNDLED = ("camera", "brick", "coins", "astronaut", "chelsea", "coffee")
SCRIPTS = {"denoise": denoise, "deblur": deblur}


def settings(task, text, steps):
    """Return the learner's settings and the number of steps of a recipe."""
    name, *changes = text.split(",")
    defaults = SCRIPTS[task].DEFAULTS | utils.RECIPES["paper"]
    values = defaults | utils.RECIPES[name]
    for change in changes:
        if change.startswith("-"):
            values[change[1:]] = defaults[change[1:]]
        else:
            key, value = change.split("=")
            values[key] = type(values[key])(value)
    values["iteration"] = steps or values["iteration"]
    keys = ("drop_rate", "lr", "optimizer", "bs", "average", "ratio", "start", "beta2")
    chosen = {k: values[k] for k in keys}
    chosen["anneal"] = values["iteration"] if values["anneal"] else None
    return chosen, values["iteration"], values["num_prediction"]


def identity(x):
    """The forward operator of denoising."""
    return x


def denoise_classically(y, clean, sigma):
    """Scores of non-local means and total variation, each at its best parameter."""
    y, s, axis = y.transpose(1, 2, 0), sigma / 255, -1
    means = [
        denoise_nl_means(y, 5, 9, h * s, sigma=s, fast_mode=True, channel_axis=axis)
        for h in (0.5, 0.7, 0.9, 1.1)
    ]
    variation = [
        denoise_tv_chambolle(y, w * s, channel_axis=axis) for w in (0.6, 0.9, 1.2, 1.6)
    ]
    return {"non-local means": means, "total variation": variation}


def deblur_classically(y, clean, psf):
    """Scores of Wiener's and Richardson-Lucy's methods, each at its best parameter.

    scikit-image's work on one plane, and not circularly: the image is wrapped around.
    """
    around = max(psf.shape)
    wrapped = np.pad(y, ((0, 0), (around,) * 2, (around,) * 2), mode="wrap")

    def planes(method):
        done = np.stack([method(plane.astype(np.float64)) for plane in wrapped])
        return done[:, around:-around, around:-around].transpose(1, 2, 0)

    wieners = [
        planes(lambda plane, b=balance: wiener(plane, psf, b, clip=False))
        for balance in (0.003, 0.01, 0.03, 0.1, 0.3, 1, 3)
    ]
    richardson = [
        planes(lambda plane, n=n: richardson_lucy(np.clip(plane, 1e-4, 1), psf, n))
        for n in (2, 4, 7, 12, 20, 35)
    ]
    return {"Wiener": wieners, "Richardson-Lucy": richardson}


def main():
    """Measure what is missing, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", choices=SCRIPTS, default="denoise")
    parser.add_argument("--images", help="folder; default: images of scikit-image")
    parser.add_argument("--crop", type=int, default=128)
    parser.add_argument("--sigmas", type=float, nargs="+", default=[25.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--kernel", help="PSF file; default: the script's Gaussian")
    parser.add_argument("--recipes", nargs="*", default=["fast"])
    parser.add_argument("--steps", type=int, nargs="+", default=[0], help="0: recipe's")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", default="logs/quality.json")
    args = parser.parse_args()
    utils.tune_cpu()
    device = utils.choose_device(args.device)
    out = Path(args.out)
    scores = json.loads(out.read_text()) if out.exists() else {}
    names = [args.images] if args.images else BUNDLED
    files = [found for name in names for found in utils.find_images(name)]
    operator, psf = identity, None
    if args.task == "deblur":
        psf = deblur.gaussian_psf(15, 1.0)
        psf = deblur.read_psf(args.kernel) if args.kernel else psf
        operator = deblur.CircularBlur(psf)
    blur_name = (args.kernel or "Gaussian") if args.task == "deblur" else "-"

    def keep(key, values):
        scores["|".join(map(str, key))] = values
        utils.write_atomically(out, json.dumps(scores, indent=0).encode())

    tables = {}
    recipes = list(itertools.product(args.recipes, args.steps))
    learners = {}
    for sigma, seed, (file, folder) in itertools.product(
        args.sigmas, args.seeds, files
    ):
        picture = utils.read_picture(file, args.crop, folder)
        clean = picture.image
        blurred = operator(torch.from_numpy(clean)[None])[0].numpy()
        y = blurred + utils.gaussian_noise(clean.shape, sigma, seed)
        case = (args.task, blur_name, sigma)
        place = (*case, f"{picture.folder}/{picture.name}", args.crop, seed)
        done = {"observation": [*utils.score(y, clean), 0.0]}
        for text, steps in recipes:
            chosen, steps, count = settings(args.task, text, steps)
            key = (*place, text, steps)
            if "|".join(map(str, key)) not in scores:
                learner = learners.setdefault(
                    (text, steps, seed), Self2Self(seed=seed, device=device, **chosen)
                )
                started = time.perf_counter()
                learner.begin(y, operator)
                for _ in range(steps):
                    learner.train_step()
                restored = learner.predict(count)
                seconds = time.perf_counter() - started
                keep(key, [*utils.score(restored, clean), seconds])
                print(*key, *(f"{v:.4g}" for v in scores["|".join(map(str, key))]))
            done[f"{text} {steps}"] = scores["|".join(map(str, key))]
        key = (*place, "classical")
        if "|".join(map(str, key)) not in scores:
            if args.task == "denoise":
                tried = denoise_classically(y, clean, sigma)
            else:
                tried = deblur_classically(y, clean, psf)
            best = {
                name: max(
                    utils.score(
                        x.reshape(y.shape[1:] + y.shape[:1]).transpose(2, 0, 1), clean
                    )
                    for x in images
                )
                for name, images in tried.items()
            }
            keep(key, {name: [*value, 0.0] for name, value in best.items()})
        done |= scores["|".join(map(str, key))]
        for name, values in done.items():
            tables.setdefault(case, {}).setdefault(name, []).append(values)

    for case, rows in tables.items():
        print(f"\n{case[0]}, PSF {case[1]}, sigma {case[2]:g}: {len(done)} rows,")
        print(f"{len(files)} images, seeds {args.seeds}, {args.crop} crops, {device}\n")
        print(
            "| method | PSNR, dB | SSIM | lowest PSNR | spread of seeds, dB | seconds |"
        )
        print("|---|---|---|---|---|---|")
        for name, values in rows.items():
            values = np.array(values)
            psnr, ssim, seconds = values.mean(0)
            runs = values[:, 0].reshape(len(args.seeds), -1)  # seed, image
            spread = runs.mean(1).std(ddof=1) if len(runs) > 1 else float("nan")
            cells = f"{psnr:.2f}", f"{ssim:.4f}", f"{runs.min():.2f}", f"{spread:.2f}"
            print("|", " | ".join([name, *cells, f"{seconds:.1f}"]), "|")


if __name__ == "__main__":
    main()
