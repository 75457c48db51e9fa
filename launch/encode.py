"""accelerate launch launch/encode.py: the same as `fastvae encode`."""

import sys

from fastvae.cli import main

if __name__ == "__main__":
    main(["encode", *sys.argv[1:]])
