"""Deprecated: import from ``polyak.record``."""

import warnings

from polyak.record import Record, coefficients, error_estimate, finest, fit, shares

__all__ = ["Record", "coefficients", "error_estimate", "finest", "fit", "shares"]

warnings.warn("polyak.posthoc has moved: import from polyak.record", DeprecationWarning, stacklevel=2)
