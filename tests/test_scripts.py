"""The two scripts, from the command line to the files they leave."""

import csv
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import scipy.io
from kill import kill_and_compare

import deblur
import denoise
import utils

ROOT = Path(__file__).parents[1]
SCRIPTS = {"denoise": denoise, "deblur": deblur}
RNG = np.random.default_rng(0)
QUICK = "--iteration 4 --test_frequency 2 --num_prediction 2 --device cpu"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Run every test in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path, channels=1, side=32, dtype=np.uint8):
    """Write a random image."""
    shape = (side, side, channels) if channels > 1 else (side, side)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    pixels = RNG.integers(0, np.iinfo(dtype).max + 1, shape).astype(dtype)
    cv2.imwrite(str(path), pixels)


def run(task, flags):
    """Run a script in this process; return its exit status."""
    try:
        return SCRIPTS[task].main(shlex.split(f"{QUICK} {flags}"))
    except SystemExit as stop:
        return stop.code


def files(folder="."):
    """List the files below a folder, with their bytes."""
    found = sorted(f for f in Path(folder).rglob("*") if f.is_file())
    return {str(f.relative_to(folder)): f.read_bytes() for f in found}


def without_seconds(made):
    """Leave out of `files()` what says how long it took."""
    made = {k: v for k, v in made.items() if "record" not in k and "checkp" not in k}
    for name in made:
        if name.endswith(".csv"):
            lines = made[name].splitlines()
            made[name] = [line.rpartition(b",")[0] for line in lines]
    return made


@pytest.mark.parametrize("task", SCRIPTS)
def test_shell_and_python_defaults_agree(task):
    text = (ROOT / f"{task}.sh").read_text().replace("\\\n", " ")
    words = shlex.split(text, comments=True)
    assert words[-1] == "$@"
    flags = words[words.index("--path") : -1]
    defaults = SCRIPTS[task].DEFAULTS
    spelt = utils.parse_arguments("", defaults, flags)
    assert vars(spelt) == vars(utils.parse_arguments("", defaults, []))
    assert {f"--{name}" for name in defaults} >= set(flags[::2])


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
    settings = {"denoise": "25.0_0.3", "deblur": "15_1.0_10.0_0.3"}[task]
    results = folder / "images/my pictures/a.png" / task
    made = {"Self2Self-2.png", "Self2Self-4.png", "noisy.png", "noise.mat"}
    made |= {"restored.png", "comparison.png", "record.json"}
    made |= {"checkpoint.pt", "checkpoint.previous.pt"}
    if task == "deblur":
        made |= {"blurred.png", "kernel.mat"}
    (results,) = results.iterdir()
    assert results.name == f"{settings}_num_prediction2"
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


def parse(flags, task="denoise"):
    """Read a command line; return the options' values."""
    defaults = SCRIPTS[task].DEFAULTS
    return vars(utils.parse_arguments("", defaults, shlex.split(flags)))


def test_a_flag_wins_over_the_recipe_and_the_recipe_over_the_defaults():
    paper = parse("")
    assert paper["iteration"] == denoise.DEFAULTS["iteration"]
    assert paper | utils.RECIPES["paper"] == paper
    fast = parse("--recipe fast --sigma 5")
    assert fast | utils.decided("fast", 5) == fast
    changed = {k: v for k, v in fast.items() if v != paper[k]}
    assert changed.keys() == utils.RECIPES["fast"].keys() | {"recipe", "sigma"}
    flags = "--recipe fast --sigma 5 --lr 0.5 --iteration 7 --drop_rate 0.1"
    assert parse(flags) == fast | {"lr": 0.5, "iteration": 7, "drop_rate": 0.1}


