"""Folders of images, on one process and several."""

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scripts import QUICK, ROOT, files, run, without_seconds, write

import utils


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
    held = []
    advance = utils.Run.advance

    def look(run, step):
        advance(run, step)
        held.append([r.name for r in run.results if r.observation is not None])

    monkeypatch.setattr(utils.Run, "advance", look)
    assert run("denoise", "--path in --iteration 1") == 0
    assert held == [[f"in/{name}.png"] for name in "abc"]


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
