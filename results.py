"""What a run leaves: drawings, the files of one picture, the log of all pictures."""

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
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

import numpy as np
from tqdm import tqdm

from pictures import (
    MOST_ROUNDING,
    SMALLEST_SIDE,
    Moved,
    black_and_white,
    describe,
    join_planes,
    read_mask,
    read_picture,
    score,
    score_moved,
)
from utils import (
    SUFFIXES,
    InputError,
    atomic_file,
    csv_text,
    digest,
    find_images,
    named_settings,
    reason,
    report,
    result_names,
    save_mat,
    stack_of,
    write_atomically,
)

warnings.filterwarnings("ignore", "Glyph .* missing")

# --- drawing -------------------------------------------------------------------------

PANEL = 1024  # pixels a side in comparison.png, at most
TALL = 4  # a picture's height over its width, at most
TAIL = 0.001  # share of the pixels beyond its black, and its white, if not of 8 bits
BARE = {"xticks": [], "yticks": [], "frame_on": False}  # axes with an image alone
COLUMNS = ("step", "loss", "psnr", "ssim", "ensemble_psnr")
COLUMNS += ("moved_psnr", "down", "right", "seconds")  # see score_moved


def row_text(row):
    """Write a test as a line of the log."""
    step, loss, psnr, ssim, ensemble, *moved, _ = row
    line = f"step {step:7d}  loss {loss:.6f}"
    if psnr is not None:
        line += f"  PSNR {psnr:.3f} dB  SSIM {ssim:.4f}"
    if ensemble != psnr:
        line += f"  plain ensemble {ensemble:.3f} dB"
    if moved[0] is not None:
        line += f"  ({Moved(*moved)})"
    return line


def new_figure(size, dpi):
    """Return a Matplotlib figure of so many inches."""
    from matplotlib.figure import Figure  # late, as PyTorch is

    return Figure(figsize=size, dpi=dpi)


