"""Evaluates what a run would score with its averages now, from its record while that is written."""

from polyak.watching.algorithm import Watch
from polyak.watching.log import Log, read_moments
from polyak.watching.moment import COOLDOWNS, HALF_LIVES, Moment, Reading, read_moment
from polyak.watching.process import watch

__all__ = ["COOLDOWNS", "HALF_LIVES", "Log", "Moment", "Reading", "Watch", "read_moment", "read_moments", "watch"]
