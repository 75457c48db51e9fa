"""Which images to read, and how."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from fastvae.errors import UserError


@dataclass(frozen=True)
class DataConfig:
    """Where the images come from and what is done to them once, when they are read."""

    data: str = "digits"
    """digits, mnist, fashion-mnist, cifar10, a table (diabetes, breast-cancer, wine), a folder of
    images, a folder or name that Hugging Face datasets can load (Parquet, Arrow, a Hub name), or an
    .npy, .npz or .safetensors file."""
    data_dir: Path | None = None
    """Where mnist, fashion-mnist and cifar10 already lie or are downloaded to (default: data)."""
    download: bool = False
    """Fetch mnist, fashion-mnist or cifar10 into --data-dir if they are not there."""
    image_size: tuple[int, ...] = ()
    """Resize to HEIGHT WIDTH (one number: a square). Empty: keep the size, which must be one."""
    resize: Literal["crop", "stretch"] = "crop"
    """With --image-size: scale the shorter side and cut the centre, or stretch both sides."""
    channels: Literal[1, 3] | None = None
    """1 for grey, 3 for colour. None: grey if every image is grey, else colour."""
    holdout: float = 0.1
    """Share of the images held out for evaluation where the source has no test split."""
    flip: bool = False
    """Mirror a training image left to right with probability 1/2, each time it is met."""
    data_budget: float | None = None
    """GiB that decoded images may take in memory. Larger sets of image files, Parquet and Arrow are
    decoded as they are needed, in the same order. None: half of what is free."""
    data_workers: int | None = None
    """Processes that decode images which are not kept in memory. None: one for each core, at most
    8."""
    on_bad_sample: Literal["error", "skip"] = "error"
    """What to do about an image that cannot be read: stop, or take the next one in its place, with
    a warning."""
    train_limit: int | None = None
    """Train on the first so many training images only; None: all."""
    heldout_limit: int | None = None
    """Evaluate on the first so many held-out images only, for a quick look; None: all."""

    def __post_init__(self) -> None:
        if len(self.image_size) > 2 or any(side < 1 for side in self.image_size):
            raise UserError(
                f"--image-size takes one or two positive whole numbers, got {list(self.image_size)}"
            )
        if not 0.0 < self.holdout < 1.0:
            raise UserError(f"--holdout is a share between 0 and 1, got {self.holdout}")
        if self.data_budget is not None and not self.data_budget >= 0:
            raise UserError(f"--data-budget is in GiB, 0 or more, got {self.data_budget}")
        for flag, limit in (
            ("data-workers", self.data_workers),
            ("train-limit", self.train_limit),
            ("heldout-limit", self.heldout_limit),
        ):
            if limit is not None and limit < 1:
                raise UserError(f"--{flag} is 1 or more, got {limit}")

    @property
    def budget_bytes(self) -> float:
        """`data_budget`, or half of the memory that is free now."""
        if self.data_budget is None:
            return 0.5 * psutil.virtual_memory().available
        return self.data_budget * 2**30
