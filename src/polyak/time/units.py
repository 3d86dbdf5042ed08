"""The units of time, and the numbers that count them as text: ``"1000ba"``, ``"1000 steps"``, ``"1h30m"``."""

import difflib
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
        if not isinstance(value, str):
            return None
        unit, count = _WORDS.get(value.lower(), (None, 1))
        return unit if count == 1 else None


def _words() -> dict[str, tuple[TimeUnit, int]]:
    """Return each word for a unit in time strings, with the unit and how many of it the word stands for."""
    words = {unit.value: (unit, 1) for unit in TimeUnit}
    for unit, names in {
        TimeUnit.BATCH: ("batch", "batches", "step", "steps"),
        TimeUnit.EPOCH: ("epoch", "epochs"),
        TimeUnit.SAMPLE: ("sample", "samples"),
        TimeUnit.TOKEN: ("token", "tokens"),
        TimeUnit.ITERATION: ("iteration", "iterations"),
        TimeUnit.SECOND: ("second", "seconds", "secs"),
    }.items():
        words |= dict.fromkeys(names, (unit, 1))
    words |= dict.fromkeys(("min", "mins", "minute", "minutes"), (TimeUnit.SECOND, 60))
    return words | dict.fromkeys(("hour", "hours"), (TimeUnit.SECOND, 3600))


_WORDS = _words()


_DIGITS = r"[0-9]+(?:_[0-9]+)*"
_NUMBER = rf"(?:{_DIGITS}(?:\.(?:{_DIGITS})?)?|\.{_DIGITS})(?:e[+-]?{_DIGITS})?|inf"
_TIME_STRING = re.compile(rf"\s*({_NUMBER})\s*({'|'.join(_WORDS)})\s*", re.IGNORECASE)
_WALL_CLOCK = re.compile(r"\s*(?=[0-9])(?:([0-9]+)h)?(?:([0-9]+)m)?(?:([0-9]+)s)?\s*", re.IGNORECASE)
_OTHER_UNIT = re.compile(rf"\s*({_NUMBER})\s*([a-z]*)\s*", re.IGNORECASE)
FORM = (
    "a time string is a number that is not negative and a unit, such as '1000 steps', '1000ba', '1.5ep', '0.25dur' or "
    "'1h30m'; the units are steps or batches (ba), epochs (ep), samples (sp), tokens (tok), iterations (iter), shares "
    "of the run (dur), seconds (sec), minutes, hours"
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
        timestring: In upper or lower case; the unit short or as a word, singular or plural.

    Raises:
        TimeError: If it is not a time string; the message names the accepted form.

    Example:
        >>> parse("1h30m")
        (5400, <TimeUnit.SECOND: 'sec'>)
        >>> parse("1000 steps")
        (1000, <TimeUnit.BATCH: 'ba'>)
    """
    if not isinstance(timestring, str):
        raise TimeError(f"{FORM} (got {timestring!r}, a {type(timestring).__name__})")
    if match := _TIME_STRING.fullmatch(timestring):
        unit, count = _WORDS[match[2].lower()]
        return count * _number_in(match[1], timestring), unit
    match = _WALL_CLOCK.fullmatch(timestring)
    if match and any(match.groups()):
        hours, minutes, seconds = (_number_in(part or "0", timestring) for part in match.groups())
        return 3600 * hours + 60 * minutes + seconds, TimeUnit.SECOND
    raise TimeError(f"{FORM} (got {timestring!r}){_meant(timestring)}")


def _meant(timestring: str) -> str:
    """Return what was perhaps meant by a string that is not a time string."""
    match = _OTHER_UNIT.fullmatch(timestring)
    if match is None:
        share = re.fullmatch(rf"\s*({_NUMBER})\s*%\s*", timestring)
        return f"; for a share of the run, write '{float(share[1]) / 100:g}dur'" if share else ""
    number, unit = match[1], match[2].lower()
    if not unit:
        return f"; for optimizer steps, write '{number} steps'"
    # Words before short units: 'stp' is rather a step than a sample.
    words = [word for word in _WORDS if len(word) > 3 and (number == "1") is not word.endswith("s")]
    close = difflib.get_close_matches(unit, words, n=1)
    close = close or difflib.get_close_matches(unit, _WORDS, n=1)
    return f"; did you mean '{number} {close[0]}'?" if close else ""


def _number_in(digits: str, timestring: str) -> int | float:
    """Return the number with which a time string begins."""
    try:
        number = int(digits) if digits.replace("_", "").isdigit() else float(digits)
        if math.isfinite(float(number)) or digits.lower() == "inf":
            return number
    except (ValueError, OverflowError):  # Python reads no more than 4,300 digits
        pass
    raise TimeError(f"{FORM}; the number must be below 1e308 (got {timestring[:40]!r})")
