"""What README.md says can be run is run."""

import re
import runpy
from pathlib import Path

import numpy as np
import pytest
from scripts import ROOT

from network.noise import find_noise

BLUR = "from scipy import ndimage; y = ndimage.gaussian_filter(y, (0, 1, 1))"


RAMP = "y = np.linspace(0, 1, 64 * 64).reshape(1, 64, 64)"


@pytest.mark.parametrize(
    ("after", "kind"), [("", "white"), (BLUR, "correlated"), (RAMP, "none")]
)
def test_the_use_from_python_restores_any_array(after, kind):
    """White noise, noise that neighbours share, as a photo's, and none."""
    code = re.search(
        r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL
    )[1]
    assert len(code.splitlines()) <= 12
    few = '"fast", y, given={"iteration": 4})'
    code = code.replace('"fast", y)', few, 1).replace("predict(100)", "predict(2)")
    code = code.replace("\nrecipe", f"\n{after}\nrecipe", 1)
    Path("use.py").write_text(code.replace("192:320", "192:256"))
    names = runpy.run_path("use.py")
    assert names["learner"].step == 4
    assert find_noise(names["y"], np.ones((1, 1, 1))).kind == kind
    fused = kind != "none"
    assert (names["predicted_error"] is not None) == fused
    for array in (names["clean"], names["predicted_error"])[: 1 + fused]:
        assert array.shape == (1, 64, 64) and np.isfinite(array).all()
