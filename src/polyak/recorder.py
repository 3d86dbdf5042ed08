"""Deprecated: import from ``polyak``."""

import warnings

from polyak.record.recorder import Recorder

__all__ = ["Recorder"]

warnings.warn("polyak.recorder has moved: import from polyak", DeprecationWarning, stacklevel=2)
