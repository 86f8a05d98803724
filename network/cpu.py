"""What is asked of a CPU, and of the C library's memory, so that PyTorch is fast."""

import ctypes
import sys
from contextlib import suppress

import torch


def tune_cpu():
    """Keep PyTorch fast on a CPU: denormal numbers, which a network meets, are slow."""
    torch.set_flush_denormal(True)
    keep_memory(2**27, 2**30)  # a window's tensors, not a large picture's


def keep_memory(largest, freed):
    """Say what freed memory is kept for the next tensors, and hand back all other.

    To the system, which maps and clears it again when it is asked for: a training step
    that does so with every tensor takes a tenth longer.

    Args:
        largest: bytes of a tensor that is not handed back by itself when it is freed.
        freed: bytes that are kept, at most.
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # glibc alone has it
            glibc = ctypes.CDLL(None)
            glibc.mallopt(-3, largest)  # M_MMAP_THRESHOLD
            glibc.mallopt(-1, freed)  # M_TRIM_THRESHOLD
            glibc.malloc_trim(0)
