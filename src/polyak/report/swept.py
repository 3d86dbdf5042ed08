"""The numbers for the page and the figure of a sweep. Nothing is drawn here."""

import math
import shlex
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from polyak.errors import PlanWarning
from polyak.record import Fit, Record, fit
from polyak.sweeping import Result, best
from polyak.sweeping.examples import interval
from polyak.time import TimeUnit

# Points per segment of the record at which the curve of a profile is computed.
_POINTS = 16
# A line of other weights is on the scale if it is this close to the averages, in units of their range.
_ROOM = 1.5
# The axis shows the averages near the best one first if all of them take so many times as much room.
_FAR = 2.5
# A log axis is offered for values that differ by such a factor.
_WIDE = 3.0

UNIT_WORDS = {
    TimeUnit.ITERATION: "iterations",
    TimeUnit.EPOCH: "epochs",
    TimeUnit.BATCH: "batches",
    TimeUnit.SAMPLE: "samples",
    TimeUnit.TOKEN: "tokens",
    TimeUnit.DURATION: "runs",
    TimeUnit.SECOND: "seconds",
}


@dataclass(frozen=True, slots=True)
class Point:
    """One evaluated average.

    Args:
        result: The result of its evaluation.
        half_life: The half-life of the profile; for other profiles the median age of what is averaged.
        since: The moment at that median: half of the average is of later weights.
        steps: The weight of each moment in the average that the record gives: for each segment, its share of the
            average, divided by its length.
        curve: The weight of each moment in the profile itself, between ``Swept.moments``.
    """

    result: Result
    half_life: float
    since: float
    steps: tuple[float, ...]
    curve: tuple[float, ...]

    @property
    def on_line(self) -> bool:
        """Whether the profile is a half-life, so that a line connects it with the others."""
        return self.result.half_life is not None


@dataclass(frozen=True, slots=True)
class Level:
    """The metric of other weights, a level line in the drawings.

    Args:
        name: The name given to ``sweep``.
        value: The metric.
        on_scale: Whether the value lies on the scale of the averages.
    """

    name: str
    value: float
    on_scale: bool


