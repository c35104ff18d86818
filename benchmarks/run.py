"""The same as `diffkernels bench`."""

import sys

from diffkernels.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "bench")
    sys.exit(main())
