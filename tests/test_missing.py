"""Pictures of which pixels are missing: what is hidden, what comes back, what is named."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import scipy.io
from scripts import SCRIPTS, run, write

import results

ONE_TEST = " --test_frequency 4"  # not one within the training, too


def folder_of(task, picture="in/a.png"):
    """The only folder that the last run left; it is renamed, so that the next has its own."""
    (found,) = Path("images", picture, task).iterdir()
    return found.rename(f"{found.name}-{len(list(Path().iterdir()))}")


def read(path):
    return cv2.imread(str(path), cv2.IMREAD_UNCHANGED)


@pytest.mark.parametrize("channels", [1, 3])
def test_hidden_pixels_are_a_share_of_all_and_known_ones_come_back(channels):
    write("in/a.png", channels, side=40)
    clean, hidden = read("in/a.png").clip(min=1), []  # 0 means hidden, below
    cv2.imwrite("in/a.png", clean)
    clean = clean.reshape(40, 40, -1)
    for seed in (3, 4):
        flags = f"--path in/a.png --sigma 0 --missing 0.7 --seed {seed}{ONE_TEST}"
        assert run("denoise", flags) == 0
        made = folder_of("denoise")
        assert "sigma0_" in made.name and "missing0.7" in made.name
        error = scipy.io.loadmat(made / "error.mat")["error"].reshape(40, 40, -1)
        observation = read(made / "noisy.png").reshape(40, 40, -1)
        restored = read(made / "restored.png").reshape(40, 40, -1)
        gone = (observation == 0).all(2)
        assert 0.65 < gone.mean() < 0.75
        np.testing.assert_array_equal(observation[~gone], clean[~gone])
        np.testing.assert_array_equal(restored[~gone], clean[~gone])
        assert (restored[gone] > 0).all()
        # After so few steps some predictions agree to float32's last digits.
        assert (error[gone] > 0).mean() > 0.99 and (error[~gone] == 0).all()
        hidden.append(gone)
    assert (hidden[0] != hidden[1]).any()


def test_a_mask_of_equal_colours_is_a_gray_one():
    write("in/a.png")
    mask = np.ones((32, 32), np.uint8)
    mask[5:9] = 0
    for name, pixels in (("gray", mask), ("rgb", np.dstack([mask] * 3))):
        cv2.imwrite(f"{name}.png", pixels)
        flags = f"--path in/a.png --sigma 0 --mask {name}.png{ONE_TEST}"
        assert run("denoise", flags) == 0
    gray, rgb = (read(f) for f in sorted(Path("images").rglob("restored.png")))
    np.testing.assert_array_equal(gray, rgb)


def test_noise_and_blur_leave_no_pixel_as_it_was():
    write("in/a.png", side=64)
    for task, sigma in (("denoise", 5), ("deblur", 0)):
        assert run(task, f"--path in/a.png --sigma {sigma} --missing 0.5") == 0
        made = folder_of(task)
        observation, restored = read(made / "noisy.png"), read(made / "restored.png")
        known = observation > 0
        assert (restored[known] != observation[known]).mean() > 0.9


@pytest.mark.parametrize("task", SCRIPTS)
def test_mask_says_what_is_missing(task):
    write("in/a.png", 3, side=56)
    mask = np.full((56, 56), 255, np.uint8)
    mask[20:30, 5:40] = 0
    names = set()
    for value in (1, 0):  # whatever is not 0 is known
        mask[45] = value
        cv2.imwrite("in/mask.tif", mask)
        flags = (
            "--path in/a.png --mask in/mask.tif --crop 40 --observed --noise_sigma 0"
        )
        assert run(task, flags + ONE_TEST) == 0
        made = folder_of(task)
        assert made.name.startswith("observed_mask-mask-")
        names.add(made.name.rpartition("-")[0])
        gone = (read(made / "noisy.png") == 0).all(2)
        assert (gone == (mask[8:48, 8:48] == 0)).mean() > 0.99
    assert len(names) == 2


def test_each_channel_has_a_mask_of_its_own():
    write("in/a.png", 3, side=40)
    mask = np.full((40, 40, 3), 9, np.uint8)
    mask[:20, :, 2] = 0  # red, in OpenCV's order
    cv2.imwrite("in/mask.png", mask)
    assert run("denoise", "--path in/a.png --mask in/mask.png --sigma 0") == 0
    observation = read(folder_of("denoise") / "noisy.png")
    assert (observation[:20, :, 2] == 0).all()
    cv2.imwrite(
        "in/mask.png", np.full((40, 40, 3), (9, 9, 0), np.uint8)
    )  # of red nothing
    assert run("denoise", "--path in/a.png --mask in/mask.png --observed") == 0
    np.testing.assert_array_equal(observation[..., :2], read("in/a.png")[..., :2])


def test_resumed_runs_keep_what_is_missing(crash):
    write("in/a.png", side=40)
    flags = "--path in/a.png --sigma 0 --missing 0.5 --recipe paper"
    assert run("denoise", flags) == 0
    whole = folder_of("denoise")
    crash(3)
    assert run("denoise", flags) == 99
    crash(10**9)
    assert run("denoise", f"{flags} --resume") == 0
    again = folder_of("denoise")
    for name in ("restored.png", "noisy.png", "uncertainty.png"):
        assert (again / name).read_bytes() == (whole / name).read_bytes()


def test_uncertainty_is_the_predictions_deviation(monkeypatch, figures):
    drawn, draw = [], results.comparison

    def watched_drawing(panels, ends):
        drawn.append((panels, ends))
        return draw(panels, ends)

    monkeypatch.setattr(results, "comparison", watched_drawing)
    made, add = [], results.Result.add

    def watched(result, restored, *fused):
        made.append(restored.variance)
        add(result, restored, *fused)

    monkeypatch.setattr(results.Result, "add", watched)
    write("in/a.png", 3, side=40)
    assert run("denoise", "--path in/a.png") == 0
    # planes are orthonormal: the mean over them is the mean over the channels
    ((title, deviation),), ends = drawn[-2][0].items(), drawn[-2][1]
    np.testing.assert_allclose(deviation[0] ** 2, 255**2 * made[-1].mean(0), rtol=1e-4)
    assert ends == (0, deviation.max()) and f"0 to {deviation.max():.3g}" in title
    picture = read(folder_of("denoise") / "uncertainty.png")
    assert min(picture.shape[:2]) > 300
