"""Time a training step and the ensemble: a plain eager one against the one that the scripts use.

Run by hand, on a quiet machine: python tests/benchmark.py [--recipe paper] [--sizes 256]

Both live in processes of their own, which take turns, so that neither's memory nor its
settings touch the other's. Both have PyTorch's default precision (TF32 convolutions
where CUDA has them).

With --budgets 10 30 60 120, seconds, it says instead what a user has after them: the PSNR
of denoise.py's result, and of the network alone, when its steps are as many as the time
allows, beside BM3D's where that package is installed; --picture FILE draws it.
"""

import argparse
import csv
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import denoise
import pictures
import results
import utils
from network import Self2Self, blur, recipes
from network.device import open_device
from network.muon import Muon
from network.noise import gaussian_noise

DROP_RATE = 0.3
PICTURE = "astronaut"  # of quality against time


class PlainPConv2d(nn.Module):
    """Partial convolution as earlier ports have it: a full convolution for the mask."""

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, bias=False)
        self.bias = nn.Parameter(torch.zeros(1, out_channels, 1, 1))
        self.register_buffer("ones", torch.ones(out_channels, in_channels, 3, 3))

    def forward(self, x, mask):
        x = F.pad(x, (1, 1, 1, 1), mode="replicate")
        mask = F.pad(mask, (1, 1, 1, 1), value=1.0)
        with torch.no_grad():
            kept = F.conv2d(mask, self.ones)
            updated = kept.clamp(0, 1)
            ratio = 9 / (kept + 1e-8) * updated
        return self.conv(x * mask) * ratio + self.bias, updated


class PlainPunet(nn.Module):
    """The network in plain, eager layers."""

    def __init__(self, channels):
        super().__init__()
        inputs = [channels, 48, 48, 48, 48, 48, 48]
        self.encoder = nn.ModuleList(PlainPConv2d(c, 48) for c in inputs)
        inputs = [96, 96, 144, 96, 144, 96, 144, 96, 96 + channels, 64, 32]
        outputs = [96] * 8 + [64, 32, channels]
        self.decoder = nn.ModuleList(map(nn.Conv2d, inputs, outputs, [3] * 11))

    def forward(self, x, mask):
        skips = [x]
        for i, layer in enumerate(self.encoder):
            x, mask = layer(x, mask)
            x = F.leaky_relu(x, 0.1)
            if 1 <= i <= 5:
                x = F.max_pool2d(x, 2, ceil_mode=True)
                mask = F.max_pool2d(mask, 2, ceil_mode=True)
                skips.append(x)
        skips.pop()
        for i, conv in enumerate(self.decoder):
            if i % 2 == 0 and skips:
                skip = skips.pop()
                x = F.interpolate(x, scale_factor=2)
                x = torch.cat([x[..., : skip.shape[2], : skip.shape[3]], skip], 1)
            x = F.dropout(x, DROP_RATE)
            x = conv(F.pad(x, (1, 1, 1, 1), mode="replicate"))
            x = F.leaky_relu(x, 0.1) if i < 10 else torch.sigmoid(x)
        return x


class Plain:
    """A learner with the plain network, unfused Adam and the loss read at every step.

    With the recipe fast it has Muon, too, for the same weights as ours. It is float32.
    """

    def __init__(self, recipe, precision, device, channels, size):
        self.y = torch.rand(1, channels, size, size, device=device)
        self.network = PlainPunet(channels).to(device)
        weights, wide = list(self.network.parameters()), []
        if recipe == "fast":
            wide = [w for w in weights if w.ndim == 4 and min(w.shape[:2]) >= 32]
        rest = [w for w in weights if all(w is not other for other in wide)]
        self.optimizers = [torch.optim.Adam(rest, 1e-4, foreach=False)]
        self.optimizers += [Muon(wide, torch.tensor(1e-4))] if wide else []

    def sample(self):
        """Predict from one Bernoulli sample, flipped at random."""
        mask = torch.bernoulli(torch.full_like(self.y, 1 - DROP_RATE))
        dims = [d for d in (2, 3) if torch.rand(()) < 0.5]
        y, seen = self.y.flip(dims), mask.flip(dims)
        return self.network(y * seen, seen).flip(dims), mask

    def train_step(self):
        prediction, mask = self.sample()
        loss = ((1 - mask) * (prediction - self.y) ** 2).sum() / (1 - mask).sum()
        self.network.zero_grad()
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss.item()

    def predict(self, num_prediction):
        with torch.no_grad():
            total = sum(self.sample()[0] for _ in range(num_prediction))
        return (total / num_prediction).cpu().numpy()


