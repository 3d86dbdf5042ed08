"""The end moments of a sweep, which are those of the record."""

from polyak.record.moments import ends, moment

__all__ = ["ends", "moment"]
