"""Measure the READMEs' tables: every run is a script's, as a user would start it.

Run by hand: python tests/quality.py --images FOLDER [--tables set9 ...] [--flags="--lr 1e-3"]
FOLDER holds the test sets (`plan` says which); a table whose pictures are not there is left
out. Every run keeps a folder of its own in --out; called again, only what is missing is
measured, with --print nothing is. "Classical" is BM3D, where the package bm3d is installed,
which is for non-commercial use; of missing pixels it is biharmonic inpainting.

Or with --observation FILE a recipe is followed, step by step, at one observation.
"""

import argparse
import itertools
import json
import math
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

import cv2
import numpy as np
import scipy.ndimage
import skimage.data
import tifffile
import torch
from skimage.restoration import inpaint_biharmonic

import deblur
import denoise
import pictures
import results
import utils
from network import Self2Self, blur, recipes
from network.device import open_device
from network.noise import find_noise, gaussian_noise, white

try:
    import bm3d

    np.trapz = np.trapezoid  # which bm4d, beneath it, still asks for
except ImportError:
    bm3d = None

ROOT = Path(__file__).parents[1].resolve()
GRAY = "Set9/House256rgb", "Set9/Peppers512rgb", "Set9/kodim01", "camera"
PUBLISHED = "kernel4", "kernel8"  # Levin's PSFs that are not turned by 180 degrees
SCRIPTS = {"denoise": denoise, "deblur": deblur}
COLUMNS = (
    "observation",
    "classical",
    "network",
    "you get",
    "SSIM, classical",
    "SSIM",
    "seconds",
)
# Noise of the pictures that are observed: its standard deviation, or how many photons a
# pixel of 1 has.
SPOILED = {
    "white, sigma 5": (5, 0),
    "white, sigma 10": (10, 0),
    "30 photons": (0, 30),
    "120 photons": (0, 120),
}
# BM3D's sigma for photographs with noise that neighbours share: the best one for the set.
BM3D_SIGMA = {"CC15": 20, "PolyU": 12}


class Case(NamedTuple):
    """One run of a script: the row of a table that it counts in, and what it is given."""

    table: str
    row: str
    script: str
    picture: Path
    flags: str
    clean: Path | None = None  # of an observed picture


def plan(sets, made):
    """Yield the cases of every table.

    Args:
        sets: the folder of test sets.
        made: a folder for the pictures that are made of them.
    """
    for table, folder in (("set9", "Set9"), ("kodak", "Kodak24-256")):
        for sigma in (25, 50):
            for picture in sorted((sets / folder).glob("*.png")):
                flags = f"--sigma {sigma}"
                yield Case(table, f"sigma {sigma}", "denoise", picture, flags)
    gray = gray_pictures(sets, GRAY, made)
    for sigma in (5, 10, 15, 25, 50):
        for picture, seed in ((p, s) for s in (0, 1) for p in gray):
            flags = f"--sigma {sigma} --crop 128 --seed {seed}"
            yield Case("gray", f"sigma {sigma}", "denoise", picture, flags)
    for sigma in (2.55, 7.65):
        for number in (1, 3, 5):
            kernel = sets / f"kernels/levin{number}.mat"
            for picture in gray if kernel.exists() else ():
                flags = (
                    f"--sigma {sigma} --crop 256 --kernel {shlex.quote(str(kernel))}"
                )
                yield Case("deblur", f"sigma {sigma}", "deblur", picture, flags)
    for number, (psf, *sigmas) in enumerate(scenarios(), 1):
        kernel = made / f"scenario{number}.npy"
        np.save(kernel, psf)
        for name, sigma in zip(("Cameraman256", "house"), sigmas):
            picture = sets / f"deblur6/{name}.png"
            flags = f"--sigma {sigma:.6g} --kernel {shlex.quote(str(kernel))}"
            if picture.exists():
                yield Case("deblur6", f"scenario {number}", "deblur", picture, flags)
    holes = gray_pictures(sets, ("Set11/hill", *GRAY[:3]), made)
    for share in (50, 70, 90):
        for picture in holes:
            flags = f"--sigma 0 --crop 128 --missing {share / 100}"
            yield Case("missing", f"{share} % missing", "denoise", picture, flags)
    for row, noise in SPOILED.items():
        for picture in (*gray, *(sets / "Set9").glob("F16_512rgb.png")):
            noisy, clean = spoiled(picture, row, noise, made)
            yield Case("observed", row, "denoise", noisy, "--observed", clean)
    for name, noisy in (("FMD", "one"), ("CC15", "real"), ("PolyU", "real")):
        for picture in sorted((sets / name).glob(f"*_{noisy}.*")):
            clean = picture.with_name(picture.name.replace(f"_{noisy}.", "_mean."))
            flags = "--observed --crop 128"
            yield Case("pairs", name, "denoise", picture, flags, clean)
    for picture in sorted((sets / "Levin").glob("im*_kernel*_img.png")):
        clean, kernel, _ = picture.stem.split("_")
        psf = cv2.imread(str(sets / f"Levin/{kernel}.png"), cv2.IMREAD_GRAYSCALE)
        psf = psf if kernel in PUBLISHED else psf[::-1, ::-1]
        file = made / f"{kernel}.npy"
        np.save(file, psf)
        clean = picture.with_name(f"{clean}.png")
        for row, kernel in (("PSF estimated", "estimate"), ("true PSF", file)):
            flags = f"--observed --kernel {shlex.quote(str(kernel))}"
            yield Case("levin", row, "deblur", picture, flags, clean)


