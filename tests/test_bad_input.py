"""What a user can get wrong ends in one line, and what fails later too."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import scipy.io
import tifffile
import torch
from scripts import files, run, write

import network
from network import health


def bad_inputs():
    """Make one of every unusable input, and yield (task, flags, words of the error)."""
    for flags, words in (
        ("--path nowhere", "nowhere: no such file"),
        ("--path empty", "no PNG, JPEG or TIFF image"),
        ("--path text.txt", "not a PNG, JPEG or TIFF"),
        ("--path photo.heic", "convert to PNG or TIFF"),
        ("--path empty", "convert to PNG or TIFF"),
        ("--path text.png", "text.png is damaged"),
        ("--path zero.png", "zero.png is damaged"),
        ("--path cut.png", "cut.png is damaged"),
        ("--path cut.jpg", "cut.jpg is damaged"),
        ("--path cut.tif", "cut.tif is damaged"),
        ("--path nan.tif", "NaN"),
        ("--path small.png", "31x31 pixels; a side needs 32"),
        ("--path good.png --crop 31", "31x31 pixels"),
        ("--drop_rate 1", "--drop_rate: '1' is not a rate"),
        ("--drop_rate -0.1", "rate"),
        ("--sigma -1", "--sigma"),
        ("--sigma nan", "--sigma"),
        ("--sigma 1e200", "--sigma"),
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
        ("--missing 1", "--missing"),
        ("--path good.png --missing 0.5 --mask good.png", "drop one"),
        ("--path good.png --mask nowhere.png", "nowhere.png"),
        ("--path good.png --mask text.png", "text.png is damaged"),
        ("--path good.png --mask black.png", "every pixel is missing"),
        ("--path good.png --mask wide.png", "wide.png: 40x32"),
        (
            "--path good.png --mask white.png",
            "white.png: no pixel of this mask is 0 or transparent",
        ),
        ("--path good.png --mask coloured.png", "coloured.png: 32x32 colour"),
        ("--path good.png --mask whole.jpg", "a JPEG's zeros are not exact"),
        ("--fuse on --drop_rate 0", "--drop_rate"),
        ("--noise_sigma 5", "--observed"),
        ("--fuse on --num_prediction 1", "several"),
        ("--observed --noise_sigma -1", "--noise_sigma"),
        ("--path good.png --observed --noise_sigma 1e15", "times the picture's range"),
        ("--lr 1e300", "--lr"),
        ("--bs 1000000000000", "--bs"),
        ("--device abacus", "no device 'abacus'"),
        ("--device cuda:99", "no device 'cuda:99'"),
        ("--device cuda:01", "no device"),
        ("--device cuda:200", "no device"),
        ("--device meta", "no device"),
        ("--device hpu", "no device"),
        ("--path good.png --observed --reference ''", "it is empty"),
        ("--path images/in", "images/in/good.png: results go there"),
        ("--path good.png --reference good.png", "--observed"),
        ("--path good.png --observed --reference small.png", "small.png"),
        ("--path good.png --observed --reference rgb.png", "colour"),
        ("--path good.png --log_path text.txt/log.txt", "text.txt"),
        ("--path good.png --log_path empty", "empty is a folder"),
        ("--path good.png --log_path ''", "--log_path"),
        ("--path good.png --log_path good.txt", "good.png is a folder or an input"),
        ("--path good.png --log_path .", "a text file, such as log.txt"),
        ("--path good.png --log_path log.csv", "a text file, such as log.txt"),
        ("--path ''", "it is empty"),
        (f"--path {'a' * 300}", "File name too long"),
        ("--path good.png --observed --reference pages.tif", "2 planes for 1 images"),
        ("--path good.png --mask pages.tif", "2 planes"),
        (
            "--path pages.tif --observed --reference good.png",
            "or with a stack of as many",
        ),
        ("--path pages.tif/1", "pages.tif/1: no such file"),
        ("--path rgba.jpg", "no JPEG"),
        ("--path cmyk.tif", "cmyk.tif: SEPARATED pixels"),
        ("--path many.tif", "many.tif: 5 samples"),
        ("--path early.tif", "image: it ends before its pixels do"),
        ("--seed -1", "--seed"),
        ("--seed 99999999999999999999", "--seed"),
        ("--model_type ../x", "--model_type"),
        ("--model_type ..", "--model_type"),
        ("--recipe quick", "--recipe"),
        ("--path good.png --observed --reference big.png --crop 32", "64x64"),
    ):
        yield "denoise", flags, words
    for flags, words in (
        ("--kernel nowhere.mat", "nowhere.mat: No such file"),
        ("--kernel ''", "it is empty"),
        (f"--kernel {'a' * 300}.npy", "too long"),
        ("--kernel zero.npy", "sum above 0"),
        ("--kernel negative.npy", "sum above 0"),
        ("--kernel cube.npy", "matrix"),
        ("--kernel nan.npy", "finite"),
        ("--kernel object.npy", "object.npy is damaged, or no PSF"),
        ("--kernel two.mat", "two.mat: it has neither `kernel` nor a single matrix"),
        ("--kernel text.mat", "text.mat is damaged, or no PSF"),
        ("--kernel cut.png", "cut.png is damaged"),
        ("--kernel text.txt", "a PSF is .mat, .npy or an image"),
        ("--path good.png --kernel_size 33", "larger than the image of 32x32"),
        ("--path good.png --kernel_size 33 --observed --boundary wrap", "larger"),
        ("--path good.png --boundary valid --kernel_size 2", "leaves 31x31 pixels"),
        ("--path good.png --boundary valid --kernel_size 99", "leaves 0x0 pixels"),
        ("--kernel_size 1000000", "--kernel_size"),
        ("--kernel_size 0", "--kernel_size"),
        ("--kernel_sigma 0", "--kernel_sigma"),
    ):
        yield "deblur", flags, words


@pytest.fixture
def bad_files():
    """Make the files that bad_inputs names."""
    Path("empty").mkdir()
    for name in ("photo.heic", "text.txt", "text.png", "text.mat"):
        Path(name).write_text("no image")
    Path("zero.png").touch()
    write("good.png")
    write("rgb.png", channels=3)
    write("small.png", side=31)
    cv2.imwrite("black.png", np.zeros((32, 32), np.uint8))
    cv2.imwrite("white.png", np.full((32, 32), 255, np.uint8))
    cv2.imwrite("wide.png", np.eye(32, 40, dtype=np.uint8))
    write("coloured.png", channels=3)
    write("big.png", side=64)
    write("images/in/good.png")
    write("rgba.png", channels=4)
    Path("rgba.png").rename("rgba.jpg")
    samples = np.zeros((32, 32, 5), np.uint8)
    tifffile.imwrite("cmyk.tif", samples[..., :4], photometric="separated")
    tifffile.imwrite("many.tif", samples, planarconfig="contig")
    tifffile.imwrite("early.tif", samples[..., 0], compression="zlib")
    data = Path("early.tif").read_bytes()
    Path("early.tif").write_bytes(data[:-8])
    cv2.imwritemulti("pages.tif", [np.zeros((32, 32), np.uint8)] * 2)
    for suffix in (".png", ".jpg", ".tif"):
        write("whole" + suffix)
        data = Path("whole" + suffix).read_bytes()
        Path("cut" + suffix).write_bytes(data[: len(data) // 2])
    cv2.imwrite("nan.tif", np.full((32, 32), np.nan, np.float32))
    np.save("zero.npy", np.zeros((3, 3)))
    np.save("negative.npy", -np.eye(3))
    np.save("cube.npy", np.ones((3, 3, 3)))
    np.save("nan.npy", np.full((3, 3), np.nan))
    scipy.io.savemat("two.mat", {"a": np.eye(3), "b": np.eye(3)})
    np.save("object.npy", np.array([{}], dtype=object))


def over(error):
    """An error that is raised while another one is handled, as a capture's end does."""
    try:
        try:
            raise error
        finally:
            raise RuntimeError("CUDA error: operation failed due to a previous error")
    except RuntimeError as on_top:
        return on_top


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
        (RuntimeError("cuFFT error: CUFFT_ALLOC_FAILED"), "--crop", 1),
        (over(torch.OutOfMemoryError("CUDA out of memory")), "--crop", 1),
    ],
)
def test_what_fails_later_is_one_line_too(error, words, status, monkeypatch, capsys):
    write("in/a.png")

    def fail(*_):
        raise error

    monkeypatch.setattr(network.Self2Self, "predict", fail)
    assert run("denoise", "--path in/a.png") == status
    assert words in capsys.readouterr().err


