"""What a run would score with its averages now: readings of a record while it is written."""

from polyak.watching.algorithm import Watch
from polyak.watching.beside import watch
from polyak.watching.log import Log, read_moments
from polyak.watching.moment import COOLDOWNS, HALF_LIVES, Moment, Reading, read_moment

__all__ = ["COOLDOWNS", "HALF_LIVES", "Log", "Moment", "Reading", "Watch", "read_moment", "read_moments", "watch"]
