"""Files that are written whole and repeat, .mat files, and simulated noise."""

import numpy as np
import pytest
import scipy.io

import pictures
import utils
from network.noise import gaussian_noise


def test_noise_is_white_and_of_the_named_sigma():
    noise = gaussian_noise((3, 200, 200), 25, 1)
    assert noise.std() * 255 == pytest.approx(25, rel=0.01)
    assert abs(np.mean(noise[0] * noise[1])) < 4 * (25 / 255) ** 2 / 200
    assert (noise == gaussian_noise((3, 200, 200), 25, 1)).all()
    assert not (noise == gaussian_noise((3, 200, 200), 25, 2)).any()


def test_mat_files_repeat(tmp_path, monkeypatch):
    pictures.save_mat(tmp_path / "a.mat", "noise", np.eye(3))
    monkeypatch.setattr("time.asctime", lambda: "another day")
    pictures.save_mat(tmp_path / "b.mat", "noise", np.eye(3))
    assert (tmp_path / "a.mat").read_bytes() == (tmp_path / "b.mat").read_bytes()
    assert (scipy.io.loadmat(tmp_path / "a.mat")["noise"] == np.eye(3)).all()


def test_write_atomically_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    utils.write_atomically(path, b"old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        utils.write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [f.name for f in tmp_path.iterdir()] == ["a.txt"]
