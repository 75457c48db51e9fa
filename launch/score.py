"""accelerate launch launch/score.py: the same as `fastvae score`."""

import sys

from fastvae.cli import main

if __name__ == "__main__":
    main(["score", *sys.argv[1:]])