@pytest.mark.parametrize(
    ("flags", "drop_rate", "average"),
    [
        ("--recipe fast", 0.3, 3),
        ("--recipe fast --sigma 0", 0.2, 3),
        ("--recipe fast --sigma 14.9", 0.2, 3),
        ("--recipe fast --sigma 15", 0.3, 3),
        ("--recipe fast --sigma 39.9", 0.3, 3),
        ("--recipe fast --sigma 40", 0.3, 1),
        ("--recipe fast --sigma 5 --observed", 0.3, 3),
        ("--recipe fast --sigma 50 --observed", 0.3, 3),
        ("--sigma 5", 0.3, 0),
    ],
)
def test_fast_goes_by_the_noise_where_it_is_known(flags, drop_rate, average):
    chosen, blurred = parse(flags), parse(flags, "deblur")
    assert (chosen["drop_rate"], chosen["average"]) == (drop_rate, average)
    assert (blurred["drop_rate"], blurred["average"]) == (0.3, min(3, 3 * average))


def test_fast_recipe_names_its_steps():
    write("in/a.png")
    assert run("denoise", "--path in/a.png --recipe fast") == 0
    assert run("denoise", "--path in/a.png --recipe fast --iteration 6") == 0
    names = {f.name for f in Path("images/in/a.png/denoise").iterdir()}
    ending = "fast_num_prediction2"
    assert {n.split("_", 2)[2] for n in names} == {f"{ending}_{n}steps" for n in (4, 6)}


@pytest.mark.parametrize("task", SCRIPTS)
def test_fused_results_state_the_plain_ensemble_too(task):
    write("in/a.png", channels=3)
    assert run(task, "--path in/a.png --fuse on") == 0
    assert run(task, "--path in/a.png --log_path off/log.txt") == 0
    logs = Path(f"logs/{task}"), Path("off")
    tables = [list(csv.DictReader((log / "log.csv").open())) for log in logs]
    for fused, plain in zip(*tables, strict=True):
        assert fused["ensemble_psnr"] == plain["ensemble_psnr"] == plain["psnr"]
        assert fused["psnr"] != plain["psnr"]
    texts = [(log / "log.txt").read_text() for log in logs]
    told = f"plain ensemble {float(tables[1][-1]['psnr']):.3f} dB"
    assert [told in text for text in texts] == [True, False]
    fused, plain = sorted(Path(f"images/in/a.png/{task}").iterdir(), reverse=True)
    assert fused.name == f"{plain.name}_fuse_on"
    error = scipy.io.loadmat(fused / "error.mat")["error"]
    assert error.shape == (32, 32, 3) and error.min() >= 0
    assert not (plain / "error.mat").exists()


def test_an_observed_images_noise_is_given_or_estimated():
    noisy = RNG.normal(128, 20, (64, 64)).clip(1, 254).astype(np.uint8)
    Path("in").mkdir()
    cv2.imwrite("in/a.png", noisy)
    errors, sigmas = [], []
    for flags in ("", "--noise_sigma 20", "--noise_sigma 60"):
        assert run("denoise", f"--path in/a.png --observed --fuse on {flags}") == 0
        log = Path("logs/denoise/log.txt").read_text()
        sigmas.append(float(re.search(r"noise sigma ([\d.]+)", log)[1]))
    assert sigmas == [pytest.approx(20, rel=0.1), 20, 60]
    for name in ("", "_noise20.0", "_noise60.0"):
        (made,) = Path("images/in/a.png/denoise").glob(f"*_observed_fuse_on{name}")
        errors.append(scipy.io.loadmat(made / "error.mat")["error"].mean())
    assert errors[0] == pytest.approx(errors[1], rel=0.1)
    assert errors[2] > errors[1]
    assert run("denoise", "--path in/a.png --observed --recipe fast") == 0
    (made,) = Path("images/in/a.png/denoise").glob("*fast*")
    assert "fuse_off" in made.name  # a camera's noise is not white


def test_fast_fuses_where_it_pays():
    np.save("psf.npy", np.eye(3))

    def fuses(task, flags):
        flags = shlex.split(f"--recipe fast {flags}")
        return utils.parse_arguments("", SCRIPTS[task].DEFAULTS, flags).fuse == "on"

    assert fuses("denoise", "") and fuses("deblur", "--kernel psf.npy")
    assert fuses("deblur", "--fuse on") and fuses("denoise", "--observed --fuse on")
    for flags in ("--sigma 0", "--drop_rate 0", "--num_prediction 1", "--observed"):
        assert not fuses("denoise", flags)
    assert not fuses("deblur", "")  # a Gaussian blur


