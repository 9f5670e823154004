"""`python -m pmod.bench`."""

import sys

from pmod.bench.command import main

if __name__ == "__main__":
    sys.exit(main())
