"""Lets the tests import the scripts, from whatever folder pytest is called."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import utils  # noqa: F401 - before PyTorch, for which it sets the environment

# isort: split
import torch

torch.set_num_threads(1)  # tiny tensors, and perhaps a busy machine
