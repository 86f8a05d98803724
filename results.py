"""What a run leaves: the files of one picture, the log of all pictures, exit status."""

import io
import itertools
import json
import math
import os
import signal
import sys
import threading
import time
import warnings
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

import numpy as np
from tqdm import tqdm

import pictures
import utils
from utils import InputError

warnings.filterwarnings("ignore", "Glyph .* missing")

# --- drawing -------------------------------------------------------------------------

MAX_PANEL = 1024  # pixels a side of a picture in a drawing
MAX_RATIO = 4  # of a drawn picture's height to its width
BARE = {"xticks": [], "yticks": [], "frame_on": False}  # axes with an image alone


def new_figure(size, dpi):
    """Return a Matplotlib figure; size is its (width, height) in inches."""
    from matplotlib.figure import Figure  # late, as PyTorch is

    return Figure(figsize=size, dpi=dpi, layout="constrained")


def drawn(figure):
    """Return a figure as a PNG file's bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def comparison(panels, ends):
    """Draw titled images side by side.

    Args:
        panels: title -> image (C, H, W), all of one size.
        ends: the values drawn as black and as white.
    """
    _, height, width = next(iter(panels.values())).shape
    every = math.ceil(max(height, width) / MAX_PANEL)
    size = len(panels) * 4, 4 * min(height / width, MAX_RATIO) + 0.4
    figure = new_figure(size, max(320, width // every) / 4)
    (row,) = figure.subplots(1, len(panels), squeeze=False, subplot_kw=BARE)
    for axes, (title, image) in zip(row, panels.items()):
        pixels = (image[:, ::every, ::every] - ends[0]) / max(ends[1] - ends[0], 1e-30)
        pixels = pixels.clip(0, 1).transpose(1, 2, 0)
        axes.imshow(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))
        axes.set_title(title, fontsize="large" if len(title) < 40 else "small")
    return drawn(figure)


def uncertainty(deviation):
    """Draw the predictions' standard deviation (H, W), in a file's numbers."""
    height, width = deviation.shape
    every = math.ceil(max(height, width) / MAX_PANEL)
    figure = new_figure((6, max(5 * min(height / width, MAX_RATIO), 4)), 160)
    axes = figure.subplots(subplot_kw=BARE)
    shown = axes.imshow(deviation[::every, ::every], cmap="magma", vmin=0)
    label = "standard deviation of the predictions, in the file's numbers"
    figure.colorbar(shown, ax=axes, label=label)
    return drawn(figure)


def curves(records):
    """Draw loss and PSNR over the steps, a line for each of the results' records."""
    figure = new_figure((9, 4), 120)
    axes = figure.subplots(1, 2)
    for record in records:
        # Matplotlib reads "$" as a formula, and drops a name that begins with "_".
        name = " " + record["name"].replace("$", r"\$")
        every = record["loss_every"]
        losses = [(every * n, loss) for n, loss in enumerate(record["losses"], 1)]
        scores = [(row[0], row[2]) for row in record["rows"] if row[2] is not None]
        for axis, points in zip(axes, (losses, scores)):
            if points:
                axis.plot(*zip(*points), marker=".", label=name)
    for axis, title in zip(axes, ("loss", "PSNR (dB)")):
        axis.set(xlabel="step", ylabel=title)
        axis.grid(alpha=0.3)
    if 0 < len(axes[0].lines) <= 12:
        axes[0].legend(fontsize="small")
    return drawn(figure)


# --- the picture that was read -------------------------------------------------------


