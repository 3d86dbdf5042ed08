"""A span of training, or a moment in it: ``Time``."""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from numbers import Integral, Real
from typing import Any, Self

from polyak.errors import TimeError
from polyak.time.units import FORM, TimeUnit, parse, plain_number


@dataclass(frozen=True, slots=True, eq=False)
class Time:
    """A span of training, or a moment in it counted from the start.

    Numbers stand for times in the same unit: ``batch == 5``, ``batch % 10 == 0``, ``batch in {5, 10}``. Time strings
    are read, and seconds also compare with ``datetime.timedelta``.

    Args:
        value: The number. Whole floats become ints, except in ``dur``, where 1 is the whole run.
        unit: The unit.

    Raises:
        TimeError: If ``value`` is not a number or ``unit`` not a unit; when comparing or adding different units.

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
        value = plain_number(self.value)
        object.__setattr__(self, "value", float(value) if self.unit is TimeUnit.DURATION else value)

    @classmethod
    def from_timestring(cls, timestring: str) -> Self:
        """Read a time string: a number and a unit in any case, or a wall clock as ``"1h30m"``.

        Args:
            timestring: For example ``"1000ba"``, ``"1000 steps"``, ``"1.5 epochs"``, ``"0.5dur"``, ``"infba"``.

        Raises:
            TimeError: If it is not such a string; the message names the accepted form.

        Example:
            >>> Time.from_timestring("1h30m")
            Time(5400, 'sec')
        """
        return cls(*parse(timestring))

    @classmethod
    def from_input(cls, time: "Time | str | float", default_int_unit: TimeUnit | str | None = None) -> "Time":
        """Return a ``Time`` as it is, and read a time string or a number.

        Args:
            time: One of the three.
            default_int_unit: What a number counts; without it, numbers are refused.

        Raises:
            TimeError: If it is not one of them, or a time string that cannot be read.

        Example:
            >>> Time.from_input(1, "ep")
            Time(1, 'ep')
        """
        if isinstance(time, Time):
            return time
        if isinstance(time, str):
            return cls.from_timestring(time)
        if isinstance(time, bool) or not isinstance(time, Real) or default_int_unit is None:
            raise TimeError(f"{FORM} (got {time!r}, a {type(time).__name__})")
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
            TimeError: If this is not a wall clock.
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


def as_span(
    name: str,
    time: Time | str | float,
    *,
    above: float | None = None,
    whole: bool = False,
    unit: TimeUnit | None = None,
    steps: bool = False,
) -> Time:
    """Return ``time`` as a ``Time`` that may serve as the length of something.

    Args:
        name: What it is for, to name it in errors.
        time: A time or a time string, at least 0.
        above: If given, the value must be above this instead.
        whole: Whether the value must be a whole number (``dur`` never needs to be).
        unit: What a number counts; without it, numbers are refused.
        steps: Whether a number counts batches, which are optimizer steps, and must be whole.

    Raises:
        TimeError: If one of these does not hold.
    """
    try:
        time = Time.from_input(time, TimeUnit.BATCH if steps and _is_whole(time) else unit)
    except TimeError as error:
        number = " or a whole number of steps" if steps and not isinstance(time, str) else ""
        raise TimeError(f"{name} must be a time{number}: {error}") from None
    if time.value < 0 or (above is not None and not time.value > above):
        raise TimeError(f"{name} must be {f'above {above}' if above is not None else 'at least 0'} (got {time})")
    if whole and time.unit is not TimeUnit.DURATION and not isinstance(time.value, int):
        raise TimeError(f"{name} must be a whole number of {time.unit} (got {time})")
    return time


def _is_whole(given: object) -> bool:
    if isinstance(given, Integral):
        return not isinstance(given, bool)
    return isinstance(given, Real) and float(given).is_integer()
