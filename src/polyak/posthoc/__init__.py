"""The average under any profile from a record, at any recorded moment, and its error: ``Record`` and its arithmetic."""

from polyak.posthoc.fitting import Fit, coefficients, error_estimate, finest, fit, shares
from polyak.posthoc.record import Record

__all__ = ["Fit", "Record", "coefficients", "error_estimate", "finest", "fit", "shares"]