class Source:
    """A picture as it was read, which of its entries are known, and its reference.

    `image` and `known` have the margin; all other arrays, (C, h, w), lie at `place`.

    Args:
        path: the image file.
        args: the options' values.
        margin: pixels (above, below), (left, right) that the forward operator sees beyond
            the observation: added to an --observed picture, cut off another one.
    Raises InputError or OSError for a file that cannot be used.
    """

    def __init__(self, path, args, margin=((0, 0), (0, 0))):
        self.path, self.args = path, args
        # A pictures.Picture. Its image is NaN where `left_out`.
        self.picture = picture = pictures.read_picture(path, args.crop)
        known = self._read_known()
        self.image = picture.image  # (C, H, W), 1 is the file's peak
        # The reference for scores; its NaN entries do not count.
        self.clean = self._read_reference() if args.reference else None
        if args.observed:
            widths = (0, 0), *margin
            self.image, known = np.pad(self.image, widths), np.pad(known, widths)
        sides = zip(margin, self.image.shape[1:])
        self.place = (slice(None), *(slice(a, n - b) for (a, b), n in sides))
        if not args.observed:
            self.picture = picture.part(self.place)
            self.clean = self.picture.image
            if not np.isfinite(self.image).all():
                raise InputError(f"{path}: NaN or infinite pixels need --observed")
        elif picture.absent is not None:
            self.image[self.place][picture.absent] = np.nan
        self.as_read = self.picture.image
        height, width = self.as_read.shape[1:]
        if min(height, width) < pictures.SMALLEST_SIDE:
            left = f"{width}x{height} pixels; a side needs {pictures.SMALLEST_SIDE}"
            raise InputError(f"{path}: the PSF leaves {left} or more")
        self.size = pictures.describe(*self.as_read.shape)
        self.eight_bits = picture.dtype == np.uint8 and picture.peak == 255
        # What is unknown besides --mask and --missing; what of it comes back as_read.
        self.left_out = self.gaps = np.zeros(self.as_read.shape, bool)
        self.known = np.zeros_like(known)  # 1 or 0, (C, H, W) or (1, H, W), float32
        self.known[self.place] = known[self.place]
        self._refuse_nothing_known()

    def _read_known(self):
        """Return what --mask or --missing leave known of the whole picture."""
        args, known = self.args, np.ones((1, *self.picture.image.shape[1:]), np.float32)
        if args.missing:  # the noise has the same seed, and must have other draws
            draws = np.random.default_rng((args.seed, 1)).random(known.shape)
            known[draws < args.missing] = 0
        if args.mask:
            mask, known = pictures.read_mask(args.mask, args.crop)
            self._refuse_misfit(args.mask, mask, len(known))
        return known

    def _read_reference(self):
        """Return --reference, NaN where nothing was measured."""
        reference = pictures.read_picture(self.args.reference, self.args.crop)
        self._refuse_misfit(self.args.reference, reference, len(reference.image))
        absent = False if reference.absent is None else reference.absent
        clean = np.where(absent, np.nan, reference.image)
        return np.broadcast_to(clean, self.picture.image.shape)

    def _refuse_misfit(self, path, other, channels):
        """Raise InputError unless a Picture has our size, and one channel or as many as ours."""
        ours = self.picture.uncropped
        same_size = other.uncropped.split()[0] == ours.split()[0]
        if not same_size or channels not in {1, len(self.picture.image)}:
            raise InputError(f"{path}: {other.uncropped}, but {self.path} is {ours}")

    def _refuse_nothing_known(self):
        if not self.known.any():
            raise InputError(f"{self.path}: every pixel is missing")

    def leave_out(self, gaps, outliers):
        """Take entries as unknown; say how many, and why; return what is known then.

        `gaps` come back as they were read, `outliers` are predicted: see network.unknown.
        Both are (C, H, W), bool, with the margin.
        """
        known = np.where(gaps | outliers, np.float32(0), self.known)
        gaps, outliers = ((x & (self.known > 0))[self.place] for x in (gaps, outliers))
        self.known = known[:1] if (known == known[:1]).all() else known
        self._refuse_nothing_known()
        self.gaps, self.left_out = gaps, gaps | outliers
        if self.left_out.any():
            image = np.where(self.left_out, np.nan, self.as_read)
            self.picture = self.picture._replace(image=image)
            if self.clean is not None:
                clean = np.where(gaps, np.nan, self.clean)
                self.clean = clean if np.isfinite(clean).any() else None
            counts = {"not measured (they come back as they are)": gaps.sum()}
            counts["far off all their neighbours (they are predicted)"] = outliers.sum()
            why = ", ".join(f"{n} {why}" for why, n in counts.items() if n)
            name = "/".join(utils.result_names(self.path))
            tqdm.write(f"{name}: {why}: unknown, of {gaps.size} entries")
        return self.known


# --- progress ------------------------------------------------------------------------

