"""Everything there is to see on a GPU, in one call; figures go into a file as they come.

Run by hand, from anywhere: python tests/gpu.py [--out FOLDER] [--limit SECONDS]. No check's
failure stops the next; none begins after the limit. `paper` goes on, for the seconds that
are left, from its checkpoint in the output folder. With --device cpu --quick it is tried
on a machine without a GPU.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import cv2
import numpy as np
import skimage.data
import torch
from scripts import ROOT, SCRIPTS

import pictures
import results
import utils
from network import Self2Self, blur, fast_punet, recipes
from network.device import open_device
from network.fusing import fuse
from network.noise import gaussian_noise, white

BLUR = blur.CircularBlur(blur.gaussian_psf(15, 1.0))


def figure(name, value):
    """Keep a figure."""
    path = OUT / "figures.json"
    figures = json.loads(path.read_text()) if path.exists() else {}
    utils.write_atomically(path, json.dumps(figures | {name: value}, indent=1).encode())
    print(f"   {name}: {value}", flush=True)


def tried(name, action, *arguments):
    """Keep what an action returns, and its seconds, or how it failed."""
    started = time.perf_counter()
    try:
        value = action(*arguments)
        figure(name, "ok" if value is None else value)
    except Exception as error:  # noqa: BLE001 - the next check goes on
        traceback.print_exc()
        figure(name, f"FAILED {type(error).__name__}: {str(error)[:300]}")
    figure(f"{name} [s]", round(time.perf_counter() - started, 2))


def picture(side, channels=1, seed=0):
    """A part of a bundled picture (C, side, side), [0, 1]; larger ones are repeated."""
    image = skimage.data.astronaut() if channels == 3 else skimage.data.camera()
    image = np.atleast_3d(image).transpose(2, 0, 1).astype(np.float32) / 255
    whole = np.tile(image, (1, -(-side // 300), -(-side // 300)))
    top, left = 60 + 7 * seed, 130 + 5 * seed
    return np.ascontiguousarray(whole[:, top : top + side, left : left + side])


def learner(name, y, operator=blur.identity, **changes):
    """A learner of y by a recipe, in float32 unless it is changed."""
    recipe = recipes.adapt(
        name, y, noise=white(25), given={"device": DEVICE}, blurred=operator is BLUR
    )
    recipe = replace(recipe, **{"precision": "float32"} | changes)
    return Self2Self(y, operator, None, recipe, device=DEVICE)


def train(made, steps):
    """Train for some steps; return the mean loss."""
    for _ in range(steps):
        made.train_step()
    return made.mean_loss()


def smoke():
    """A captured step of each kind, by Triton's kernels and by PyTorch's own."""
    tritons, y = fast_punet.triton_punet, picture(64)
    for name, photons in (("paper", None), ("fast", None), ("fast", 100)):
        for kernels, module in (("Triton", tritons), ("PyTorch", None)):
            fast_punet.triton_punet = module
            label = f"smoke: {name}, {photons} photons, {kernels}, loss"
            tried(label, lambda n=name, p=photons: train(learner(n, y, photons=p), 3))
    fast_punet.triton_punet = tritons


def timed(name, y):
    """Milliseconds of a step, seconds of 100 predictions, of a learner's start; MiB."""
    started = time.perf_counter()
    made, count = learner(name, y), 2 if QUICK else 100
    train(made, 1)
    begun = time.perf_counter()
    train(made, count)
    trained = time.perf_counter()
    made.predict(count)
    spent = 1e3 * (trained - begun) / count, time.perf_counter() - trained
    cuda = DEVICE.type == "cuda"
    memory = torch.cuda.max_memory_reserved() / 2**20 if cuda else None
    return [*spent, begun - started, memory]


def steps():
    """Speed and memory."""
    cases = [("fast", 256, 1), ("fast", 512, 1), ("fast", 1024, 3), ("paper", 256, 1)]
    for name, side, channels in [("fast", 48, 1)] if QUICK else cases:
        case = f"steps: {name}, {side}x{side}x{channels}"
        tried(case, timed, name, picture(side, channels))


def restored(clean, y, precision):
    """Return dB of the ensemble, and fused."""
    made = learner("fast", y, precision=precision)
    train(made, 6 if QUICK else made.recipe.iteration)
    ensemble = made.predict(4 if QUICK else 100)
    images = ensemble.image, made.fuse(ensemble)[0]
    return [pictures.score(image, clean)[0] for image in images]


def quality():
    """`fast` in either precision."""
    clean = picture(48 if QUICK else 256)
    y = clean + gaussian_noise(clean.shape, 25, 0)
    for precision in ("float32", "bfloat16"):
        tried(f"quality: {precision}", restored, clean, y, precision)


def fused_apart(what, x, operator=blur.identity):
    """Return how far fusing on the device is from a CPU's, at most."""
    noise, known = gaussian_noise(x.shape, 10, 0), np.ones_like(x[:1])
    f, variance, made = x + 0.5 * noise[:, ::-1], np.full_like(x, 1e-4), []
    y = operator(torch.from_numpy(x)[None])[0].numpy() + noise
    if what == "holes":
        y, known[:, ::2, ::3] = x, 0
    for device in ("cpu", DEVICE):
        seen = (torch.from_numpy(a).to(device) for a in (known * y, known))
        made.append(fuse(what, f.copy(), variance, *seen, 10, operator)[0])
    return float(np.abs(made[0] - made[1]).max())


