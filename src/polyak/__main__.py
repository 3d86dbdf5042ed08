"""``python -m polyak`` is the command ``polyak``."""

import sys

from polyak.cli import main

sys.exit(main())
