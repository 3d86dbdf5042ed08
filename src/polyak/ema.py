"""Deprecated: import from ``polyak``."""

import warnings

from polyak.averaging.ema import EMA
from polyak.averaging.functional import compute_ema

__all__ = ["EMA", "compute_ema"]

warnings.warn("polyak.ema has moved: import from polyak", DeprecationWarning, stacklevel=2)