def our_learner(recipe, precision, device, channels, size):
    """The learner as the scripts use it, but of the published width, as the plain one is."""
    flags = ["--recipe", recipe, "--device", str(device), "--width", "1"]
    flags += ["--precision", precision] if precision else []
    args = utils.parse_arguments(__doc__, denoise.DEFAULTS, open_device, flags)
    y = np.random.default_rng(0).random((channels, size, size), np.float32)
    known = np.ones((1, size, size), np.float32)
    result = SimpleNamespace(
        known=known, eight_bits=True, place=slice(None), stack=None
    )
    recipe, _ = denoise.choose(args, y, result)
    return Self2Self(y, blur.identity, known, recipe, args.seed, args.device)


def work(kind, recipe, precision, device, channels, size):
    """Answer each line of standard input ("step 3", "predict 4", "peak") with a number."""
    device = torch.device(device)
    make = Plain if kind == "plain" else our_learner

    def seconds(action, *arguments):
        started = time.perf_counter()
        action(*arguments)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    def start():
        nonlocal learner
        learner = make(recipe, precision, device, channels, size)
        learner.train_step()

    def steps(count):
        for _ in range(count):
            learner.train_step()

    learner = None
    print(seconds(start), flush=True)
    for line in sys.stdin:
        command, count = line.split()[0], int(line.split()[1])
        if command == "step":
            answer = seconds(steps, count)
        elif command == "predict":
            answer = seconds(learner.predict, count)
        elif command == "peak" and device.type == "cuda":
            answer = torch.cuda.max_memory_reserved() / 2**20
        elif command == "peak":
            answer = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(answer, flush=True)


class Worker:
    """A process that holds one learner."""

    def __init__(self, *arguments):
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--work", *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.startup = float(self.process.stdout.readline())

    def ask(self, command, count):
        """Return a command's answer; seconds are those of one step or prediction."""
        print(command, count, file=self.process.stdin, flush=True)
        return float(self.process.stdout.readline()) / (count or 1)

    def stop(self):
        self.process.stdin.close()
        self.process.wait()


def step_flops(channels, size):
    """Floating-point operations of a step's convolutions: forward, and twice backward."""
    counted = []

    def count(layer, _, output):
        _, inputs, *kernel = layer.weight.shape
        counted.append(output.numel() * inputs * kernel[0] * kernel[1])

    network = PlainPunet(channels)
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(count)
    with torch.no_grad():
        network(
            torch.ones(1, channels, size, size), torch.ones(1, channels, size, size)
        )
    return 2 * 3 * sum(counted)


def convolution_flops(device):
    """Floating-point operations per second of a large convolution, as fast as it goes."""
    layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    x = torch.rand(1, 128, 512, 512, device=device).contiguous(memory_format=layout)
    weight = torch.rand(128, 128, 3, 3, device=device).contiguous(memory_format=layout)
    best = float("inf")
    with torch.no_grad():
        for _ in range(10):
            started = time.perf_counter()
            for _ in range(20 if device.type == "cuda" else 1):
                F.conv2d(x, weight, padding=1)
            if device.type == "cuda":
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - started)
    operations = 2 * 128 * 128 * 9 * 512 * 512 * (20 if device.type == "cuda" else 1)
    return operations / best


