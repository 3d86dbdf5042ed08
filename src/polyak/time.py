"""Spans and moments of training: ``Time``, ``TimeUnit`` and ``Timestamp``.

No torch here: this is what a profile, a command line and a file name have in common.
"""

import math
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from datetime import timedelta
from enum import StrEnum
from numbers import Real
from typing import Any, Self

from polyak.errors import TimeError


class TimeUnit(StrEnum):
    """What a span is counted in. The values are the endings of time strings."""

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
_FORM = (
    "a time string is a number that is not negative and a unit, such as '1000ba', '1.5ep', '0.25dur' or '1h30m'; "
    f"the units are {', '.join(TimeUnit)}"
)


def _plain(value: object) -> int | float:
    """Return a number as Python's own; whole floats as ints."""
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


@dataclass(frozen=True, slots=True, eq=False)
class Time:
    """A span of training, or a moment in it counted from the start.

    Numbers stand for times in the same unit: ``batch == 5``, ``batch % 10 == 0``, ``batch in {5, 10}``. Time strings
    are read, and seconds also compare with ``datetime.timedelta``.

    Args:
        value: How many. Whole floats become ints, except in ``dur``, where 1 is the whole run.
        unit: Of what.

    Raises:
        TimeError: If ``value`` is no number, or ``unit`` is no unit; when comparing or adding two of different units.

    Example:
        >>> Time.from_timestring("1000ba")
        Time(1000, 'ba')
        >>> Time.from_input("2ep") + "1ep" < "4ep"
        True
        >>> Time.from_input("3ba") / "4ba"
        Time(0.75, 'dur')
        >>> Time(6, "ba") % 3 == 0, Time(6, "ba") * Time(0.5, "dur")
        (True, Time(3, 'ba'))
    """

    value: int | float
    unit: TimeUnit

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "unit", TimeUnit(self.unit))
        except ValueError:
            raise TimeError(f"unit must be one of {', '.join(TimeUnit)} (got {self.unit!r})") from None
        value = _plain(self.value)
        object.__setattr__(self, "value", float(value) if self.unit is TimeUnit.DURATION else value)

    @classmethod
    def from_timestring(cls, timestring: str) -> Self:
        """Read a time string: a number and a unit in any case, or a wall clock as ``"1h30m"``.

        Args:
            timestring: For example ``"1000ba"``, ``"1.5ep"``, ``"0.5dur"``, ``"infba"``.

        Raises:
            TimeError: If it is no such string; the message names the accepted form.

        Example:
            >>> Time.from_timestring("1h30m")
            Time(5400, 'sec')
        """
        if not isinstance(timestring, str):
            raise TimeError(f"{_FORM} (got {timestring!r}, a {type(timestring).__name__})")
        if match := _TIME_STRING.fullmatch(timestring):
            return cls(_number_in(match[1], timestring), TimeUnit(match[2]))
        match = _WALL_CLOCK.fullmatch(timestring)
        if match and any(match.groups()):
            hours, minutes, seconds = (_number_in(part or "0", timestring) for part in match.groups())
            return cls(3600 * hours + 60 * minutes + seconds, TimeUnit.SECOND)
        raise TimeError(f"{_FORM} (got {timestring!r})")

    @classmethod
    def from_input(cls, time: "Time | str | float", default_int_unit: TimeUnit | str | None = None) -> "Time":
        """Return a ``Time`` as it is, and read a time string or a number.

        Args:
            time: One of the three.
            default_int_unit: What a number counts; without it, numbers are refused.

        Raises:
            TimeError: If it is none of them, or a time string that cannot be read.

        Example:
            >>> Time.from_input(1, "ep")
            Time(1, 'ep')
        """
        if isinstance(time, Time):
            return time
        if isinstance(time, str):
            return cls.from_timestring(time)
        if isinstance(time, bool) or not isinstance(time, Real) or default_int_unit is None:
            raise TimeError(f"{_FORM} (got {time!r}, a {type(time).__name__})")
        return cls(time, TimeUnit(default_int_unit))

    @classmethod
    def from_iteration(cls, iteration: int) -> Self:
        """Return a number of iterations."""
        return cls(iteration, TimeUnit.ITERATION)

    @classmethod
    def from_epoch(cls, epoch: float) -> Self:
        """Return a number of epochs."""
        return cls(epoch, TimeUnit.EPOCH)

    @classmethod
    def from_batch(cls, batch: int) -> Self:
        """Return a number of batches."""
        return cls(batch, TimeUnit.BATCH)

    @classmethod
    def from_sample(cls, sample: int) -> Self:
        """Return a number of samples."""
        return cls(sample, TimeUnit.SAMPLE)

    @classmethod
    def from_token(cls, token: int) -> Self:
        """Return a number of tokens."""
        return cls(token, TimeUnit.TOKEN)

    @classmethod
    def from_duration(cls, duration: float) -> Self:
        """Return a share of the run: 1 is all of it."""
        return cls(duration, TimeUnit.DURATION)

    @classmethod
    def from_timedelta(cls, time: timedelta | str) -> Self:
        """Return a wall clock in seconds.

        Args:
            time: A ``timedelta``, or a string such as ``"1h30m"``.

        Raises:
            TimeError: If it is neither.
        """
        if isinstance(time, timedelta):
            return cls(time.total_seconds(), TimeUnit.SECOND)
        read = cls.from_timestring(time)
        if read.unit is not TimeUnit.SECOND:
            raise TimeError(f"a wall clock must be hours, minutes and seconds, such as '1h30m' (got {time!r})")
        return read

    def to_timestring(self) -> str:
        """Return the time string that reads back as this.

        Example:
            >>> Time(0.5, TimeUnit.DURATION).to_timestring()
            '0.5dur'
        """
        return f"{self.value}{self.unit}"

    def total_seconds(self) -> float:
        """Return the seconds of a wall clock, as ``datetime.timedelta`` does.

        Raises:
            TimeError: If this is no wall clock.
        """
        if self.unit is not TimeUnit.SECOND:
            raise TimeError(f"only times in sec are wall clocks (got {self}); read .value instead")
        return float(self.value)

    def __eq__(self, other: object) -> bool:
        """Compare with a time, a time string or a number; two of different units are never equal."""
        if isinstance(other, timedelta):
            return self.unit is TimeUnit.SECOND and self.value == other.total_seconds()
        if isinstance(other, str):
            other = Time.from_timestring(other)
        if isinstance(other, Time):
            return self.unit is other.unit and self.value == other.value
        return self.value == other if isinstance(other, Real) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.value)  # that of the number, which it equals: `batch in {5, 10}`

    def __repr__(self) -> str:
        return f"Time({self.value}, {self.unit.value!r})"

    def __str__(self) -> str:
        return self.to_timestring()

    def __int__(self) -> int:
        return int(self.value)

    def __float__(self) -> float:
        return float(self.value)

    def _combined(self, other: object, combine: Callable[[Any, Any], Any]) -> Any:
        """Return what ``combine`` makes of the two values, or ``NotImplemented``."""
        if isinstance(other, timedelta):
            other = Time(other.total_seconds(), TimeUnit.SECOND)
        elif isinstance(other, str):
            other = Time.from_timestring(other)
        if isinstance(other, Time):
            if other.unit is not self.unit:
                raise TimeError(f"two times must have one unit (got {self} and {other})")
            return combine(self.value, other.value)
        return combine(self.value, other) if isinstance(other, Real) else NotImplemented

    def _in_own_unit(self, other: object, combine: Callable[[Any, Any], Any]) -> Any:
        value = self._combined(other, combine)
        return value if value is NotImplemented else Time(value, self.unit)

    def __lt__(self, other: "Time | str | float | timedelta") -> bool:
        return self._combined(other, operator.lt)

    def __le__(self, other: "Time | str | float | timedelta") -> bool:
        return self._combined(other, operator.le)

    def __gt__(self, other: "Time | str | float | timedelta") -> bool:
        return self._combined(other, operator.gt)

    def __ge__(self, other: "Time | str | float | timedelta") -> bool:
        return self._combined(other, operator.ge)

    def __add__(self, other: "Time | str | float | timedelta") -> "Time":
        return self._in_own_unit(other, operator.add)

    __radd__ = __add__

    def __sub__(self, other: "Time | str | float | timedelta") -> "Time":
        return self._in_own_unit(other, operator.sub)

    def __rsub__(self, other: "str | float | timedelta") -> "Time":
        return self._in_own_unit(other, lambda own, given: given - own)

    def __mod__(self, other: "Time | str | float") -> "Time":
        return self._in_own_unit(other, operator.mod)

    def __neg__(self) -> "Time":
        return Time(-self.value, self.unit)

    def __pos__(self) -> "Time":
        return self

    def __mul__(self, factor: "Time | str | float") -> "Time":
        """Multiply by a number or a share of the run: one of the two factors must be in ``dur``."""
        if isinstance(factor, str):
            factor = Time.from_timestring(factor)
        if not isinstance(factor, Time):
            return Time(self.value * factor, self.unit) if isinstance(factor, Real) else NotImplemented
        if TimeUnit.DURATION not in (self.unit, factor.unit):
            raise TimeError(f"of two times that are multiplied, one must be in dur (got {self} and {factor})")
        return Time(self.value * factor.value, factor.unit if self.unit is TimeUnit.DURATION else self.unit)

    __rmul__ = __mul__

    def __truediv__(self, other: "Time | str | float") -> "Time":
        """Divide by a number, or by a time of the same unit, which gives the share as ``dur``."""
        if isinstance(other, Real):
            return Time(self.value / float(other), self.unit)
        share = self._combined(other, operator.truediv)
        return share if share is NotImplemented else Time(share, TimeUnit.DURATION)


