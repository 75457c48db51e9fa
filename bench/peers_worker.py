"""One candidate of `peers.py` in a process of its own: trains for ever, and says how far it is.

    python peers_worker.py CANDIDATE VARIANT CASE IMAGES.npz BEAT

It is stopped and continued from outside, by signals.
"""

import math
import mmap
import struct
import sys
import time
from pathlib import Path

import numpy as np
import torch
from peers_cases import CASES

LAYOUT = struct.Struct("qdd")
"""Images trained on, seconds spent on them, the last loss that was looked at (nats or NaN)."""


class Beat:
    """A few bytes in a file that is memory to both sides; a step pays about a microsecond."""

    def __init__(self, path: Path) -> None:
        with path.open("r+b") as file:
            self.memory = mmap.mmap(file.fileno(), LAYOUT.size)
        self.images, self.seconds, self.loss = 0, 0.0, math.nan
        self.last = time.perf_counter()

    def start(self) -> None:
        """What went before is no training."""
        self.last = time.perf_counter()

    def __call__(self, images: int, loss: float | None = None) -> None:
        """A step over so many images is done."""
        now = time.perf_counter()
        self.images += images
        self.seconds += now - self.last
        self.last = now
        if loss is not None:
            self.loss = loss
        LAYOUT.pack_into(self.memory, 0, self.images, self.seconds, self.loss)


def main(candidate: str, variant: str, case_name: str, images: str, beat: str) -> None:
    case = CASES[case_name]
    pixels = torch.from_numpy(np.load(images)["x_train"])
    torch.manual_seed(0)
    if candidate == "pythae":
        import peers_pythae

        peers_pythae.run(case, variant, pixels, Beat(Path(beat)), Path(beat).with_suffix(".runs"))
    else:
        import peers_loops

        peers_loops.LOOPS[candidate](case, variant, pixels, Beat(Path(beat)))


if __name__ == "__main__":
    main(*sys.argv[1:])
