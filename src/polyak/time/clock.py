"""``Timestamp``: the clock of a training run. It holds plain numbers, and makes a ``Time`` when one is read."""

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from datetime import timedelta
from typing import Any

from polyak.errors import TimeError
from polyak.time.span import Time
from polyak.time.units import TimeUnit, plain_number

_COUNTERS: dict[str, str] = {
    TimeUnit.ITERATION: "iteration",
    TimeUnit.EPOCH: "epoch",
    TimeUnit.BATCH: "batch",
    TimeUnit.SAMPLE: "sample",
    TimeUnit.TOKEN: "token",
    TimeUnit.SECOND: "total_wct",
}
# No average depends on these, and records do not have them.
_DETAILS = ("epoch_in_iteration", "token_in_iteration", "iteration_wct", "epoch_wct", "batch_wct")


class _Counter:
    """A counter of a ``Timestamp``, whose ``__dict__`` holds its number by name.

    Args:
        unit: The unit of the counter.
    """

    def __init__(self, unit: TimeUnit) -> None:
        self._unit = unit

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, timestamp: "Timestamp | None", owner: type | None = None) -> Time:
        number = 0 if timestamp is None else timestamp.__dict__[self._name]  # without one: the default of the field
        return Time(number, self._unit)

    def __set__(self, timestamp: "Timestamp", given: Time | str | float | timedelta) -> None:
        timestamp.__dict__[self._name] = _number_of(self._name, given, self._unit)


def _number_of(name: str, given: Any, unit: TimeUnit) -> int | float:
    """Return the number of a counter, given as a time in its unit, a time string, a ``timedelta`` or a number."""
    if type(given) is not Time:
        given = Time.from_timedelta(given) if isinstance(given, timedelta) else Time.from_input(given, unit)
    if given.unit is not unit:
        raise TimeError(f"{name} must be in {unit} (got {given})")
    return given.value