def _number_in(digits: str, timestring: str) -> int | float:
    """Return the number that a time string begins with."""
    try:
        number = int(digits) if digits.replace("_", "").isdigit() else float(digits)
        if math.isfinite(float(number)) or digits.lower() == "inf":
            return number
    except (ValueError, OverflowError):  # Python reads no more than 4,300 digits
        pass
    raise TimeError(f"{_FORM}; the number must be below 1e308 (got {timestring[:40]!r})")


def as_span(
    name: str,
    time: Time | str | float,
    *,
    above: float | None = None,
    whole: bool = False,
    unit: TimeUnit | None = None,
) -> Time:
    """Return ``time`` as a ``Time`` that may serve as the length of something.

    Args:
        name: What it is for, to name it in errors.
        time: A time or a time string, at least 0.
        above: If given, the value must be above this instead.
        whole: Whether the value must be a whole number (``dur`` never needs to be).
        unit: What a number counts; without it, numbers are refused.

    Raises:
        TimeError: If one of these does not hold.
    """
    try:
        time = Time.from_input(time, unit)
    except TimeError as error:
        raise TimeError(f"{name} must be a time: {error}") from None
    if time.value < 0 or (above is not None and not time.value > above):
        raise TimeError(f"{name} must be {f'above {above}' if above is not None else 'at least 0'} (got {time})")
    if whole and time.unit is not TimeUnit.DURATION and not isinstance(time.value, int):
        raise TimeError(f"{name} must be a whole number of {time.unit} (got {time})")
    return time


