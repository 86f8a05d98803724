"""Kill a run at random moments, resume it, and compare its files with an untouched run's.

Run by hand: python tests/kill.py [--kills 50]. Moments within checkpoint writes are
among them: the run saves at every second step.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np

ROOT = Path(__file__).parents[1]
FLAGS = [
    "--path",
    "in",
    "--test_frequency",
    "2",
    "--num_prediction",
    "2",
    "--device",
    "cpu",
    "--resume",
]


def start(folder, steps):
    """Start or resume the run, two images, in a folder."""
    return subprocess.Popen(
        [sys.executable, ROOT / "denoise.py", *FLAGS, "--iteration", str(steps)],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def results(folder):
    """Return the files that must repeat: pictures, log and CSV, but for the seconds."""
    found = {}
    for file in sorted(f for f in folder.rglob("*") if f.is_file()):
        name, data = str(file.relative_to(folder)), file.read_bytes()
        if file.suffix == ".csv":
            data = b"\n".join(line.rpartition(b",")[0] for line in data.splitlines())
        if file.suffix not in (".pt", ".json") and not file.name.startswith("."):
            found[name] = data
    return found


def kill_and_compare(kills, steps, longest, seed=0):
    """Return the number of kills and the names of the files that differ.

    A process is killed after 1 to `longest` seconds; the whole run must take longer.
    """
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as scratch:
        folders = [Path(scratch, name) for name in ("whole", "killed")]
        for folder in folders:
            (folder / "in").mkdir(parents=True)
            for i in range(2):
                pixels = np.random.default_rng(i).integers(0, 256, (32, 32, 3))
                cv2.imwrite(str(folder / f"in/{i}.png"), pixels.astype(np.uint8))
        whole, killed = folders
        untouched = start(whole, steps)
        done = 0
        while True:
            process = start(killed, steps)
            if done < kills:
                # Anywhere from the start of Python to some way into the training.
                time.sleep(chance.uniform(1, longest))
                done += process.poll() is None
                process.send_signal(signal.SIGKILL)
            if process.wait() == 0:
                break
        assert untouched.wait() == 0
        expected, got = results(whole), results(killed)
        names = sorted(expected.keys() | got.keys())
        return done, [n for n in names if expected.get(n) != got.get(n)]


def main():
    """Print how many kills the run survived, and what differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--longest", type=float, default=6, help="seconds to a kill")
    args = parser.parse_args()
    kills, differences = kill_and_compare(args.kills, args.steps, args.longest)
    print(f"{kills} kills, {len(differences)} differences", *differences, sep="\n")
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main())