EVERY = 60  # seconds between two checkpoints, lines of progress or logs, at least


class Progress:
    """One picture's progress: a bar, or a line a minute if stderr is no terminal.

    Between `start` and `close` the first signal only sets `stopping` to the exit status.
    """

    def __init__(self, name):
        self.name, self.bar, self.stopping = name, None, None
        self.spoken_at = time.perf_counter()

    def start(self, total, done):
        """Show a bar of `total` units, `done` of them done."""
        how = {"desc": self.name, "disable": None, "leave": False}
        self.bar = tqdm(total=total, initial=done, **how)

    def advance(self, n):
        """Show that n more units are done."""
        self.bar.update(n)
        if self.bar.disable:  # stderr is no terminal, and a bar would fill it
            self.bar.n += n
            if time.perf_counter() - self.spoken_at > EVERY:
                self.spoken_at, share = time.perf_counter(), self.bar.n / self.bar.total
                print(f"{self.name}: {share:.0%} done", file=sys.stderr)

    def close(self):
        """Remove the bar."""
        if self.bar is not None:
            self.bar.close()
        self.bar = None

    def stop(self, number, _frame):
        """Handle a signal. A second one does not wait for the end of the step."""
        if self.bar is None or self.stopping:
            sys.exit(128 + number)
        self.stopping = 128 + number


@contextmanager
def signals_handled(handler):
    """Handle SIGINT and SIGTERM by a function, in the main thread; others cannot."""
    main = threading.current_thread() is threading.main_thread()
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM) if main}
    # A shell that runs a command behind "&" has Ctrl-C ignored.
    before = {n: f for n, f in before.items() if f not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)


# --- one picture's results -----------------------------------------------------------

COLUMNS = ("step", "loss", "psnr", "ssim", "ensemble_psnr")
COLUMNS += ("moved_psnr", "down", "right", "seconds")  # see pictures.score_moved
RESULTS = ["error.mat", "Self2Self-[0-9]*.png", "comparison.png", "uncertainty.png"]
RESULTS += [f"restored{suffix}" for suffix in utils.SUFFIXES]
OWN_FILES = ["noisy.png", "noise.mat", "blurred.png", "kernel.mat", "kernel.png"]
OWN_FILES += ["checkpoint.pt", *RESULTS]
SAVING = 20  # a checkpoint that took t seconds is followed by 20 t seconds without one


def row_text(row):
    """Write a test as a line of the log."""
    step, loss, psnr, ssim, ensemble, *moved, _ = row
    line = f"step {step:7d}  loss {loss:.6f}"
    if psnr is not None:
        line += f"  PSNR {psnr:.3f} dB  SSIM {ssim:.4f}"
    if ensemble != psnr:
        line += f"  plain ensemble {ensemble:.3f} dB"
    if moved[0] is not None:
        line += f"  ({pictures.Moved(*moved)})"
    return line


