"""Malformed and odd files: a part of what tests/corpus.py reads."""

import collections

import corpus
import numpy as np


def test_odd_files_are_usable_or_refused_in_one_line(tmp_path):
    counts = collections.Counter()
    for number, path in enumerate(corpus.make(tmp_path, bombs=False)):
        if number % 6 == 0 or path.name in ("object.npy", "pickle.npy", "complex.mat"):
            verdict = corpus.judge(path)
            assert verdict in ("usable", "refused"), f"{path}: {verdict}"
            counts[verdict] += 1
    assert min(counts["usable"], counts["refused"]) > 15
    marker = tmp_path / "unpickled"
    assert not marker.exists()
    np.load(tmp_path / "psf" / "object.npy", allow_pickle=True)
    assert marker.exists()  # so the file would have told