def test_a_network_that_dies_starts_over(capsys, monkeypatch):
    flags = "--path camera --crop 32 --lr 0.1 --iteration 100 --test_frequency 50"
    monkeypatch.setattr(utils, "ATTEMPTS", 1)
    assert run("denoise", flags) == 1
    out, err = capsys.readouterr()
    assert "by step 100: started over at the mean, learning rate 0.05" in out
    assert "by step 100; a lower --lr than 0.1 cures it" in err
    assert "started over" in Path("logs/denoise/log.txt").read_text()


def test_a_network_that_dies_late_leaves_its_last_good_result(capsys, monkeypatch):
    write("in/a.png")
    monkeypatch.setattr(utils, "EARLY", 150)
    monkeypatch.setattr(denoise.Self2Self, "alive", lambda learner: learner.step < 200)
    flags = "--path in/a.png --iteration 300 --test_frequency 100"
    assert run("denoise", flags) == 1
    assert "the result of step 100 is kept" in capsys.readouterr().err
    (restored,) = Path("images").rglob("restored.png")
    kept = restored.with_name("Self2Self-100.png")
    assert restored.read_bytes() == kept.read_bytes()
    record = json.loads(restored.with_name("record.json").read_text())
    assert [row[0] for row in record["rows"]] == [100]
    log = Path("logs/denoise/log.txt").read_text()
    assert "failed: in/a.png: the network died" in log
    assert "step     200" not in log
    assert "0 images" in log


def test_names_of_results_folders():
    write("in/a.png")
    assert run("denoise", "--path in/a.png --num_prediction 100") == 0
    flags = "--optimizer adamw --seed 1 --lr 1e-3 --bs 2 --crop 32 --sigma 10"
    assert run("denoise", f"--path in/a.png {flags}") == 0
    assert {f.name for f in Path("images/in/a.png/denoise").iterdir()} == {
        "25.0_0.3",
        "10.0_0.3_lr0.001_adamw_bs2_num_prediction2_seed1_crop32",
    }


def test_bundled_image_and_model_type():
    assert run("denoise", "--path coins --crop 32 --model_type x") == 0
    assert list(Path("images/skimage/coins").iterdir()) == [
        Path("images/skimage/coins/x")
    ]


def test_psf_file_names_the_folder():
    write("a.png")
    for number in (1, 2):
        np.save("k.npy", np.eye(2, 3) + number)
        assert run("deblur", "--path a.png --kernel k.npy") == 0
    (folder,) = Path("images").glob("*/a.png/deblur")
    names = {f.name for f in folder.iterdir()}
    assert len(names) == 2
    assert all(n.startswith("15_1.0_10.0_0.3_k-") for n in names)
    saved = scipy.io.loadmat(next(folder.glob("*/kernel.mat")))["kernel"]
    assert saved.shape == (2, 3)
    assert saved.sum() == pytest.approx(1)


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


def test_folder_goes_on_past_a_bad_image(capsys):
    write("in/a.png")
    write("in/c.png")
    Path("in/b.png").write_bytes(Path("in/a.png").read_bytes()[:300])
    Path("in/notes.txt").write_text("no image")
    assert run("denoise", "--path in") == 1
    out, err = capsys.readouterr()
    assert "notes.txt: skipped" in out
    assert "in/b.png is damaged" in err
    assert err.splitlines()[-1].endswith("1 of 3 images failed: in/b.png")
    assert {f.name for f in Path("images/in").iterdir()} == {"a.png", "c.png"}
    rows = list(csv.reader(Path("logs/denoise/log.csv").read_text().splitlines()))
    assert len(rows) == 1 + 2 * 2
    log = Path("logs/denoise/log.txt").read_text()
    last = [float(row[3]) for row in rows[2::2]]
    assert float(re.search(r"average PSNR ([\d.]+)", log)[1]) == pytest.approx(
        np.mean(last), abs=1e-3
    )