def scenarios():
    """Return six blurs of Danielyan, Katkovnik, Egiazarian (IEEE TIP 2012).

    Each is a PSF and the noise's sigma for Cameraman and for House; in the third it lies
    40 dB below the blurred picture's variance.
    """
    squares = np.add.outer(np.arange(-7, 8) ** 2, np.arange(-7, 8) ** 2)
    binomial = np.outer([1, 4, 6, 4, 1], [1, 4, 6, 4, 1])
    return [
        (1 / (1 + squares), math.sqrt(2), math.sqrt(2)),
        (1 / (1 + squares), math.sqrt(8), math.sqrt(8)),
        (np.ones((9, 9)), 0.555, 0.406),
        (binomial, 7, 7),
        (deblur.gaussian_psf(25, 1.6), 2, 2),
        (deblur.gaussian_psf(15, 0.4), 8, 8),
    ]


def gray_pictures(sets, names, made):
    """Write pictures of the sets, or scikit-image's, in gray, OpenCV's; return the paths."""
    paths = []
    for name in names:
        folder = (sets / name).parent if "/" in name else Path(skimage.data.data_dir)
        for file in folder.glob(f"{Path(name).name}.*"):
            paths.append(made / f"{file.stem}.png")
            pixels = cv2.imread(str(file), cv2.IMREAD_GRAYSCALE)
            utils.write_atomically(paths[-1], cv2.imencode(".png", pixels)[1].tobytes())
    return paths


def spoiled(picture, row, noise, made):
    """Write a crop of a picture with noise, and without, as float TIFF; return both."""
    paths = [made / f"{picture.stem}, {row}{end}.tif" for end in ("", ", clean")]
    clean = 0.8 * pictures.read_picture(picture, 128).image + 0.1
    sigma, photons = noise
    noisy = clean + gaussian_noise(clean.shape, sigma, 0)
    if photons:
        noisy = np.random.default_rng(0).poisson(clean * photons) / photons
    for path, image in zip(paths, (noisy, clean)):
        planes = np.moveaxis(image, 0, -1) if len(image) == 3 else image[0]
        tifffile.imwrite(path, planes.astype(np.float32))
    return paths


