"""accelerate launch launch/reconstruct.py: the same as `fastvae reconstruct`."""

import sys

from fastvae.cli import main

if __name__ == "__main__":
    main(["reconstruct", *sys.argv[1:]])