def test_only_the_image_at_hand_is_held_in_memory(monkeypatch):
    for name in "abc":
        write(f"in/{name}.png")
    held = []
    begin = utils.Run.begin

    def look(run, record):
        begin(run, record)
        held.append([r.name for r in run.records if r.observation is not None])

    monkeypatch.setattr(utils.Run, "begin", look)
    assert run("denoise", "--path in") == 0
    assert held == [[f"in/{name}.png"] for name in "abc"]


def test_a_log_of_another_kind_is_kept():
    write("in/a.png")
    Path("logs/denoise").mkdir(parents=True)
    Path("logs/denoise/log.txt").write_bytes(b"\xff")
    assert run("denoise", "--path in/a.png --resume") == 0
    assert Path("logs/denoise/log~1.txt").read_bytes() == b"\xff"


def test_same_settings_replace_and_others_are_kept(capsys):
    write("in/a.png")
    assert run("denoise", "--path in/a.png --test_frequency 1") == 0
    (results,) = Path("images/in/a.png/denoise").iterdir()
    (results / "mine.txt").write_text("a note of the user's")
    assert run("denoise", "--path in/a.png") == 0
    assert "replacing the earlier results" in capsys.readouterr().out
    assert not (results / "Self2Self-1.png").exists()
    assert (results / "mine.txt").exists()
    assert Path("logs/denoise/log~1.txt").exists()
    assert Path("logs/denoise/log~1.csv").exists()
    before = files(results)
    write("in/a.png")  # another picture of the same name
    assert run("denoise", "--path in/a.png") == 0
    assert files(results.with_name(results.name + "~1")) == before


def test_a_wrong_share_of_the_images_is_refused(monkeypatch, capsys):
    write("in/a.png")
    for rank, world in (("2", "2"), ("x", "2"), ("0", "0")):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", world)
        assert run("denoise", "--path in/a.png") == 2
        assert "RANK and WORLD_SIZE" in capsys.readouterr().err


def test_edited_defaults_are_checked_like_flags(monkeypatch, capsys):
    write("in/a.png")
    monkeypatch.setitem(denoise.DEFAULTS, "sigma", 10)
    assert run("denoise", "--path in/a.png") == 0
    assert Path("images/in/a.png/denoise/10.0_0.3_num_prediction2").exists()
    monkeypatch.setitem(denoise.DEFAULTS, "drop_rate", 1.5)
    assert run("denoise", "--path in/a.png") == 2
    assert "--drop_rate" in capsys.readouterr().err


def test_output_that_is_not_finite_is_no_result(capsys):
    assert run("denoise", "--path camera --crop 32 --lr 1e30") == 1
    assert "not finite" in capsys.readouterr().err
    assert not list(Path("images").rglob("restored.png"))


def test_record_states_the_settings():
    write("in/a.png")
    assert run("denoise", "--path in/a.png --lr 0.002") == 0
    (path,) = Path("images").rglob("record.json")
    record = json.loads(path.read_text())
    assert record["settings"]["lr"] == 0.002
    assert [row[0] for row in record["rows"]] == [2, 4]


