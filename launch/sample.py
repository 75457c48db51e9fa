"""accelerate launch launch/sample.py: the same as `fastvae sample`."""

import sys

from fastvae.cli import main

if __name__ == "__main__":
    main(["sample", *sys.argv[1:]])
