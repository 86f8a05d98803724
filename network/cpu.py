"""Settings of the processor and of the C library with which PyTorch is fast on a CPU."""

import ctypes
import sys
from contextlib import suppress

import torch


def tune_cpu():
    """Keep training fast on a CPU: flush denormal numbers to 0, reuse freed memory.

    A network's activations become denormal now and then, and the CPU is slow at those.
    """
    torch.set_flush_denormal(True)
    keep_memory(2**27, 2**30)  # keeps tensors of a window, not those of a large picture


def keep_memory(max_tensor, max_kept):
    """Choose how much freed memory the process keeps, and return the rest to the system.

    The system maps and clears memory again at every request. A training step takes a
    tenth longer if each tensor is returned when it is freed. Only glibc has this setting.

    Args:
        max_tensor: bytes; a larger tensor is returned as soon as it is freed.
        max_kept: bytes of freed memory that are kept.
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another C library
            glibc = ctypes.CDLL(None)
            glibc.mallopt(-3, max_tensor)  # M_MMAP_THRESHOLD
            glibc.mallopt(-1, max_kept)  # M_TRIM_THRESHOLD
            glibc.malloc_trim(0)
