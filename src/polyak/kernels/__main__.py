"""Compile the C kernel: ``python -m polyak.kernels``."""

import sys

from polyak.kernels.build import BuildError, build

try:
    sys.stdout.write(f"built {build()}\n")
except (BuildError, OSError) as failure:
    sys.exit(f"not built: {failure}")