def scores(case, folder, extra):
    """Return the PSNR and SSIM, and seconds, of a case's run; None where it is not there.

    It is a dictionary by COLUMNS. The script is run unless `extra`, more flags, is None.
    """
    records = map(
        results.read_record, (file.parent for file in folder.rglob("record.json"))
    )
    record = next((r for r in records if r and r["finished"]), None)
    if record is None:
        if extra is None:
            return None
        folder.mkdir(parents=True, exist_ok=True)
        words = ["--path", case.picture, *shlex.split(case.flags), *extra, "--resume"]
        words += ["--reference", case.clean] if case.clean else []
        command = [sys.executable, ROOT / f"{case.script}.py", *words]
        subprocess.run([*map(str, command)], cwd=folder, check=True)
        return scores(case, folder, None)
    _, _, psnr, ssim, network, *_, seconds = record["rows"][-1]
    found = {"observation": record["observation"][0], "network": network}
    found |= {"you get": psnr, "SSIM": ssim, "seconds": seconds}
    if case.table == "levin":  # what is found may be shifted
        clean = pictures.read_picture(case.clean).image[0]
        restored = pictures.read_picture(next(folder.rglob("restored.png"))).image[0]
        found["you get"] = best_shift(restored, clean)
        del found["network"], found["SSIM"]
    return found


def best_shift(image, clean):
    """Return the PSNR at the best shift by half pixels, 20 pixels of edge left out."""
    inner, best = (slice(20, -20),) * 2, (0.0, 0.0)

    def psnr(shift):
        moved = scipy.ndimage.shift(image, shift, order=3, mode="nearest")
        return -10 * math.log10(((moved - clean)[inner] ** 2).mean())

    for offsets in (range(-7, 8), (-0.5, 0, 0.5)):
        around = [(best[0] + i, best[1] + j) for i in offsets for j in offsets]
        best = max(around, key=psnr)
    return psnr(best)


def classical(case, extra):
    """Return PSNR and SSIM of BM3D, or of biharmonic inpainting; None: of neither.

    BM3D is told the noise's sigma, or that in BM3D_SIGMA, or what the program finds, which
    is made even for it where it grows. Deblurring, it is the best of shifts by a pixel and of both
    orientations of the PSF, which its conventions leave open.
    """
    words = ["--path", str(case.picture), *shlex.split(case.flags), *extra]
    script = SCRIPTS[case.script]
    args = utils.parse_arguments("", script.DEFAULTS, open_device, words)
    x = pictures.read_picture(case.picture, args.crop).image
    y = x if args.observed else x + gaussian_noise(x.shape, args.sigma, args.seed)
    if args.missing:
        draws = np.random.default_rng((args.seed, 1)).random((1, *x.shape[1:]))
        filled = inpaint_biharmonic(x[0], draws[0] < args.missing)
        return pictures.score(filled[None], x)
    if args.observed:
        clean = pictures.read_picture(case.clean, args.crop).image
        if case.row in BM3D_SIGMA:
            return pictures.score(filtered(y, BM3D_SIGMA[case.row] / 255), clean)
        noise = find_noise(y, np.ones((1, 1, 1)))
        if not noise.is_white():
            return None
        recipe = recipes.adapt("fast", y, noise=noise)
        even = filtered(recipe.scale.to(y), recipe.noise / 255)
        return pictures.score(recipe.scale.back(even), clean)
    if case.script == "denoise":
        return pictures.score(filtered(y, args.sigma / 255), x)
    psf = pictures.read_psf(args.kernel)
    y += blur.CircularBlur(psf)(torch.from_numpy(x)[None])[0].numpy() - x
    given = y.transpose(1, 2, 0), args.sigma / 255  # of (H, W) it makes H channels
    sharp = [bm3d.bm3d_deblurring(*given, k) for k in (psf, psf[::-1, ::-1])]
    moves = itertools.product((-1, 0, 1), repeat=2)
    moved = [np.roll(k.squeeze(), move, (0, 1)) for move in moves for k in sharp]
    return max(pictures.score(image[None], x) for image in moved)


def filtered(y, sigma):
    """Return BM3D's result of an image (C, H, W)."""
    if len(y) == 1:
        return bm3d.bm3d(y[0], sigma)[None]
    return bm3d.bm3d_rgb(y.transpose(1, 2, 0), sigma).transpose(2, 0, 1)


