"""The Self2Self method: partial convolution, dropout network, the learner of one image, fusion.

PyTorch takes seconds to import, and --help does not need it. So the modules that --help needs
import it inside the functions that compute.
"""

__all__ = ["Self2Self"]


def __getattr__(name):
    """Import the learner when it is asked for."""
    if name == "Self2Self":
        from network.self2self import Self2Self

        return Self2Self
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