@dataclass(frozen=True, slots=True)
class Swept:
    """The numbers of a sweep.

    Args:
        record: The name of the record's folder.
        unit: The unit of half-lives and moments, in words.
        metric: The metric that decides.
        maximize: Whether a higher value is better.
        points: The averages, in the order of their half-lives.
        best: The index of the best average.
        others: The results of other weights.
        edges: The start of the first segment of the record, then the end of each segment.
        moments: The moments between which the numbers of ``Point.curve`` hold.
        batchnorm: Whether the statistics of BatchNorm layers were recomputed.
        folder: The folder of the record.
        at: The end moment of the averages, as text; "" for the end of the record.
        source: The arguments by which commands open the record; "" if a command line cannot say it.
    """

    record: str
    unit: str
    metric: str
    maximize: bool
    points: tuple[Point, ...]
    best: int
    others: tuple[Result, ...]
    edges: tuple[float, ...]
    moments: tuple[float, ...]
    batchnorm: bool = False
    folder: str = ""
    at: str = ""
    source: str = ""

    @property
    def label(self) -> str:
        """What distinguishes these averages from those of other moments and records."""
        return f"{self.record} at {self.at}" if self.at else self.record

    @property
    def metrics(self) -> list[str]:
        """The names of all metrics with a finite value somewhere, the one that decides first."""
        names = [name for name in self.points[self.best].result.metrics if name != self.metric]
        return [self.metric, *(name for name in names if any(map(self.of(name).known, self.points)))]

    def of(self, metric: str) -> "Swept":
        """Return the same numbers with another metric in the drawings.

        Args:
            metric: One of ``metrics``.
        """
        return replace(self, metric=metric)

    @property
    def line(self) -> list[tuple[float, float]]:
        """The half-lives and their metric, without NaN. Other profiles are not on this line."""
        return [(point.half_life, self.value(point)) for point in self.points if point.on_line and self.known(point)]

    def value(self, point: Point) -> float:
        """Return the metric of an average.

        Args:
            point: The average.
        """
        return point.result.metrics.get(self.metric, math.nan)

    def margins(self, point: Point) -> tuple[float, float] | None:
        """Return how far the 95 % interval of the metric reaches below and above its value; None if there is none.

        Args:
            point: The average.
        """
        interval, value = point.result.interval(self.metric), self.value(point)
        return None if interval is None else (value - interval[0], interval[1] - value)

    def known(self, point: Point) -> bool:
        """Return whether the metric of an average is a number.

        Args:
            point: The average.
        """
        return not math.isnan(self.value(point))

    @property
    def middles(self) -> list[float]:
        """The middle between each two neighbouring ``moments``."""
        return [(before + now) / 2 for before, now in pairwise(self.moments)]

    @property
    def levels(self) -> list[Level]:
        """The metric of other weights, without NaN, the highest first."""
        values = [(value, one.name) for one in self.others if not math.isnan(value := self._of(one))]
        low, high = self._reach
        return [Level(name, value, low <= value <= high) for value, name in sorted(values, reverse=True)]

    @property
    def metric_range(self) -> tuple[float, float]:
        """The limits of the metric's axis: all averages, and the other weights that do not flatten them."""
        values = [self.value(point) for point in self.points if self.known(point)]
        values += [level.value for level in self.levels if level.on_scale]
        low, high = min(values), max(values)
        margin = 0.15 * (high - low) or 0.1 * abs(high) or 1.0
        return low - margin, high + margin

    def differs_by(self, point: Point) -> tuple[float, float] | None:
        """Return how far the 95 % interval of the difference from the best average reaches, below and above it.

        It is paired, over the same examples: far shorter than that of the metric. None without examples, and for the
        best average itself.

        Args:
            point: The average.
        """
        best = self.points[self.best]
        values, of_best = (one.result.examples.get(self.metric, ()) for one in (point, best))
        if point is best or len(values) != len(of_best):
            return None
        differences = [value - other for value, other in zip(values, of_best, strict=True)]
        bounds, mean = interval(differences), self.value(point) - self.value(best)
        return None if bounds is None else (mean - bounds[0], bounds[1] - mean)

    @property
    def near_range(self) -> tuple[float, float] | None:
        """The limits of an axis that shows the two thirds of the averages nearest the best; None if all are near."""
        best = self.value(self.points[self.best])
        values = sorted((self.value(p) for p in self.points if self.known(p)), key=lambda value: abs(value - best))
        near = values[: 2 * len(values) // 3 + 1]
        low, high = min(near), max(near)
        margin = 0.3 * (high - low)
        if not margin or max(values) - min(values) < _FAR * (high - low + 2 * margin):
            return None
        return low - margin, high + margin

    @property
    def log_range(self) -> tuple[float, float] | None:
        """The limits of a log axis, as exponents of 10; None if the values are too close for one, or not above 0."""
        values = [self.value(p) for p in self.points if self.known(p)] + [one.value for one in self.levels]
        if not min(values) > 0 or max(values) < _WIDE * min(values):
            return None
        low, high = math.log10(min(values)), math.log10(max(values))
        margin = 0.05 * (high - low)
        return low - margin, high + margin

    @property
    def _reach(self) -> tuple[float, float]:
        values = [self.value(point) for point in self.points if self.known(point)]
        room = _ROOM * (max(values) - min(values)) or math.inf
        return min(values) - room, max(values) + room

    def _of(self, result: Result) -> float:
        return result.metrics.get(self.metric, math.nan)


def swept(
    record: Record,
    results: Sequence[Result],
    metric: str | None = None,
    *,
    maximize: bool = False,
    batchnorm: bool = False,
) -> Swept:
    """Return the numbers that the report of a sweep shows.

    Args:
        record: The record of the sweep.
        results: The results, as ``sweep`` returned them.
        metric: The metric that decides; None for the first.
        maximize: Whether a higher value is better.
        batchnorm: Whether the statistics of BatchNorm layers were recomputed.

    Raises:
        EvaluationError: If the metric is NaN for every average.
    """
    chosen = best(results, metric, maximize=maximize)
    unit = next((one.half_life.unit for one in results if one.half_life is not None), TimeUnit.BATCH)
    edges = [record.stretches[0].start, *(segment.end for segment in record.stretches)]
    times = tuple(edge.clock(unit, record.max_duration) for edge in edges)
    points: list[Point] = []
    moments: tuple[float, ...] = ()
    for result in results:
        if result.profile is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", PlanWarning)  # the sweep has warned already
                fitted = fit(result.profile, record.stretches, max_duration=record.max_duration)
            moments, curve = _curve(fitted, times)
            points.append(_point(result, fitted, times, curve))
    points.sort(key=lambda point: point.half_life)
    return Swept(
        record=record.folder.resolve().name,
        unit=UNIT_WORDS[unit],
        metric=next(iter(chosen.metrics)) if metric is None else metric,
        maximize=maximize,
        points=tuple(points),
        best=next(i for i, point in enumerate(points) if point.result is chosen),
        others=tuple(result for result in results if result.profile is None),
        edges=times,
        moments=moments,
        batchnorm=batchnorm,
        folder=str(record.folder),
        at="" if chosen.at is None else str(chosen.at),
        source=_source(record),
    )


def _source(record: Record) -> str:
    """Return the arguments by which commands open a record; the page does not say in which folder a record is."""
    own = shlex.quote(str(record.folder))
    return shlex.quote(record.folder.resolve().name) if record.arguments == own else record.arguments or ""


def _point(result: Result, fitted: Fit, times: Sequence[float], curve: Sequence[float]) -> Point:
    since = _clock_at(fitted, times, fitted.stretches[-1].end.updates - fitted.median_age)
    half_life = times[-1] - since if result.half_life is None else float(result.half_life)
    steps = [
        (share - before) / (end - start) if end > start else 0.0
        for (before, share), (start, end) in zip(pairwise(fitted.cumulative), pairwise(times), strict=True)
    ]
    return Point(result, half_life, since, tuple(steps), tuple(curve))


def _clock_at(fitted: Fit, times: Sequence[float], updates: float) -> float:
    """Return the clock after a number of updates, by linear interpolation within a segment."""
    for segment, (start, end) in zip(fitted.stretches, pairwise(times), strict=True):
        if updates <= segment.end.updates:
            return start + (end - start) * (updates - segment.start.updates) / segment.num_updates
    return times[-1]


def _curve(fitted: Fit, times: Sequence[float]) -> tuple[tuple[float, ...], list[float]]:
    """Return moments, and the weight of each moment between two neighbours in the profile itself."""
    moments, curve = [times[0]], list[float]()
    for values, (start, end) in zip(fitted.profile, pairwise(times), strict=True):
        intervals = len(values) - 1
        stops = sorted({round(intervals * i / _POINTS) for i in range(_POINTS + 1)})
        for before, now in pairwise(stops):
            length = (end - start) * (now - before) / intervals
            moments.append(start + (end - start) * now / intervals)
            curve.append((values[now] - values[before]) / length if length > 0 else 0.0)
    return tuple(moments), curve
