"""Opens the device to compute on."""

import os
import re

NO_DEVICE = (
    "no device {!r} that PyTorch can use on this machine; choose auto, cpu, cuda, cuda:N "
    "or mps"
)


def open_device(name):
    """Return the torch.device of a name, after a first computation on it.

    Several processes on a machine (LOCAL_RANK, else RANK) take a GPU each.

    Args:
        name: auto, cpu, cuda, cuda:N or mps. `auto` is a GPU if one works, else the CPU.

    Raises:
        ValueError: PyTorch cannot use the device.
    """
    if not re.fullmatch(r"auto|cpu|mps|cuda(:(0|[1-9]\d*))?", name, re.ASCII):
        raise ValueError(NO_DEVICE.format(name))
    import torch  # late: it takes seconds, and --help does not need it

    wanted, rank = name, os.environ.get("LOCAL_RANK", os.environ.get("RANK", ""))
    if name == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda" and torch.cuda.is_available() and rank.isdecimal():
        wanted = f"cuda:{int(rank) % torch.cuda.device_count()}"
    try:
        device = torch.device(wanted)
        if device.type == "cuda" and device.index and torch.cuda.is_available():
            torch.cuda.set_device(device)  # else each process opens GPU 0, too
        torch.ones(1, device=device).add(1).item()  # fails without kernels for it
        return device
    except (AssertionError, RuntimeError, ValueError) as error:  # PyTorch raises any
        if name != "auto":
            raise ValueError(NO_DEVICE.format(wanted)) from None
        fault, *_ = str(error).partition("\n")
        print(f"PyTorch cannot use {wanted}, so the CPU is used: {fault}")
        return torch.device("cpu")
