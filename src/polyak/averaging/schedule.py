"""Decides when an average begins, when it is updated, and how much of it each update keeps. Without torch."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

from polyak.errors import ProfileError, TimeError
from polyak.profiles import HalfLife, Momentum, Profile, Smoothing, named
from polyak.time import Time, Timestamp, TimeUnit, as_span

# A default that needs no evaluation, in the middle of the values that others have tuned (docs/which-half-life.md).
AUTO, AUTO_SHARE = "auto", 1 / 16
_AUTO = HalfLife(Time(AUTO_SHARE, TimeUnit.DURATION), unbiased=True)


class Run(Protocol):
    """The members of a run that a schedule reads: the clock and the length. Every ``State`` has both."""

    @property
    def timestamp(self) -> Timestamp:
        """The current position in training."""
        ...

    @property
    def max_duration(self) -> Time | None:
        """The length of the run; None if it is not known."""
        ...


@dataclass(frozen=True, slots=True)
class Requirement:
    """A unit of time that an argument needs the loop to count.

    Args:
        argument: The argument as it was given, for errors.
        unit: The unit.
        fractions: Whether fractions of an epoch matter.
        of_profile: Whether the argument is the profile.
    """

    argument: str
    unit: TimeUnit
    fractions: bool = False
    of_profile: bool = False


@dataclass(frozen=True, slots=True)
class Schedule:
    """When averaging begins, the time between updates, and how much of the average each update keeps.

    Args:
        start: How much training comes before averaging.
        interval: The time between updates.
        profile: The profile, which decides on the decay.

    Attributes:
        unit: The unit of the profile's clock; None if it counts updates.
        by_epoch: Whether updates are due at the ends of epochs, and not at the ends of batches.

    Example:
        >>> schedule = Schedule(Time(0, "ba"), Time(1, "ba"), HalfLife("10ba"))
        >>> schedule.smoothing == 2 ** -0.1
        True
    """

    start: Time
    interval: Time
    profile: Profile
    unit: TimeUnit | None = field(init=False, repr=False)
    by_epoch: bool = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "unit", self.profile.unit)
        object.__setattr__(self, "by_epoch", self.interval.unit is TimeUnit.EPOCH)

    @classmethod
    def of(
        cls,
        *,
        half_life: str | Time | int | None,
        smoothing: float | None,
        profile: Profile | None,
        ema_start: str | Time | int,
        update_interval: str | Time | int | None,
    ) -> Self:
        """Return the schedule that the arguments of ``EMA`` describe.

        Args:
            half_life: One of the three that decide on the decay.
            smoothing: One of the three.
            profile: One of the three.
            ema_start: As for ``EMA``.
            update_interval: As for ``EMA``.

        Raises:
            TimeError: If a time cannot be read or is out of range.
            ProfileError: If not exactly one of the three is given, or one buffer cannot follow the profile.
        """
        given = {"half_life": half_life, "decay": smoothing, "profile": profile}
        if sum(value is not None for value in given.values()) != 1:
            shown = ", ".join(f"{name}={value!r}" for name, value in given.items() if value is not None)
            raise ProfileError(
                f"give exactly one of half_life, decay (or smoothing) and profile (got {shown or 'none'})"
            )
        if isinstance(half_life, str) and half_life.strip() == AUTO:
            profile = _AUTO
        elif half_life is not None:
            profile = HalfLife(as_span("half_life", half_life, steps=True))
        elif smoothing is not None:
            profile = Smoothing(smoothing)
        _check_profile(profile)
        assert profile is not None
        if update_interval is None:
            update_interval = "1ep" if profile.unit is TimeUnit.EPOCH else "1ba"
        interval = as_span("update_interval", update_interval, above=0, whole=True, steps=True)
        if math.isinf(interval.value):
            raise ProfileError("update_interval must be finite (got inf); an infinite half-life never moves either")
        return cls(as_span("ema_start", ema_start, steps=True), interval, profile)

    @property
    def smoothing(self) -> float | None:
        """The share of the average that every update keeps; None if it depends on the elapsed time."""
        if not named(self.profile).constant or self.unit not in {None, self.interval.unit}:
            return None
        return self.profile.decay(0, 1 if self.unit is None else float(self.interval))

    @property
    def units(self) -> set[TimeUnit]:
        """The units that the schedule depends on."""
        return {requirement.unit for requirement in self.requirements()}

    def requirements(self) -> Iterator[Requirement]:
        """Yield the units that the loop must count, each with the argument that needs it."""
        # The profile comes first, since the interval follows from it by default. If updates are due at the ends of
        # epochs, only full epochs matter.
        if self.unit is not None:
            argument = named(self.profile).argument
            argument = f"{argument}, which is {AUTO!r}" if self.profile == _AUTO else argument
            yield Requirement(argument, self.unit, not self.by_epoch, of_profile=True)
        if self.start.value:
            fractions = not self.by_epoch and not isinstance(self.start.value, int)
            yield Requirement(f"ema_start='{self.start}'", self.start.unit, fractions)
        yield Requirement(f"update_interval='{self.interval}'", self.interval.unit)

    def counts_seconds(self, max_duration: Time | None) -> bool:
        """Return whether the schedule depends on wall-clock time.

        Args:
            max_duration: The length of the run; None if it is not known.
        """
        by_clock = max_duration is None or max_duration.unit is TimeUnit.SECOND
        return TimeUnit.SECOND in self.units or (TimeUnit.DURATION in self.units and by_clock)

    def may_start(self, run: Run) -> bool:
        """Return whether averaging may begin: a batch has been trained, and ``start`` has been reached.

        Args:
            run: The run as it is now.
        """
        timestamp, unit = run.timestamp, self.start.unit
        if timestamp.batch.value == 0:
            return False  # mixed precision has skipped every step so far
        if unit is TimeUnit.DURATION and run.max_duration is None:
            return not self.start.value
        return timestamp.elapsed(unit, run.max_duration) >= self.start.value

    def is_due(self, updated_at: Timestamp | None, run: Run) -> bool:
        """Return whether an interval has ended since the last update, or the clock has been set back behind it.

        Args:
            updated_at: The last update. None if it is not known, as for an average that the user has set in a loop
                without FIT_START; then an update is due at every multiple of the interval.
            run: The run as it is now.
        """
        interval, length, now = self.interval, run.max_duration, run.timestamp
        if updated_at is None:
            return now.elapsed(interval.unit, length) % interval.value == 0
        return now.intervals(interval, length) != updated_at.intervals(interval, length)

    def origin(self, now: Timestamp) -> Timestamp:
        """Return where the profile's clock begins if averaging begins now: at ``start``, which may be earlier.

        The first weights then count for the time since ``start``.

        Args:
            now: The first update event at or after ``start``.
        """
        if self.start.value == 0:
            return Timestamp()
        return now if self.start.unit is TimeUnit.DURATION else now.with_counter(self.start)

    def decay(self, origin: Timestamp, updated_at: Timestamp | None, run: Run) -> float:
        """Return the share of the average that an update keeps, by the time since the last update.

        Args:
            origin: The start of the profile's clock.
            updated_at: The last update. None if it is not known: then one interval has elapsed.
            run: The run as it is now.

        Raises:
            TimeError: If no time has elapsed, or the elapsed time cannot be known.
        """
        unit, length, timestamp = self.unit, run.max_duration, run.timestamp
        assert unit is not None
        profile = self.profile_in(run)
        start, now = origin.elapsed(unit, length), timestamp.elapsed(unit, length)
        if updated_at is None:
            interval = self._interval_in(unit, run)
            now = max(now - start, interval)
            return profile.decay(now - interval, now)
        last = updated_at.elapsed(unit, length)
        if now <= last and not self.is_due(updated_at, run):
            raise TimeError(
                f"time must have passed since the last update (it was at {_moment(updated_at)}, now is "
                f"{_moment(timestamp)}); set state.timestamp = state.timestamp.to_next_batch()"
            )
        return profile.decay(max(0.0, last - start), max(0.0, now - start))

    def profile_in(self, run: Run) -> Profile:
        """Return the profile. A momentum is converted to steps, if the length of the run is known.

        Args:
            run: Has the length of an epoch and of the run, if they are known.
        """
        profile = self.profile
        if isinstance(profile, Momentum):
            return profile.in_steps(convert(profile.over, TimeUnit.BATCH, run))
        return profile

    def _interval_in(self, unit: TimeUnit, run: Run) -> float:
        interval = convert(self.interval, unit, run)
        if interval is None:
            raise TimeError(
                f"the interval must be known in {unit} for the first update of an average that was set (got "
                f"update_interval='{self.interval}'); set state.max_duration and the timestamp's epoch_length"
            )
        return interval

    def check_clock(self, run: Run) -> None:
        """Check that the loop counts the profile's unit, at the first update.

        Args:
            run: The run as it is now.

        Raises:
            ProfileError: If it does not.
        """
        unit, now = self.unit, run.timestamp
        if unit is None:
            return
        epochs_only = not self.by_epoch and now.epoch_length is None
        if now.elapsed(unit, run.max_duration) == 0 or (unit is TimeUnit.EPOCH and epochs_only):
            raise ProfileError(
                f"the loop must count {unit} for {self.profile!r} (after {now.batch} it has counted none); set it to "
                "count them (epochs need the number of batches in one), or use a profile in ba"
            )

    def last_interval(self, now: Timestamp) -> Timestamp:
        """Return where the last interval ended.

        Args:
            now: The current position in training.
        """
        unit, interval = self.interval.unit, self.interval.value
        if unit is TimeUnit.DURATION:
            return now
        return now.with_counter(Time(now.get(unit).value // interval * interval, unit))


def _check_profile(profile: Any) -> None:
    if isinstance(profile, type) or not all(hasattr(profile, name) for name in ("decay", "recursive", "unit")):
        raise ProfileError(
            f"profile must be an instance of a profile, such as HalfLife('1000ba') (got {profile!r}); a half-life or a "
            "smoothing goes into the argument of that name"
        )
    if not profile.recursive:
        raise ProfileError(
            f"one buffer must be able to follow the profile (got {profile!r}, which forgets what leaves its window); "
            f"{named(profile).online}"
        )


def convert(time: Time | None, unit: TimeUnit, run: Run) -> float | None:
    """Return a time in another unit; None if the run does not say how.

    Args:
        time: Any time.
        unit: Any unit.
        run: Has the length of an epoch and of the run, if they are known.
    """
    if time is None or time.unit is unit:
        return None if time is None else float(time)
    if time.value == 0:
        return 0.0
    batches = _in_batches(time, run)
    if batches is None or unit is TimeUnit.BATCH:
        return batches
    one = _in_batches(Time(1, unit), run)
    return batches / one if one else None


def _moment(timestamp: Timestamp) -> str:
    return f"{timestamp.batch}, {timestamp.epoch}"


def _in_batches(time: Time, run: Run) -> float | None:
    length, whole = run.timestamp.epoch_length, run.max_duration
    if time.unit is TimeUnit.BATCH:
        return float(time)
    if time.unit is TimeUnit.EPOCH and length:
        return time.value * length
    if time.unit is TimeUnit.DURATION and whole and whole.unit is not TimeUnit.DURATION:
        batches = _in_batches(whole, run)
        return None if batches is None else time.value * batches
    return None