class Result:
    """One picture's tests, and the files in its results folder.

    A test is an ensemble prediction. It adds a row to `record`, the content of
    record.json, writes pictures, and calls `write_logs`.
    """

    def __init__(self, path, folder, args, settings, write_logs):
        self.path, self.args, self.settings = path, args, settings
        self.folder, self.write_logs = folder, write_logs
        self.name = "/".join(utils.result_names(path))
        self.progress = Progress(self.name)
        # A training can be made longer only if its learning rate is constant.
        self.extends = args.schedule == "constant"
        self.may_be_moved = False  # by its PSF: it is scored at the best shift, too
        self.source = self.learner = self.observation = None
        self.unchanged = None  # where the result is the observation, (C, h, w), bool
        self.begun = False  # whether the folder is this run's
        self.record = {"name": self.name, "columns": COLUMNS, "rows": []}
        self.record |= {"losses": [], "notes": [], "finished": False, "failed": None}
        self.saved, self.saved_step = {}, None  # to go on from; of the last checkpoint
        self.saved_at, self.saving = time.perf_counter(), 0.0  # when; how long it took
        self.started = None  # time.perf_counter() less the seconds of earlier runs

    def read(self, *margin):
        """Read the picture; return its Source."""
        self.source = Source(self.path, self.args, *margin)
        return self.source

    def begin(self, learner, y, noise, psf=None, **simulated):
        """Make the folder ready, and write the observation and what it was made of.

        Earlier results of the same picture and settings are replaced, others set aside.
        A checkpoint to resume from is read, and checked, before anything is touched.

        Args:
            learner: the network.Self2Self of the observation.
            y: the observation, (C, H, W), not clipped, with its margin.
            noise: the noise it has, a network.noise.Noise.
            psf: the PSF (h, w), or None.
            simulated: n, the noise, and `blurred`, of y's shape; not for --observed.
        """
        source, picture, place = self.source, self.source.picture, self.source.place
        self.learner = learner
        self.observation = np.where(source.left_out, source.as_read, y[place])
        # What is known is the result if there is neither noise nor blur.
        exact = noise.kind == "none" and psf is None
        self.unchanged = source.gaps | (exact and source.known[place] > 0)
        self._describe(noise, exact)
        if self.args.resume:
            self._read_earlier()
        if not self.saved:
            make_room(self.folder, self.record["made_from"], learner.recipe.iteration)
        self.begun = True
        self._write_record()
        picture.save(self.folder / "noisy.png", self.observation)
        if psf is not None:
            utils.save_mat(self.folder / "kernel.mat", "kernel", psf)
            panel = {"PSF, {1}x{0} pixels".format(*psf.shape): psf[None]}
            self._write("kernel.png", comparison(panel, (0, psf.max())))
        if not self.args.observed:
            utils.save_mat(self.folder / "noise.mat", "noise", simulated["n"][place])
            if "blurred" in simulated:
                picture.save(self.folder / "blurred.png", simulated["blurred"][place])

    def _describe(self, noise, exact):
        """Add to the record what the picture is, and what the result depends on."""
        source, clean, peak = self.source, self.source.clean, self.source.picture.peak
        description, scores = noise.describe(peak), None
        heading = f"{self.name}: {source.size}"
        if clean is not None:
            scores = pictures.score(self.observation, clean)
            heading += f", observation {scores[0]:.3f} dB"
            low, high = pictures.black_and_white(clean)
            if (low, high) != (0, 1):
                heading += f" (peak: the reference's range, {peak * (high - low):.4g})"
        heading += f", noise: {description}"
        if noise.lines and not source.eight_bits:
            flag = f", --noise_sigma {float(f'{noise.sigma():.3g}'):g}"
            flag = flag if self.args.observed and noise.kind == "white" else ""
            heading += f" (in the file's numbers{flag})"
        missing = 1 - source.known[source.place].mean(dtype=np.float64)
        if missing:
            heading += f", {missing:.2%} missing"
        elif exact:
            heading += ": it comes back as it is"
        tqdm.write(heading)
        low, high = (peak * x for x in pictures.black_and_white(source.picture.image))
        if (low, high) != (0, peak):
            tqdm.write(f"{self.name}: PNGs show {low:.4g} black and {high:.4g} white")
        recipe = asdict(self.learner.recipe) | {"kind of noise": noise.kind}
        del recipe["scale"], recipe["noise"]  # which the observation decides
        if self.extends:
            del recipe["iteration"]
        sums = {"image or noise": utils.digest([self.observation])}
        sums["reference"] = utils.digest(None if clean is None else [clean])
        made_from = self.settings | recipe | sums | {"device": self.args.device.type}
        self.record |= {"size": source.size, "heading": heading, "noise": description}
        self.record |= {"observation": scores, "made_from": made_from}
        self.record["loss_every"] = self.learner.LOSS_EVERY

    def _read_earlier(self):
        """Take over the tests of a checkpoint or, if a run is complete, of its record."""
        path = self.folder / "checkpoint.pt"
        if path.exists():
            saved = read_checkpoint(path)
        else:
            path, saved = self.folder / "record.json", read_record(self.folder)
            steps = [row[0] for row in saved["rows"]] if saved else []
            complete = max(steps, default=0) >= self.learner.recipe.iteration
            if not complete or not self._restored_path().exists():
                return
        was, now = saved["made_from"], self.record["made_from"]
        changed = [k for k in was.keys() | now.keys() if was.get(k) != now.get(k)]
        if changed:
            what = f"it is of another {', another '.join(sorted(changed))}"
            what = "the program has changed since" if "program" in changed else what
            raise InputError(f"{path}: {what}; without --resume the run starts over")
        self.record |= {key: saved[key] for key in ("rows", "losses", "notes")}
        self.saved = saved

    def resume(self):
        """Go on from what `begin` has read with --resume; start the clock and the bar."""
        step, saved = max(0, self.tested_step), self.saved
        if "learner" in saved:
            self.learner.load_state_dict(saved["learner"])
            self.saved_step = step = self.learner.step
        self.saved = {}
        if step:
            at = "finished already, at" if self.is_complete() else "going on from"
            tqdm.write(f"{self.name}: {at} step {step}")
        self.started = time.perf_counter() - saved.get("seconds", 0.0)
        iteration = self.learner.recipe.iteration
        tests = math.ceil(iteration / self.args.test_frequency)
        test = self.learner.ensemble_size(self.args.num_prediction) + 1  # its files
        done = step + len(self.record["rows"]) * test
        self.progress.start(iteration + tests * test, done)

    @property
    def tested_step(self):
        """The step of the last test; -1 before the first one."""
        return self.record["rows"][-1][0] if self.record["rows"] else -1

    def is_complete(self):
        """Tell whether the last step has been tested."""
        return self.tested_step >= self.learner.recipe.iteration

    def awaits_test(self):
        """Tell whether the learner is to predict now, before another step."""
        step, recipe = self.learner.step, self.learner.recipe
        # A run resumed with a smaller --iteration may be past its last step.
        due = step > 0 and step % self.args.test_frequency == 0
        due = due or step >= recipe.iteration
        return step > self.tested_step and due and self.learner.alive()

    def add(self, restored, image, error):
        """Score a test, add it to the record, and write its pictures.

        Args:
            restored: the ensemble's Restoration, with its margin.
            image, error: what the learner's `fuse` made of it, with their margin.
        Raises FloatingPointError, before it writes, for a restoration that is not finite.
        """
        source, picture, step = self.source, self.source.picture, self.learner.step
        images = [x[source.place] for x in (restored.image, image)]
        if not all(np.isfinite(image).all() for image in images):
            raise FloatingPointError("the output is not finite; lower --lr")
        given, y = self.unchanged, self.observation
        ensemble, image = (np.where(given, y, x) for x in images)
        panels = {"observation": y, "restored": image}
        psnr, ssim, plain, moved = [None] * 4
        if source.clean is not None:
            psnr, ssim = pictures.score(image, source.clean)
            plain = psnr if error is None else pictures.score(ensemble, source.clean)[0]
            moved = self.may_be_moved and pictures.score_moved(image, source.clean)
            before = f"observation {self.record['observation'][0]:.2f} dB"
            after = f"restored {psnr:.2f} dB" + (f", {moved}" if moved else "")
            panels = {before: y, after: image, "clean": source.clean}
        row = step, self.learner.mean_loss(), psnr, ssim, plain, *(moved or [None] * 3)
        self.record["rows"].append((*row, time.perf_counter() - self.started))
        self.record["losses"] = [*self.learner.read_losses()]
        if error is not None:
            error = picture.peak**2 * error[source.place]
            utils.save_mat(self.folder / "error.mat", "error", error)
        for path in (self.folder / f"Self2Self-{step}.png", self._restored_path()):
            picture.save(path, image)
        if picture.rounding(image) > pictures.MOST_ROUNDING and self.is_complete():
            advice = "rounding changes its mean; save the picture as float, in a TIFF"
            tqdm.write(f"{self.name}: {advice}")
        deviation = picture.peak * np.sqrt(restored.variance[source.place].mean(0))
        self._write("uncertainty.png", uncertainty(deviation))
        # Most pictures of 16 bits would be all dark.
        ends = (0, 1) if source.eight_bits else np.nanquantile(image, (0.001, 0.999))
        self._write("comparison.png", comparison(panels, ends))
        self._write_record()
        self.write_logs()
        tqdm.write(f"{self.name}: {row_text(self.record['rows'][-1])}")

    def advance(self, n=1):
        """Show that n steps or predictions are done; after a signal, save and exit."""
        self.progress.advance(n)
        if self.progress.stopping:
            with suppress(OSError):  # `whats_left` tells what could not be saved
                if self.learner.step:
                    self._save_checkpoint()
            sys.exit(self.progress.stopping)

    def keep(self):
        """After a step or test: drop a dead network's tests, save a checkpoint if due."""
        if len(self.learner.notes) > len(self.record["notes"]):
            self.record |= {"notes": [*self.learner.notes], "rows": [], "losses": []}
            for file in itertools.chain.from_iterable(map(self.folder.glob, RESULTS)):
                file.unlink()
            self._write_record()
            tqdm.write(f"{self.name}: {self.learner.notes[-1]}")
        self.advance()
        late = time.perf_counter() - self.saved_at > max(EVERY, SAVING * self.saving)
        due = late or self.learner.step == self.tested_step
        if due and (self.extends or not self.is_complete()):
            self._save_checkpoint()

    def _save_checkpoint(self):
        """Save all that the coming steps and the results depend on."""
        import torch

        started = time.perf_counter()
        state = self.record | {"learner": self.learner.state_dict()}
        state |= {"losses": self.learner.losses, "seconds": started - self.started}
        with utils.atomic_file(self.folder / "checkpoint.pt") as file:
            try:
                torch.save(state, file)
            except RuntimeError:  # PyTorch's says "unexpected pos"
                raise OSError(None, "cannot be written; is the disk full?") from None
        self.saved_step, self.saved_at = self.learner.step, time.perf_counter()
        self.saving = self.saved_at - started

    def finish(self, failed=None):
        """Complete the record, with what failed; remove a checkpoint of no more use."""
        self.progress.close()
        if self.begun:
            self.record |= {"finished": not failed, "failed": failed}
            self._write_record()
        if not failed and not self.extends:
            (self.folder / "checkpoint.pt").unlink(missing_ok=True)
        if self.record["rows"]:
            print(self._restored_path())

    def whats_left(self):
        """Return a phrase on what an interruption leaves: where --resume goes on."""
        if self.saved_step:
            return f"--resume goes on from step {self.saved_step}"
        steps = self.learner.step if self.learner else 0
        return f"its {steps} steps are lost" if steps else "nothing is lost"

    def _restored_path(self):
        return self.folder / f"restored{self.source.picture.suffix}"

    def _write(self, name, data):
        utils.write_atomically(self.folder / name, data)

    def _write_record(self):
        steps = max(self.learner.recipe.iteration, self.tested_step)
        write_record(self.folder, self.record | {"iteration": steps})


