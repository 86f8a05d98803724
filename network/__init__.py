"""The Self2Self method: partial convolution, dropout network, and the learner of one image."""

from network.self2self import Self2Self

__all__ = ["Self2Self"]