def fusing():
    """Fusing on the device beside a CPU's."""
    gray, colour = (picture(64 if QUICK else 256, channels) for channels in (1, 3))
    for name, *given in (
        ("gray", "noise", gray),
        ("colour", "noise", colour),
        ("blur", "noise", gray, BLUR),
        ("shared", "shared", colour),
        ("holes", "holes", gray),
    ):
        tried(f"fuse: {name}, largest difference", fused_apart, *given)


def rows_below(folder):
    """Return the tests that the records below a folder have."""
    found = sorted(folder.rglob("record.json"))
    return [results.read_record(path.parent)["rows"] for path in found]


def call(task, flags, place="runs"):
    """Run a script in this process; return its exit status and its records' last rows."""
    folder = OUT / place
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "in").mkdir(parents=True)
    for i, side in enumerate((48, 64) if QUICK else (128, 200)):
        pixels = np.rint(picture(side, seed=i)[0] * 255).astype(np.uint8)
        cv2.imwrite(str(folder / f"in/{i}.png"), pixels)
    few = " --iteration 6 --num_prediction 3 --crop 48" if QUICK else ""
    with contextlib.chdir(folder):
        try:
            status = SCRIPTS[task].main(f"{flags}{few} --device {DEVICE}".split())
        except SystemExit as stop:
            status = stop.code
        return status, [rows[-1][:5] for rows in rows_below(Path()) if rows]


def scripts():
    """Both scripts, end to end, in every mode."""
    for task, flags in (
        ("denoise", "--path in"),
        ("denoise", "--path camera --crop 256"),
        ("denoise", "--path in/0.png --observed"),
        ("denoise", "--path in/0.png --sigma 0 --missing 0.5"),
        ("denoise", "--path astronaut --crop 128 --bs 2"),
        ("deblur", "--path camera --crop 256"),
        ("deblur", "--path in/0.png --boundary valid"),
    ):
        tried(f"scripts: {task} {flags}", call, task, flags)


def start(place, flags):
    """Start denoise.py in a folder of its own, as a process."""
    (OUT / place).mkdir(parents=True, exist_ok=True)
    words = [sys.executable, ROOT / "denoise.py", "--device", str(DEVICE)]
    silent = subprocess.DEVNULL
    return subprocess.Popen([*words, *flags.split()], cwd=OUT / place, stdout=silent)


def resume():
    """A killed run, resumed, beside one that nobody killed: exit statuses, dB."""
    flags = "--path camera --crop 128 --iteration 1000 --test_frequency 200"
    if QUICK:
        flags = "--path camera --crop 48 --iteration 9 --test_frequency 3"
    shutil.rmtree(OUT / "resume", ignore_errors=True)
    found = [start("resume/whole", flags).wait()]
    killed = start("resume/killed", flags)
    while killed.poll() is None and not list((OUT / "resume/killed").rglob("*.pt")):
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    found += [killed.wait(), start("resume/killed", f"{flags} --resume").wait()]
    return found + [rows[-1][2] for rows in rows_below(OUT / "resume")]


def out_of_memory():
    """Too little memory: one line, exit status 1."""
    if DEVICE.type != "cuda":
        return "skipped"
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(300 * 2**20 / total)
    try:
        return call("denoise", "--path camera --window 0 --iteration 20")[0]
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def paper(seconds):
    """`paper` on a part of a colour picture, for some seconds, from its own checkpoint."""
    side = 48 if QUICK else 256
    flags = f"--recipe paper --path astronaut --resume --crop {side} --test_frequency"
    process = start("paper", f"{flags} {5 if QUICK else 10000} --num_prediction 10")
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    process.send_signal(signal.SIGKILL)
    found = (OUT / "paper").rglob("checkpoint.pt")
    return [results.read_checkpoint(path)["learner"]["step"] for path in found]


def main():
    """Run the checks one after the other."""
    global OUT, DEVICE, QUICK
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="gpu_out", help="folder")
    parser.add_argument("--limit", type=float, default=530, help="seconds for all")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny settings, to try it")
    args = parser.parse_args()
    OUT, QUICK, started = Path(args.out).resolve(), args.quick, time.perf_counter()
    DEVICE = open_device(args.device)
    OUT.mkdir(parents=True, exist_ok=True)
    kind = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU"
    figure("machine", f"{kind}, {os.cpu_count()} cores, PyTorch {torch.__version__}")
    for check in (smoke, steps, quality, fusing, scripts, resume, out_of_memory):
        if time.perf_counter() - started < args.limit:
            print(f"== {check.__doc__.splitlines()[0]}", flush=True)
            single = check in (resume, out_of_memory)
            tried(check.__name__, check) if single else check()
    left = args.limit - (time.perf_counter() - started)
    if left > 20:
        tried("paper: steps done", paper, 20 if QUICK else left - 10)


if __name__ == "__main__":
    main()
