"""accelerate launch launch/train.py: the same as `fastvae train`."""

import sys

from fastvae.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