def bad_inputs():
    """Make one of every unusable input, and yield (task, flags, words of the error)."""
    for flags, words in (
        ("--path nowhere", "nowhere: no such file"),
        ("--path empty", "no PNG, JPEG or TIFF image"),
        ("--path text.txt", "not a PNG, JPEG or TIFF"),
        ("--path text.png", "text.png is damaged"),
        ("--path zero.png", "zero.png is empty"),
        ("--path cut.png", "cut.png is damaged"),
        ("--path cut.jpg", "cut.jpg is damaged"),
        ("--path cut.tif", "cut.tif is damaged"),
        ("--path nan.tif", "NaN"),
        ("--path far.tif", "scale them to [0, 1]"),
        ("--path small.png", "31x31 pixels; a side needs 32"),
        ("--path good.png --crop 31", "31x31 pixels"),
        ("--drop_rate 1", "--drop_rate: '1' is not a rate"),
        ("--drop_rate -0.1", "rate"),
        ("--sigma -1", "--sigma"),
        ("--sigma nan", "--sigma"),
        ("--lr nan", "--lr"),
        ("--lr 0", "--lr"),
        ("--iteration 0", "--iteration"),
        ("--bs 0", "--bs"),
        ("--num_prediction 0", "--num_prediction"),
        ("--test_frequency 0", "--test_frequency"),
        ("--crop 1.5", "--crop"),
        ("--colour yes", "--colour"),
        ("--optimizer sgd", "--optimizer"),
        ("--fuse maybe", "--fuse"),
        ("--fuse on --drop_rate 0", "--drop_rate"),
        ("--noise_sigma 5", "--observed"),
        ("--path good.png --observed --noise_sigma 5", "--fuse on"),
        ("--fuse on --num_prediction 1", "several"),
        ("--observed --noise_sigma 0", "--noise_sigma"),
        ("--device abacus", "unknown device 'abacus'"),
        ("--device cuda:99", "no device 'cuda:99'"),
        ("--device cuda:01", "unknown device"),
        ("--device cuda:200", "unknown device"),
        ("--path odd", "not UTF-8"),
        ("--path good.png --model_type '\udce9'", "not UTF-8"),
        ("--path good.png --observed --reference ''", "--reference is empty"),
        ("--path images/in", "way; move the picture"),
        ("--path good.png --reference good.png", "--observed"),
        ("--path good.png --observed --reference small.png", "small.png"),
        ("--path good.png --observed --reference rgb.png", "colour"),
        ("--path good.png --log_path text.txt/log.txt", "text.txt"),
        ("--path good.png --log_path empty", "empty is a folder"),
        ("--path good.png --log_path ''", "--log_path"),
        ("--path good.png --log_path good.txt", "good.png is a folder or an input"),
        ("--path ''", "--path is empty"),
        (f"--path {'a' * 300}", "File name too long"),
        ("--path pages.tif", "2 pages"),
        ("--path rgba.jpg", "no JPEG"),
        ("--seed -1", "--seed"),
        ("--seed 99999999999999999999", "--seed"),
        ("--model_type ../x", "--model_type"),
        ("--recipe quick", "--recipe"),
        ("--path good.png --observed --reference big.png --crop 32", "64x64"),
    ):
        yield "denoise", flags, words
    for flags, words in (
        ("--kernel nowhere.mat", "nowhere.mat: no such file"),
        ("--kernel ''", "--kernel is empty"),
        (f"--kernel {'a' * 300}.npy", "too long"),
        ("--kernel zero.npy", "sum above 0"),
        ("--kernel negative.npy", "sum above 0"),
        ("--kernel cube.npy", "matrix"),
        ("--kernel nan.npy", "finite"),
        ("--kernel object.npy", "object.npy: no PSF can be read"),
        ("--kernel text.mat", "text.mat: no PSF can be read"),
        ("--kernel cut.png", "cut.png is damaged"),
        ("--path good.png --kernel_size 33", "larger than the image of 32x32"),
        ("--path good.png --kernel_size 33 --observed", "larger than the image"),
        ("--kernel_size 1000000", "--kernel_size"),
        ("--kernel_size 0", "--kernel_size"),
        ("--kernel_sigma 0", "--kernel_sigma"),
    ):
        yield "deblur", flags, words