def read_record(folder):
    """Return the record of a results folder; None if this program has written none."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        record = json.loads((folder / "record.json").read_text())
        ours = {"made_from", "iteration", "rows", "losses", "finished", "written"}
        return record if ours <= record.keys() else None


def write_record(folder, record):
    """Write the record of a results folder, with the time of writing."""
    data = json.dumps(record | {"written": time.time()}, indent=1)
    utils.write_atomically(folder / "record.json", data.encode())


def mark_failed(folder):
    """Note in an earlier record that its picture fails now: other processes see it."""
    earlier = read_record(folder)
    if earlier:
        data = json.dumps(earlier | {"failed_at": time.time()}, indent=1)
        utils.write_atomically(folder / "record.json", data.encode())


def read_checkpoint(path):
    """Return the contents of a checkpoint; raise InputError if the file is no checkpoint."""
    import torch

    with suppress(Exception):  # a damaged file fails in many ways
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if {"made_from", "rows", "losses", "notes", "learner"} <= saved.keys():
            return saved
    raise InputError(f"{path}: damaged, or of another version; delete it to start over")


def make_room(folder, made_from, steps):
    """Remove results that this run repeats, or rename the folder to keep others."""
    if not any(folder.glob("[!.]*")):  # at most what a killed run was writing
        return
    record = read_record(folder)
    if record and record["made_from"] == made_from and record["iteration"] <= steps:
        tqdm.write(f"{folder}: replacing the earlier results")
        for file in itertools.chain.from_iterable(map(folder.glob, OWN_FILES)):
            file.unlink()
        return
    numbered = (folder.with_name(f"{folder.name}~{n}") for n in itertools.count(1))
    free = next(path for path in numbered if not path.exists())
    folder.rename(free)
    tqdm.write(f"{folder}: kept as {free}")


# --- all images of a call ------------------------------------------------------------

SKEW = 60  # seconds between the starts of several processes, at most
SUMMARY = ("image", "size", "observation_psnr", "psnr", "ssim", "steps", "seconds")


class Run:
    """All images of one call of a script: their paths, log and exit status.

    A fault that shows before the first image, such as a file that cannot be written, exits
    with status 2. `defaults` are the script's, `psf` is the PSF's name, or None.
    """

    def __init__(self, args, defaults, psf=None):
        self.args, self.failed = args, []
        self.started, self.logged_at = time.time(), -math.inf
        self.records, self.stacks = {}, {}  # as last logged; path -> its planes
        try:
            self.settings, self.named = utils.named_settings(args, defaults, psf)
            self.log = Path(args.log_path)
            self.totals = self.log.parent / f"{self.log.stem}-summary.csv"
            self.files = utils.find_images(args.path)
            texts = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
            rank, self.world = (int(x) if x.isdecimal() else -1 for x in texts)
            if not 0 <= rank < self.world:
                raise InputError(f"RANK and WORLD_SIZE: {texts}; 0, 1 is one process")
            self.paths = self.files[rank :: self.world]  # this process's
            for file in self.files:
                if stack := utils.stack_of(file):
                    self.stacks.setdefault(stack, []).append(file)
            self._check()
        except (InputError, OSError) as error:
            utils.report(utils.reason(error))
            sys.exit(2)
        for stack, planes in self.stacks.items():
            ours = len({*planes} & {*self.paths})
            print(f"{stack}: {len(planes)} planes, {ours} of them to restore")

    def _check(self):
        """Raise InputError if a file would be written in another's place."""
        args, log = self.args, self.log
        if not log.name or log.suffix in (".csv", ".png"):
            raise InputError(f"--log_path {log}: a text file, such as log.txt")
        if len(self.files) > 1 and args.reference:
            raise InputError("--reference goes with one image, not with several")
        inputs = [utils.stack_of(file) or file for file in self.files]
        inputs += [args.reference, args.mask, getattr(args, "kernel", None)]
        inputs = {Path(file).resolve() for file in inputs if file}
        logs = [log, log.with_suffix(".csv"), log.with_suffix(".png"), self.totals]
        for path in logs:
            if path.is_dir() or path.resolve() in inputs:
                raise InputError(f"--log_path: {path} is a folder or an input")
        there = [path for path in logs if path.exists()]
        if there and not (log.exists() and log.read_bytes().startswith(b"path: ")):
            raise InputError(f"--log_path: {there[0]} is no log of ours; name another")
        for folder in (log.parent, *map(self._folder, self.files)):
            there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
            if there.resolve() in inputs:
                raise InputError(f"{there}: its results would lie within; move it")
            if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
                raise InputError(f"{there}: make it a folder that can be written to")

    def _folder(self, path):
        names = utils.result_names(path)
        return Path("images", *names, self.args.model_type, self.named)

    @contextmanager
    def image(self, path):
        """Yield the Result of one image; report an error, so the caller's loop goes on."""
        result = Result(path, self._folder(path), self.args, self.settings, self._log)
        try:
            with signals_handled(result.progress.stop):
                yield result
        except (KeyboardInterrupt, SystemExit) as stop:
            utils.report(f"{result.name}: interrupted; {result.whats_left()}")
            with suppress(OSError):
                self.write_logs()
            sys.exit(stop.code if isinstance(stop, SystemExit) else 130)
        except Exception as error:
            size = result.source.size if result.source else "its size"
            message = utils.reason(error, path, size)
            if message is None:
                raise
            if result.tested_step > 0:
                message += f"; the result of step {result.tested_step} is kept"
            utils.report(message)
            self.failed.append(str(path))
            with suppress(OSError):  # which may be what failed
                result.finish(failed=message)
                if self.world > 1 and not result.begun:
                    mark_failed(result.folder)

    def finish(self):
        """Write and print the totals; return the exit status.

        It is 0 or, if images failed, 1, or 2 if no training had begun. It is 0 for each
        of several processes: torchrun would end the others if one had failed.
        """
        if self.failed and len(self.files) > 1:
            count = f"{len(self.failed)} of {len(self.files)} images failed"
            utils.report(f"{count}: {', '.join(self.failed)}")
        try:
            table = self.write_logs()
            # Others may have finished meanwhile. In text a NaN equals itself.
            while self.world > 1 and str(self._read_records()) != str(self.records):
                table = self.write_logs()
            for name, *cells in table:
                texts = (f"{x:.3f}" if type(x) is float else x or "-" for x in cells)
                print(f"{name:32s}", *(f"{text:>16}" for text in texts))
            for stack, planes in self.stacks.items():
                self._join(stack, planes)
        except (InputError, OSError) as error:
            utils.report(utils.reason(error))
            return 1
        if self.world > 1 or not self.failed:
            return 0
        return 1 if self.records else 2

    def _read_records(self):
        """Return the records of this call's images so far, path -> record.

        Records of an earlier call count only if this call resumes it and the image has not
        failed now. Other processes may have started up to SKEW before this one.
        """
        found, ours, failed = {}, set(self.paths), set(self.failed)
        for file in self.files:
            record = read_record(self._folder(file))
            since = self.started - (0 if file in ours else SKEW)
            # A joined stack's record has no columns; another version has others.
            if record and record.get("columns") == [*COLUMNS]:
                resumed = self.args.resume and str(file) not in failed
                marked = record.get("failed_at", 0) >= since
                if not marked and (resumed or record["written"] >= since):
                    found[file] = record
        return found

    def _log(self):
        """Write the logs after a test, unless they were written just now: it may take long."""
        if time.perf_counter() - self.logged_at > EVERY:
            self.write_logs()
            self.logged_at = time.perf_counter()

    def write_logs(self):
        """Write the log, its CSV, the curves and the summary; return the summary's rows.

        Every process writes the logs of all processes' records.
        """
        hidden = ("resume", "given", "schedule")
        lines = [f"{k}: {v}" for k, v in vars(self.args).items() if k not in hidden]
        rows, table, self.records = [("image", *COLUMNS)], [], self._read_records()
        records = self.records.values()
        for record in records:
            lines += ["", record["heading"], *record["notes"]]
            lines += map(row_text, record["rows"])
            lines += [f"failed: {record['failed']}"] if record["failed"] else []
            rows += [(record["name"], *row) for row in record["rows"]]
            if record["finished"]:
                step, _, psnr, ssim, *_, seconds = record["rows"][-1]
                before = (record["observation"] or [None])[0]
                cells = record["size"], before, psnr, ssim, step, round(seconds, 1)
                table.append((record["name"], *cells))
        if not records:
            return []
        utils.write_atomically(self.log, "\n".join([*lines, ""]).encode())
        utils.write_atomically(self.log.with_suffix(".csv"), utils.csv_text(rows))
        utils.write_atomically(self.log.with_suffix(".png"), curves(records))
        if not table:
            return []
        scored = [row[2:5] for row in table if row[3] is not None]
        means = np.mean(scored, 0).tolist() if scored else [None] * 3
        table = [SUMMARY, *table, ("average", f"of {len(table)}", *means, None, None)]
        utils.write_atomically(self.totals, utils.csv_text(table))
        return table

    def _join(self, stack, planes):
        """Join the restored planes of a stack if all of them are finished."""
        found = self._read_records()
        records = [found[file] for file in planes if file in found]
        if len(records) < len(planes) or not all(r["finished"] for r in records):
            return
        folder, name = self._folder(stack), f"restored{stack.suffix.lower()}"
        record = {"made_from": [record["made_from"] for record in records]}
        record["iteration"] = max(record["iteration"] for record in records)
        earlier = read_record(folder) or {}
        if earlier | record != earlier:
            make_room(folder, record["made_from"], record["iteration"])
        restored = [self._folder(file) / name for file in planes]
        pictures.join_planes(folder / name, stack, restored)
        write_record(folder, record | {"rows": [], "losses": [], "finished": True})
        print(folder / name)
