"""Time to a likelihood on MNIST, as docs/speedrun.md describes: python launch/speedrun.py --help"""

import sys

from fastvae.speedrun import main

if __name__ == "__main__":
    sys.exit(main())