_COUNTERS = {
    TimeUnit.ITERATION: "iteration",
    TimeUnit.EPOCH: "epoch",
    TimeUnit.BATCH: "batch",
    TimeUnit.SAMPLE: "sample",
    TimeUnit.TOKEN: "token",
    TimeUnit.SECOND: "total_wct",
}
# What no average depends on, and records do not have.
_DETAILS = ("epoch_in_iteration", "token_in_iteration", "iteration_wct", "epoch_wct", "batch_wct")


@dataclass(frozen=True, slots=True)
class Timestamp:
    """The state of training: one counter for each unit. Numbers stand for times in the unit of the counter.

    It compares with a time or a time string by the counter of that unit: ``state.timestamp < "10ep"``. Two are equal
    if their counters are; wall clocks of epochs and batches, and what is counted within an iteration, do not matter.

    Args:
        iteration: Iterations ended; counted by loops that have iterations above epochs.
        epoch: Epochs ended.
        batch: Batches that ended in an optimizer step.
        sample: Samples seen.
        token: Tokens seen, where they are counted.
        epoch_in_iteration: As ``epoch``, since the iteration began.
        token_in_iteration: As ``token``, since the iteration began.
        batch_in_epoch: As ``batch``, since the epoch began.
        sample_in_epoch: As ``sample``, since the epoch began.
        token_in_epoch: As ``token``, since the epoch began.
        total_wct: Seconds of training, evaluation excluded.
        iteration_wct: As ``total_wct``, since the iteration began.
        epoch_wct: As ``total_wct``, since the epoch began.
        batch_wct: Seconds that the last batch took.
        epoch_length: Batches in an epoch, if known: without it, epochs have no fractions.

    Raises:
        TimeError: If a counter is no time in its unit.

    Example:
        >>> now = Timestamp(epoch_length=4).to_next_batch(samples=8).to_next_batch(samples=8)
        >>> now.batch, now.elapsed("ep"), now.elapsed("sp")
        (Time(2, 'ba'), 0.5, 16.0)
        >>> now.batch == 2, now < "3ba", now.copy(epoch=7).epoch
        (True, True, Time(7, 'ep'))
    """

    iteration: Time = Time(0, TimeUnit.ITERATION)
    epoch: Time = Time(0, TimeUnit.EPOCH)
    batch: Time = Time(0, TimeUnit.BATCH)
    sample: Time = Time(0, TimeUnit.SAMPLE)
    token: Time = Time(0, TimeUnit.TOKEN)
    epoch_in_iteration: Time = field(default=Time(0, TimeUnit.EPOCH), compare=False)
    token_in_iteration: Time = field(default=Time(0, TimeUnit.TOKEN), compare=False)
    batch_in_epoch: Time = Time(0, TimeUnit.BATCH)
    sample_in_epoch: Time = Time(0, TimeUnit.SAMPLE)
    token_in_epoch: Time = Time(0, TimeUnit.TOKEN)
    total_wct: Time = Time(0, TimeUnit.SECOND)
    iteration_wct: Time = field(default=Time(0, TimeUnit.SECOND), compare=False)
    epoch_wct: Time = field(default=Time(0, TimeUnit.SECOND), compare=False)
    batch_wct: Time = field(default=Time(0, TimeUnit.SECOND), compare=False)
    epoch_length: int | None = None

    def __post_init__(self) -> None:
        for name, unit in _UNITS.items():
            given: Any = getattr(self, name)
            if type(given) is not Time or given.unit is not unit:
                object.__setattr__(self, name, _as_counter(name, given, unit))

    def copy(self, **changes: Any) -> "Timestamp":
        """Return a copy with other counters.

        Args:
            **changes: By name; None leaves a counter as it is. Numbers stand for times in the unit of the counter.

        Raises:
            TimeError: If a value is no time in the unit of its counter.
        """
        unknown = [name for name in changes if name not in Timestamp.__dataclass_fields__]
        if unknown:
            raise TimeError(f"a counter must be one of {', '.join(_UNITS)} (got {', '.join(unknown)})")
        return replace(self, **{name: value for name, value in changes.items() if value is not None})

    def get(self, unit: TimeUnit | str) -> Time:
        """Return the counter of ``unit``, full epochs only.

        Args:
            unit: Any but ``dur``.

        Raises:
            TimeError: For ``dur``, which needs the length of the run.
        """
        if unit not in _COUNTERS:
            raise TimeError(f"unit must be one of {', '.join(_COUNTERS)} (got {unit!r})")
        return getattr(self, _COUNTERS[TimeUnit(unit)])

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Timestamp):
            return _compared(self) == _compared(other)
        time = _as_time(other)
        return NotImplemented if time is None else self.get(time.unit) == time

    def __hash__(self) -> int:
        return hash(_compared(self))

    def __lt__(self, other: Time | str) -> bool:
        return self._by_counter(other, operator.lt)

    def __le__(self, other: Time | str) -> bool:
        return self._by_counter(other, operator.le)

    def __gt__(self, other: Time | str) -> bool:
        return self._by_counter(other, operator.gt)

    def __ge__(self, other: Time | str) -> bool:
        return self._by_counter(other, operator.ge)

    def _by_counter(self, other: object, compare: Callable[[Time, Time], bool]) -> bool:
        time = _as_time(other)
        return NotImplemented if time is None else compare(self.get(time.unit), time)

    def elapsed(self, unit: TimeUnit | str, max_duration: Time | None = None) -> float:
        """Read the clock in ``unit``: as ``get``, with the elapsed fraction of an epoch, and of the run for ``dur``.

        Args:
            unit: Any.
            max_duration: The length of the run; needed for ``dur``.

        Raises:
            TimeError: For ``dur`` without ``max_duration``.
        """
        if unit == TimeUnit.DURATION:
            if max_duration is None:
                raise TimeError("a time in dur needs a run of known length: give max_duration, or use another unit")
            return self.elapsed(max_duration.unit) / max_duration.value
        if unit == TimeUnit.EPOCH and self.epoch_length:
            return self.epoch.value + min(1.0, self.batch_in_epoch.value / self.epoch_length)
        return float(self.get(unit))

    def intervals(self, interval: Time, max_duration: Time | None = None) -> int:
        """Return how many intervals have ended.

        Args:
            interval: In any unit, above 0.
            max_duration: The length of the run; needed for ``dur``.

        Raises:
            TimeError: For ``dur`` without ``max_duration``.
        """
        # A clock in dur or ep is a quotient, and may read 2.9999999999999996 where 3 intervals have ended.
        return math.floor(self.elapsed(interval.unit, max_duration) / interval.value + 1e-9)

    def with_counter(self, time: Time) -> "Timestamp":
        """Return this moment with the counter of ``time.unit`` set to ``time``.

        Args:
            time: In any unit but ``dur``; epochs may have a fraction.
        """
        changes: dict[str, Time] = {_COUNTERS[time.unit]: time}
        if time.unit is TimeUnit.EPOCH:
            changes["batch_in_epoch"] = Time(0, TimeUnit.BATCH)
        return replace(self, **changes)

    def to_next_batch(
        self,
        samples: int | Time = 0,
        tokens: int | Time = 0,
        duration: timedelta | None = None,
        *,
        seconds: float = 0.0,
        steps: int = 1,
    ) -> "Timestamp":
        """Return the moment after one more batch.

        Args:
            samples: Samples in it.
            tokens: Tokens in it.
            duration: How long it took; or give ``seconds``.
            seconds: How long it took.
            steps: Optimizer steps that it ended in: 0 when mixed precision skipped the step.
        """
        took = seconds if duration is None else duration.total_seconds()
        return replace(
            self,
            batch=self.batch + steps,
            sample=self.sample + samples,
            token=self.token + tokens,
            token_in_iteration=self.token_in_iteration + tokens,
            batch_in_epoch=self.batch_in_epoch + steps,
            sample_in_epoch=self.sample_in_epoch + samples,
            token_in_epoch=self.token_in_epoch + tokens,
            total_wct=self.total_wct + took,
            iteration_wct=self.iteration_wct + took,
            epoch_wct=self.epoch_wct + took,
            batch_wct=Time(took, TimeUnit.SECOND),
        )

    def to_next_epoch(self, duration: timedelta | None = None) -> "Timestamp":
        """Return the moment after the end of this epoch.

        Args:
            duration: Time since the last batch that counts as training.
        """
        took = 0.0 if duration is None else duration.total_seconds()
        ended = self._at_epoch_start(took)
        return replace(ended, epoch=self.epoch + 1, epoch_in_iteration=self.epoch_in_iteration + 1)

    def to_next_iteration(self, duration: timedelta | None = None) -> "Timestamp":
        """Return the moment after the end of this iteration.

        Args:
            duration: Time since the last batch that counts as training.
        """
        took = 0.0 if duration is None else duration.total_seconds()
        return self._at_epoch_start(took).copy(
            iteration=self.iteration + 1, epoch_in_iteration=0, token_in_iteration=0, iteration_wct=0
        )

    def _at_epoch_start(self, took: float) -> "Timestamp":
        total, iteration = self.total_wct + took, self.iteration_wct + took
        return self.copy(
            batch_in_epoch=0,
            sample_in_epoch=0,
            token_in_epoch=0,
            epoch_wct=0,
            batch_wct=0,
            total_wct=total,
            iteration_wct=iteration,
        )

    def state_dict(self, *, details: bool = False) -> dict[str, int | float | None]:
        """Return the counters as plain numbers by field name.

        Args:
            details: Whether to include the wall clocks of epochs and batches, and what is counted within an iteration.
        """
        names = [one.name for one in fields(self) if details or one.name not in _DETAILS]
        values = {name: getattr(self, name) for name in names}
        return {name: value.value if isinstance(value, Time) else value for name, value in values.items()}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, int | float | None]) -> "Timestamp":
        """Return the moment that ``state_dict`` was taken of.

        Args:
            state: What ``state_dict`` returned, with details or without.
        """
        counters = {name: Time(state[name] or 0, unit) for name, unit in _UNITS.items() if name in state}
        epoch_length = state["epoch_length"]
        return cls(**counters, epoch_length=None if epoch_length is None else int(epoch_length))


_UNITS: dict[str, TimeUnit] = {one.name: one.default.unit for one in fields(Timestamp) if isinstance(one.default, Time)}
_COMPARED = operator.attrgetter(*(one.name for one in fields(Timestamp) if one.compare))


def _compared(timestamp: Timestamp) -> tuple[object, ...]:
    return _COMPARED(timestamp)


def _as_time(given: object) -> Time | None:
    """Return a time or a time string as a ``Time``, and None for anything else."""
    return given if isinstance(given, Time) else Time.from_timestring(given) if isinstance(given, str) else None


def _as_counter(name: str, given: Any, unit: TimeUnit) -> Time:
    time = Time.from_timedelta(given) if isinstance(given, timedelta) else Time.from_input(given, unit)
    if time.unit is not unit:
        raise TimeError(f"{name} must be in {unit} (got {time})")
    return time
