"""The two scripts, from the command line to the files they leave."""

import csv
import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import cv2
import numpy as np
import pytest
import scipy.io
import skimage.data
import tifffile
from matplotlib.axes import Axes
from PIL import Image, ImageCms
from scripts import QUICK, RNG, ROOT, SCRIPTS, files, run, without_seconds, write

import results


@pytest.mark.parametrize("task", SCRIPTS)
def test_shell_script_from_another_folder(task, folder):
    write("my pictures/a.png", channels=3)
    done = subprocess.run(
        ["sh", ROOT / f"{task}.sh", "--path", "my pictures/a.png", *QUICK.split()],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    settings = {"denoise": "sigma25", "deblur": "sigma10_gaussian15-1"}[task]
    results = folder / "images/my pictures/a.png" / task
    made = {"Self2Self-2.png", "Self2Self-4.png", "noisy.png", "noise.mat"}
    made |= {"restored.png", "comparison.png", "record.json", "uncertainty.png"}
    made |= {"error.mat"}
    if task == "deblur":
        made |= {"blurred.png", "kernel.mat", "kernel.png"}
    (results,) = results.iterdir()
    assert results.name == f"{settings}_fast_iteration4_num_prediction2"
    assert set(files(results)) == made
    ends = (".txt", ".csv", ".png", "-summary.csv")
    assert set(files(folder / "logs")) == {f"{task}/log{end}" for end in ends}
    table = (folder / f"logs/{task}/log.csv").read_text()
    rows = list(csv.DictReader(table.splitlines()))
    assert [row["step"] for row in rows] == ["2", "4"]
    log = (folder / f"logs/{task}/log.txt").read_text()
    assert f"PSNR {float(rows[-1]['psnr']):.3f} dB" in log
    noise = scipy.io.loadmat(results / "noise.mat")["noise"]
    assert noise.shape == (32, 32, 3)
    sigma = {"denoise": 25, "deblur": 10}[task]
    assert noise.std() * 255 == pytest.approx(sigma, rel=0.05)
    restored = cv2.imread(str(results / "restored.png"), cv2.IMREAD_UNCHANGED)
    assert restored.shape == (32, 32, 3)


@pytest.mark.parametrize("task", SCRIPTS)
def test_fused_results_state_the_plain_ensemble_too(task):
    assert run(task, "--path astronaut --crop 48 --recipe paper --fuse on") == 0
    assert (
        run(task, "--path astronaut --crop 48 --recipe paper --log_path off/log.txt")
        == 0
    )
    logs = Path(f"logs/{task}"), Path("off")
    tables = [list(csv.DictReader((log / "log.csv").open())) for log in logs]
    for fused, plain in zip(*tables, strict=True):
        assert fused["ensemble_psnr"] == plain["ensemble_psnr"] == plain["psnr"]
        assert fused["psnr"] != plain["psnr"]
    texts = [(log / "log.txt").read_text() for log in logs]
    told = f"plain ensemble {float(tables[1][-1]['psnr']):.3f} dB"
    assert [told in text for text in texts] == [True, False]
    fused, plain = sorted(Path(f"images/skimage/astronaut/{task}").iterdir())
    assert "_fuse-on" in fused.name and "fuse" not in plain.name
    error = scipy.io.loadmat(fused / "error.mat")["error"]
    assert error.shape == (48, 48, 3) and error.min() >= 0
    assert not (plain / "error.mat").exists()


def test_an_observed_images_noise_is_given_or_found(capsys):
    noisy = RNG.normal(128, 20, (64, 64)).clip(1, 254).astype(np.uint8)
    shared = cv2.GaussianBlur(noisy, (0, 0), 1)
    Path("in").mkdir()
    cv2.imwrite("in/a.png", noisy)
    cv2.imwrite("in/b.png", shared)
    errors, sigmas = [], []
    for flags in ("", "--noise_sigma 20", "--noise_sigma 60"):
        assert run("denoise", f"--path in/a.png --observed {flags}") == 0
        log = Path("logs/denoise/log.txt").read_text()
        sigmas.append(float(re.search(r"noise: white, sigma ([\d.]+)", log)[1]))
        made = max(Path("images/in/a.png").rglob("error.mat"), key=os.path.getmtime)
        errors.append(scipy.io.loadmat(made)["error"].mean())
        record = json.loads((made.parent / "record.json").read_text())
        assert record["noise"] == f"white, sigma {sigmas[-1]:.3g}"
    assert sigmas == [pytest.approx(20, rel=0.1), 20, 60]
    assert errors[0] == pytest.approx(errors[1], rel=0.1)
    assert errors[2] > errors[1]
    assert run("denoise", "--path in/b.png --observed") == 0
    assert "noise: shared by neighbours" in Path("logs/denoise/log.txt").read_text()
    assert run("denoise", "--path in/b.png --observed --fuse on --seed 1") == 2
    assert "--noise_sigma says how strong it is" in capsys.readouterr().err


def test_a_clean_picture_is_given_back():
    smooth = cv2.GaussianBlur(skimage.data.camera(), (0, 0), 1)
    clean = smooth[100:228, 100:228]
    Path("in").mkdir()
    cv2.imwrite("in/a.png", clean)
    assert run("denoise", "--path in/a.png --observed") == 0
    (made,) = Path("images").rglob("restored.png")
    np.testing.assert_array_equal(cv2.imread(str(made), cv2.IMREAD_UNCHANGED), clean)
    log = Path("logs/denoise/log.txt").read_text()
    assert "noise: none to speak of" in log and "it comes back as it is" in log


def test_bundled_image_and_model_type():
    assert run("denoise", "--path coins --crop 32 --model_type x") == 0
    assert list(Path("images/skimage/coins").iterdir()) == [
        Path("images/skimage/coins/x")
    ]


def test_a_seed_repeats_byte_for_byte_whatever_the_test_frequency(folder, monkeypatch):
    write("in/a.png", channels=3)
    results = []
    for name, frequency in (("one", "1"), ("two", "3"), ("three", "3")):
        (folder / name).mkdir()
        monkeypatch.chdir(folder / name)
        flags = f"--path {folder}/in/a.png --test_frequency {frequency}"
        assert run("deblur", flags) == 0
        results.append(without_seconds(files("images")))
    assert results[1] == results[2]
    last = next(k for k in results[0] if k.endswith("restored.png"))
    assert results[0][last] == results[1][last]
    assert any(k.endswith("Self2Self-1.png") for k in results[0])


def test_noise_depends_on_seed_and_shape_alone():
    write("in/a.png")
    for flags in ("--drop_rate 0.3", "--drop_rate 0.6 --optimizer adamw", "--seed 1"):
        assert run("denoise", f"--path in/a.png {flags}") == 0
    made = sorted(Path("images").rglob("noise.mat"), key=lambda f: "seed1" in str(f))
    first, same, other = (scipy.io.loadmat(f)["noise"] for f in made)
    assert (first == same).all()
    assert not (first == other).any()


def test_sigma_zero_adds_nothing():
    write("in/a.png")
    assert run("denoise", "--path in/a.png --sigma 0") == 0
    (noisy,) = Path("images").rglob("noisy.png")
    assert (cv2.imread(str(noisy)) == cv2.imread("in/a.png")).all()


@pytest.mark.parametrize("task", SCRIPTS)
def test_observed_image_is_taken_as_it_is(task):
    write("in/a.png")
    write("in/clean.png")
    assert run(task, "--path in/a.png --observed") == 0
    log = Path(f"logs/{task}/log.txt").read_text()
    assert "loss" in log
    assert "PSNR" not in log
    made = {Path(f).name for f in files("images")}
    assert "noise.mat" not in made
    assert "blurred.png" not in made
    (noisy,) = Path("images").rglob("noisy.png")
    assert (cv2.imread(str(noisy)) == cv2.imread("in/a.png")).all()
    assert run(task, "--path in/a.png --observed --reference in/clean.png") == 0
    assert "PSNR" in Path(f"logs/{task}/log.txt").read_text()


def test_sixteen_bits_alpha_and_format_are_kept():
    write("in/a.tif", channels=4, dtype=np.uint16)
    write("in/a.png")
    assert run("denoise", "--path in") == 0
    (restored,) = Path("images").rglob("restored.tif")
    pixels = cv2.imread(str(restored), cv2.IMREAD_UNCHANGED)
    assert pixels.dtype == np.uint16
    given = cv2.imread("in/a.tif", cv2.IMREAD_UNCHANGED)
    assert (pixels[..., 3] == given[..., 3]).all()
    assert (pixels[..., :3] % 257).any()
    assert len(list(Path("images/in").iterdir())) == 2


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_a_colour_profile_is_kept(suffix):
    Path("in").mkdir()
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    pixels = np.random.default_rng(0).integers(0, 256, (32, 40, 3), np.uint8)
    Image.fromarray(pixels).save(f"in/a.{suffix}", icc_profile=profile)
    assert run("denoise", f"--path in/a.{suffix} --test_frequency 4") == 0
    (results,) = Path(f"images/in/a.{suffix}/denoise").iterdir()
    for name in (f"restored.{suffix}", "noisy.png"):
        assert Image.open(results / name).info["icc_profile"] == profile


def test_a_damaged_colour_profile_is_left_out():
    Path("in").mkdir()
    pixels = np.zeros((32, 32, 3), np.uint8)
    Image.fromarray(pixels).save("in/a.jpg", icc_profile=b"no profile")
    assert run("denoise", "--path in/a.jpg --test_frequency 4") == 0
    (noisy,) = Path("images").rglob("noisy.png")
    assert "icc_profile" not in Image.open(noisy).info


def test_a_file_that_cannot_be_written_is_named_and_the_picture_kept():
    """Files over half a mebibyte cannot: the checkpoints. Names need not suit the font."""
    for name in ("\u56fe", "\u7d75"):
        write(f"in/{name}.png", side=40)
    command = f"ulimit -f 1024; exec python {shlex.quote(str(ROOT / 'denoise.py'))}"
    done = subprocess.run(
        ["bash", "-c", f"{command} --path in --observed {QUICK}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    *each, last = done.stderr.splitlines()
    assert len(each) == 2 and "2 of 2 images failed" in last
    for line in each:
        assert "checkpoint.pt: " in line and "the result of step 2 is kept" in line
    for name in ("restored", "comparison", "uncertainty"):
        assert len(list(Path("images").rglob(f"{name}.png"))) == 2


def test_a_stack_that_cannot_be_joined_is_named(monkeypatch, capsys):
    given = RNG.integers(0, 99, (2, 40, 40), np.uint8)
    tifffile.imwrite("a.tif", given, photometric="minisblack")
    write_planes = tifffile.TiffWriter.write

    def full(writer, data, shape=None, **told):
        if shape and len(shape) == 3:
            raise OSError("1600 requested and 0 written")  # as NumPy says it
        return write_planes(writer, data, shape=shape, **told)

    monkeypatch.setattr(tifffile.TiffWriter, "write", full)
    assert run("denoise", "--path a.tif --iteration 1") == 1
    assert "restored.tif: 1600 requested and 0" in capsys.readouterr().err


def test_nothing_is_set_aside_where_a_killed_run_left_nothing():
    write("in/a.png")
    assert run("denoise", "--path in/a.png --test_frequency 4") == 0
    (results,) = Path("images/in/a.png/denoise").iterdir()
    for file in results.iterdir():
        file.unlink()
    (results / ".record.json.1").touch()
    assert run("denoise", "--path in/a.png --test_frequency 4") == 0
    assert [f.name for f in results.parent.iterdir()] == [results.name]


@pytest.mark.filterwarnings("error")
def test_any_name_and_shape_can_be_drawn():
    for name in ("in/cost$1_$2.png", "_in/a.png"):
        record = {"name": name, "rows": [(1, 0.1, 20.0)] * 2, "loss_every": 10}
        assert results.curves([record | {"losses": [0.1] * 2}])
    strip = np.zeros((20_000, 64))
    for drawn in (
        results.uncertainty(strip),
        results.comparison([("observation", strip[None], None)] * 2, (0, 1)),
    ):
        assert max(cv2.imdecode(np.frombuffer(drawn, np.uint8), 1).shape) < 6000


def test_a_log_of_another_kind_is_kept(capsys):
    write("in/a.png")
    Path("logs/denoise").mkdir(parents=True)
    for name in ("log.txt", "log.csv", "log-summary.csv"):
        Path("logs/denoise", name).write_bytes(b"\xff")
        before = files()
        assert run("denoise", "--path in/a.png --resume") == 2
        assert f"{name} is no log of ours" in capsys.readouterr().err
        assert files() == before
        Path("logs/denoise", name).unlink()


def test_same_settings_replace_and_others_are_kept(capsys):
    write("in/a.png")
    assert run("denoise", "--path in/a.png --test_frequency 1") == 0
    (results,) = Path("images/in/a.png/denoise").iterdir()
    for name in ("mine.txt", "restored.xcf", "kernel.txt", "checkpoint-good.pt"):
        (results / name).write_text("a file of the user's")
    assert run("denoise", "--path in/a.png") == 0
    assert "replacing the earlier results" in capsys.readouterr().out
    assert not (results / "Self2Self-1.png").exists()
    for name in ("mine.txt", "restored.xcf", "kernel.txt", "checkpoint-good.pt"):
        assert (results / name).exists()
    before = files(results)
    write("in/a.png")  # another picture of the same name
    assert run("denoise", "--path in/a.png") == 0
    assert files(results.with_name(results.name + "~1")) == before


def test_a_longer_runs_results_are_kept():
    write("in/a.png")
    assert run("denoise", "--path in/a.png --recipe paper") == 0
    (results,) = Path("images/in/a.png/denoise").iterdir()
    assert run("denoise", "--path in/a.png --recipe paper --iteration 2 --resume") == 0
    before = files(results)
    assert run("denoise", "--path in/a.png --recipe paper --iteration 2") == 0
    assert files(results.with_name(results.name + "~1")) == before


def test_results_that_cannot_be_set_aside_are_not_touched(monkeypatch, capsys):
    write("in/a.png")
    assert run("denoise", "--path in/a.png") == 0
    before = files("images")
    write("in/a.png")  # another picture of the same name

    def denied(path, _):
        raise OSError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "rename", denied)
    assert run("denoise", "--path in/a.png --log_path other/log.txt") == 2
    assert "Permission denied" in capsys.readouterr().err
    assert files("images") == before


def test_record_states_the_settings():
    write("in/a.png")
    assert run("denoise", "--path in/a.png --lr 0.002") == 0
    (path,) = Path("images").rglob("record.json")
    record = json.loads(path.read_text())
    assert record["made_from"]["lr"] == 0.002
    assert [row[0] for row in record["rows"]] == [2, 4]


def test_the_curve_has_every_tenth_steps_loss(monkeypatch, figures):
    write("in/a.png")
    plot, lines = Axes.plot, []
    monkeypatch.setattr(
        Axes, "plot", lambda *args, **how: lines.append(args[1:]) or plot(*args, **how)
    )
    assert run("denoise", "--path in/a.png --iteration 25 --test_frequency 25") == 0
    (path,) = Path("images").rglob("record.json")
    record = json.loads(path.read_text())
    losses, scores = lines[-2:]
    assert losses == ((10, 20), tuple(record["losses"])) and record["loss_every"] == 10
    assert scores == ((25,), (record["rows"][0][2],))


def test_training_learns():
    flags = "--path coffee --crop 64 --sigma 50 --iteration 60"
    flags += " --test_frequency 60 --num_prediction 10"
    assert run("denoise", flags) == 0
    (path,) = Path("images").rglob("record.json")
    record = json.loads(path.read_text())
    assert record["rows"][-1][2] > record["observation"][0] + 4
