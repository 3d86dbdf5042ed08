"""Computes the coefficients of a record's segments in an average under any profile, and the error of that average.

A linear combination of the segments' means gives all updates in a segment the same weight. Its cumulative profile is a
linear spline with knots at the segments' edges. ``coefficients`` chooses the spline nearest to the given profile, which
is the best linear prediction if the weights are a random walk. The clock of all computations is the count of recorded
updates; the clock of a profile is read at the edges, and interpolated between them.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from polyak.errors import PlanWarning, ProfileError, TimeError
from polyak.profiles import NamedProfile, Profile, named
from polyak.record.manifest import Segment
from polyak.record.stored import all_stored
from polyak.time import Time, TimeUnit

# Points per segment at which the profile is evaluated. Segments of fewer updates are evaluated at each of them.
_POINTS = 64
# Above these, an average is so far from what was asked for that there is a warning: the share of weights from before
# the record, and the error relative to |last weights - average|.
MISSING_SHARE = 0.01
_LARGE_ERROR = 0.05
# Below this error, the segments give the profile exactly.
_EXACT = 1e-6


@dataclass(frozen=True, slots=True)
class Fit:
    """A linear combination of segments, compared with the profile that was asked for.

    Args:
        segments: Those up to the moment of the average, oldest first.
        profile: The cumulative profile at evenly spaced points in each segment, edges included. The share of weights
            from before the record is left out and the rest scaled up.
        cumulative: The cumulative profile of the combination, at each edge.
        missing: The share that was left out.
        raw: The share of the last raw weights besides, as the floor of a cooldown. All else is about the rest.
    """

    segments: tuple[Segment, ...]
    profile: tuple[tuple[float, ...], ...]
    cumulative: tuple[float, ...]
    missing: float
    raw: float = 0.0

    @property
    def stretches(self) -> tuple[Segment, ...]:
        """The earlier name of ``segments``."""
        return self.segments

    @property
    def coefficients(self) -> list[float]:
        """The weight of each segment. Their sum is 1, less the share of the raw weights."""
        return [(1 - self.raw) * (after - before) for before, after in pairwise(self.cumulative)]

    @property
    def residuals(self) -> list[float]:
        """For each segment, the integral over it of the squared difference between the two cumulative profiles."""
        result: list[float] = []
        for segment, values, (start, end) in zip(self.segments, self.profile, pairwise(self.cumulative), strict=True):
            given = _line(start, end, len(values))
            result.append(_integral(segment, [(f - s) ** 2 for f, s in zip(values, given, strict=True)]))
        return result

    @property
    def expected_error(self) -> float:
        """The error, relative to |last weights - average|, if the weights were a random walk with equal steps."""
        total = sum(
            _integral(segment, [f * f for f in values])
            for segment, values in zip(self.segments, self.profile, strict=True)
        )
        return math.sqrt(sum(self.residuals) / total)

    @property
    def remedy(self) -> str:
        """How to make the error smaller in another run."""
        return "record with a larger per_level or a shorter interval"

    @property
    def is_exact(self) -> bool:
        """Whether the combination is what was asked for, up to rounding."""
        return self.expected_error < _EXACT

    @property
    def median_age(self) -> float:
        """The median age of the average in updates: half of it is younger. For a half-life this is the half-life."""
        now = self.segments[-1].end.updates
        for segment, values in zip(reversed(self.segments), reversed(self.profile), strict=True):
            step = segment.num_updates / (len(values) - 1)
            for j in range(len(values) - 1, 0, -1):
                low, high = values[j - 1], values[j]
                if low <= 0.5:
                    within = j - 1 + (0.5 - low) / (high - low) if high > low else j
                    return now - (segment.start.updates + within * step)
        return float(now)


def finest(segments: Sequence[Segment]) -> int:
    """Return the shortest half-life, in recorded updates, that ``segments`` resolve at their end.

    It is the length of the longer of the last two: the last alone may have been cut short by the end of the run. Where
    the last has just been added, and the one before is merged, it is the length of a segment before merging.

    Args:
        segments: Oldest first. The result is 0 if there are none.
    """
    return math.ceil(_finest(segments, None, None))


def _finest(segments: Sequence[Segment], unit: TimeUnit | None, max_duration: Time | None) -> float:
    """Return the same as ``finest`` in a unit of the clock, or in updates for None."""
    lengths = [one.end.clock(unit, max_duration) - one.start.clock(unit, max_duration) for one in segments[-2:]]
    if len(lengths) == 2 and not segments[-1].level:
        lengths[0] /= 2 ** segments[-2].level
    return max(lengths, default=0)


def coefficients(
    profile: Profile,
    segments: Sequence[Segment],
    at: Time | str | int | None = None,
    *,
    max_duration: Time | None = None,
) -> list[float]:
    """Return the coefficient of each segment in an average under ``profile``.

    A profile is measured by its median age, which for a half-life is the half-life. One that is younger than
    ``finest`` is refused, except where the segments give it exactly, as a window that starts at an edge. There is a
    warning if the expected error is above 5 % of |last weights - average|.

    Args:
        profile: Its clock starts where the record does.
        segments: The segments of the record, oldest first.
        at: The moment of the average, which must be the end of a segment; None for the last.
        max_duration: The length of the run; needed for times in ``dur``.

    Returns:
        A coefficient for each segment that ends by then. Their sum is 1, less the share of the last raw weights that
        the floor of a cooldown is; some may be slightly negative.

    Raises:
        ProfileError: If the segments do not resolve the profile, or it has no share in them.
        TimeError: If ``at`` is not the end of a segment.
    """
    fitted = fit(profile, segments, at, max_duration=max_duration)
    warn_of_error(profile, fitted.expected_error, fitted.remedy)
    return fitted.coefficients


def shares(
    profile: Profile,
    segments: Sequence[Segment],
    at: Time | str | int | None = None,
    *,
    max_duration: Time | None = None,
) -> list[float]:
    """Return the share of the profile in each segment: simpler than ``coefficients`` and less accurate.

    Args:
        profile: As for ``coefficients``.
        segments: As for ``coefficients``.
        at: As for ``coefficients``.
        max_duration: As for ``coefficients``.

    Raises:
        ProfileError: If the profile has no share in the segments.
        TimeError: If ``at`` is not the end of a segment.
    """
    up_to = _until(segments, at, max_duration)
    placed, raw = _placed(profile, up_to, max_duration)
    curve, _ = _curve(placed, up_to, max_duration)
    return [(1 - raw) * (values[-1] - values[0]) for values in curve]


def fit(
    profile: Profile,
    segments: Sequence[Segment],
    at: Time | str | int | None = None,
    *,
    max_duration: Time | None = None,
) -> Fit:
    """Return the coefficients and the data for their errors, without a warning.

    Args:
        profile: As for ``coefficients``.
        segments: As for ``coefficients``.
        at: As for ``coefficients``.
        max_duration: As for ``coefficients``.

    Raises:
        ProfileError: As ``coefficients``.
        TimeError: As ``coefficients``.
    """
    if all_stored(segments):
        from polyak.record.solving import fit_stored  # noqa: PLC0415  it needs this module

        return fit_stored(profile, segments, at, max_duration)
    up_to = _until(segments, at, max_duration)
    placed, raw = _placed(profile, up_to, max_duration)
    curve, missing = _curve(placed, up_to, max_duration)
    result = Fit(up_to, curve, tuple(_spline(up_to, curve)), missing, raw)
    limit = finest(up_to)
    shown = named(profile).describe()
    # Segments of one update resolve everything, even half-lives below one update.
    if limit > 1 and not result.is_exact and _is_finer(result, profile, limit, max_duration):
        raise ProfileError(
            f"a profile must not be finer than the record, which at this moment resolves half-lives of {limit} updates "
            f"or more (got {shown}, whose median age is {result.median_age:.4g} updates): ask for a longer one, or "
            "record with a shorter interval"
        )
    if missing > MISSING_SHARE:
        warnings.warn(
            f"{missing:.1%} of the average under {shown} are weights from before the record, which it does not hold: "
            "they are left out, as HalfLife(..., unbiased=True) leaves them out by itself",
            PlanWarning,
            stacklevel=4,
        )
    return result


def _is_finer(fitted: Fit, profile: Profile, limit: int, max_duration: Time | None) -> bool:
    """Return whether a profile is finer than the segments resolve.

    Without bias, more than half of an average is younger than its half-life, so that a half-life counts as it is.
    """
    span = named(profile).half_life
    if span is not None and float(span) >= _finest(fitted.segments, span.unit, max_duration) * (1 - _EXACT):
        return False
    return fitted.median_age < limit * (1 - _EXACT)


def warn_of_error(profile: Profile, error: float, remedy: str) -> None:
    """Warn if the error of an average is above 5 %.

    Args:
        profile: As asked for.
        error: In units of |last weights - average|.
        remedy: What makes it smaller in another run.
    """
    if not error <= _LARGE_ERROR:
        shown = named(profile).describe()
        warnings.warn(
            f"the record resolves {shown} only coarsely: the error of the average is about {error:.1%} of its "
            f"distance from the last weights; {remedy}",
            PlanWarning,
            stacklevel=3,
        )


def error_estimate(fitted: Fit, products: Sequence[Sequence[float]]) -> float:
    """Estimate the error of an average, in units of |last weights - average|, from the segments alone.

    An estimate and not a bound: it was within a factor of 2.5 of the truth where the truth was known.

    Args:
        fitted: What ``fit`` returned.
        products: For each two pairs of neighboring segments, the inner product of the differences of their means; not
            needed if the segments give the profile exactly.

    Returns:
        The error; 0 if the segments give the profile exactly, else infinite if there is a single segment.
    """
    if all_stored(fitted.segments):
        from polyak.record.solving import StoredFit, error_of  # noqa: PLC0415  it needs this module

        assert isinstance(fitted, StoredFit)
        return error_of(fitted, products)
    segments, residuals = fitted.segments, fitted.residuals
    if fitted.is_exact:
        return 0.0
    if len(segments) == 1:
        return math.inf
    # The means of neighbours differ by the steps of a walk, weighted by a hat function whose square has this integral.
    hats = [(a.num_updates + b.num_updates) / 3 for a, b in pairwise(segments)]
    walked = [products[i][i] / hat for i, hat in enumerate(hats)]
    around = [walked[:1], *([a, b] for a, b in pairwise(walked)), walked[-1:]]
    variances = [sum(pair) / len(pair) for pair in around]
    error = sum(variance * residual for variance, residual in zip(variances, residuals, strict=True))
    # The average differs from the last mean by all steps between means, weighted by the cumulative profile ...
    inner = fitted.cumulative[1:-1]
    distance = sum(a * b * products[i][j] for i, a in enumerate(inner) for j, b in enumerate(inner))
    # ... and the last weights from that mean by the steps within the segment.
    last, values = segments[-1], fitted.profile[-1]
    rising = _line(0.0, 1.0, len(values))
    within = _integral(last, [2 * f * r - r * r for f, r in zip(values, rising, strict=True)])
    distance += variances[-1] * max(0.0, within)
    if error <= 0:
        return 0.0
    return math.sqrt(error / distance) if distance > 0 else math.inf


def _until(segments: Sequence[Segment], at: Time | str | int | None, max_duration: Time | None) -> tuple[Segment, ...]:
    if not segments:
        raise ProfileError("an average needs a record with at least one segment (got none)")
    if at is None:
        return tuple(segments)
    moment = Time.from_input(at, TimeUnit.BATCH)
    ends = [segment.end.clock(moment.unit, max_duration) for segment in segments]
    nearest = min(range(len(ends)), key=lambda i: abs(ends[i] - moment.value))
    if not math.isclose(ends[nearest], moment.value, rel_tol=1e-9):
        around = sorted(set(ends[max(0, nearest - 1) : nearest + 2]))
        raise TimeError(
            f"an average must end where a segment does (got at={moment}): near it are "
            f"{', '.join(Time(end, moment.unit).to_timestring() for end in around)}"
        )
    return tuple(segments[: nearest + 1])


def _placed(profile: Profile, segments: Sequence[Segment], max_duration: Time | None) -> tuple[NamedProfile, float]:
    """Return the profile of the segments, and the separate share of the last raw weights."""
    edges = [segments[0].start, *(segment.end for segment in segments)]
    readings = [edge.clock(profile.unit, max_duration) for edge in edges]
    return named(profile).placed([reading - readings[0] for reading in readings])


def _curve(
    profile: Profile, segments: Sequence[Segment], max_duration: Time | None
) -> tuple[tuple[tuple[float, ...], ...], float]:
    """Return ``Fit.profile`` and ``Fit.missing``."""
    unit = profile.unit
    begin = segments[0].start.clock(unit, max_duration)
    now = segments[-1].end.clock(unit, max_duration) - begin
    if not now > 0:
        raise ProfileError(f"{profile} needs a clock in {unit}, which stood still in this record: use another unit")
    curve: list[tuple[float, ...]] = []
    later, share = now, 1.0
    # From the newest point to the oldest, so that for recursive profiles each decay spans a single step: a warm-up is
    # a product over all its updates.
    for segment in reversed(segments):
        start, end = (edge.clock(unit, max_duration) - begin for edge in (segment.start, segment.end))
        values: list[float] = []
        for clock in reversed(_line(start, end, 1 + min(_POINTS, segment.num_updates))):
            before = max(0.0, min(clock, later))  # a clock that was set back stands still
            share = share * profile.decay(before, later) if profile.recursive else profile.decay(before, now)
            later = before
            values.append(share)
        curve.append(tuple(reversed(values)))
    missing = curve[-1][0]
    if not missing < 1:
        raise ProfileError(f"{profile} must give weight to the record (got all weight before it): use a shorter one")
    if missing < -_EXACT:
        raise ProfileError(
            "a profile must not subtract weights from before the record, which it does not hold (got a share of "
            f"{missing:.1%} of them under {profile}); average while training, as by BEMA(...), or use another profile"
        )
    return tuple(tuple((f - missing) / (1 - missing) for f in values) for values in reversed(curve)), missing


def _line(start: float, end: float, points: int) -> list[float]:
    return [start + (end - start) * j / (points - 1) for j in range(points)]


def _integral(segment: Segment, values: Sequence[float]) -> float:
    """Integrate over a segment by the trapezoid rule: the sum over its updates if there is a point for each."""
    return (sum(values) - (values[0] + values[-1]) / 2) * segment.num_updates / (len(values) - 1)


def _spline(segments: Sequence[Segment], curve: Sequence[Sequence[float]]) -> list[float]:
    """Return the values at the edges of the linear spline from 0 to 1 that is nearest to ``curve``.

    The sums on both sides of the equations are over the same points, so that a curve that is such a spline is returned
    exactly.
    """
    size = len(segments) + 1
    diagonal, neighbor, right = [0.0] * size, [0.0] * size, [0.0] * size
    for i, (segment, values) in enumerate(zip(segments, curve, strict=True)):
        rising = _line(0.0, 1.0, len(values))
        falling = rising[::-1]
        square = _integral(segment, [r * r for r in rising])
        diagonal[i] += square
        diagonal[i + 1] += square
        neighbor[i] = _integral(segment, [r * f for r, f in zip(rising, falling, strict=True)])
        right[i] += _integral(segment, [v * f for v, f in zip(values, falling, strict=True)])
        right[i + 1] += _integral(segment, [v * r for v, r in zip(values, rising, strict=True)])
    knots = [0.0] * (size - 1) + [1.0]
    if size == 2:
        return knots
    # Gauss's elimination for the inner edges; the outer two are given.
    right[-2] -= neighbor[-2]
    for i in range(2, size - 1):
        factor = neighbor[i - 1] / diagonal[i - 1]
        diagonal[i] -= factor * neighbor[i - 1]
        right[i] -= factor * right[i - 1]
    for i in range(size - 2, 0, -1):
        onward = neighbor[i] * knots[i + 1] if i < size - 2 else 0.0
        knots[i] = (right[i] - onward) / diagonal[i]
    return knots