@dataclass(frozen=True, eq=False)
class Timestamp:
    """The state of training: one counter for each unit. Numbers stand for times in the unit of the counter.

    It compares with a time or a time string by the counter of that unit: ``state.timestamp < "10ep"``. Two are equal
    if their counters are; wall clocks of epochs and batches, and the counters within an iteration, do not matter.

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
        TimeError: If a counter is not a time in its unit.

    Example:
        >>> now = Timestamp(epoch_length=4).to_next_batch(samples=8).to_next_batch(samples=8)
        >>> now.batch, now.elapsed("ep"), now.elapsed("sp")
        (Time(2, 'ba'), 0.5, 16.0)
        >>> now.batch == 2, now < "3ba", now.copy(epoch=7).epoch
        (True, True, Time(7, 'ep'))
    """

    iteration: _Counter = _Counter(TimeUnit.ITERATION)
    epoch: _Counter = _Counter(TimeUnit.EPOCH)
    batch: _Counter = _Counter(TimeUnit.BATCH)
    sample: _Counter = _Counter(TimeUnit.SAMPLE)
    token: _Counter = _Counter(TimeUnit.TOKEN)
    epoch_in_iteration: _Counter = _Counter(TimeUnit.EPOCH)
    token_in_iteration: _Counter = _Counter(TimeUnit.TOKEN)
    batch_in_epoch: _Counter = _Counter(TimeUnit.BATCH)
    sample_in_epoch: _Counter = _Counter(TimeUnit.SAMPLE)
    token_in_epoch: _Counter = _Counter(TimeUnit.TOKEN)
    total_wct: _Counter = _Counter(TimeUnit.SECOND)
    iteration_wct: _Counter = _Counter(TimeUnit.SECOND)
    epoch_wct: _Counter = _Counter(TimeUnit.SECOND)
    batch_wct: _Counter = _Counter(TimeUnit.SECOND)
    epoch_length: int | None = None

    def copy(self, **changes: Any) -> "Timestamp":
        """Return a copy with other counters.

        Args:
            **changes: By name; None leaves a counter as it is.

        Raises:
            TimeError: If a value is not a time in the unit of its counter.
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
            raise _unknown_unit(unit)
        return getattr(self, _COUNTERS[unit])

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Timestamp):
            return _COMPARED(self.__dict__) == _COMPARED(other.__dict__)
        time = _as_time(other)
        return NotImplemented if time is None else self.get(time.unit) == time

    def __hash__(self) -> int:
        return hash(_COMPARED(self.__dict__))

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

    @property
    def in_epoch(self) -> bool:
        """Whether batches have ended since the last epoch did."""
        return self.__dict__["batch_in_epoch"] > 0

    @property
    def ends_epoch(self) -> bool:
        """Whether the last batch of an epoch of known length has ended, and the epoch has not been counted yet."""
        return self.epoch_length == self.__dict__["batch_in_epoch"]

    def elapsed(self, unit: TimeUnit | str, max_duration: Time | None = None) -> float:
        """Return the clock in ``unit``: as ``get``, with the elapsed fraction of an epoch, and of the run for ``dur``.

        Args:
            unit: Any unit.
            max_duration: The length of the run; needed for ``dur``.

        Raises:
            TimeError: For ``dur`` without ``max_duration``.
        """
        numbers = self.__dict__
        if unit == TimeUnit.EPOCH and self.epoch_length:
            return numbers["epoch"] + min(1.0, numbers["batch_in_epoch"] / self.epoch_length)
        if (counter := _COUNTERS.get(unit)) is not None:
            return float(numbers[counter])
        if unit != TimeUnit.DURATION:
            raise _unknown_unit(unit)
        if max_duration is None:
            raise TimeError("a time in dur needs a run whose max_duration is known: give one, or use another unit")
        return self.elapsed(max_duration.unit) / max_duration.value

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
        changes: dict[str, Any] = {_COUNTERS[time.unit]: time}
        if time.unit is TimeUnit.EPOCH:
            changes["batch_in_epoch"] = 0
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
        sample = samples if type(samples) is int else _number_of("sample", samples, TimeUnit.SAMPLE)
        token = tokens if type(tokens) is int else _number_of("token", tokens, TimeUnit.TOKEN)
        later = Timestamp.__new__(Timestamp)
        numbers = later.__dict__
        numbers.update(self.__dict__)
        numbers["batch"] += steps
        numbers["batch_in_epoch"] += steps
        numbers["sample"] += sample
        numbers["sample_in_epoch"] += sample
        numbers["token"] += token
        numbers["token_in_epoch"] += token
        numbers["token_in_iteration"] += token
        numbers["batch_wct"] = took = seconds if duration is None else duration.total_seconds()
        if took:
            numbers["total_wct"] += took
            numbers["iteration_wct"] += took
            numbers["epoch_wct"] += took
        return later

    def to_next_epoch(self, duration: timedelta | None = None) -> "Timestamp":
        """Return the moment after the end of this epoch; ``duration`` is the training since its last batch."""
        numbers = self.__dict__
        return self._at_epoch_start(
            duration, epoch=numbers["epoch"] + 1, epoch_in_iteration=numbers["epoch_in_iteration"] + 1
        )

    def to_next_iteration(self, duration: timedelta | None = None) -> "Timestamp":
        """Return the moment after the end of this iteration; ``duration`` is the training since its last batch."""
        number = self.__dict__["iteration"] + 1
        return self._at_epoch_start(
            duration, iteration=number, epoch_in_iteration=0, token_in_iteration=0, iteration_wct=0
        )

    def _at_epoch_start(self, duration: timedelta | None, **changes: float) -> "Timestamp":
        later = Timestamp.__new__(Timestamp)
        numbers = later.__dict__
        numbers.update(self.__dict__)
        if duration is not None:
            numbers["total_wct"] += duration.total_seconds()
            numbers["iteration_wct"] += duration.total_seconds()
        numbers.update(batch_in_epoch=0, sample_in_epoch=0, token_in_epoch=0, epoch_wct=0, batch_wct=0, **changes)
        return later

    def state_dict(self, *, details: bool = False) -> dict[str, int | float | None]:
        """Return the counters as plain numbers by field name.

        Args:
            details: Whether to include the wall clocks of epochs and batches, and the counters within an iteration.
        """
        names = _UNITS if details else (name for name in _UNITS if name not in _DETAILS)
        counters = {name: plain_number(self.__dict__[name]) for name in names}
        return {**counters, "epoch_length": self.epoch_length}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, int | float | None]) -> "Timestamp":
        """Return the moment whose ``state_dict`` is given.

        Args:
            state: As ``state_dict`` returned it, with details or without.
        """
        counters = {name: Time(state[name] or 0, unit) for name, unit in _UNITS.items() if name in state}
        epoch_length = state["epoch_length"]
        return cls(**counters, epoch_length=None if epoch_length is None else int(epoch_length))

    def __setstate__(self, state: Any) -> None:
        """Take what was pickled: the numbers by name, or, by earlier versions, the times in the order of the fields."""
        if not isinstance(state, dict):
            names = [one.name for one in fields(Timestamp)]
            state = vars(Timestamp(**dict(zip(names, state, strict=True))))
        self.__dict__.update(state)


_UNITS: dict[str, TimeUnit] = {one.name: one.default.unit for one in fields(Timestamp) if isinstance(one.default, Time)}
_COMPARED = operator.itemgetter(*(one.name for one in fields(Timestamp) if one.name not in _DETAILS))


def _as_time(given: object) -> Time | None:
    """Return a time or a time string as a ``Time``, and None for anything else."""
    return given if isinstance(given, Time) else Time.from_timestring(given) if isinstance(given, str) else None


def _unknown_unit(unit: object) -> TimeError:
    return TimeError(f"unit must be one of {', '.join(_COUNTERS)} (got {unit!r})")