def drawn(figure):
    """Return a figure as a PNG file's bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def comparison(panels, ends):
    """Draw labelled images side by side; return the PNG's bytes.

    Args:
        panels: (label, image (C, H, W), its score as text or None) each.
        ends: the values that are black and white.
    """
    _, height, width = panels[0][1].shape
    every = math.ceil(max(height, width) / PANEL)
    size = len(panels) * 4, 4 * min(height / width, TALL) + 0.4
    figure = new_figure(size, max(320, width // every) / 4)
    edges = {"left": 0, "right": 1, "bottom": 0, "top": 1 - 0.4 / size[1]}
    row = figure.subplots(
        1, len(panels), gridspec_kw=edges | {"wspace": 0.02}, subplot_kw=BARE
    )
    for axes, (label, image, scored) in zip(row, panels):
        pixels = (image[:, ::every, ::every] - ends[0]) / max(ends[1] - ends[0], 1e-30)
        pixels = pixels.clip(0, 1).transpose(1, 2, 0)
        axes.imshow(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))
        title = f"{label} {scored}" if scored else label
        axes.set_title(title, fontsize="large" if len(title) < 40 else "small")
    return drawn(figure)


def uncertainty(deviation):
    """Draw the predictions' standard deviation (H, W), in a file's numbers, as a PNG."""
    height, width = deviation.shape
    every = math.ceil(max(height, width) / PANEL)
    figure = new_figure((6, max(5 * min(height / width, TALL), 4)), 160)
    edges = {"left": 0.02, "right": 0.88, "bottom": 0.03, "top": 0.97}
    axes, scale = figure.subplots(
        1, 2, width_ratios=(30, 1), gridspec_kw=edges | {"wspace": 0.05}
    )
    axes.set(**BARE)
    shown = axes.imshow(deviation[::every, ::every], cmap="magma", vmin=0)
    label = "standard deviation of the predictions, in the file's numbers"
    figure.colorbar(shown, scale, label=label)
    return drawn(figure)


def psf_shown(psf):
    """Draw a PSF (h, w), enlarged, with a scale in pixels; return the PNG's bytes."""
    figure = new_figure((4, 4), 120)
    edges = {"left": 0.12, "right": 0.97, "bottom": 0.12, "top": 0.97}
    axes = figure.subplots(gridspec_kw=edges)
    (top, left), (h, w) = (n // 2 for n in psf.shape), psf.shape
    sides = (-left - 0.5, w - left - 0.5, h - top - 0.5, -top - 0.5)
    axes.imshow(psf, cmap="gray", vmin=0, extent=sides, interpolation="nearest")
    axes.set(xlabel="pixels")
    return drawn(figure)


def curves(records):
    """Draw loss and PSNR over the steps, a line per image; return the PNG's bytes."""
    figure = new_figure((9, 4), 120)
    axes = figure.subplots(1, 2, gridspec_kw={"left": 0.09, "right": 0.98})
    for record in records:
        # Of "$" Matplotlib makes formulas; "_" it leaves out at the beginning.
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


# --- one image -----------------------------------------------------------------------

RESULTS = ["error.mat", "Self2Self-[0-9]*.png", "comparison.png", "uncertainty.png"]
RESULTS += [f"restored{suffix}" for suffix in SUFFIXES]
OWN_FILES = ["noisy.png", "noise.mat", "blurred.png", "kernel.mat", "kernel.png"]
OWN_FILES += ["checkpoint.pt", *RESULTS]
CHECKPOINT_FORMAT = 8
# Seconds between two checkpoints; where saving is slow, so many times what the last one took.
SAVE_EVERY, SAVING = 60, 20
SPEAK_EVERY = 60  # seconds between two lines on stderr where it is no terminal


class Result:
    """One image: its picture, its scores, and the files in its results folder.

    Args:
        path: the image file.
        args: the options' values.
        settings, settings_name: see named_settings.
        write_logs: called after every test.
    """

    def __init__(self, path, args, settings, settings_name, write_logs):
        self.path, self.args, self.settings = path, args, settings
        self.name, self.size = "/".join(result_names(path)), "its size"
        self.write_logs = write_logs
        self.folder = results_folder(path, args.model_type, settings_name)
        self.rows, self.losses, self.notes = [], [], []
        self.gaps = self.as_read = None
        self.may_be_moved = False  # by its PSF: it is scored at the best shift, too
        self.seconds, self.begun, self.bar = 0.0, False, None
        self.state = self.saved_step = None  # to go on from; the last checkpoint's step
        self.learner = self.stopping = (
            None  # that trains; exit status that is asked for
        )
        # A training whose schedule has come to its end cannot be made longer.
        self.extends = args.schedule == "constant"

    def read(self, margin=((0, 0), (0, 0))):
        """Read the picture.

        Its pixels, or those of --reference, are what results are scored against; an
        --observed image without a reference is not scored.

        Args:
            margin: pixels above, below; left, right, of which nothing is observed but
                through a blur. An --observed picture gets them in addition, another one
                loses them: scores and files are of what they enclose.

        Returns:
            The pixels with their margin, (C, H, W), 1 standing for the file's peak, and 1
            where they are known, 0 where they are missing: (C, H, W) or (1, H, W), float32.
        """
        picture = read_picture(self.path, self.args.crop)
        image, known = picture.image, self._known(picture)
        if self.args.observed:
            image, known = (np.pad(x, [(0, 0), *margin]) for x in (image, known))
        sides = zip(margin, image.shape[1:])
        self.place = (slice(None), *(slice(a, n - b) for (a, b), n in sides))
        self.picture = picture if self.args.observed else picture.part(self.place)
        self.eight_bits = picture.dtype == np.uint8 and picture.peak == 255
        height, width = self.picture.image.shape[1:]
        if min(height, width) < SMALLEST_SIDE:
            raise InputError(
                f"{self.path}: the PSF leaves {width}x{height} pixels; a side needs "
                f"{SMALLEST_SIDE} or more"
            )
        self.size = describe(*self.picture.image.shape)
        self.clean = None if self.args.observed else self.picture.image
        if self.args.reference:
            reference = read_picture(self.args.reference, self.args.crop)
            fits = len(reference.image) <= len(picture.image)
            self._refuse_misfit(self.args.reference, reference, picture, fits)
            self.clean = np.broadcast_to(reference.image, picture.image.shape)
            if reference.absent is not None:
                self.clean = np.where(reference.absent, np.nan, self.clean)
        if not self.args.observed and not np.isfinite(image).all():
            raise InputError(
                f"{self.path}: it holds NaN or infinite pixels; with --observed they "
                "are unknown"
            )
        inner = np.zeros((1, *image.shape[1:]), np.float32)
        inner[self.place] = 1
        self.known = known * inner
        if self.args.observed and picture.absent is not None:
            absent = np.zeros(image.shape, bool)
            absent[self.place] = picture.absent
            image = np.where(absent, np.nan, image)
        self._refuse_nothing()
        return image, self.known

    def _refuse_nothing(self):
        if not self.known.any():
            raise InputError(f"{self.path}: every pixel is missing")

    def leave_out(self, gaps, outliers):
        """Take entries for unknown; say how many, and why.

        Args:
            gaps, outliers: (C, H, W), bool, with a margin: see network.unknown. Gaps come
                back as they were, outliers as they are predicted.

        Returns:
            What is known then: see `read`.
        """
        known = np.where(gaps | outliers, np.float32(0), self.known)
        if (known == known[:1]).all():
            known = known[:1]
        gaps, outliers = ((x & (self.known > 0))[self.place] for x in (gaps, outliers))
        self.known = known
        self._refuse_nothing()
        if not (gaps.any() or outliers.any()):
            return known
        self.gaps, self.as_read = gaps, self.picture.image
        self.picture = self.picture._replace(
            image=np.where(gaps | outliers, np.nan, self.picture.image)
        )
        if self.clean is not None:
            self.clean = np.where(gaps, np.nan, self.clean)
            self.clean = self.clean if np.isfinite(self.clean).any() else None
        why = ("not measured (they come back as they are)", gaps.sum())
        why = why, ("far off all their neighbours (they are predicted)", outliers.sum())
        why = ", ".join(f"{n} {reason}" for reason, n in why if n)
        tqdm.write(f"{self.name}: {why}: unknown, of {gaps.size} entries")
        return known

    def _known(self, picture):
        """Return what --mask or --missing say is known of a picture: see `read`."""
        known = np.ones((1, *picture.image.shape[1:]), np.float32)
        if self.args.missing:  # other draws than the noise's
            draws = np.random.default_rng((self.args.seed, 1)).random(known.shape)
            known = (draws >= self.args.missing).astype(np.float32)
        if self.args.mask:
            mask, known = read_mask(self.args.mask, self.args.crop)
            fits = len(known) in {1, len(picture.image)}
            self._refuse_misfit(self.args.mask, mask, picture, fits)
        return known

    def _refuse_misfit(self, path, other, picture, fits):
        """Raise InputError where another picture is not of this one's size and kind."""
        sizes = {x.uncropped.split()[0] for x in (other, picture)}
        if len(sizes) > 1 or not fits:
            raise InputError(
                f"{path}: {other.uncropped}, but {self.path} is {picture.uncropped}"
            )

    def begin(self, learner, observation, noise, psf=None, **simulated):
        """Make the folder ready, and write the observation and what it was made of.

        Earlier results of the same picture and settings are replaced, others set aside.
        With --resume a checkpoint is read, and checked, before anything is touched.

        Args:
            learner: the network.Self2Self of the observation.
            observation: y, (C, H, W), not clipped, with its margin.
            noise: what noise it has, a network.noise.Noise.
            psf: the PSF (h, w), or None.
            simulated: n, the noise, and blurred, of y's shape, that an --observed image has not.
        """
        if learner.recipe.fuse and learner.recipe.noise is None and psf is None:
            raise InputError(
                f"{self.path}: its noise is {noise.describe()}: to fuse, --noise_sigma "
                "says how strong it is"
            )
        if (learner.recipe.noise or 0) > 100 * 255:
            raise InputError(f"{self.path}: noise over 100 times the picture's range")
        observation = np.ascontiguousarray(observation[self.place])
        if self.as_read is not None:
            left_out = np.isnan(self.picture.image)
            observation = np.where(left_out, self.as_read, observation)
        self.observation = observation
        # Without noise and blur what is known is the result.
        self.noiseless = noise.kind == "none" and psf is None
        self.iteration, self.loss_every = learner.recipe.iteration, learner.LOSS_EVERY
        self.scores = None if self.clean is None else score(observation, self.clean)
        self._describe(learner, noise)
        recipe = asdict(learner.recipe) | {"kind of noise": noise.kind}
        for field in ("scale", "noise"):  # which the observation decides
            del recipe[field]
        if self.extends:
            del recipe["iteration"]
        arrays = {"image or noise": [observation]}
        arrays["reference"] = None if self.clean is None else [self.clean]
        sums = {key: digest(array) for key, array in arrays.items()}
        self.made_from = self.settings | recipe | sums
        self.made_from["device"] = self.args.device.type
        if not self.args.resume or not self._take_up():
            make_room(self.folder, self.made_from, self.iteration)
        self.begun = True
        self._write_record()
        self.picture.save(self.folder / "noisy.png", observation)
        if psf is not None:
            save_mat(self.folder / "kernel.mat", "kernel", psf)
            write_atomically(self.folder / "kernel.png", psf_shown(psf))
        if not self.args.observed:
            save_mat(self.folder / "noise.mat", "noise", simulated["n"][self.place])
        if not self.args.observed and "blurred" in simulated:
            blurred = simulated["blurred"][self.place]
            self.picture.save(self.folder / "blurred.png", blurred)

    def _describe(self, learner, noise):
        """Say what the picture is: `heading`, a line for the log, and what to know of it."""
        peak, shown = self.picture.peak, black_and_white(self.picture.image)
        self.heading = f"{self.name}: {self.size}"
        if self.scores:
            self.heading += f", observation {self.scores[0]:.3f} dB"
            low, high = black_and_white(self.clean)
            if (low, high) != (0, 1):
                self.heading += (
                    f" (peak: the reference's range, {peak * (high - low):.4g})"
                )
        self.noise = noise.describe(peak)
        self.heading += f", noise: {self.noise}"
        if noise.lines and not self.eight_bits:
            self.heading += " (in the file's numbers"
            if self.args.observed and noise.kind == "white":
                self.heading += f", --noise_sigma {float(f'{noise.sigma():.3g}'):g}"
            self.heading += ")"
        missing = 1 - self.known[self.place].mean(dtype=np.float64)
        if missing:
            self.heading += f", {missing:.2%} missing"
        elif self.noiseless:
            self.heading += ": it comes back as it is"
        tqdm.write(self.heading)
        if shown != (0, 1):
            low, high = (peak * end for end in shown)
            tqdm.write(f"{self.name}: PNGs show {low:.4g} black and {high:.4g} white")
        wanted = self.args.num_prediction
        made = learner.ensemble_size(wanted)
        if made < wanted and "num_prediction" in self.args.given:
            tqdm.write(f"{self.name}: --num_prediction {wanted}: {made} for its size")

    def _take_up(self):
        """Take up the tests of a checkpoint or, where a run is complete, of its record.

        Returns:
            Whether there is one of them.

        Raises:
            InputError: it cannot be gone on from; the text says why.
        """
        path = self.folder / "checkpoint.pt"
        if path.exists():
            saved = read_checkpoint(path)
            self.state, self.seconds = saved["learner"], saved["seconds"]
        else:
            path, saved = self.folder / "record.json", read_record(self.folder)
            complete = saved and self._reaches_end(saved["rows"])
            if not complete or not self._restored_path().exists():
                return False
        was, now = saved["made_from"], self.made_from
        changed = [k for k in was.keys() | now.keys() if was.get(k) != now.get(k)]
        if changed:
            what = f"it is of another {', another '.join(sorted(changed))}"
            what = "the program has changed since" if "program" in changed else what
            raise InputError(f"{path}: {what}; without --resume the run starts over")
        self.rows = [*map(tuple, saved["rows"])]
        self.losses, self.notes = saved["losses"], saved["notes"]
        step = self.state["step"] if self.state else self.rows[-1][0]
        if step > self.iteration and (not self.rows or step != self.rows[-1][0]):
            raise InputError(
                f"{self.name}: the checkpoint is of step {step} already, between "
                "two tests; a larger --iteration goes on from it"
            )
        return True

    def _reaches_end(self, rows):
        return bool(rows) and rows[-1][0] >= self.iteration

    def is_complete(self):
        """Tell whether the last step's test has been taken into the record."""
        return self._reaches_end(self.rows)

    def resume(self, learner):
        """With --resume, let the learner go on from the checkpoint, where there is one."""
        step = self.rows[-1][0] if self.rows else 0
        if self.state:
            learner.load_state_dict(self.state)
            self.state, step = None, learner.step
            self.saved_step = step
        if step:
            at = "finished already, at" if self.is_complete() else "going on from"
            tqdm.write(f"{self.name}: {at} step {step}")
        self.learner = learner
        self.saved_at = self.spoken_at = time.perf_counter()
        self.started, self.saving = self.saved_at - self.seconds, 0.0
        tests = self.iteration // self.args.test_frequency
        tests += self.iteration % self.args.test_frequency > 0
        test = learner.ensemble_size(self.args.num_prediction) + 1  # its files
        total, done = self.iteration + tests * test, step + len(self.rows) * test
        self.bar = tqdm(
            total=total, initial=done, desc=self.name, disable=None, leave=False
        )

    def awaits_test(self, learner):
        """Tell whether the ensemble is to be predicted now, before another step."""
        step, every = learner.step, self.args.test_frequency
        due = step > 0 and (step % every == 0 or step == self.iteration)
        return due and not self._tested(step) and learner.alive()

    def _tested(self, step):
        return bool(self.rows) and self.rows[-1][0] == step

    def add(self, learner, restored, image, error):
        """Take a test into the record, and write its pictures.

        Args:
            learner: the network.Self2Self, which has just predicted.
            restored: the ensemble's Restoration, with its margin.
            image, error: what the learner's `fuse` made of it.

        Raises:
            FloatingPointError: the restoration is not finite; nothing is written.
        """
        images = [x[self.place] for x in (restored.image, image)]
        if not all(np.isfinite(image).all() for image in images):
            raise FloatingPointError("the output is not finite; lower --lr")
        if self.noiseless:
            known = self.known[self.place]
            images = [np.where(known, self.observation, x) for x in images]
        if self.gaps is not None:
            images = [np.where(self.gaps, self.as_read, x) for x in images]
        peak, step = self.picture.peak, learner.step
        result, scores, plain, moved = images[-1], None, None, None
        if self.clean is not None:
            scores = score(result, self.clean)
            plain = scores[0] if error is None else score(images[0], self.clean)[0]
            moved = score_moved(result, self.clean) if self.may_be_moved else None
        seconds = time.perf_counter() - self.started
        row = step, learner.mean_loss(), *(scores or (None, None)), plain
        self.rows.append((*row, *(moved or (None, None, None)), seconds))
        self.losses = learner.read_losses().copy()
        if error is not None:
            save_mat(self.folder / "error.mat", "error", peak**2 * error[self.place])
        for name in (f"Self2Self-{step}.png", f"restored{self.picture.suffix}"):
            self.picture.save(self.folder / name, result)
        rounding = self.picture.rounding(result)
        if rounding > MOST_ROUNDING and step == self.iteration:
            tqdm.write(
                f"{self.name}: rounding to whole numbers changes its mean by "
                f"{rounding:.0%}; save the picture as float, in a TIFF"
            )
        deviation = peak * np.sqrt(restored.variance[self.place].mean(0))
        write_atomically(self.folder / "uncertainty.png", uncertainty(deviation))
        shown = [x and f"{x[0]:.2f} dB" for x in (self.scores, scores)]
        shown[1] = f"{shown[1]}, {moved}" if moved else shown[1]
        panels = [("observation", self.observation, shown[0])]
        panels += [("restored", result, shown[1])]
        panels += [] if self.clean is None else [("clean", self.clean, None)]
        # of a dark picture of 16 bits nothing would be seen
        ends = (0, 1) if self.eight_bits else np.nanquantile(result, (TAIL, 1 - TAIL))
        write_atomically(self.folder / "comparison.png", comparison(panels, ends))
        self._write_record()
        self.write_logs()
        tqdm.write(f"{self.name}: {row_text(self.rows[-1])}")

    def advance(self, n=1):
        """Show the progress: steps and predictions, on one bar, or now and then in a line.

        Where a signal has come, save a checkpoint, and exit.
        """
        self.bar.update(n)
        now = time.perf_counter()
        if self.bar.disable:  # stderr is no terminal, and would be filled
            self.bar.n += n
            if now - self.spoken_at > SPEAK_EVERY:
                self.spoken_at, share = now, self.bar.n / self.bar.total
                print(f"{self.name}: {share:.0%} done", file=sys.stderr)
        if self.stopping:
            try:
                if self.learner.step:
                    self._save_checkpoint(self.learner)
            except OSError as error:
                report(reason(error))
            sys.exit(self.stopping)

    def stop(self, number, _frame):
        """Handle a signal: exit, or let the step at hand end first, so that it can be saved.

        A second one does not wait.
        """
        if self.learner is None or self.stopping:
            sys.exit(128 + number)
        self.stopping = 128 + number

    def whats_left(self):
        """Say, of a run that was interrupted, where --resume goes on."""
        if self.saved_step:
            return f"--resume goes on from step {self.saved_step}"
        steps = self.learner.step if self.learner else 0
        return f"its {steps} steps are lost" if steps else "nothing is lost"

    def keep(self, learner):
        """Take a step or a test into account: progress, a network's new start, a checkpoint."""
        if len(learner.notes) > len(self.notes):  # the tests of a dead network go
            self.notes = learner.notes.copy()
            self.rows.clear()
            self.losses.clear()
            for pattern in RESULTS:
                for file in self.folder.glob(pattern):
                    file.unlink()
            self._write_record()
            tqdm.write(f"{self.name}: {self.notes[-1]}")
        self.advance()
        late = time.perf_counter() - self.saved_at
        due = self._tested(learner.step) or late > max(SAVE_EVERY, SAVING * self.saving)
        if due and (self.extends or not self.is_complete()):
            self._save_checkpoint(learner)

    def _save_checkpoint(self, learner):
        """Save all that the coming steps and the results depend on."""
        import torch

        started = time.perf_counter()
        state = {"format": CHECKPOINT_FORMAT, "made_from": self.made_from}
        state |= {"rows": self.rows, "seconds": started - self.started}
        state |= {"learner": learner.state_dict(), "notes": self.notes}
        state["losses"] = learner.losses
        with atomic_file(self.folder / "checkpoint.pt") as file:
            try:
                torch.save(state, file)
            except RuntimeError:  # PyTorch's, which says "unexpected pos"
                raise OSError(None, "cannot be written; is the disk full?") from None
        self.saved_at, self.saved_step = time.perf_counter(), learner.step
        self.saving = self.saved_at - started

    def finish(self, failed=None):
        """Mark the record: there is no more to come. Remove a checkpoint of no more use.

        Args:
            failed: why there is not, where something went wrong.
        """
        self.learner = None
        if self.bar is not None:
            self.bar.close()
        if self.begun:
            self._write_record(finished=not failed, failed=failed)
        if not failed and not self.extends:
            (self.folder / "checkpoint.pt").unlink(missing_ok=True)
        if self.rows:
            print(self._restored_path())

    def _restored_path(self):
        return self.folder / f"restored{self.picture.suffix}"

    def _write_record(self, finished=False, failed=None):
        """Write what is known of this image as JSON."""
        record = {"name": self.name, "size": self.size, "finished": finished}
        record["failed"] = failed
        record |= {
            "heading": self.heading,
            "noise": self.noise,
            "notes": self.notes,
            "written": time.time(),
        }
        reached = max([self.iteration, *(row[0] for row in self.rows)])
        record |= {"made_from": self.made_from, "iteration": reached}
        record |= {"observation": self.scores, "columns": COLUMNS, "rows": self.rows}
        record |= {"loss_every": self.loss_every, "losses": self.losses}
        data = json.dumps(record, indent=1).encode()
        write_atomically(self.folder / "record.json", data)


def results_folder(path, model_type, settings_name):
    """Say where the results of an image go."""
    return Path("images", *result_names(path), model_type, settings_name)


def read_record(folder):
    """Return the record of a results folder; None where there is none of ours."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        record = json.loads((folder / "record.json").read_text())
        ours = {"made_from", "iteration", "rows", "losses", "finished", "written"}
        return record if ours <= record.keys() else None


def read_checkpoint(path):
    """Return what a checkpoint holds, on the CPU.

    Raises:
        InputError: the file is none; the text says why.
    """
    import torch

    with suppress(Exception):  # a damaged file fails in many ways
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if saved["format"] == CHECKPOINT_FORMAT:
            return saved
    raise InputError(
        f"{path}: damaged, or no checkpoint of this version of the program; without it "
        "the run starts over"
    )


def make_room(folder, made_from, steps):
    """Remove a folder's results of the same pixels and settings, set others aside.

    Others are those of more steps, too.
    """
    if not any(folder.glob("[!.]*")):  # nothing but what a killed run was writing
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


def mark_failed(folder):
    """Note in an earlier record that its picture fails now, for other processes to see."""
    record = read_record(folder)
    if record:
        record["failed_at"] = time.time()
        write_atomically(folder / "record.json", json.dumps(record, indent=1).encode())


@contextmanager
def signals_handled(handler):
    """Let a function handle Ctrl-C and the wish to end; not outside the main thread."""
    main = threading.current_thread() is threading.main_thread()
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM) if main}
    # Behind a "&" a shell has Ctrl-C ignored.
    before = {n: f for n, f in before.items() if f not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)


# --- all images of a call ------------------------------------------------------------

SKEW = 60  # seconds between the starts of several processes, at most
LOGGING = 20  # logs are written no sooner than so many times what the last time took
SUMMARY = ("image", "size", "observation_psnr", "psnr", "ssim", "steps", "seconds")


class Run:
    """All images of one call of a script: which they are, their log, the exit status.

    What cannot be read or written, as far as it can be known now, exits with status 2.

    Args:
        args: the options' values.
        defaults: the script's.
        psf: the PSF's name, or None.
    """

    def __init__(self, args, defaults, psf=None):
        self.args, self.failed, self.begun = args, [], False
        self.started = time.time()
        self.logged, self.drawn = {}, []  # records; their tests
        self.logged_at, self.logging = -math.inf, 0.0  # when, and how long it took
        self.behind = False  # whether a test is not in the logs yet
        try:
            self.settings = named_settings(args, defaults, psf)
            self.log = Path(args.log_path)
            self.files = find_images(args.path)
            self._share_out()
            self._check()
        except (InputError, OSError) as error:
            report(reason(error))
            sys.exit(2)

    def _share_out(self):
        """Say which of the images are this process's: `paths`."""
        texts = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
        self.rank, self.world = (int(x) if x.isdecimal() else -1 for x in texts)
        if not 0 <= self.rank < self.world:
            raise InputError(f"RANK and WORLD_SIZE: {texts}; 0, 1 is one process")
        self.paths = self.files[self.rank :: self.world]
        ours = Counter(filter(None, map(stack_of, self.paths)))
        for stack, n in Counter(filter(None, map(stack_of, self.files))).items():
            print(f"{stack}: {n} planes, {ours[stack]} of them to restore")

    def _check(self):
        """Raise InputError where a file would be written in another's place."""
        args, log = self.args, self.log
        if not log.name or log.suffix in (".csv", ".png"):
            raise InputError(f"--log_path {log}: a text file, such as log.txt")
        if len(self.files) > 1 and args.reference:
            raise InputError("--reference goes with one image, not with several")
        inputs = [stack_of(file) or file for file in self.files]
        inputs += [args.reference, args.mask, getattr(args, "kernel", None)]
        inputs = {Path(file).resolve() for file in inputs if file}
        logs = [log, log.with_suffix(".csv"), log.with_suffix(".png"), self._totals()]
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

    def _totals(self):
        return self.log.with_name(f"{self.log.stem}-summary.csv")

    def _folder(self, path):
        return results_folder(path, self.args.model_type, self.settings[1])

    @contextmanager
    def image(self, path):
        """Give the Result of one image; report what goes wrong, so that the next goes on."""
        result = Result(path, self.args, *self.settings, self._log_a_test)
        try:
            with signals_handled(result.stop):
                yield result
        except (KeyboardInterrupt, SystemExit) as stop:
            report(f"{result.name}: interrupted; {result.whats_left()}")
            with suppress(OSError):
                if self.behind:
                    self.write_logs()
            sys.exit(stop.code if isinstance(stop, SystemExit) else 130)
        except Exception as error:
            message = reason(error, result.path, result.size)
            if message is None:
                raise
            if result.rows:
                message += f"; the result of step {result.rows[-1][0]} is kept"
            report(message)
            self.failed.append(str(path))
            with suppress(OSError):  # which may be what failed
                result.finish(failed=message)
                if self.world > 1 and not result.begun:
                    mark_failed(result.folder)
        finally:
            self.begun |= result.begun

    def finish(self):
        """Write and print the totals; return the exit status.

        That is 0, or where images failed 1, 2 if no training had begun. Of several
        processes each ends with 0: torchrun would end the others when one has failed.
        """
        if self.failed and len(self.files) > 1:
            names = ", ".join(self.failed)
            report(f"{len(self.failed)} of {len(self.files)} images failed: {names}")
        try:
            table = self.write_logs()
            # Others may have finished meanwhile. In text a NaN equals itself.
            while self.world > 1 and str(self._records()) != str(self.logged):
                table = self.write_logs()
            for row in table:
                cells = (
                    f"{c:.3f}" if isinstance(c, float) else c or "-" for c in row[1:]
                )
                print(f"{row[0]:32s}", *(f"{cell:>16}" for cell in cells))
            self._join_stacks()
        except (InputError, OSError) as error:
            report(reason(error))
            return 1
        if self.world > 1:
            return 0
        return (1 if self.begun else 2) if self.failed else 0

    def _records(self):
        """Return the records of this call's images so far, path -> record.

        An earlier call's do not count, unless it is resumed and has not failed now. Other
        processes may have begun up to SKEW before this one.
        """
        found, ours, failed = {}, set(self.paths), set(self.failed)
        for file in self.files:
            record = read_record(self._folder(file))
            # No joined stack's, nor another version's.
            if not record or record.get("columns") != [*COLUMNS]:
                continue
            since = self.started - (0 if file in ours else SKEW)
            marked = record.get("failed_at", 0) >= since  # by another process
            resumed = self.args.resume and str(file) not in failed
            if not marked and (resumed or record["written"] >= since):
                found[file] = record
        return found

    def _log_a_test(self):
        """Write the logs, but for where that would take much of the time: of many images."""
        started = time.perf_counter()
        self.behind = started - self.logged_at < LOGGING * self.logging
        if not self.behind:
            self.write_logs()
            self.logged_at = time.perf_counter()
            self.logging = self.logged_at - started

    def write_logs(self):
        """Write the log, its CSV, the curves and the summary, of all records there are.

        Every process writes them alike. Returns the summary's rows.
        """
        values = vars(self.args).items()
        lines = [
            f"{k}: {v}" for k, v in values if k not in ("resume", "given", "schedule")
        ]
        rows, table, self.logged = [("image", *COLUMNS)], [], self._records()
        records = self.logged.values()
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
        write_atomically(self.log, "\n".join([*lines, ""]).encode())
        write_atomically(self.log.with_suffix(".csv"), csv_text(rows))
        if rows != self.drawn:  # drawing takes longer than all else here
            write_atomically(self.log.with_suffix(".png"), curves(records))
            self.drawn = rows
        if not table:
            return []
        scored = [row[2:5] for row in table if row[3] is not None]
        means = np.mean(scored, 0).tolist() if scored else [None] * 3
        table = [SUMMARY, *table, ("average", f"of {len(table)}", *means, None, None)]
        write_atomically(self._totals(), csv_text(table))
        return table

    def _join_stacks(self):
        """Join the restored planes of every stack all of whose planes are finished."""
        finished = {path: r for path, r in self._records().items() if r["finished"]}
        stacks = {}
        for file in self.files:
            stacks.setdefault(stack_of(file), []).append(file)
        stacks.pop(None, None)
        for stack, own in stacks.items():
            if all(file in finished for file in own):
                folder, name = self._folder(stack), f"restored{stack.suffix.lower()}"
                record = {"made_from": [finished[file]["made_from"] for file in own]}
                record |= {"iteration": max(finished[f]["iteration"] for f in own)}
                record |= {"rows": [], "losses": [], "finished": True}
                record["written"] = time.time()
                earlier = read_record(folder) or {}
                if any(earlier.get(k) != record[k] for k in ("made_from", "iteration")):
                    make_room(folder, record["made_from"], record["iteration"])
                restored = [self._folder(file) / name for file in own]
                join_planes(folder / name, stack, restored)
                write_atomically(folder / "record.json", json.dumps(record).encode())
                print(folder / name)
