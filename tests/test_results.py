"""The two scripts, from the command line to the files they leave."""

import csv
import json
import os
import re
import resource
import shutil
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
from scripts import RNG, ROOT, SCRIPTS, files, run, without_seconds, write

import results
from network.noise import gaussian_noise

PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return the folder of a run of each script; tests only look at its files."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("in").mkdir()
        write("in/deep.tif", channels=4, dtype=np.uint16)
        pixels = RNG.integers(0, 256, (32, 40, 3), np.uint8)
        for name, profile in (
            ("a.png", PROFILE),
            ("a.jpg", PROFILE),
            ("damaged.jpg", b"no profile"),
        ):
            Image.fromarray(pixels).save(f"in/{name}", icc_profile=profile)
        assert run("denoise", "--path in --lr 0.002") == 0
        assert run("deblur", "--path in/a.png --lr 0.002") == 0
    return folder


def read(path):
    return cv2.imread(str(path), cv2.IMREAD_UNCHANGED)


@pytest.mark.parametrize("task", SCRIPTS)
def test_a_run_leaves_files_logs_and_its_settings(task, made):
    settings = {"denoise": "sigma25", "deblur": "sigma10_gaussian15-1"}[task]
    (folder,) = (made / "images/in/a.png" / task).iterdir()
    assert folder.name == f"{settings}_fast_iteration4_lr0.002_num_prediction2"
    names = {"Self2Self-2.png", "noisy.png"}
    names |= {"restored.png", "comparison.png", "record.json", "uncertainty.png"}
    names |= {"error.mat"}
    if task == "deblur":
        names |= {"kernel.mat", "kernel.png"}
    assert set(files(folder)) == names
    ends = (".txt", ".csv", ".png", "-summary.csv")
    assert set(files(made / "logs" / task)) == {f"log{end}" for end in ends}
    table = (made / f"logs/{task}/log.csv").read_text()
    rows = [r for r in csv.DictReader(table.splitlines()) if r["image"] == "in/a.png"]
    assert [row["step"] for row in rows] == ["2", "4"]
    log = (made / f"logs/{task}/log.txt").read_text()
    assert f"PSNR {float(rows[-1]['psnr']):.3f} dB" in log
    if task == "denoise":
        noise = gaussian_noise((3, 32, 40), 25, 0).transpose(1, 2, 0)[..., ::-1]
        noisy = read(made / "in/a.png") + 255 * noise
        difference = read(folder / "noisy.png") - noisy.clip(0, 255)
        assert np.abs(difference).max() < 0.51
    assert read(folder / "restored.png").shape == (32, 40, 3)
    record = json.loads((folder / "record.json").read_text())
    assert record["made_from"]["lr"] == 0.002 and record["finished"]
    assert [str(row[0]) for row in record["rows"]] == [row["step"] for row in rows]


