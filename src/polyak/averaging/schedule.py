"""When an average begins and is updated, and what can be said of that before a run."""

import math
import warnings
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Self

from polyak.errors import PlanWarning, ProfileError, TimeError
from polyak.events import State, refuse_uncounted
from polyak.profiles import HalfLife, Profile, Smoothing, named
from polyak.time import Time, Timestamp, TimeUnit, as_span


@dataclass(frozen=True, slots=True)
class Schedule:
    """When averaging begins, the time between updates, and how much of the average each of them keeps.

    Args:
        start: How much training comes before averaging.
        interval: The time between updates.
        profile: What decides on the decay.
    """

    start: Time
    interval: Time
    profile: Profile

    @classmethod
    def of(
        cls,
        *,
        half_life: str | Time | None,
        smoothing: float | None,
        profile: Profile | None,
        ema_start: str | Time,
        update_interval: str | Time | None,
    ) -> Self:
        """Return the schedule that the arguments of ``EMA`` ask for.

        Args:
            half_life: One of the three that decide on the decay.
            smoothing: One of the three.
            profile: One of the three.
            ema_start: As of ``EMA``.
            update_interval: As of ``EMA``.

        Raises:
            TimeError: If a time cannot be read, or has a value that makes no sense.
            ProfileError: If not exactly one of the three is given, or it is none that can be followed online.
        """
        given = {"half_life": half_life, "smoothing": smoothing, "profile": profile}
        if sum(value is not None for value in given.values()) != 1:
            raise ProfileError(f"give exactly one of half_life, smoothing and profile (got {given})")
        if half_life is not None:
            profile = HalfLife(as_span("half_life", half_life))
        elif smoothing is not None:
            profile = Smoothing(smoothing)
        _check_profile(profile)
        assert profile is not None
        if update_interval is None:
            update_interval = "1ep" if profile.unit is TimeUnit.EPOCH else "1ba"
        interval = as_span("update_interval", update_interval, above=0, whole=True)
        if math.isinf(interval.value):
            raise ProfileError("update_interval must be finite (got inf); an infinite half-life never moves either")
        return cls(as_span("ema_start", ema_start), interval, profile)

    @property
    def smoothing(self) -> float | None:
        """The share of the average that one update keeps, or None where it depends on what elapses."""
        if not named(self.profile).constant or self.profile.unit not in {None, self.interval.unit}:
            return None
        return self.profile.decay(0, 1 if self.profile.unit is None else float(self.interval))

    @property
    def units(self) -> set[TimeUnit]:
        """The units that it depends on."""
        units = {self.interval.unit, self.start.unit if self.start.value else None, self.profile.unit}
        return {unit for unit in units if unit is not None}

    def counts_seconds(self, max_duration: Time | None) -> bool:
        """Return whether it depends on wall clocks.

        Args:
            max_duration: The length of the run; None if it is not known.
        """
        of_run = max_duration is None or max_duration.unit is TimeUnit.SECOND
        return TimeUnit.SECOND in self.units or (TimeUnit.DURATION in self.units and of_run)

    def refuse_uncounted(self, state: State, counted: Collection[TimeUnit]) -> None:
        """Refuse times that the loop does not count; see ``Algorithm``.

        Args:
            state: What is known of the run.
            counted: Units that the loop counts.

        Raises:
            TimeError: If there are any.
            ProfileError: If they are those of the profile.
        """
        # Where updates are at the ends of epochs, only full ones matter.
        parts = self.interval.unit is not TimeUnit.EPOCH
        refuse_uncounted(f"update_interval='{self.interval}'", self.interval.unit, state, counted)
        if self.start.value:
            part = parts and not isinstance(self.start.value, int) and self.start.unit is TimeUnit.EPOCH
            refuse_uncounted(f"ema_start='{self.start}'", self.start.unit, state, counted, fractions=part)
        if self.profile.unit is None:
            return
        try:
            refuse_uncounted(named(self.profile).argument, self.profile.unit, state, counted, fractions=parts)
        except TimeError as error:
            if self.profile.unit is TimeUnit.DURATION and state.max_duration is None:
                raise
            raise ProfileError(str(error)) from None

    def warn(self, state: State) -> None:
        """Warn if, by what is known of the run, averaging never starts or never forgets the first weights.

        Args:
            state: Where the run begins.
        """
        end, first = convert(state.max_duration, TimeUnit.BATCH, state), self.first_update(state)
        if end is None or first is None or end <= float(state.timestamp.batch):
            return
        if first >= end:
            when = "never starts" if first > end else "starts only where the run ends"
            warnings.warn(
                f"averaging {when}: its first update is at {first:g}ba (ema_start='{self.start}', "
                f"update_interval='{self.interval}') and the run ends at {end:g}ba",
                PlanWarning,
                stacklevel=3,
            )
            return
        share = self.share_of_first_weights(state, first, end)
        if share is not None and share > 0.5:
            warnings.warn(
                f"the first weights will still be {share:.1%} of the average at the end of the run (averaging from "
                f"{first:g}ba to {end:g}ba by {self.profile!r}); take a shorter half-life, or "
                "EMA(profile=HalfLife(..., unbiased=True)), which forgets them",
                PlanWarning,
                stacklevel=3,
            )

    def first_update(self, state: State) -> float | None:
        """Return the batch of the first update event at or past the start; None if it cannot be known.

        Args:
            state: What is known of the run.
        """
        start = convert(self.start, TimeUnit.BATCH, state)
        if self.interval.unit is TimeUnit.EPOCH:
            epoch = state.timestamp.epoch_length
            return None if start is None or epoch is None else max(1, math.ceil(start / epoch - 1e-9)) * float(epoch)
        return None if start is None else max(1.0, math.ceil(start - 1e-9))

    def share_of_first_weights(self, state: State, first: float, end: float) -> float | None:
        """Return how much of the average at the end the first weights are; None if it is not known, or as asked for.

        Args:
            state: What is known of the run.
            first: The batch of the first update.
            end: The last batch.
        """
        if named(self.profile).forgets_nothing:
            return None
        interval = convert(self.interval, TimeUnit.BATCH, state)
        if interval is None:
            return None
        updates = end // interval - first // interval
        if self.profile.unit is None:
            return self.profile.decay(0, updates)
        origin = 0.0 if self.start.value == 0 else first
        last = end // interval * interval if updates else first
        moments = [convert(Time(t, TimeUnit.BATCH), self.profile.unit, state) for t in (origin, first, last)]
        known = [moment for moment in moments if moment is not None]
        if len(known) < len(moments):
            return None
        return self.profile.decay(known[1] - known[0], known[2] - known[0])

    def share_kept(self, origin: Timestamp, updated_at: Timestamp | None, state: State) -> float:
        """Return how much of the average an update keeps by what elapsed; without a moment before, one interval did.

        Args:
            origin: Where the profile's clock began.
            updated_at: When the last update was, if that is known.
            state: Now.

        Raises:
            TimeError: If no time has passed, or it cannot be known how much.
        """
        unit, run = self.profile.unit, state.max_duration
        assert unit is not None
        start, now = origin.elapsed(unit, run), state.timestamp.elapsed(unit, run)
        if updated_at is None:
            interval = convert(self.interval, unit, state)
            if interval is None:
                raise TimeError(
                    f"the length of an interval must be known in {unit} for an update whose last one is not known (got "
                    f"update_interval='{self.interval}'); set state.max_duration and the timestamp's epoch_length"
                )
            now = max(now - start, interval)
            return self.profile.decay(now - interval, now)
        last = updated_at.elapsed(unit, run)
        if now <= last and state.timestamp.intervals(self.interval, run) <= updated_at.intervals(self.interval, run):
            raise TimeError(
                f"time must have passed since the last update (it was at {_moment(updated_at)}, and now it is "
                f"{_moment(state.timestamp)}); set state.timestamp = state.timestamp.to_next_batch()"
            )
        return self.profile.decay(max(0.0, last - start), max(0.0, now - start))

    def last_interval(self, state: State) -> Timestamp:
        """Return where an interval last ended.

        Args:
            state: Now.
        """
        unit, interval = self.interval.unit, self.interval.value
        if unit is TimeUnit.DURATION:
            return state.timestamp
        return state.timestamp.with_counter(Time(state.timestamp.get(unit).value // interval * interval, unit))


def _check_profile(profile: Any) -> None:
    if isinstance(profile, type) or not all(hasattr(profile, name) for name in ("decay", "recursive", "unit")):
        raise ProfileError(
            f"profile must be an instance of a profile, such as HalfLife('1000ba') (got {profile!r}); half-lives and "
            "smoothing have arguments of their own"
        )
    if not profile.recursive:
        raise ProfileError(
            f"one buffer must be able to follow the profile, and {profile!r} it cannot: what leaves the window "
            "would have to be forgotten; record the run and take this average from the record, or use HalfLife"
        )


def convert(time: Time | None, unit: TimeUnit, state: State) -> float | None:
    """Return a moment of the run in another unit; None if what is known of the run does not allow that.

    Args:
        time: The moment.
        unit: Any.
        state: What is known of the run.
    """
    if time is None or time.unit is unit:
        return None if time is None else float(time)
    if time.value == 0:
        return 0.0
    batches = _in_batches(time, state)
    if batches is None or unit is TimeUnit.BATCH:
        return batches
    one = _in_batches(Time(1, unit), state)
    return batches / one if one else None


def _moment(timestamp: Timestamp) -> str:
    return f"{timestamp.batch}, {timestamp.epoch}"


def _in_batches(time: Time, state: State) -> float | None:
    if time.unit is TimeUnit.BATCH:
        return float(time)
    if time.unit is TimeUnit.EPOCH and state.timestamp.epoch_length:
        return time.value * state.timestamp.epoch_length
    if time.unit is TimeUnit.DURATION and state.max_duration and state.max_duration.unit is not TimeUnit.DURATION:
        run = _in_batches(state.max_duration, state)
        return None if run is None else time.value * run
    return None
