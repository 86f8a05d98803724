"""The Triton kernels on a CPU, in Triton's interpreter; on CUDA test_punet.py has them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs Triton: pip install triton")


def test_interpreted_kernels_are_punet():
    script = Path(__file__).parent / "interpret.py"
    processes = [  # both at once: they are slow
        subprocess.Popen([sys.executable, script, case], stdout=subprocess.PIPE)
        for case in "01"
    ]
    for process in processes:
        made = process.communicate()[0]
        assert process.returncode == 0
        triton, pytorch = json.loads(made)
        prediction, gradient = triton
        assert prediction < 5e-7
        # float32 PyTorch's own distance from float64, with another order of summation
        assert gradient < 2 * pytorch[1] + 1e-6
