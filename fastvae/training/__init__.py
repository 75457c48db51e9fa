"""The training path."""

from fastvae.training.loop import train
from fastvae.training.together import leave_the_others

__all__ = ["leave_the_others", "train"]
