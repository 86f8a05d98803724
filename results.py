"""What a run leaves: the files of one picture, the log of all pictures, exit status."""

import io
import json
import math
import os
import sys
import time
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

import numpy as np
from tqdm import tqdm

import pictures
import utils
from utils import InputError

# --- drawing -------------------------------------------------------------------------

MAX_PANEL = 1024  # pixels a side of a picture in a drawing
MAX_RATIO = 4  # of a drawn picture's height to its width


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
    """Draw images (C, H, W) of one size side by side.

    panels: title -> image; ends: the values drawn as black and as white.
    """
    _, height, width = next(iter(panels.values())).shape
    every = math.ceil(max(height, width) / MAX_PANEL)
    size = len(panels) * 4, 4 * min(height / width, MAX_RATIO) + 0.4
    figure = new_figure(size, max(320, width // every) / 4)
    (row,) = figure.subplots(1, len(panels), squeeze=False)
    for axes, (title, image) in zip(row, panels.items()):
        pixels = (image[:, ::every, ::every] - ends[0]) / max(ends[1] - ends[0], 1e-30)
        pixels = pixels.clip(0, 1).transpose(1, 2, 0)
        axes.imshow(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))
        axes.set_axis_off()
        axes.set_title(title, fontsize="large" if len(title) < 40 else "small")
    return drawn(figure)


def curves(records):
    """Draw loss and PSNR over the steps, a line for each of the results' records."""
    figure = new_figure((9, 4), 120)
    axes = figure.subplots(1, 2)
    for record in records:
        losses = record["losses"]
        steps = record["loss_every"] * np.arange(1, len(losses) + 1)
        axes[0].plot(steps, losses, marker=".")
        scores = [(row[0], row[2]) for row in record["rows"] if row[2] is not None]
        axes[1].plot(*np.reshape(scores, (-1, 2)).T, marker=".")
    for axis, title in zip(axes, ("loss", "PSNR (dB)")):
        axis.set(xlabel="step", ylabel=title)
        axis.grid(alpha=0.3)
    return drawn(figure)


# --- the picture that was read -------------------------------------------------------

MAX_JUDGED = 2**23  # entries; in a larger stack only some planes are searched for noise


class Stack:
    """The planes of a TIFF file. Their noise is found once, for all of them."""

    def __init__(self):
        self.planes, self.noise = [], None  # paths; a network.noise.Noise


class Source:
    """A picture as it was read, which of its entries are known, and its reference.

    `image` and `known` include the margin. All other arrays, (C, h, w), are without it:
    `place` says where they lie in `image`.

    Args:
        path: the image file.
        args: the options' values.
        stack: the Stack that the picture is a plane of, or None.
        margin: pixels (above, below), (left, right) that the forward operator uses
            beyond the observation: added to an --observed picture, else cut off.
    Raises InputError or OSError for a file that cannot be used.
    """

    def __init__(self, path, args, stack, margin=((0, 0), (0, 0))):
        self.path, self.args, self.stack = path, args, stack
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
        else:
            self.image[self.place] = picture.measured()
        self.as_read = self.picture.image
        height, width = self.as_read.shape[1:]
        if min(height, width) < pictures.SMALLEST_SIDE:
            left = f"{width}x{height} pixels; a side needs {pictures.SMALLEST_SIDE}"
            raise InputError(f"{path}: the PSF leaves {left} or more")
        self.size = pictures.describe(*self.as_read.shape)
        self.eight_bits = picture.dtype == np.uint8 and picture.peak == 255
        # Entries that `leave_out` marked; `gaps` are those of them that come back as read.
        self.left_out = self.gaps = np.zeros(self.as_read.shape, bool)
        self.known = np.zeros_like(known)  # 1 or 0, (C, H, W) or (1, H, W), float32
        self.known[self.place] = self.unmasked = known[self.place]
        self._refuse_nothing_known()

    def _read_known(self):
        """Return which entries --mask or --missing leave known, without the margin."""
        args, known = self.args, np.ones((1, *self.picture.image.shape[1:]), np.float32)
        if args.missing:  # the noise has the same seed, but needs other draws
            draws = np.random.default_rng((args.seed, 1)).random(known.shape)
            known[draws < args.missing] = 0
        if args.mask:
            mask, known = pictures.read_mask(args.mask, args.crop)
            self.picture.refuse_misfit(self.path, mask, args.mask, len(known))
        return known

    def _read_reference(self):
        """Return --reference, NaN where nothing was measured."""
        path = self.args.reference
        path = Path(path, self.path.name) if self.stack else path  # the same plane
        reference = pictures.read_picture(path, self.args.crop)
        self.picture.refuse_misfit(self.path, reference, path, len(reference.image))
        return np.broadcast_to(reference.measured(), self.picture.image.shape)

    def whole_stack(self):
        """Return the stack's planes, one below the other, and where they are not masked.

        (C, n h, w), NaN where nothing was measured; and (C, n h, w) or (1, n h, w), bool.
        """
        every = math.ceil(len(self.stack.planes) * self.as_read.size / MAX_JUDGED)
        planes = self.stack.planes[::every]
        planes = pictures.read_planes(planes, self.args.crop, self.picture)
        planes = planes or [self.picture.measured()]  # none has this one's shape
        height = planes[0].shape[1]
        unmasked = np.tile(self.unmasked[:, :height] > 0, (1, len(planes), 1))
        return np.concatenate(planes, 1), unmasked

    def _refuse_nothing_known(self):
        if not self.known.any():
            raise InputError(f"{self.path}: every pixel is missing")

    def leave_out(self, gaps, outliers):
        """Mark entries as unknown, print how many and why, and return what is known now.

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
            tqdm.write(f"{self.path}: unknown entries (of {gaps.size}): {why}")
        return self.known


# --- one picture's results -----------------------------------------------------------

COLUMNS = ("step", "loss", "psnr", "ssim", "ensemble_psnr")
COLUMNS += ("moved_psnr", "down", "right", "seconds")  # at the shift that fits best
FEW = 3  # rounding to whole numbers harms a picture with a smaller mean


def row_text(row):
    """Write a test as a line of the log."""
    step, loss, psnr, ssim, ensemble, *moved, _ = row
    line = f"step {step:7d}  loss {loss:.6f}"
    if psnr is not None:
        line += f"  PSNR {psnr:.3f} dB  SSIM {ssim:.4f}"
    if ensemble != psnr:
        line += f"  plain ensemble {ensemble:.3f} dB"
    if moved[0] is not None:
        psnr, down, right = moved
        line += f"  ({psnr:.2f} dB if moved {down:.1f} down, {right:.1f} right)"
    return line


class Result:
    """One picture's tests, and the files in its results folder.

    A test is an ensemble prediction. It adds a row to `record`, the content of
    record.json, writes pictures, and lets the Run write its logs.
    """

    def __init__(self, run, path):
        self.run, self.args, self.path = run, run.args, path
        self.folder = run.folder(path)
        self.name = "/".join(utils.result_names(path))
        self.progress = utils.Progress(self.name)
        self.find_shift = None  # network.psf's, if the PSF may move the picture
        self.source = self.learner = self.observation = None
        self.unchanged = None  # where the result is the observation, (C, h, w), bool
        self.begun = False  # whether the folder is this run's
        self.record = {"name": self.name, "columns": COLUMNS, "rows": []}
        self.record |= {"losses": [], "notes": [], "finished": False, "failed": None}
        self.saved, self.saved_step = {}, None  # for --resume; last saved step
        self.saved_at = time.perf_counter()
        self.forecast = None  # a network.forecast.Forecast
        self.started = None  # time.perf_counter() less the seconds of earlier runs

    def read(self, *margin):
        """Read the picture; return its Source."""
        stack = self.run.stacks.get(utils.stack_of(self.path))
        self.source = Source(self.path, self.args, stack, *margin)
        if self.args.output and not stack:
            self.source.picture.refuse_format(self.run.output(self.path))
        return self.source

    def begin(self, learner, y, noise, psf=None):
        """Prepare the folder, and write the record, the observation and the PSF.

        Earlier results of the same picture and settings are replaced, others set aside.
        A checkpoint to resume from is read, and checked, before anything is touched.

        Args:
            learner: the network.Self2Self of the observation.
            y: the observation, (C, H, W), not clipped, with its margin.
            noise: the noise it has, a network.noise.Noise.
            psf: the PSF (h, w), or None.
        """
        source, picture, place = self.source, self.source.picture, self.source.place
        self.learner = learner
        self.observation = np.where(source.left_out, source.as_read, y[place])
        # Without noise and blur the known entries are the result.
        exact = noise.kind == "none" and psf is None
        self.unchanged = source.gaps | (exact and source.known[place] > 0)
        self._describe(noise, exact)
        if self.args.resume:
            self._read_earlier()
        if not self.saved:
            earlier = read_record(self.folder) or {}
            if earlier.get("made_from") != self.record["made_from"]:
                utils.set_aside(self.folder)  # equal ones are overwritten
                if source.stack:
                    utils.set_aside(self.run.folder(utils.stack_of(self.path)))
        self.begun = True
        self._write_record()
        picture.save(self.folder / "noisy.png", self.observation)
        if psf is not None:
            pictures.save_mat(self.folder / "kernel.mat", "kernel", psf)
            panel = {"PSF, {1}x{0} pixels".format(*psf.shape): psf[None]}
            self._write("kernel.png", comparison(panel, (0, psf.max())))

    def _describe(self, noise, exact):
        """Add to the record what the picture is, and what the result depends on."""
        source, clean, peak = self.source, self.source.clean, self.source.picture.peak
        scores = None
        heading = f"{self.name}: {source.size}"
        if clean is not None:
            scores = pictures.score(self.observation, clean)
            heading += f", observation {scores[0]:.3f} dB"
            low, high = pictures.black_and_white(clean)
            if (low, high) != (0, 1):
                heading += f" (peak: the reference's range, {peak * (high - low):.4g})"
        heading += f", noise: {noise.describe(peak)}"
        if noise.lines and not source.eight_bits:
            heading += " (in the file's numbers)"
        missing = 1 - source.known[source.place].mean(dtype=np.float64)
        if missing:
            heading += f", {missing:.2%} missing"
        elif exact:
            heading += ": it comes back as it is"
        tqdm.write(heading)
        recipe = asdict(self.learner.recipe) | {"kind of noise": noise.kind}
        del recipe["scale"], recipe["noise"]  # the observation decides them
        sums = {"image or noise": utils.digest(self.observation)}
        sums["reference"] = utils.digest(clean)
        sums["device"] = self.args.device.type
        made_from = self.run.settings | recipe | sums
        self.record |= {"size": source.size, "heading": heading, "made_from": made_from}
        self.record |= {"observation": scores, "noise": noise.describe(peak)}
        self.record["loss_every"] = self.learner.LOSS_EVERY

    def _read_earlier(self):
        """Take over the tests of a checkpoint or, if a run is complete, of its record."""
        path = self.folder / "checkpoint.pt"
        if path.exists():
            saved = read_checkpoint(path)
        else:
            path, saved = self.folder / "record.json", read_record(self.folder)
            if not (saved and saved["finished"] and self._restored_path().exists()):
                return
        was, now = saved["made_from"], self.record["made_from"]
        changed = [k for k in was.keys() | now.keys() if was.get(k) != now.get(k)]
        if changed:
            what = f"of another {', another '.join(sorted(changed))}"
            raise InputError(f"{path}: {what}; without --resume the run starts over")
        self.record |= {key: saved[key] for key in ("rows", "losses", "notes")}
        self.saved = saved

    def resume(self, forecast):
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
        self.forecast = forecast
        self.forecast.start(self.is_complete())
        self.progress.start()

    @property
    def tested_step(self):
        """The step of the last test; -1 before the first one."""
        return self.record["rows"][-1][0] if self.record["rows"] else -1

    def is_complete(self):
        """Tell whether the last step has been tested."""
        return self.tested_step >= self.learner.recipe.iteration

    def awaits_test(self):
        """Tell whether the learner is to predict now, before another step."""
        step = self.learner.step
        last = step == self.learner.recipe.iteration
        due = last or (step and step % self.args.test_frequency == 0)
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
            shift = self.find_shift and self.find_shift(image, source.clean)
            if shift is not None:
                best = pictures.score_moved(image, source.clean, shift)
                moved = best, *(0.0 - shift).tolist()
            before = f"observation {self.record['observation'][0]:.2f} dB"
            after = f"restored {psnr:.2f} dB"
            panels = {before: y, after: image, "clean": source.clean}
        row = step, self.learner.mean_loss(), psnr, ssim, plain, *(moved or [None] * 3)
        self.record["rows"].append((*row, time.perf_counter() - self.started))
        self.record["losses"] = [*self.learner.read_losses()]
        if error is not None:
            error = picture.peak**2 * error[source.place]
            pictures.save_mat(self.folder / "error.mat", "error", error)
        picture.save(self._restored_path(), image)
        if not self.is_complete():
            picture.save(self.folder / f"Self2Self-{step}.png", image)
        if picture.dtype.kind != "f" and picture.peak * image.mean() < FEW:
            advice = "rounding changes numbers so small; save it as float, in a TIFF"
            tqdm.write(f"{self.name}: {advice}")
        deviation = picture.peak * np.sqrt(restored.variance[source.place].mean(0))
        title = f"standard deviation of the predictions, 0 to {deviation.max():.3g}"
        panel = {title: deviation[None]}
        self._write("uncertainty.png", comparison(panel, (0, deviation.max())))
        # From 0 to 1 most pictures of 16 bits would be all dark.
        ends = (0, 1) if source.eight_bits else np.nanquantile(image, (0.001, 0.999))
        self._write("comparison.png", comparison(panels, ends))
        self._write_record()
        self.run.log_test()
        tqdm.write(f"{self.name}: {row_text(self.record['rows'][-1])}")

    def advance(self, n, part="prediction"):
        """Count n parts (see Forecast) as done; after a signal, save and exit."""
        self.forecast.count(part, n)
        self.progress.expect(self.forecast.seconds_left())
        if self.progress.stopping:
            with suppress(OSError):  # `saved_step` tells where --resume goes on
                if self.learner.step:
                    self._save_checkpoint()
            sys.exit(self.progress.stopping)

    def keep(self):
        """After a step or test: drop a dead network's tests, save a checkpoint if due."""
        if len(self.learner.notes) > len(self.record["notes"]):
            self.record |= {"notes": [*self.learner.notes], "rows": [], "losses": []}
            self._write_record()
            tqdm.write(f"{self.name}: {self.learner.notes[-1]}")
            self.forecast.start(self.is_complete())
        tested = self.learner.step == self.tested_step
        self.advance(1, "test" if tested else "step")
        late = time.perf_counter() - self.saved_at > utils.EVERY
        if (late or tested) and not self.is_complete():
            self._save_checkpoint()

    def _save_checkpoint(self):
        """Save all that the coming steps and the results depend on."""
        import torch

        state = self.record | {"learner": self.learner.state_dict()}
        state["losses"] = self.learner.losses
        state["seconds"] = time.perf_counter() - self.started
        with utils.atomic_file(self.folder / "checkpoint.pt") as file:
            try:
                torch.save(state, file)
            except RuntimeError:  # PyTorch's message is "unexpected pos"
                raise OSError(None, "cannot be written; is the disk full?") from None
        self.saved_step, self.saved_at = self.learner.step, time.perf_counter()

    def finish(self, failed=None):
        """Complete the record; without a failure remove the checkpoint, deliver the result."""
        self.progress.close()
        if self.begun:
            self.record |= {"finished": not failed, "failed": failed}
            self._write_record()
        elif self.run.world > 1 and (earlier := read_record(self.folder)):
            self._write_record(earlier | {"failed_at": time.time()})
        if not failed:
            (self.folder / "checkpoint.pt").unlink(missing_ok=True)
            if not self.source.stack:
                self.run.deliver(self.path, self._restored_path())

    def _restored_path(self):
        return self.folder / f"restored{self.source.picture.suffix}"

    def _write(self, name, data):
        utils.write_atomically(self.folder / name, data)

    def _write_record(self, record=None):
        record = record or self.record | {"written": time.time()}
        self._write("record.json", json.dumps(record, indent=1).encode())


def read_record(folder):
    """Return the record of a results folder; None if this version has written none."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        record = json.loads((folder / "record.json").read_text())
        return record if record["columns"] == [*COLUMNS] else None


def read_checkpoint(path):
    """Return the contents of a checkpoint; raise InputError if the file is no checkpoint."""
    import torch

    with suppress(Exception):  # a damaged file fails in many ways
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if {"made_from", "rows", "losses", "notes", "learner"} <= saved.keys():
            return saved
    raise InputError(f"{path}: damaged, or of another version; delete it to start over")


# --- all images of a call ------------------------------------------------------------

SKEW = 60  # seconds between the starts of several processes, at most
SUMMARY = ("image", "size", "observation_psnr", "psnr", "ssim", "steps", "seconds")
OUTPUTS = Path("images", "output.sha256")  # what --output wrote, as sha256sum lists it


def refuse_to_replace(path):
    """Raise InputError for a file unless --output wrote it and nobody changed it since."""
    ours = OUTPUTS.read_bytes() if OUTPUTS.exists() else b""
    if path.exists() and utils.file_digest(path).encode() not in ours:
        raise InputError(f"--output {path}: no run wrote it as it is; name another")


class Run:
    """All images of one call of a script: their paths, log and exit status.

    A fault that shows before the first image, such as a file that cannot be written, exits
    with status 2. `defaults` are the script's, `psf` is the PSF's name, or None.
    """

    def __init__(self, args, defaults, psf=None):
        self.args, self.failed, self.restored = args, [], []  # paths
        self.started, self.logged_at = time.time(), -math.inf
        self.records, self.stacks = {}, {}  # as last logged; path -> Stack
        rank = int(os.environ.get("RANK", "0"))  # torchrun sets both
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        try:
            self.settings, self.named = utils.named_settings(args, defaults, psf)
            self.log = Path(args.log_path)
            self.totals = self.log.parent / f"{self.log.stem}-summary.csv"
            self.files = utils.find_images(args.path)
            self.paths = self.files[rank :: self.world]  # this process's
            for file in self.files:
                if stack := utils.stack_of(file):
                    self.stacks.setdefault(stack, Stack()).planes.append(file)
            wholes = (utils.stack_of(file) or file for file in self.files)
            self.wholes = list(dict.fromkeys(wholes))  # pictures and stacks
            self._check()
        except (InputError, OSError) as error:
            utils.report(utils.reason(error))
            sys.exit(2)

    def _check(self):
        """Raise InputError if a file would replace another, or --reference does not fit."""
        args, log = self.args, self.log
        if not log.name or log.suffix in (".csv", ".png"):
            raise InputError(f"--log_path {log}: a text file, such as log.txt")
        planes = utils.planes(Path(args.reference)) if args.reference else self.files
        if len(planes) != len(self.files) or (args.reference and len(self.wholes) > 1):
            count = f"{len(planes)} planes for {len(self.files)} images"
            takes = "it goes with one image, or with a stack of as many planes"
            raise InputError(f"--reference {args.reference}: {count}; {takes}")
        files = args.reference, args.mask, getattr(args, "kernel", None)
        inputs = {Path(file).resolve() for file in (*self.wholes, *files) if file}
        logs = [log, log.with_suffix(".csv"), log.with_suffix(".png"), self.totals]
        outputs = [self.output(whole) for whole in self.wholes if args.output]
        for path in logs + outputs:
            if path.is_dir() or path.resolve() in inputs:
                raise InputError(f"{path} is a folder or an input; name another file")
        there = [path for path in logs if path.exists()]
        if there and not (log.exists() and log.read_bytes().startswith(b"path: ")):
            raise InputError(f"--log_path: {there[0]} is no log of ours; name another")
        for whole, path in zip(self.wholes, outputs):
            if whole in self.stacks and path.suffix.lower() not in utils.TIFF:
                raise InputError(f"--output {path}: a stack needs .tif or .tiff")
            refuse_to_replace(path)
        folders = {path.parent for path in (log, *outputs)}
        for folder in folders | {*map(self.folder, self.files)}:
            there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
            if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
                fault = "results go there, but it is no folder that can be written to"
                raise InputError(f"{there}: {fault}")

    def output(self, whole):
        """Return where --output puts a picture or stack."""
        several = len(self.wholes) > 1 or Path(self.args.path).is_dir()
        return Path(self.args.output, *[whole.name] * several)

    def deliver(self, whole, restored):
        """Copy a restored file of a picture or stack to --output; note its path."""
        if self.args.output:
            restored, made = self.output(whole), restored
            refuse_to_replace(restored)
            pictures.copy(made, restored)
            line = f"{utils.file_digest(restored)}  {restored.absolute()}\n"
            with OUTPUTS.open("ab") as file:
                file.write(line.encode(errors=utils.ANY_NAME))
        self.restored.append(restored)

    def folder(self, path):
        """Return the results folder of a picture, plane or stack."""
        names = utils.result_names(path)
        return Path("images", *names, self.args.model_type, self.named)

    @contextmanager
    def image(self, path):
        """Yield the Result of one image; report an error, so the caller's loop goes on."""
        result = Result(self, path)
        try:
            with closing(result.progress):
                yield result
        except (KeyboardInterrupt, SystemExit) as stop:
            step = result.saved_step
            left = f"--resume goes on from step {step}" if step else "nothing is saved"
            utils.report(f"{result.name}: interrupted; {left}")
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

    def finish(self):
        """Write and print the totals; return the exit status.

        It is 0 if no image failed, else 1, or 2 if no training had begun. Each of several
        processes returns 0, because torchrun would end the others if one failed.
        """
        if self.failed and len(self.files) > 1:
            count = f"{len(self.failed)} of {len(self.files)} images failed"
            utils.report(f"{count}: {', '.join(self.failed)}")
        try:
            table = self.write_logs()
            # Others may have finished meanwhile. As text a NaN equals itself.
            while self.world > 1 and str(self._read_records()) != str(self.records):
                table = self.write_logs()
            for name, *cells in table:
                texts = (f"{x:.3f}" if type(x) is float else x or "-" for x in cells)
                print(f"{name:32s}", *(f"{text:>16}" for text in texts))
            for path, stack in self.stacks.items():
                self._join(path, stack.planes)
            for path in self.restored:
                print(path)
        except (InputError, OSError) as error:
            utils.report(utils.reason(error))
            return 1
        if self.world > 1 or not self.failed:
            return 0
        return 1 if self.records else 2

    def _read_records(self):
        """Return the records of this call's images so far, path -> record.

        Records of an earlier call count only if this call resumes it, and the image has not
        failed now. Other processes may have started up to SKEW before this one.
        """
        found, ours, failed = {}, set(self.paths), set(self.failed)
        for file in self.files:
            record = read_record(self.folder(file)) or {"failed_at": math.inf}
            since = self.started - (0 if file in ours else SKEW)
            resumed = self.args.resume and str(file) not in failed
            fails = record.get("failed_at", 0) >= since  # in another process, perhaps
            if not fails and (resumed or record["written"] >= since):
                found[file] = record
        return found

    def log_test(self):
        """Write the logs after a test, unless they were written just now: it may take long."""
        if time.perf_counter() - self.logged_at > utils.EVERY:
            self.write_logs()
            self.logged_at = time.perf_counter()

    def write_logs(self):
        """Write the log, its CSV, the curves and the summary; return the summary's rows.

        Every process writes what all processes have recorded.
        """
        args = vars(self.args).items()
        lines = [f"{k}: {v}" for k, v in args if k not in ("resume", "given")]
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
        text = "\n".join([*lines, ""]).encode(errors=utils.ANY_NAME)
        utils.write_atomically(self.log, text)
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
        if not all(found.get(file, {}).get("finished") for file in planes):
            return
        folder, name = self.folder(stack), f"restored{stack.suffix.lower()}"
        restored = [self.folder(file) / name for file in planes]
        pictures.join_planes(folder / name, stack, restored)
        self.deliver(stack, folder / name)
