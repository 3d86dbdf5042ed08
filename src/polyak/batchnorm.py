"""Deprecated: import from ``polyak``."""

import warnings

from polyak.averaging.batchnorm import update_bn

__all__ = ["update_bn"]

warnings.warn("polyak.batchnorm has moved: import from polyak", DeprecationWarning, stacklevel=2)
