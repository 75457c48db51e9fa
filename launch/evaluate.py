"""accelerate launch launch/evaluate.py: the same as `fastvae evaluate`."""

import sys

from fastvae.cli import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
