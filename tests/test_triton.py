"""The Triton kernels on a CPU, in Triton's interpreter; on CUDA test_punet.py has them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs Triton: pip install triton")


def test_interpreted_kernels_are_punet():
    script = Path(__file__).parent / "interpret.py"
    processes = [  # all at once: they are slow
        subprocess.Popen([sys.executable, script, case], stdout=subprocess.PIPE)
        for case in "012"
    ]
    made = [json.loads(process.communicate()[0]) for process in processes]
    for triton, pytorch in made:
        # PyTorch's own distance from float64, with another order of summation
        assert triton[1] < 2 * pytorch[1] + 1e-6
    *float32, bfloat16 = (triton[0] for triton, _ in made)
    assert max(float32) < 5e-7
    assert 1e-6 < bfloat16 < 2e-3