def compare(recipe, precision, device, channels, size, rounds):
    """Time both learners in turns; return the table's cells."""
    count = 50 if device.type == "cuda" else 5  # in a row, as training does
    predictions = 100 if device.type == "cuda" else 2
    settings = recipe, precision, device, channels, size
    workers = [Worker(kind, *settings) for kind in ("plain", "ours")]
    for worker in workers:
        worker.ask("step", 2 * count)
        worker.ask("predict", predictions)
    times = [[worker.ask("step", count) for worker in workers] for _ in range(rounds)]
    tests = [
        [w.ask("predict", predictions) for w in workers] for _ in range(rounds // 3)
    ]
    peaks = [worker.ask("peak", 0) for worker in workers]
    for worker in workers:
        worker.stop()
    plain, ours = (statistics.median(t) for t in zip(*times))
    plain_test, our_test = (statistics.median(t) for t in zip(*tests))
    speed = step_flops(channels, size) / ours
    return {
        "size": f"{size}x{size}x{channels}",
        "plain ms": f"{1e3 * plain:.2f}",
        "ours ms": f"{1e3 * ours:.2f}",
        "ratio": f"{plain / ours:.2f}",
        "plain MiB": f"{peaks[0]:.0f}",
        "ours MiB": f"{peaks[1]:.0f}",
        "plain pred/s": f"{1 / plain_test:.1f}",
        "ours pred/s": f"{1 / our_test:.1f}",
        "pred ratio": f"{plain_test / our_test:.2f}",
        "the recipe's": f"{recipes.RECIPES[recipe].iteration * ours:.0f} s",
        "GFLOP/s": f"{speed / 1e9:.0f}",
        "of a conv": f"{speed / convolution_flops(device):.0%}",
        "start s": f"{workers[1].startup:.1f}",
    }


def instructions():
    """Name the widest instructions that PyTorch computes with on this CPU."""
    widest = torch.backends.cpu.get_cpu_capability()
    return f"{widest}, bfloat16" if recipes.multiplies_bfloat16(None) else widest


def denoised(size, device, steps):
    """Run denoise.py on a crop; return the command's seconds, and PSNRs: its, the network's."""
    script = Path(__file__).parents[1] / "denoise.py"
    options = {"path": PICTURE, "crop": size, "device": device, "iteration": steps}
    words = [f"--{key}={value}" for key, value in options.items()]
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        subprocess.run([sys.executable, script, *words], cwd=folder, check=True)
        seconds = time.perf_counter() - started
        log = Path(folder, "logs", "denoise", "log.csv").read_text()
        row = next(csv.DictReader(log.splitlines()))
        return seconds, float(row["psnr"]), float(row["ensemble_psnr"])


def bm3d_denoised(size):
    """Return the seconds and the PSNR of BM3D, told sigma; None where it is not installed."""
    try:
        from bm3d import bm3d_rgb
    except ImportError:
        return None
    sigma = denoise.DEFAULTS["sigma"]
    clean = pictures.read_picture(utils.find_images(PICTURE)[0], size).image
    y = clean + gaussian_noise(clean.shape, sigma, denoise.DEFAULTS["seed"])
    started = time.perf_counter()
    made = bm3d_rgb(y.transpose(1, 2, 0), sigma / 255).transpose(2, 0, 1)
    return time.perf_counter() - started, pictures.score(made, clean)[0]


def quality_against_time(budgets, size, device, picture):
    """Print, and draw, the PSNR that PICTURE's centre crop has after so many seconds."""
    few, many = 20, 120
    start, end = (denoised(size, device, steps)[0] for steps in (few, many))
    step = (end - start) / (many - few)
    points = []
    print(
        "| seconds allowed | steps | seconds | PSNR, dB | network |\n|---|---|---|---|---|"
    )
    for budget in budgets:
        steps = few + int((budget - start) / step)
        if steps > 0:
            points.append(denoised(size, device, steps))
            cells = " | ".join(f"{x:.2f}" for x in points[-1])
            print(f"| {budget:g} | {steps} | {cells} |", flush=True)
    other = bm3d_denoised(size)
    if other:
        print(f"| BM3D | | {other[0]:.2f} | {other[1]:.2f} | |")
    if picture:
        figure = results.new_figure((6, 3), 150)
        axes = figure.subplots()
        seconds, restored, network = zip(*points)
        axes.plot(seconds, restored, marker="o", label="you get")
        axes.plot(seconds, network, marker="o", label="network alone")
        if other:
            axes.plot(*other, "ks", label="BM3D, told sigma")
        axes.set(xlabel="seconds", ylabel="PSNR (dB)", xscale="log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
        axes.set_xticks([1, 2, 5, 10, 20, 50, 100])
        axes.grid(alpha=0.3, which="both")
        axes.legend()
        utils.write_atomically(picture, results.drawn(figure))


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", choices=recipes.RECIPES, default="fast")
    parser.add_argument("--precision", default="", help="ours; default: the recipe's")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--sizes", type=int, nargs="+", default=[256])
    parser.add_argument("--channels", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--budgets", type=float, nargs="*", default=[])
    parser.add_argument("--picture", help="file of the curve, PNG")
    parser.add_argument("--work", nargs=6, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        *settings, channels, size = args.work
        work(*settings, int(channels), int(size))
        return
    device = open_device(args.device)
    cuda = device.type == "cuda"
    name = (
        torch.cuda.get_device_name()
        if cuda
        else f"{torch.get_num_threads()} CPU threads, {instructions()}"
    )
    print(f"{name}, torch {torch.__version__}")
    if args.budgets:
        quality_against_time(args.budgets, args.sizes[0], device, args.picture)
        return
    for row, (size, channels) in enumerate(
        (size, channels) for size in args.sizes for channels in args.channels
    ):
        cells = compare(
            args.recipe, args.precision, device, channels, size, args.rounds
        )
        if row == 0:
            print("| " + " | ".join(cells) + " |")
            print("|---" * len(cells) + "|")
        print("| " + " | ".join(cells.values()) + " |", flush=True)


if __name__ == "__main__":
    main()