@pytest.mark.parametrize("task", SCRIPTS)
def test_shell_script_from_another_folder(task):
    command = ["sh", ROOT / f"{task}.sh", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (
        f"{task}.py" in done.stdout
        and "--kernel_sigma" * (task == "deblur") in done.stdout
    )


def test_fused_results_state_the_plain_ensemble_too():
    flags = "--path astronaut --crop 48 --recipe paper"
    assert run("denoise", f"{flags} --fuse on") == 0
    assert run("denoise", f"{flags} --log_path off/log.txt") == 0
    logs = Path("logs/denoise"), Path("off")
    tables = [list(csv.DictReader((log / "log.csv").open())) for log in logs]
    for fused, plain in zip(*tables, strict=True):
        assert fused["ensemble_psnr"] == plain["ensemble_psnr"] == plain["psnr"]
        assert fused["psnr"] != plain["psnr"]
    texts = [(log / "log.txt").read_text() for log in logs]
    told = f"plain ensemble {float(tables[1][-1]['psnr']):.3f} dB"
    assert [told in text for text in texts] == [True, False]
    fused, plain = sorted(Path("images/skimage/astronaut/denoise").iterdir())
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
    for flags in ("", "--noise_sigma 60"):
        assert run("denoise", f"--path in/a.png --observed {flags}") == 0
        log = Path("logs/denoise/log.txt").read_text()
        sigmas.append(float(re.search(r"noise: white, sigma ([\d.]+)", log)[1]))
        made = max(Path("images/in/a.png").rglob("error.mat"), key=os.path.getmtime)
        errors.append(scipy.io.loadmat(made)["error"].mean())
        record = json.loads((made.parent / "record.json").read_text())
        assert record["noise"] == f"white, sigma {sigmas[-1]:.3g}"
    assert sigmas == [pytest.approx(20, rel=0.1), 60]
    assert errors[1] > errors[0]
    assert run("denoise", "--path in/b.png --observed --fuse on --no-real_noise") == 2
    err = capsys.readouterr().err
    assert "shared by neighbours, as a camera's; --fuse on needs a --noise_sigma" in err
    assert not Path("images/in/b.png").exists()


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


def test_a_seed_repeats_byte_for_byte_whatever_the_test_frequency():
    write("in/a.png", channels=3)
    made = []
    for frequency in (1, 3):
        assert run("deblur", f"--path in/a.png --test_frequency {frequency}") == 0
        made.append(without_seconds(files("images")))
        shutil.rmtree("images")
    often, seldom = ({Path(k).name: v for k, v in found.items()} for found in made)
    assert often.keys() - seldom.keys() == {"Self2Self-1.png", "Self2Self-2.png"}
    assert seldom == {name: often[name] for name in seldom}


@pytest.mark.parametrize("task", SCRIPTS)
def test_observed_image_is_taken_as_it_is(task):
    write("in/a.png")
    write("in/clean.png")
    assert run(task, "--path in/a.png --observed") == 0
    log = Path(f"logs/{task}/log.txt").read_text()
    assert "loss" in log
    assert "PSNR" not in log
    (noisy,) = Path("images").rglob("noisy.png")
    assert (cv2.imread(str(noisy)) == cv2.imread("in/a.png")).all()
    assert run(task, "--path in/a.png --observed --reference in/clean.png") == 0
    assert "PSNR" in Path(f"logs/{task}/log.txt").read_text()


def test_sixteen_bits_alpha_and_format_are_kept(made):
    (restored,) = (made / "images/in/deep.tif").rglob("restored.tif")
    pixels, given = read(restored), read(made / "in/deep.tif")
    assert pixels.dtype == np.uint16
    assert (pixels[..., 3] == given[..., 3]).all()
    assert (pixels[..., :3] % 257).any()


def test_a_colour_profile_is_kept_and_a_damaged_one_left_out(made):
    for name in ("a.png", "a.jpg", "damaged.jpg"):
        (folder,) = (made / "images/in" / name / "denoise").iterdir()
        for file in (f"restored{Path(name).suffix}", "noisy.png"):
            expected = None if name == "damaged.jpg" else PROFILE
            assert Image.open(folder / file).info.get("icc_profile") == expected


def test_a_file_that_cannot_be_written_is_named_and_the_picture_kept(capsys, figures):
    """Files over half a mebibyte cannot: the checkpoints. Names need not suit the font."""
    for name in ("\u56fe", "\u7d75"):
        write(f"in/{name}.png", side=40)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**19, before[1]))
    try:
        assert run("denoise", "--path in --observed") == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    *each, last = capsys.readouterr().err.splitlines()
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
def test_any_shape_can_be_drawn():
    record = {"rows": [(1, 0.1, 20.0)] * 2, "loss_every": 10, "losses": [0.1] * 2}
    assert results.curves([record, record | {"rows": []}])
    strip = np.zeros((20_000, 64))
    panels = dict.fromkeys(("observation", "restored"), strip[None])
    drawn = results.comparison(panels, (0, 1))
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
    assert run("denoise", "--path in/a.png --test_frequency 4") == 0
    (results,) = Path("images/in/a.png/denoise").iterdir()
    (results / "mine.txt").write_text("a file of the user's")
    before = without_seconds(files(results))
    (results / "restored.png").write_bytes(b"damaged")
    assert run("denoise", "--path in/a.png --test_frequency 4") == 0
    assert without_seconds(files(results)) == before
    assert "kept as" not in capsys.readouterr().out
    before = files(results)
    write("in/a.png")  # another picture of the same name
    assert run("denoise", "--path in/a.png") == 0
    assert files(results.with_name(results.name + "~1")) == before
    assert "kept as" in capsys.readouterr().out


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
    assert [list(x) for x in losses] == [[10, 20], record["losses"]]
    assert [list(x) for x in scores] == [[25], [record["rows"][0][2]]]


def test_training_learns():
    flags = "--path coffee --crop 64 --sigma 50 --iteration 60"
    flags += " --test_frequency 60 --num_prediction 10"
    assert run("denoise", flags) == 0
    (path,) = Path("images").rglob("record.json")
    record = json.loads(path.read_text())
    assert record["rows"][-1][2] > record["observation"][0] + 4
