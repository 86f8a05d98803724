"""What README.md says can be run is run."""

import re
import runpy
from pathlib import Path

import numpy as np
from scripts import ROOT


def test_the_use_from_python_restores_an_array():
    code = re.search(
        r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL
    )[1]
    assert len(code.splitlines()) <= 12
    few = '"fast", y, given={"iteration": 4})'
    code = code.replace('"fast", y)', few, 1).replace("predict(100)", "predict(2)")
    Path("use.py").write_text(code.replace("192:320", "192:256"))
    names = runpy.run_path("use.py")
    assert names["learner"].step == 4
    for array in (names["clean"], names["predicted_error"]):
        assert array.shape == (1, 64, 64) and np.isfinite(array).all()
