"""Spans and moments of training: ``Time``, ``TimeUnit`` and ``Timestamp``.

No torch here: profiles, the command line and file names all use these.
"""

from polyak.time.clock import Timestamp
from polyak.time.span import Time, as_span
from polyak.time.units import TimeUnit

__all__ = ["Time", "TimeUnit", "Timestamp", "as_span"]