@pytest.fixture
def bad_files():
    """Make the files that bad_inputs names."""
    Path("empty").mkdir()
    for name in ("text.txt", "text.png", "text.mat"):
        Path(name).write_text("no image")
    Path("zero.png").touch()
    write("good.png")
    write("rgb.png", channels=3)
    write("small.png", side=31)
    write("big.png", side=64)
    write("images/in/good.png")
    Path("odd").mkdir()
    if sys.platform == "linux":  # others have no such names
        shutil.copy("good.png", os.fsdecode(b"odd/caf\xe9.png"))
    write("rgba.png", channels=4)
    Path("rgba.png").rename("rgba.jpg")
    cv2.imwritemulti("pages.tif", [np.zeros((32, 32), np.uint8)] * 2)
    for suffix in (".png", ".jpg", ".tif"):
        write("whole" + suffix)
        data = Path("whole" + suffix).read_bytes()
        Path("cut" + suffix).write_bytes(data[: len(data) // 2])
    for name, value in (("nan", np.nan), ("far", 255)):
        cv2.imwrite(f"{name}.tif", np.full((32, 32), value, np.float32))
    np.save("zero.npy", np.zeros((3, 3)))
    np.save("negative.npy", -np.eye(3))
    np.save("cube.npy", np.ones((3, 3, 3)))
    np.save("nan.npy", np.full((3, 3), np.nan))
    np.save("object.npy", np.array([{}], dtype=object))


def test_wrong_input_is_refused_in_one_line(bad_files, capfd):
    before = files()
    for task, flags, words in bad_inputs():
        assert run(task, flags) == 2, flags
        err = capfd.readouterr().err
        assert words in err, flags
        assert err.count("\n") == 1, flags
    assert files() == before


@pytest.mark.parametrize(
    ("error", "words", "status"),
    [
        (OSError(28, "No space left on device", "x.png"), "x.png: No space left", 1),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "--crop", 1),
        (KeyboardInterrupt(), "interrupted", 130),
    ],
)
def test_what_fails_later_is_one_line_too(error, words, status, monkeypatch, capsys):
    write("in/a.png")

    def fail(*_):
        raise error

    monkeypatch.setattr(denoise.Self2Self, "predict", fail)
    assert run("denoise", "--path in/a.png") == status
    assert words in capsys.readouterr().err


@pytest.fixture
def crash(monkeypatch):
    """Return a function that makes the n-th training step from now end the process."""
    real = denoise.Self2Self.train_step

    def at(steps):
        left = itertools.count(steps - 1, -1)

        def train_step(learner):
            if next(left) == 0:
                raise SystemExit(99)
            real(learner)

        monkeypatch.setattr(denoise.Self2Self, "train_step", train_step)

    return at


@pytest.mark.parametrize("recipe", ["paper", "fast"])
def test_a_run_resumed_after_crashes_is_the_uninterrupted_one(
    recipe, folder, crash, monkeypatch
):
    write("in/a.png")
    write("in/b.png", channels=3)
    flags = f"--path {folder}/in --iteration 7 --test_frequency 2 --recipe {recipe}"
    results = []
    for name, crashes in (("whole", []), ("cut", [1, 4, 5, 6, 2])):
        Path(name).mkdir()
        monkeypatch.chdir(folder / name)
        for steps in crashes:
            crash(steps)
            assert run("denoise", flags + " --resume") == 99
        crash(10**9)
        assert run("denoise", flags + " --resume") == 0
        results.append(without_seconds(files()))
        monkeypatch.chdir(folder)
    assert results[0] == results[1]


def test_a_killed_run_resumes_to_the_same_bytes():
    kills, differences = kill_and_compare(2, 60, longest=4)
    assert kills
    assert not differences


def test_processes_share_a_folder_and_any_number_of_them_resumes(folder, capsys):
    for name in "abcd":
        write(f"in/{name}.png")
    Path("in/e.png").write_text("no image")
    command = [sys.executable, ROOT / "denoise.py", "--path", "in", *QUICK.split()]
    share = {"WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            command, env=os.environ | share | {"RANK": rank}, stderr=subprocess.DEVNULL
        )
        for rank in "01"
    ]
    # The last one answers for the bad image; both do if they end at the same moment.
    assert max(p.wait() for p in processes) == 1
    summary = Path("logs/denoise/log-summary.csv")
    assert [row.split(",")[0] for row in summary.read_text().splitlines()[1:-1]] == [
        f"in/{name}.png" for name in "abcd"
    ]
    logs = [Path(f"logs/denoise/log.rank{rank}.csv").read_text() for rank in "01"]
    assert [len(log.split()) for log in logs] == [1 + 4, 1 + 4]
    expected = without_seconds(files("images"))
    lost = list(Path("images").glob("in/[bc].png/*/*"))
    for results in lost:
        shutil.rmtree(results)
    assert run("denoise", "--path in --resume") == 1
    assert capsys.readouterr().out.count("finished already") == 2
    assert without_seconds(files("images")) == expected


