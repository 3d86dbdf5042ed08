"""One moment of a run: the metrics of its raw weights, of averages, and of virtual cooldowns that end there."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Self

from torch import Tensor

from polyak.averaging.schedule import AUTO_SHARE
from polyak.errors import ArgumentError, ProfileError
from polyak.profiles import Cooldown, HalfLife, Profile
from polyak.record import Record, fit
from polyak.record.recommendation import share_of
from polyak.sweeping import EvaluationError, Result, held, sweep
from polyak.sweeping.direction import asked
from polyak.sweeping.returned import Evaluate, measured
from polyak.time import Timestamp

# Shares of what was recorded so far.
HALF_LIVES = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4)
COOLDOWNS = (0.1, 0.2)

RAW, NEWEST, HALF_LIFE, COOLDOWN = "raw", "newest", "half_life", "cooldown"


@dataclass(frozen=True, slots=True)
class Reading:
    """The metrics of one set of weights.

    Args:
        kind: ``"raw"``, ``"newest"`` (the mean over the newest segment of the record, nearly raw), ``"half_life"`` or
            ``"cooldown"``.
        share: The half-life or the length of the cooldown, as a share of the run so far; None for the others.
        name: The name for people.
        metrics: The metrics, by name.
        error: The estimated error of the average; None if it is not known.
    """

    kind: str
    share: float | None
    name: str
    metrics: Mapping[str, float]
    error: float | None = None


@dataclass(frozen=True, slots=True)
class Moment:
    """All that was read at one moment.

    Args:
        updates: How many updates the record had.
        timestamp: The clock of the run there.
        metric: The metric that decides.
        maximize: Whether a higher value is better.
        readings: What was evaluated.
        seconds: How long that took.
        record: The folder of the record.
    """

    updates: int
    timestamp: Timestamp
    metric: str
    maximize: bool
    readings: tuple[Reading, ...]
    seconds: float = 0.0
    record: str = ""

    def get(self, kind: str, share: float | None = None) -> Reading | None:
        """Return a reading; None if there is none.

        Args:
            kind: As for ``Reading``.
            share: As for ``Reading``.
        """
        return next((one for one in self.readings if one.kind == kind and one.share == share), None)

    def value(self, reading: Reading | None) -> float:
        """Return the metric that decides; NaN if it is not known.

        Args:
            reading: One of the readings, or None.
        """
        return math.nan if reading is None else reading.metrics.get(self.metric, math.nan)

    @property
    def sixteenth(self) -> Reading | None:
        """The average with a half-life of a sixteenth of the run so far."""
        return self.get(HALF_LIFE, AUTO_SHARE)

    @property
    def best(self) -> Reading | None:
        """The best of the half-lives; None if none gives a number."""
        known = [one for one in self.readings if one.kind == HALF_LIFE and not math.isnan(self.value(one))]
        return (max if self.maximize else min)(known, key=self.value, default=None)

    @property
    def cooldowns(self) -> list[Reading]:
        """The virtual cooldowns."""
        return [one for one in self.readings if one.kind == COOLDOWN]

    def named(self) -> Iterator[tuple[str, Reading]]:
        """Yield the readings with names for loggers."""
        listed = [("raw", self.get(RAW)), ("newest", self.get(NEWEST)), ("sixteenth", self.sixteenth)]
        listed += [("best_half_life", self.best), *((f"cooldown_{one.share:.0%}"[:-1], one) for one in self.cooldowns)]
        yield from ((name, one) for name, one in listed if one is not None)

    def numbers(self) -> dict[str, float]:
        """Return the metrics by name, for loggers; ``watch/best_half_life_share`` is a share of the run so far."""
        found = {f"watch/{m}/{name}": value for name, one in self.named() for m, value in one.metrics.items()}
        if self.best is not None and self.best.share is not None:
            found["watch/best_half_life_share"] = self.best.share
        return found

    def to_plain(self) -> dict[str, Any]:
        """Return the moment in a form that JSON can hold: NaN is null."""
        return {
            "record": self.record,
            "updates": self.updates,
            "clock": self.timestamp.state_dict(),
            "metric": self.metric,
            "direction": "maximize" if self.maximize else "minimize",
            "best": None if self.best is None else self.best.name,
            "readings": [
                {
                    "kind": one.kind,
                    "share": one.share,
                    "name": one.name,
                    "metrics": {name: _plain(value) for name, value in one.metrics.items()},
                    "error": None if one.error is None else _plain(one.error),
                }
                for one in self.readings
            ],
            "seconds": round(self.seconds, 3),
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Self:
        """Return the moment whose ``to_plain`` is given.

        Args:
            plain: As returned.
        """
        readings = tuple(
            Reading(
                str(one["kind"]),
                one["share"],
                str(one["name"]),
                {name: math.nan if value is None else float(value) for name, value in one["metrics"].items()},
                one["error"],
            )
            for one in plain["readings"]
        )
        return cls(
            int(plain["updates"]),
            Timestamp.from_state_dict(plain["clock"]),
            str(plain["metric"]),
            plain["direction"] == "maximize",
            readings,
            float(plain["seconds"]),
            str(plain["record"]),
        )


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None


def check_options(
    evaluate: Evaluate,
    *,
    half_lives: Sequence[float],
    cooldowns: Sequence[float],
    maximize: bool | None,
    minimize: bool | None,
) -> None:
    """Check the arguments of ``read_moment`` before a run, since the first moment may be hours away.

    Args:
        evaluate: As for ``read_moment``.
        half_lives: As for ``read_moment``.
        cooldowns: As for ``read_moment``.
        maximize: As for ``read_moment``.
        minimize: As for ``read_moment``.

    Raises:
        ArgumentError: If ``evaluate`` cannot be called, or a length is not a share of the run.
        EvaluationError: If ``maximize`` and ``minimize`` contradict each other.
    """
    if not callable(evaluate):
        raise ArgumentError(f"evaluate must be a function of the weights by name (got {evaluate!r})")
    for name, shares in (("half_lives", half_lives), ("cooldowns", cooldowns)):
        if not isinstance(shares, Sequence) or not all(isinstance(one, Real) and 0 < one <= 1 for one in shares):
            raise ArgumentError(
                f"{name} must be a list of shares of the run so far, each above 0 and at most 1 (got {shares!r}); for "
                "10 % give 0.1"
            )
    asked(maximize=maximize, minimize=minimize)


def read_moment(
    record: Record,
    evaluate: Evaluate,
    *,
    raw: Callable[[], dict[str, Tensor]] | None = None,
    half_lives: Sequence[float] = HALF_LIVES,
    cooldowns: Sequence[float] = COOLDOWNS,
    metric: str | None = None,
    maximize: bool | None = None,
    minimize: bool | None = None,
) -> Moment:
    """Evaluate the averages at the end of a record, which a run may be writing. Its files are read once for all.

    Args:
        record: The record, with a segment.
        evaluate: As for ``sweep``.
        raw: Returns the raw weights; None takes those that the record keeps, once its run has ended.
        half_lives: As shares of what was recorded. Those that the record does not resolve are left out.
        cooldowns: The lengths of virtual linear cooldowns, as shares of what was recorded.
        metric: As for ``sweep``.
        maximize: As for ``sweep``.
        minimize: As for ``sweep``.

    Raises:
        EvaluationError: As ``sweep``.
        RecordError: As ``sweep``.
    """
    began = time.perf_counter()
    with held(record) as snapshot:
        wanted = _wanted(snapshot, half_lives, cooldowns)
        profiles = [profile for _, _, profile in wanted]
        options: dict[str, Any] = {"metric": metric, "maximize": maximize, "minimize": minimize}
        results = sweep(snapshot, evaluate, profiles, refine=0, **options)
        readings = [_reading(one, wanted) for one in results]
        if raw is not None and not any(one.kind == RAW for one in readings):
            readings.insert(0, Reading(RAW, None, "raw weights", _evaluated(evaluate, raw())))
        end, folder = snapshot.segments[-1].end, str(record.folder)
        seconds = time.perf_counter() - began
        return Moment(
            end.updates, end.timestamp, results.metric, results.maximize, tuple(readings), seconds, record=folder
        )


def _wanted(
    record: Record, half_lives: Sequence[float], cooldowns: Sequence[float]
) -> list[tuple[str, float, Profile]]:
    """Return the kind, the share and the profile of the averages that the record resolves."""
    listed: list[tuple[str, float, Profile]] = [
        *((HALF_LIFE, share, HalfLife(share_of(record, share), unbiased=True)) for share in half_lives),
        *((COOLDOWN, share, Cooldown(share_of(record, share))) for share in cooldowns),
    ]
    found = list[tuple[str, float, Profile]]()
    for one in listed:
        try:
            fit(one[2], record.segments, max_duration=record.max_duration)
        except ProfileError:  # too fine for a record that is still short
            continue
        found.append(one)
    return found


def _reading(result: Result, wanted: Sequence[tuple[str, float, Profile]]) -> Reading:
    kind, share = RAW if result.profile is None else NEWEST, None
    for one, of, profile in wanted:
        if profile is result.profile:
            kind, share = one, of
    return Reading(kind, share, result.name, result.metrics, result.error)


def _evaluated(evaluate: Evaluate, state: dict[str, Tensor]) -> dict[str, float]:
    try:
        returned = evaluate(state)
    except Exception as problem:
        raise EvaluationError(f"evaluating the raw weights failed: {type(problem).__name__}: {problem}") from problem
    metrics, _ = measured(returned, "raw")
    return metrics
