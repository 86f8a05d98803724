"""Folders of images, on one process and several."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import cv2
import numpy as np
import pytest
import skimage.data
import tifffile
from scripts import QUICK, RNG, ROOT, files, run, without_seconds, write
from skimage.metrics import peak_signal_noise_ratio

import results
import utils
from network import recipes


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
    last = [float(row[3]) for row in rows[2::2]]
    text = Path("logs/denoise/log-summary.csv").read_text()
    *_, average = csv.DictReader(text.splitlines())
    assert float(average["psnr"]) == pytest.approx(np.mean(last))


def test_only_the_image_at_hand_is_held_in_memory(monkeypatch):
    for name in "abc":
        write(f"in/{name}.png")
    held, pictures, keep = [], weakref.WeakSet(), results.Result.keep

    def look(result):
        keep(result)
        pictures.add(result)
        held.append([r.name for r in pictures])

    monkeypatch.setattr(results.Result, "keep", look)
    assert run("denoise", "--path in --iteration 1") == 0
    step_and_test = 2
    assert held == [[f"in/{name}.png"] for name in "abc" for _ in range(step_and_test)]


def test_processes_share_a_folder_and_any_number_of_them_resumes(
    monkeypatch, capsys, figures
):
    for name in "abcd":
        write(f"in/{name}.png")
    Path("in/e.png").write_text("no image")
    command = [sys.executable, ROOT / "denoise.py", "--path", "in", *QUICK.split()]
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    other = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    monkeypatch.setenv("RANK", "0")
    # Each ends with 0: torchrun would end the other one.
    assert [run("denoise", "--path in"), other.wait()] == [0, 0]
    monkeypatch.delenv("WORLD_SIZE")
    capsys.readouterr()
    summary = Path("logs/denoise/log-summary.csv")
    assert [row.split(",")[0] for row in summary.read_text().splitlines()[1:-1]] == [
        f"in/{name}.png" for name in "abcd"
    ]
    assert len(Path("logs/denoise/log.csv").read_text().split()) == 1 + 4 * 2
    expected = without_seconds(files("images"))
    lost = list(Path("images").glob("in/[bc].png/*/*"))
    for gone in lost:
        shutil.rmtree(gone)
    assert run("denoise", "--path in --resume") == 1
    assert capsys.readouterr().out.count("finished already") == 2
    assert without_seconds(files("images")) == expected


def test_the_summary_has_what_another_process_finishes_meanwhile(monkeypatch):
    for name in "ab":
        write(f"in/{name}.png")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(utils, "EVERY", 0)
    monkeypatch.setattr(utils.Progress, "_draw_until_closed", lambda progress: None)
    plain, calls = utils.csv_text, []

    def late(rows):
        """What one process has read is written when the other one has ended."""
        calls.append(len(rows))
        if len(calls) == 3:  # after two tests, the end
            monkeypatch.setenv("RANK", "1")
            assert run("denoise", "--path in") == 0
        return plain(rows)

    monkeypatch.setattr(utils, "csv_text", late)
    monkeypatch.setenv("RANK", "0")
    assert run("denoise", "--path in") == 0
    assert calls[2] < calls[-1]
    rows = Path("logs/denoise/log-summary.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows[1:-1]] == ["in/a.png", "in/b.png"]


def test_logs_of_many_images_are_written_no_more_often_than_pays(monkeypatch):
    for name in "abcd":
        write(f"in/{name}.png")
    read, drawn, real = [], [], results.read_record
    monkeypatch.setattr(results, "read_record", lambda f: read.append(f) or real(f))
    monkeypatch.setattr(results, "curves", lambda records: drawn.append(records) or b"")
    assert run("denoise", "--path in --test_frequency 1 --iteration 2") == 0
    # After the first test, and at the end.
    assert len(drawn) == 2
    assert len(read) == 3 * 4  # once before it begins
    lines = Path("logs/denoise/log.csv").read_text().splitlines()
    assert len(lines) == 1 + 4 * 2
    monkeypatch.setattr(results.Result, "finish", lambda _: sys.exit(99))
    assert run("denoise", "--path in --test_frequency 1 --iteration 3") == 99
    lines = Path("logs/denoise/log.csv").read_text().splitlines()
    assert len(lines) == 1 + 3  # what the end has missed is there


def test_a_script_runs_in_a_thread_too():
    write("in/a.png")
    statuses = []
    thread = threading.Thread(
        target=lambda: statuses.append(run("denoise", "--path in/a.png"))
    )
    thread.start()
    thread.join()
    assert statuses == [0]


def test_one_of_several_processes_names_what_failed(monkeypatch, capsys):
    write("in/b.png")
    Path("in/a.png").write_text("no image")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        assert run("denoise", "--path in") == 0
    assert "1 of 2 images failed: in/a.png" in capsys.readouterr().err


@pytest.mark.parametrize(
    "shape, dtype, kind",
    [
        ((40, 32), np.uint16, "minisblack"),
        ((40, 32, 3), np.float32, "rgb"),
        ((32, 33, 4), np.uint8, "rgb"),
    ],
)
def test_stack_becomes_a_stack_of_its_restored_pages(shape, dtype, kind, capsys):
    Path("in").mkdir()
    peak = 1 if dtype == np.float32 else np.iinfo(dtype).max
    clean = (np.random.default_rng(0).random((2, *shape)) * peak).astype(dtype)
    with tifffile.TiffWriter("in/cells.TIF") as stack:
        extra = ["unspecified"] * (shape[2:] == (4,))
        for page in clean:
            stack.write(page, photometric=kind, extrasamples=extra, contiguous=False)
    assert run("denoise", "--path in --observed --test_frequency 4") == 0
    assert capsys.readouterr().out.count("restored.tif") == 1
    (made,) = Path("images/in/cells.TIF/denoise").iterdir()
    joined = tifffile.TiffFile(made / "restored.tif")
    assert len(joined.pages) == 2 and joined.pages[0].photometric.name.lower() == kind
    for number, page in enumerate(joined.pages, 1):
        pixels = page.asarray()
        assert pixels.dtype == dtype
        folder = made.parent.parent / f"{number}" / "denoise" / made.name
        alone = cv2.imread(str(folder / "restored.tif"), cv2.IMREAD_UNCHANGED)
        if alone.ndim == 3:
            alone = np.dstack([alone[..., 2::-1], alone[..., 3:]])
        np.testing.assert_array_equal(pixels, alone)
        noisy = cv2.imread(str(folder / "noisy.png"), cv2.IMREAD_UNCHANGED)
        noisy = noisy / np.iinfo(noisy.dtype).max
        seen = clean[number - 1] / peak
        seen = seen[..., [2, 1, 0, 3][: shape[2]]] if len(shape) == 3 else seen
        np.testing.assert_allclose(noisy, seen, atol=1e-4)


def test_stack_is_resumed_page_by_page(capsys):
    Path("in").mkdir()
    clean = np.random.default_rng(0).integers(0, 256, (3, 32, 32), np.uint8)
    tifffile.imwrite("in/a.tif", clean, photometric="minisblack")
    assert run("denoise", "--path in/a.tif --test_frequency 4") == 0
    expected = without_seconds(files("images"))
    shutil.rmtree("images/in/a.tif/2")
    (stack,) = Path("images/in/a.tif/denoise").iterdir()
    (stack / "restored.tif").unlink()
    assert run("denoise", "--path in/a.tif --test_frequency 4 --resume") == 0
    assert capsys.readouterr().out.count("finished already") == 2
    assert without_seconds(files("images")) == expected
    clean[1, 0, 0] += 1
    tifffile.imwrite("in/a.tif", clean, photometric="minisblack")
    assert run("denoise", "--path in/a.tif --test_frequency 4") == 0
    kept = Path("images/in/a.tif/2/denoise", f"{stack.name}~1", "restored.tif")
    assert (
        kept.read_bytes() == expected[f"in/a.tif/2/denoise/{stack.name}/restored.tif"]
    )
    assert len(tifffile.TiffFile(stack / "restored.tif").pages) == 3
    kept = stack.with_name(f"{stack.name}~1") / "restored.tif"
    assert kept.read_bytes() == expected[f"in/a.tif/denoise/{stack.name}/restored.tif"]


def test_stack_with_a_bad_page_is_not_joined(capsys):
    Path("in").mkdir()
    with tifffile.TiffWriter("in/a.tif") as stack:
        for side in (32, 8, 40):
            stack.write(np.full((side, side), 9, np.uint8))
    assert run("denoise", "--path in/a.tif --test_frequency 4") == 1
    assert "1 of 3 images failed: in/a.tif/2" in capsys.readouterr().err
    assert {f.name for f in Path("images/in/a.tif").iterdir()} == {"1", "3"}


def test_what_failed_now_has_no_earlier_score_and_joins_no_stack(capsys):
    for folder, sides in (("a/in", (32, 32, 32)), ("b/in", (32, 8, 32))):
        Path(folder).mkdir(parents=True)
        with tifffile.TiffWriter(f"{folder}/a.tif") as stack:
            for side in sides:
                pixels = np.random.default_rng(side).integers(0, 256, (side, side))
                stack.write(pixels.astype(np.uint8), contiguous=False)
    assert run("denoise", "--path a/in/a.tif --test_frequency 4") == 0
    (stack,) = Path("images/in/a.tif/denoise").iterdir()
    before = files(stack)
    assert run("denoise", "--path b/in/a.tif --test_frequency 4") == 1
    assert files(stack) == before
    pages = tifffile.imread("a/in/a.tif", key=slice(None))
    tifffile.imwrite("a/in/a.tif", 255 - pages, photometric="minisblack")
    capsys.readouterr()
    assert run("denoise", "--path a/in/a.tif --test_frequency 4 --resume") == 2
    assert "restored.tif" not in capsys.readouterr().out
    tifffile.imwrite("a/in/a.tif", pages[0, :8])  # a picture in the stack's place
    assert run("denoise", "--path a/in/a.tif --test_frequency 4 --resume") == 2
    assert files(stack) == before
    summary = Path("logs/denoise/log-summary.csv").read_text()
    assert [row.split(",")[0] for row in summary.splitlines()[1:]] == [
        "in/a.tif/1",
        "in/a.tif/3",
        "average",
    ]


def test_processes_join_a_stack_once_all_its_pages_are_new(monkeypatch):
    Path("in").mkdir()
    monkeypatch.setenv("WORLD_SIZE", "2")
    for value in (50, 200):
        pages = np.full((2, 32, 32), value, np.uint8)
        tifffile.imwrite("in/a.tif", pages, photometric="minisblack")
        for rank in "01":
            monkeypatch.setenv("RANK", rank)
            assert run("denoise", "--path in/a.tif --sigma 0 --test_frequency 4") == 0
        # The first process may have joined its new page to the other's old one: "~1".
        joined_in = min(Path("images/in/a.tif/denoise").iterdir())
        joined = cv2.imreadmulti(str(joined_in / "restored.tif"))[1]
        assert [abs(page.mean() - value) < 20 for page in joined] == [True, True]
        joined_in.rename(f"{value}")


def photons(picture, gain=40, offset=900):
    """Counts of a camera of 16 bits: Poisson noise, and read noise; (96, 96)."""
    clean = cv2.resize(picture[:256, :256], (96, 96)) * 8.0 + 400
    counts = gain * RNG.poisson(clean / gain) + RNG.normal(0, offset**0.5, clean.shape)
    return counts.clip(0, 65535).astype(np.uint16)


def noises():
    """Return the noise in each record, by the name of its folder."""
    records = Path("images").rglob("record.json")
    return {
        path.parents[2].name: json.loads(path.read_text())["noise"] for path in records
    }


@pytest.mark.parametrize("task", ["denoise", "deblur"])
def test_the_noise_of_a_stack_is_found_once_for_all_planes(task, monkeypatch):
    """The third plane, full of texture, does not show alone that its noise grows."""
    pictures = skimage.data.camera(), skimage.data.camera()[::-1], skimage.data.grass()
    planes = np.stack([photons(picture) for picture in pictures])
    Path("in").mkdir()
    tifffile.imwrite("in/a.tif", planes, photometric="minisblack")
    tifffile.imwrite("alone.tif", planes[2], photometric="minisblack")
    assert run(task, "--path alone.tif --observed --iteration 1") == 0
    (alone,) = noises().values()
    found, find = [], recipes.find_noise
    monkeypatch.setattr(
        recipes, "find_noise", lambda *y: found.append(y) or find(*y), raising=True
    )
    assert run(task, "--path in/a.tif --observed --iteration 1") == 0
    assert [y.shape for y, _ in found] == [(1, 3 * 96, 96)]
    told = noises()
    assert told["1"] == told["2"] == told["3"] and "grows" not in alone
    words = told["3"].removeprefix("white, grows with the signal: ")
    for sigma, intensity in re.findall(r"sigma (\d+) at (\d+)", words):
        expected = (40 * float(intensity) + 900) ** 0.5
        assert float(sigma) == pytest.approx(expected, rel=0.1)


def test_planes_of_another_size_and_bad_ones_do_not_count_for_the_noise(capsys):
    Path("in").mkdir()
    with tifffile.TiffWriter("in/a.tif") as stack:
        for side in (64, 8, 40, 64):
            pixels = np.random.default_rng(side).normal(128, 9, (side, side))
            stack.write(pixels.astype(np.uint8), contiguous=False)
    assert run("denoise", "--path in/a.tif --observed --iteration 1") == 1
    assert "in/a.tif/2: 8x8 pixels" in capsys.readouterr().err
    told = noises()
    assert told.keys() == {"1", "3", "4"}
    assert told["1"] == told["3"] == told["4"]


def test_each_plane_is_scored_by_the_references_plane(capsys):
    Path("in").mkdir()
    clean = np.random.default_rng(0).integers(0, 256, (3, 40, 40), np.uint8)
    noisy = clean // 2
    for name, planes in (
        ("in/a.tif", noisy),
        ("clean.tif", clean),
        ("two.tif", clean[:2]),
        ("small.tif", clean[:, :32]),
    ):
        tifffile.imwrite(name, planes, photometric="minisblack")
    flags = "--path in/a.tif --observed --iteration 1 --reference"
    for name in ("two.tif", "clean.tif/1", "in"):
        assert run("denoise", f"{flags} {name}") == 2
    assert "2 planes for 3 images" in capsys.readouterr().err
    assert not Path("images").exists()
    assert run("denoise", f"{flags} small.tif") == 2
    assert "small.tif/1: 40x32 gray, but in/a.tif/1 is 40x40" in capsys.readouterr().err
    assert run("denoise", f"{flags} clean.tif") == 0
    table = Path("logs/denoise/log-summary.csv").read_text()
    rows = list(csv.DictReader(table.splitlines()))
    expected = [peak_signal_noise_ratio(*pair) for pair in zip(clean, noisy)]
    assert [float(row["observation_psnr"]) for row in rows[:3]] == pytest.approx(
        expected, abs=1e-3
    )


@pytest.mark.skipif(sys.platform != "linux", reason="others have no such names")
def test_any_name_of_a_file_will_do(capsys):
    """It need not be UTF-8."""
    write("in/a.png")
    name = os.fsdecode(b"caf\xe9.png")
    Path("in/a.png").rename(Path("in", name))
    assert run("denoise", "in --output out") == 0
    assert Path("out", name).exists()
    for log in ("log.txt", "log.csv", "log-summary.csv"):
        assert b"in/caf\\udce9.png" in Path("logs/denoise", log).read_bytes()


def test_what_fails_now_in_another_process_has_no_earlier_score(monkeypatch):
    summary = Path("logs/denoise/log-summary.csv")
    for name in "abc":
        write(f"in/{name}.png")
    monkeypatch.setenv("WORLD_SIZE", "2")
    good = Path("in/b.png").read_bytes()
    for data, ranks, names in (
        (good, "01", "abc"),
        (b"no image", "10", "ac"),
        (good, "01", "abc"),
    ):
        Path("in/b.png").write_bytes(data)
        for rank in ranks:
            monkeypatch.setenv("RANK", rank)
            assert run("denoise", "--path in --test_frequency 4 --resume") == 0
        rows = [row.split(",")[0] for row in summary.read_text().splitlines()[1:-1]]
        assert rows == [f"in/{name}.png" for name in names]
