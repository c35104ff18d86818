"""`python -m diffkernels` is the `diffkernels` command."""

import sys

from .cli import main

sys.exit(main())
