"""The progress of an average in a run: the start of its clock, its last update and decay. Without torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from polyak.averaging.schedule import Run, Schedule
from polyak.time import Time, Timestamp, TimeUnit


@dataclass(slots=True)
class Progress:
    """The moments and counts that the decay of an average depends on, and the warnings at the end of a run.

    Attributes:
        origin: The start of the profile's clock.
        updated_at: The last update; None if there was none, or it is not known.
        decay: The share of the average that the last update kept.
        logged_at: The batch at which metrics were last logged.
        counts_seconds: Whether the decay depends on wall-clock time.
        fit_from: The batch and the number of updates at which this run began.
        waits: How many updates found weights with NaN or inf, so that averaging could not begin.
        waits_since: The first of these.
        began: The reading of the profile's clock when averaging began; None if that is not known.
        has_history: Whether all updates since averaging began were counted. It is False for an average that the user
            has set, or that Composer saved.
        max_duration: The length of the run, if it is known.
        warned_of_youth: Whether there was a warning that the average is young, or has not begun.
    """

    origin: Timestamp = field(default_factory=Timestamp)
    updated_at: Timestamp | None = None
    decay: float | None = None
    logged_at: Time | None = None
    counts_seconds: bool = True
    fit_from: tuple[Time, int] | None = None
    waits: int = 0
    waits_since: Timestamp | None = None
    began: float | None = None
    has_history: bool = True
    max_duration: Time | None = None
    warned_of_youth: bool = False

    def wait(self, now: Timestamp) -> None:
        """Count an update that found weights with NaN or inf.

        Args:
            now: The current position in training.
        """
        self.waits, self.waits_since = self.waits + 1, self.waits_since or now

    def begin(self, schedule: Schedule, run: Run) -> None:
        """Begin with the weights as they are.

        Args:
            schedule: How the average updates.
            run: The run as it is now.
        """
        self.origin, self.updated_at = schedule.origin(run.timestamp), run.timestamp
        self.max_duration, unit = run.max_duration, schedule.unit
        elapsed = [0.0 if unit is None else at.elapsed(unit, run.max_duration) for at in (self.origin, self.updated_at)]
        self.began, self.has_history = max(0.0, elapsed[1] - elapsed[0]), True

    def resume(self, schedule: Schedule, run: Run) -> None:
        """Continue at the start of a run, on the clock of the run.

        Args:
            schedule: How the average updates.
            run: The run at its start.
        """
        self.max_duration = run.max_duration
        # A state from Composer does not have the last update, which was at the end of the last interval.
        self.updated_at = self.updated_at or schedule.last_interval(run.timestamp)
        if run.timestamp.batch < self.updated_at.batch:
            self._follow_new_clock(self.updated_at, schedule.unit, run)

    def _follow_new_clock(self, updated_at: Timestamp, unit: TimeUnit | None, run: Run) -> None:
        """Continue on a clock that starts again at 0, as in a second loop, as if no time had passed."""
        self.updated_at, now = run.timestamp, run.timestamp
        if unit is None:
            return
        elapsed = updated_at.elapsed(unit, run.max_duration) - self.origin.elapsed(unit, run.max_duration)
        if unit is TimeUnit.DURATION and run.max_duration is not None:
            elapsed, unit = elapsed * float(run.max_duration), run.max_duration.unit
        self.origin = now.with_counter(Time(now.elapsed(unit) - elapsed, unit))

    def state_dict(self) -> dict[str, Any]:
        """Return the moments and the decay as plain numbers."""
        return {
            "origin": self._counters(self.origin),
            "updated": self.updated_at is not None,
            "updated_at": self._counters(self.updated_at or Timestamp()),
            "decay": self.decay,
        }

    def _counters(self, moment: Timestamp) -> dict[str, int | float | None]:
        """Return a moment as numbers; wall-clock time, which differs from run to run, only if the decay needs it."""
        return moment.state_dict() | ({} if self.counts_seconds else {"total_wct": 0})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from what ``state_dict`` returned.

        Args:
            state: The saved state.
        """
        self.origin = Timestamp.from_state_dict(state["origin"])
        self.updated_at = Timestamp.from_state_dict(state["updated_at"]) if state["updated"] else None
        self.decay = state["decay"]
        self.began, self.has_history = None, state["updated"]
