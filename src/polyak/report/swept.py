"""What the report of a sweep shows, as plain numbers."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from polyak.errors import PlanWarning
from polyak.profiles import HalfLife, Profile
from polyak.record import Fit, Record, fit
from polyak.sweeping import Result, best
from polyak.time import TimeUnit

# Parts of a stretch between which a profile's curve is drawn.
_PARTS = 16

_WORDS = {
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
    """An average that was measured.

    Args:
        result: What was measured.
        half_life: Of the profile, or for other profiles the age of which half of the average is younger.
        since: The moment after which half of the average came.
        steps: How much each moment counts in what the record gives: for each stretch, its share over its length.
        curve: The same in what was asked for, at ``Swept.moments``.
    """

    result: Result
    half_life: float
    since: float
    steps: tuple[float, ...]
    curve: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Swept:
    """A sweep, ready to be shown.

    Args:
        record: Its folder's name.
        unit: Of half-lives and moments, in words.
        metric: Which counts.
        maximize: Whether more is better.
        points: The averages, the shortest half-life first.
        best: Which of them is best.
        others: Weights to compare with.
        edges: When the stretches of the record end, with the start of the first.
        moments: Between which moments each number of ``Point.curve`` holds.
        batchnorm: Whether statistics of BatchNorm layers were recomputed.
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

    @property
    def line(self) -> list[tuple[float, float]]:
        """The half-lives with a number for the metric, and that number: other profiles lie beside this line."""
        return [
            (point.half_life, point.result.metrics[self.metric])
            for point in self.points
            if isinstance(point.result.profile, HalfLife) and not math.isnan(point.result.metrics[self.metric])
        ]


def swept(
    record: Record,
    results: Sequence[Result],
    metric: str | None = None,
    *,
    maximize: bool = False,
    batchnorm: bool = False,
) -> Swept:
    """Return what there is to show of a sweep.

    Args:
        record: That was swept.
        results: As ``sweep`` returned them.
        metric: Which counts; None for the first.
        maximize: Whether more is better.
        batchnorm: Whether statistics of BatchNorm layers were recomputed.

    Raises:
        EvaluationError: If no average has a number for the metric.
    """
    chosen = best(results, metric, maximize=maximize)
    unit = next((one.profile.span.unit for one in results if isinstance(one.profile, HalfLife)), TimeUnit.BATCH)
    edges = [record.stretches[0].start, *(stretch.end for stretch in record.stretches)]
    times = tuple(edge.clock(unit, record.max_duration) for edge in edges)
    points: list[Point] = []
    moments: tuple[float, ...] = ()
    for result in results:
        if result.profile is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", PlanWarning)  # the sweep has said it
                fitted = fit(result.profile, record.stretches, max_duration=record.max_duration)
            moments, curve = _curve(fitted, times)
            points.append(_point(result, result.profile, fitted, times, curve))
    points.sort(key=lambda point: point.half_life)
    return Swept(
        record=record.folder.resolve().name,
        unit=_WORDS[unit],
        metric=next(iter(chosen.metrics)) if metric is None else metric,
        maximize=maximize,
        points=tuple(points),
        best=next(i for i, point in enumerate(points) if point.result is chosen),
        others=tuple(result for result in results if result.profile is None),
        edges=times,
        moments=moments,
        batchnorm=batchnorm,
    )


def _point(result: Result, profile: Profile, fitted: Fit, times: Sequence[float], curve: Sequence[float]) -> Point:
    since = _clock_at(fitted, times, fitted.stretches[-1].end.updates - fitted.median_age)
    half_life = float(profile.span) if isinstance(profile, HalfLife) else times[-1] - since
    steps = [
        share / (end - start) if end > start else 0.0
        for share, (start, end) in zip(fitted.coefficients, pairwise(times), strict=True)
    ]
    return Point(result, half_life, since, tuple(steps), tuple(curve))


def _clock_at(fitted: Fit, times: Sequence[float], updates: float) -> float:
    """Return the clock after a number of updates; between edges it runs evenly."""
    for stretch, (start, end) in zip(fitted.stretches, pairwise(times), strict=True):
        if updates <= stretch.end.updates:
            return start + (end - start) * (updates - stretch.start.updates) / stretch.num_updates
    return times[-1]


def _curve(fitted: Fit, times: Sequence[float]) -> tuple[tuple[float, ...], list[float]]:
    """Return moments, and between each two of them how much each moment counts in what was asked for."""
    moments, curve = [times[0]], list[float]()
    for values, (start, end) in zip(fitted.profile, pairwise(times), strict=True):
        intervals = len(values) - 1
        stops = sorted({round(intervals * i / _PARTS) for i in range(_PARTS + 1)})
        for before, now in pairwise(stops):
            length = (end - start) * (now - before) / intervals
            moments.append(start + (end - start) * now / intervals)
            curve.append((values[now] - values[before]) / length if length > 0 else 0.0)
    return tuple(moments), curve