def measure(case, folder, extra):
    """Return a case's values by COLUMNS, those that are there; extra: see scores.

    In the table deblur6 each PSNR is given as its improvement on the observation's (ISNR).
    """
    found = scores(case, folder, extra) or {}
    file = folder / "classical.json"
    wanted = case.table == "missing" or (bm3d and case.table != "levin")
    if wanted and extra is not None and not file.exists():
        utils.write_atomically(file, json.dumps(classical(case, extra)).encode())
    known = json.loads(file.read_text()) if file.exists() else None
    found |= dict(zip(("classical", "SSIM, classical"), known or ()))
    if case.table == "deblur6" and "observation" in found:
        observation = found.pop("observation")
        improved = found.keys() & {"classical", "network", "you get"}
        found |= {column: found[column] - observation for column in improved}
    return found


def follow(file, words):
    """Print how a recipe comes on at one observation; words: the flags of denoise.py."""
    args = utils.parse_arguments("", denoise.DEFAULTS, open_device, words)
    given, noise = np.load(file), white(args.sigma)
    y, chosen = given["observation"], vars(args)
    recipe = recipes.adapt(args.recipe, y, noise=noise, given=chosen, eight_bits=True)
    learner = Self2Self(y, blur.identity, None, recipe, args.seed, args.device)
    while learner.step < recipe.iteration:
        learner.train_step()
        if learner.step % args.test_frequency == 0 or learner.step == recipe.iteration:
            ensemble = learner.predict(args.num_prediction)
            image, error = learner.fuse(ensemble)
            images = [ensemble.image] + [image] * (error is not None)
            psnr = [
                f"{pictures.score(image, given['clean'])[0]:.2f}" for image in images
            ]
            print(f"seed {args.seed}, step {learner.step}: {', '.join(psnr)} dB")


def print_table(table, rows):
    """Print a table in Markdown; rows: name -> values by COLUMNS of its cases."""
    print(f"\n{table}\n\n| | {' | '.join(COLUMNS)} | least lead | cases |")
    print("|---" * (len(COLUMNS) + 3) + "|")
    for name, cases in rows.items():
        there = [case for case in cases if "you get" in case]
        means = [[case[c] for case in there if c in case] for c in COLUMNS]
        digits = [{"S": 3, "s": 0}.get(c[0], 2) for c in COLUMNS]
        cells = [
            f"{np.mean(m):.{n}f}" if m and len(m) == len(there) else ""
            for m, n in zip(means, digits)
        ]
        leads = [
            case["you get"] - case["classical"] for case in there if "classical" in case
        ]
        cells += [f"{min(leads):+.2f}" if leads else "", f"{len(there)}/{len(cases)}"]
        print(f"| {name} | {' | '.join(cells)} |")


def main():
    """Measure what is missing, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--images", type=Path, help="folder of test sets")
    given.add_argument("--observation", help=".npz of one, and of its clean image")
    parser.add_argument("--tables", nargs="+", help="only these, or rows of this name")
    parser.add_argument("--flags", default="", help="more flags for the scripts")
    parser.add_argument("--each", action="store_true", help="a row for every picture")
    parser.add_argument("--print", action="store_true", help="what is measured already")
    parser.add_argument("--out", type=Path, default=Path("logs/quality"))
    args = parser.parse_args()
    if args.observation:
        return follow(args.observation, shlex.split(args.flags))
    made, extra = (args.out / "made").resolve(), shlex.split(args.flags)
    made.mkdir(parents=True, exist_ok=True)
    tables = {}
    for case in plan(args.images.resolve(), made):
        if args.tables and not {case.table, case.row} & {*args.tables}:
            continue
        words = shlex.split(case.flags) + extra
        name = "_".join([case.picture.stem, *(Path(word).name for word in words)])
        values = measure(
            case, args.out / case.table / name, None if args.print else extra
        )
        rows = tables.setdefault(case.table, {})
        rows.setdefault(case.row, []).append(values)
        if args.each:
            rows.setdefault(f"{case.picture.stem}, {case.row}", []).append(values)
    for table, rows in tables.items():
        print_table(table, rows)


if __name__ == "__main__":
    main()