def test_output_that_is_not_finite_is_no_result(capsys):
    assert run("denoise", "--path camera --crop 32 --lr 1e30") == 1
    assert "a lower --lr than 1e+30 cures it" in capsys.readouterr().err
    assert not list(Path("images").rglob("restored.png"))


def test_a_network_that_dies_starts_over(capsys, monkeypatch):
    flags = "--path camera --crop 32 --lr 0.1 --iteration 16 --test_frequency 16"
    flags += " --recipe paper"
    monkeypatch.setattr(health, "ATTEMPTS", 1)
    monkeypatch.setattr(health, "CHECK_EVERY", 16)
    assert run("denoise", flags) == 1
    out, err = capsys.readouterr()
    assert "by step 16: started over at the mean, learning rate 0.05" in out
    assert "by step 16; a lower --lr than 0.1 cures it" in err
    assert "started over" in Path("logs/denoise/log.txt").read_text()


def test_a_network_that_is_dead_at_the_last_step_is_called_so(capsys, monkeypatch):
    write("in/a.png")
    monkeypatch.setattr(network.Self2Self, "alive", lambda learner: learner.step < 7)
    flags = "--path in/a.png --iteration 7 --test_frequency 3 --recipe paper"
    monkeypatch.setattr(health, "ATTEMPTS", 1)
    assert run("denoise", flags) == 1
    out, err = capsys.readouterr()
    assert "by step 7: started over at the mean" in out
    assert "died" in err and "a lower --lr than 0.0001 cures it" in err
    monkeypatch.setattr(health, "EARLY", 6)
    assert run("denoise", flags) == 1
    out, err = capsys.readouterr()
    assert "started over" not in out
    assert "a lower --lr than 0.0001 cures it; the result of step 6 is kept" in err


def test_a_network_that_dies_late_leaves_its_last_good_result(capsys, monkeypatch):
    write("in/a.png")
    monkeypatch.setattr(health, "CHECK_EVERY", 10)
    monkeypatch.setattr(health, "EARLY", 15)
    monkeypatch.setattr(network.Self2Self, "alive", lambda learner: learner.step < 20)
    flags = "--path in/a.png --iteration 30 --test_frequency 10 --recipe paper"
    assert run("denoise", flags) == 1
    assert "the result of step 10 is kept" in capsys.readouterr().err
    (restored,) = Path("images").rglob("restored.png")
    kept = restored.with_name("Self2Self-10.png")
    assert restored.read_bytes() == kept.read_bytes()
    record = json.loads(restored.with_name("record.json").read_text())
    assert [row[0] for row in record["rows"]] == [10]
    log = Path("logs/denoise/log.txt").read_text()
    assert "failed: in/a.png: the network died" in log
    assert "step      20" not in log