def test_the_last_of_several_processes_answers_for_all(monkeypatch, capsys):
    write("in/b.png")
    Path("in/a.png").write_text("no image")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, status in (("0", 0), ("1", 1)):
        monkeypatch.setenv("RANK", rank)
        assert run("denoise", "--path in") == status
    assert "a.png is damaged" in capsys.readouterr().err


def test_finished_images_are_skipped_and_more_steps_extend_them(
    capsys, crash, monkeypatch
):
    write("in/a.png")
    assert run("denoise", "--path in/a.png --iteration 6") == 0
    (results,) = Path("images/in/a.png/denoise").iterdir()
    longer = without_seconds(files(results))
    assert run("denoise", "--path in/a.png --iteration 4") == 0
    capsys.readouterr()
    crash(1)  # no step is made
    assert run("denoise", "--path in/a.png --iteration 4 --resume") == 0
    assert "finished already" in capsys.readouterr().out
    crash(3)  # two steps are enough
    with monkeypatch.context() as patch:
        patch.setattr(utils.Record, "_finish", lambda *_: sys.exit(99))
        assert run("denoise", "--path in/a.png --iteration 6 --resume") == 99
    assert run("denoise", "--path in/a.png --iteration 6 --resume") == 0
    assert without_seconds(files(results)) == longer


def test_a_damaged_checkpoint_gives_way_to_the_one_before(capsys):
    write("in/a.png")
    assert run("denoise", "--path in/a.png") == 0
    (newest,) = Path("images").rglob("checkpoint.pt")
    expected = without_seconds(files(newest.parent))
    newest.write_bytes(newest.read_bytes()[:1000])
    (newest.parent / "comparison.png").unlink()
    assert run("denoise", "--path in/a.png --resume") == 0
    out = capsys.readouterr().out
    assert f"{newest}: damaged" in out
    assert "going on from step 2" in out
    assert without_seconds(files(newest.parent)) == expected


def test_a_checkpoint_of_another_picture_is_refused(capsys):
    write("in/a.png")
    assert run("denoise", "--path in/a.png") == 0
    write("in/a.png")
    before = files()
    assert run("denoise", "--path in/a.png --resume") == 2
    assert "of another image or noise" in capsys.readouterr().err
    assert files() == before


def test_a_checkpoint_with_another_reference_is_refused(capsys):
    write("in/a.png")
    write("b.png")
    observed = "--path in/a.png --observed"
    assert run("denoise", f"{observed} --reference b.png") == 0
    assert run("denoise", f"{observed} --resume") == 2
    assert "of another reference" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "status"), [(2, 130), (15, 143)])
def test_a_signal_stops_after_the_step_with_a_checkpoint(
    number, status, monkeypatch, capsys
):
    write("in/a.png")
    real = denoise.Self2Self.train_step

    def train_step(learner):
        real(learner)
        if learner.step == 3:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(denoise.Self2Self, "train_step", train_step)
    assert run("denoise", "--path in/a.png") == status
    assert "stopped at step 3; go on with: python" in capsys.readouterr().err
    assert run("denoise", "--path in/a.png --iteration 2 --resume") == 2
    assert "of step 3 already" in capsys.readouterr().err
    assert run("denoise", "--path in/a.png --resume") == 0
    assert "going on from step 3" in capsys.readouterr().out


def test_training_learns():
    flags = "--path coffee --crop 64 --sigma 50 --lr 1e-3 --iteration 150"
    flags += " --test_frequency 150 --num_prediction 10"
    assert run("denoise", flags) == 0
    (path,) = Path("images").rglob("record.json")
    record = json.loads(path.read_text())
    assert record["rows"][-1][2] > record["observation"][0] + 4
