"""The training path."""

from fastvae.training.loop import train

__all__ = ["train"]
