"""The Self2Self method: partial convolution, dropout network, the learner of one image, fusion."""

from network.self2self import Self2Self

__all__ = ["Self2Self"]
