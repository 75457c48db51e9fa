"""Images in memory, where they come from, and in which order a run meets them."""

from fastvae.data.config import DataConfig
from fastvae.data.folders import read_images
from fastvae.data.image_set import ImageSet
from fastvae.data.order import EpochOrder
from fastvae.data.sources import load_all, load_data

__all__ = ["DataConfig", "EpochOrder", "ImageSet", "load_all", "load_data", "read_images"]
