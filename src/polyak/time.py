"""Spans and moments of training: ``Time``, ``TimeUnit`` and ``Timestamp``.

No torch here: this is what a profile, a command line and a file name have in common.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from typing import Self

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


_NUMBER = r"(?:\d[\d_]*\.?\d*|\.\d+)(?:e[+-]?\d+)?|inf"
_TIME_STRING = re.compile(rf"\s*({_NUMBER})\s*({'|'.join(TimeUnit)})\s*", re.IGNORECASE)
_WALL_CLOCK = re.compile(r"\s*(?=\d)(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?\s*", re.IGNORECASE)
_FORM = (
    "a time string is a number that is not negative and a unit, such as '1000ba', '1.5ep', '0.25dur' or '1h30m'; "
    f"the units are {', '.join(TimeUnit)}"
)


@dataclass(frozen=True, slots=True, eq=False)
class Time:
    """A span of training, or a moment in it counted from the start.

    Args:
        value: How many. Whole floats become ints, except in ``dur``, where 1 is the whole run.
        unit: Of what.

    Raises:
        TimeError: If ``value`` is NaN, or ``unit`` is no unit; when comparing or adding two of different units.

    Example:
        >>> Time.from_timestring("1000ba")
        Time(1000, 'ba')
        >>> Time.from_input("2ep") + "1ep" < "4ep"
        True
        >>> Time.from_input("3ba") / "4ba"
        Time(0.75, 'dur')
    """

    value: int | float
    unit: TimeUnit

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "unit", TimeUnit(self.unit))
        except ValueError:
            raise TimeError(f"unit must be one of {', '.join(TimeUnit)} (got {self.unit!r})") from None
        if math.isnan(self.value):
            raise TimeError(f"value must be a number (got {self.value!r})")
        if self.unit is TimeUnit.DURATION:
            object.__setattr__(self, "value", float(self.value))
        elif math.isfinite(self.value) and self.value == int(self.value):
            object.__setattr__(self, "value", int(self.value))

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
        if match := _TIME_STRING.fullmatch(timestring):
            return cls(float(match[1]) if not match[1].isdigit() else int(match[1]), TimeUnit(match[2].lower()))
        match = _WALL_CLOCK.fullmatch(timestring)
        if match and any(match.groups()):
            hours, minutes, seconds = (int(part or 0) for part in match.groups())
            return cls(3600 * hours + 60 * minutes + seconds, TimeUnit.SECOND)
        raise TimeError(f"{_FORM} (got {timestring!r})")

    @classmethod
    def from_input(cls, time: "Time | str") -> "Time":
        """Return a ``Time`` as it is, and read a time string.

        Args:
            time: Either of the two.

        Raises:
            TimeError: If it is neither, or a time string that cannot be read.
        """
        if isinstance(time, Time):
            return time
        if isinstance(time, str):
            return cls.from_timestring(time)
        raise TimeError(f"{_FORM} (got {time!r}, a {type(time).__name__})")

    def to_timestring(self) -> str:
        """Return the time string that reads back as this.

        Example:
            >>> Time(0.5, TimeUnit.DURATION).to_timestring()
            '0.5dur'
        """
        return f"{self.value}{self.unit}"

    def __eq__(self, other: object) -> bool:
        """Compare with a time or a time string; of different units, two are never equal."""
        if isinstance(other, str):
            other = Time.from_timestring(other)
        if not isinstance(other, Time):
            return NotImplemented
        return self.unit is other.unit and self.value == other.value

    def __hash__(self) -> int:
        return hash((self.value, self.unit))

    def __repr__(self) -> str:
        return f"Time({self.value}, {self.unit.value!r})"

    def __str__(self) -> str:
        return self.to_timestring()

    def __int__(self) -> int:
        return int(self.value)

    def __float__(self) -> float:
        return float(self.value)

    def _same_unit(self, other: "Time | str") -> "Time":
        other = Time.from_input(other)
        if other.unit is not self.unit:
            raise TimeError(f"two times must have one unit (got {self} and {other})")
        return other

    def __lt__(self, other: "Time | str") -> bool:
        return self.value < self._same_unit(other).value

    def __le__(self, other: "Time | str") -> bool:
        return self.value <= self._same_unit(other).value

    def __gt__(self, other: "Time | str") -> bool:
        return self.value > self._same_unit(other).value

    def __ge__(self, other: "Time | str") -> bool:
        return self.value >= self._same_unit(other).value

    def __add__(self, other: "Time | str") -> "Time":
        return Time(self.value + self._same_unit(other).value, self.unit)

    def __sub__(self, other: "Time | str") -> "Time":
        return Time(self.value - self._same_unit(other).value, self.unit)

    def __mod__(self, other: "Time | str") -> "Time":
        return Time(self.value % self._same_unit(other).value, self.unit)

    def __mul__(self, factor: float) -> "Time":
        return Time(self.value * factor, self.unit)

    __rmul__ = __mul__

    def __truediv__(self, other: "Time | str | float") -> "Time":
        """Divide by a number, or by a time of the same unit, which gives the share as ``dur``."""
        if isinstance(other, (Time, str)):
            return Time(self.value / self._same_unit(other).value, TimeUnit.DURATION)
        return Time(self.value / other, self.unit)


def as_span(name: str, time: Time | str, *, above: float | None = None, whole: bool = False) -> Time:
    """Return ``time`` as a ``Time`` that may serve as the length of something.

    Args:
        name: What it is for, to name it in errors.
        time: A time or a time string, at least 0.
        above: If given, the value must be above this instead.
        whole: Whether the value must be a whole number (``dur`` never needs to be).

    Raises:
        TimeError: If one of these does not hold.
    """
    time = Time.from_input(time)
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


@dataclass(frozen=True, slots=True)
class Timestamp:
    """Where training stands: one counter for each unit.

    Args:
        iteration: Counted by hosts that have iterations above epochs.
        epoch: Epochs ended.
        batch: Batches that ended in an optimizer step.
        sample: Samples seen.
        token: Tokens seen, where the host counts them.
        batch_in_epoch: As ``batch``, since the epoch began.
        sample_in_epoch: As ``sample``, since the epoch began.
        token_in_epoch: As ``token``, since the epoch began.
        total_wct: Seconds of training, evaluation excluded.
        epoch_length: Batches in an epoch, if known: without it, epochs have no fractions.

    Example:
        >>> now = Timestamp(epoch_length=4).to_next_batch(samples=8).to_next_batch(samples=8)
        >>> now.batch, now.elapsed("ep"), now.elapsed("sp")
        (Time(2, 'ba'), 0.5, 16.0)
    """

    iteration: Time = Time(0, TimeUnit.ITERATION)
    epoch: Time = Time(0, TimeUnit.EPOCH)
    batch: Time = Time(0, TimeUnit.BATCH)
    sample: Time = Time(0, TimeUnit.SAMPLE)
    token: Time = Time(0, TimeUnit.TOKEN)
    batch_in_epoch: Time = Time(0, TimeUnit.BATCH)
    sample_in_epoch: Time = Time(0, TimeUnit.SAMPLE)
    token_in_epoch: Time = Time(0, TimeUnit.TOKEN)
    total_wct: Time = Time(0, TimeUnit.SECOND)
    epoch_length: int | None = None

    def get(self, unit: TimeUnit | str) -> Time:
        """Return the counter of ``unit``, whole epochs only.

        Args:
            unit: Any but ``dur``.

        Raises:
            TimeError: For ``dur``, which needs the length of the run.
        """
        if unit not in _COUNTERS:
            raise TimeError(f"unit must be one of {', '.join(_COUNTERS)} (got {unit!r})")
        return getattr(self, _COUNTERS[TimeUnit(unit)])

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

    def to_next_batch(self, *, samples: int = 0, tokens: int = 0, seconds: float = 0.0, steps: int = 1) -> "Timestamp":
        """Return the moment after one more batch.

        Args:
            samples: Samples in it.
            tokens: Tokens in it.
            seconds: How long it took.
            steps: Optimizer steps that it ended in: 0 when mixed precision skipped the step.
        """
        return replace(
            self,
            batch=self.batch + Time(steps, TimeUnit.BATCH),
            sample=self.sample + Time(samples, TimeUnit.SAMPLE),
            token=self.token + Time(tokens, TimeUnit.TOKEN),
            batch_in_epoch=self.batch_in_epoch + Time(steps, TimeUnit.BATCH),
            sample_in_epoch=self.sample_in_epoch + Time(samples, TimeUnit.SAMPLE),
            token_in_epoch=self.token_in_epoch + Time(tokens, TimeUnit.TOKEN),
            total_wct=self.total_wct + Time(seconds, TimeUnit.SECOND),
        )

    def to_next_epoch(self) -> "Timestamp":
        """Return the moment after the end of this epoch."""
        return replace(
            self,
            epoch=self.epoch + Time(1, TimeUnit.EPOCH),
            batch_in_epoch=Time(0, TimeUnit.BATCH),
            sample_in_epoch=Time(0, TimeUnit.SAMPLE),
            token_in_epoch=Time(0, TimeUnit.TOKEN),
        )

    def state_dict(self) -> dict[str, int | float | None]:
        """Return the counters as plain numbers by field name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value.value if isinstance(value, Time) else value for name, value in values.items()}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, int | float | None]) -> "Timestamp":
        """Return the moment that ``state_dict`` was taken of.

        Args:
            state: What ``state_dict`` returned.
        """
        zero = cls()
        counters = {
            field.name: Time(state[field.name] or 0, getattr(zero, field.name).unit)
            for field in fields(cls)
            if isinstance(getattr(zero, field.name), Time)
        }
        epoch_length = state["epoch_length"]
        return replace(zero, **counters, epoch_length=None if epoch_length is None else int(epoch_length))
