"""The units of time, and the numbers that count them as text: ``"1000ba"``, ``"1h30m"``."""

import math
import operator
import re
from enum import StrEnum
from numbers import Real

from polyak.errors import TimeError


class TimeUnit(StrEnum):
    """The unit in which a span is counted. The values are the endings of time strings."""

    ITERATION = "iter"
    EPOCH = "ep"
    BATCH = "ba"
    SAMPLE = "sp"
    TOKEN = "tok"
    DURATION = "dur"
    SECOND = "sec"

    @classmethod
    def _missing_(cls, value: object) -> "TimeUnit | None":
        lower = value.lower() if isinstance(value, str) else value
        return next((unit for unit in cls if unit.value == lower), None)


_DIGITS = r"[0-9]+(?:_[0-9]+)*"
_NUMBER = rf"(?:{_DIGITS}(?:\.(?:{_DIGITS})?)?|\.{_DIGITS})(?:e[+-]?{_DIGITS})?|inf"
_TIME_STRING = re.compile(rf"\s*({_NUMBER})\s*({'|'.join(TimeUnit)})\s*", re.IGNORECASE)
_WALL_CLOCK = re.compile(r"\s*(?=[0-9])(?:([0-9]+)h)?(?:([0-9]+)m)?(?:([0-9]+)s)?\s*", re.IGNORECASE)
FORM = (
    "a time string is a number that is not negative and a unit, such as '1000ba', '1.5ep', '0.25dur' or '1h30m'; "
    f"the units are {', '.join(TimeUnit)}"
)


def plain_number(value: object) -> int | float:
    """Return a number as Python's own; whole floats as ints.

    Args:
        value: Any number but NaN, such as one of numpy's.

    Raises:
        TimeError: If it is not a number.
    """
    if isinstance(value, Real) and not hasattr(value, "__index__"):
        value = float(value)
    if not isinstance(value, float):
        try:
            value = operator.index(value)  # pyrefly: ignore
        except TypeError:
            raise TimeError(f"value must be a number (got {value!r}, a {type(value).__name__})") from None
    if math.isnan(value):
        raise TimeError(f"value must be a number (got {value!r})")
    return int(value) if math.isfinite(value) and value == int(value) else value


def parse(timestring: object) -> tuple[int | float, TimeUnit]:
    """Return the number and the unit of a time string, or the seconds of a wall clock such as ``"1h30m"``.

    Args:
        timestring: In upper or lower case.

    Raises:
        TimeError: If it is not a time string; the message names the accepted form.

    Example:
        >>> parse("1h30m")
        (5400, <TimeUnit.SECOND: 'sec'>)
    """
    if not isinstance(timestring, str):
        raise TimeError(f"{FORM} (got {timestring!r}, a {type(timestring).__name__})")
    if match := _TIME_STRING.fullmatch(timestring):
        return _number_in(match[1], timestring), TimeUnit(match[2])
    match = _WALL_CLOCK.fullmatch(timestring)
    if match and any(match.groups()):
        hours, minutes, seconds = (_number_in(part or "0", timestring) for part in match.groups())
        return 3600 * hours + 60 * minutes + seconds, TimeUnit.SECOND
    raise TimeError(f"{FORM} (got {timestring!r})")


def _number_in(digits: str, timestring: str) -> int | float:
    """Return the number with which a time string begins."""
    try:
        number = int(digits) if digits.replace("_", "").isdigit() else float(digits)
        if math.isfinite(float(number)) or digits.lower() == "inf":
            return number
    except (ValueError, OverflowError):  # Python reads no more than 4,300 digits
        pass
    raise TimeError(f"{FORM}; the number must be below 1e308 (got {timestring[:40]!r})")
