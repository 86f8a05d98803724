"""tests/gpu.py, tried on a CPU, so that it starts where a GPU is lent for minutes."""

import json
import subprocess
import sys
from pathlib import Path

from scripts import ROOT


def test_the_checks_of_a_gpu_start_on_a_cpu():
    command = [sys.executable, ROOT / "tests/gpu.py", "--device", "cpu", "--quick"]
    subprocess.run([*command, "--out", "out", "--limit", "3"], check=True)
    figures = json.loads(Path("out/figures.json").read_text())
    assert not [name for name, value in figures.items() if "FAILED" in str(value)]
    assert len([name for name in figures if name.startswith("smoke")]) == 12
