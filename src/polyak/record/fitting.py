"""How much each stretch of a record counts in an average under any profile, and how far off that average is.

The stretches' means span what can be had: an average with coefficients ``x`` counts the moments of each stretch alike.
Its cumulative profile is then a linear spline with knots at the stretches' edges. ``coefficients`` chooses the spline
nearest to the profile asked for, which is the best linear prediction when the weights walk at random. One clock runs
through all of it, the count of recorded updates; a profile's own clock is read off the edges, and runs evenly between
two of them.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from polyak.errors import PlanWarning, ProfileError, TimeError
from polyak.profiles import Profile
from polyak.record.manifest import Stretch
from polyak.time import Time

# Points per stretch at which the profile is looked at. Stretches of fewer updates are looked at in each of them.
_POINTS = 64
# Above these, what was asked for differs from what is given by so much that the user must know: a share of the average
# that belongs to weights before the record, and an error relative to |last weights - average|.
_MISSING_SHARE = 0.01
_LARGE_ERROR = 0.05
# Below this, the profile is one that the stretches give exactly.
_EXACT = 1e-6


@dataclass(frozen=True, slots=True)
class Fit:
    """An average put together from stretches, compared with the profile asked for.

    Args:
        stretches: Those up to the moment of the average, oldest first.
        profile: For each stretch, the share of the average in what came up to each of evenly spaced points in it, its
            edges included. What belongs to weights before the record is left out and the rest scaled up.
        cumulative: At each edge, the share that the stretches before it have in what is given.
        missing: The share that was left out.
    """

    stretches: tuple[Stretch, ...]
    profile: tuple[tuple[float, ...], ...]
    cumulative: tuple[float, ...]
    missing: float

    @property
    def coefficients(self) -> list[float]:
        """How much each stretch counts. Their sum is 1."""
        return [after - before for before, after in pairwise(self.cumulative)]

    @property
    def residuals(self) -> list[float]:
        """For each stretch, the integral over it of the squared difference between the two cumulative profiles."""
        result: list[float] = []
        for stretch, values, (start, end) in zip(self.stretches, self.profile, pairwise(self.cumulative), strict=True):
            given = _line(start, end, len(values))
            result.append(_integral(stretch, [(f - s) ** 2 for f, s in zip(values, given, strict=True)]))
        return result

    @property
    def expected_error(self) -> float:
        """The error, relative to |last weights - average|, if the weights walked at random with even steps."""
        total = sum(
            _integral(stretch, [f * f for f in values])
            for stretch, values in zip(self.stretches, self.profile, strict=True)
        )
        return math.sqrt(sum(self.residuals) / total)

    @property
    def median_age(self) -> float:
        """How many updates ago the weights were of which half of the average is younger: a half-life's length."""
        now = self.stretches[-1].end.updates
        for stretch, values in zip(reversed(self.stretches), reversed(self.profile), strict=True):
            step = stretch.num_updates / (len(values) - 1)
            for j in range(len(values) - 1, 0, -1):
                low, high = values[j - 1], values[j]
                if low <= 0.5:
                    within = j - 1 + (0.5 - low) / (high - low) if high > low else j
                    return now - (stretch.start.updates + within * step)
        return float(now)


def finest(stretches: Sequence[Stretch]) -> int:
    """Return the shortest half-life, in recorded updates, that can be told at the end of ``stretches``.

    It is the length of the longer of the last two: the last alone may have been cut short by the end of the run.

    Args:
        stretches: Oldest first. None tell nothing, which is 0.
    """
    return max((stretch.num_updates for stretch in stretches[-2:]), default=0)


def coefficients(
    profile: Profile, stretches: Sequence[Stretch], at: Time | str | None = None, *, max_duration: Time | None = None
) -> list[float]:
    """Return how much each stretch counts in an average under ``profile``.

    A profile is measured by its median age, which for a half-life is the half-life. One that is younger than
    ``finest`` is refused, except where the stretches give it exactly, as a window that starts at an edge. One whose
    expected error is above 5 % of |last weights - average| is warned about.

    Args:
        profile: Its clock starts where the record does.
        stretches: Of the record, oldest first.
        at: The moment of the average, which must be the end of a stretch; None for the last.
        max_duration: The length of the run; needed for times in ``dur``.

    Returns:
        A coefficient for each stretch that ends by then. Their sum is 1; single ones may be slightly negative.

    Raises:
        ProfileError: If the profile is finer than the stretches can tell, or has no share in them.
        TimeError: If ``at`` is not the end of a stretch.
    """
    fitted = fit(profile, stretches, at, max_duration=max_duration)
    warn_of_error(profile, fitted.expected_error)
    return fitted.coefficients


def shares(
    profile: Profile, stretches: Sequence[Stretch], at: Time | str | None = None, *, max_duration: Time | None = None
) -> list[float]:
    """Return the share of the profile that falls into each stretch: simpler than ``coefficients`` and less accurate.

    Args:
        profile: As for ``coefficients``.
        stretches: As for ``coefficients``.
        at: As for ``coefficients``.
        max_duration: As for ``coefficients``.

    Raises:
        ProfileError: If the profile has no share in the stretches.
        TimeError: If ``at`` is not the end of a stretch.
    """
    up_to = _until(stretches, at, max_duration)
    curve, _ = _curve(profile, up_to, max_duration)
    return [values[-1] - values[0] for values in curve]


def fit(
    profile: Profile, stretches: Sequence[Stretch], at: Time | str | None = None, *, max_duration: Time | None = None
) -> Fit:
    """Do the work of ``coefficients``, and return with them what tells how good they are: no warning of the error.

    Args:
        profile: As for ``coefficients``.
        stretches: As for ``coefficients``.
        at: As for ``coefficients``.
        max_duration: As for ``coefficients``.

    Raises:
        ProfileError: As ``coefficients``.
        TimeError: As ``coefficients``.
    """
    up_to = _until(stretches, at, max_duration)
    curve, missing = _curve(profile, up_to, max_duration)
    result = Fit(up_to, curve, tuple(_spline(up_to, curve)), missing)
    error = result.expected_error
    limit = finest(up_to)
    if error > _EXACT and result.median_age < limit * (1 - _EXACT):
        raise ProfileError(
            f"a profile must not be finer than the record, which at this moment tells half-lives of {limit} updates or "
            f"more (got {profile}, whose median age is {result.median_age:.4g} updates): ask for a longer one, or "
            "record with a shorter interval"
        )
    if missing > _MISSING_SHARE:
        warnings.warn(
            f"{missing:.1%} of the average under {profile} are weights from before the record, which it does not hold: "
            "they are left out, as HalfLife(..., unbiased=True) leaves them out by itself",
            PlanWarning,
            stacklevel=4,
        )
    return result


def warn_of_error(profile: Profile, error: float) -> None:
    """Warn if an average is so far off that the user must know.

    Args:
        profile: As asked for.
        error: In units of |last weights - average|.
    """
    if not error <= _LARGE_ERROR:
        warnings.warn(
            f"the record tells {profile} only coarsely: the average will be off by about {error:.1%} of its distance "
            "from the last weights; a record with more per_level, or a shorter interval, tells it better",
            PlanWarning,
            stacklevel=3,
        )


def error_estimate(fitted: Fit, products: Sequence[Sequence[float]]) -> float:
    """Estimate how far off an average is, in units of |last weights - average|, from the stretches alone.

    An estimate and not a bound: it was within a factor of 2.5 of the truth where the truth was known.

    Args:
        fitted: What ``fit`` returned.
        products: For each two pairs of neighbouring stretches, the inner product of the differences of their means.

    Returns:
        The error; infinite if a single stretch must do for a profile that it does not give exactly.
    """
    stretches, residuals = fitted.stretches, fitted.residuals
    if len(stretches) == 1:
        return 0.0 if fitted.expected_error < _EXACT else math.inf
    # Means of neighbours differ by a walk's steps weighed by a hat function, whose square has this integral.
    hats = [(a.num_updates + b.num_updates) / 3 for a, b in pairwise(stretches)]
    walked = [products[i][i] / hat for i, hat in enumerate(hats)]
    around = [walked[:1], *([a, b] for a, b in pairwise(walked)), walked[-1:]]
    variances = [sum(pair) / len(pair) for pair in around]
    error = sum(variance * residual for variance, residual in zip(variances, residuals, strict=True))
    # The average differs from the last mean by all the steps between means, weighed by the cumulative profile ...
    inner = fitted.cumulative[1:-1]
    distance = sum(a * b * products[i][j] for i, a in enumerate(inner) for j, b in enumerate(inner))
    # ... and the last weights from that mean by what was walked within the stretch.
    last, values = stretches[-1], fitted.profile[-1]
    rising = _line(0.0, 1.0, len(values))
    within = _integral(last, [2 * f * r - r * r for f, r in zip(values, rising, strict=True)])
    distance += variances[-1] * max(0.0, within)
    if error <= 0:
        return 0.0
    return math.sqrt(error / distance) if distance > 0 else math.inf


def _until(stretches: Sequence[Stretch], at: Time | str | None, max_duration: Time | None) -> tuple[Stretch, ...]:
    if not stretches:
        raise ProfileError("an average needs a record with at least one stretch (got none)")
    if at is None:
        return tuple(stretches)
    moment = Time.from_input(at)
    ends = [stretch.end.clock(moment.unit, max_duration) for stretch in stretches]
    nearest = min(range(len(ends)), key=lambda i: abs(ends[i] - moment.value))
    if not math.isclose(ends[nearest], moment.value, rel_tol=1e-9):
        around = sorted(set(ends[max(0, nearest - 1) : nearest + 2]))
        raise TimeError(
            f"an average must end where a stretch does (got at={moment}): near it are "
            f"{', '.join(Time(end, moment.unit).to_timestring() for end in around)}"
        )
    return tuple(stretches[: nearest + 1])


def _curve(
    profile: Profile, stretches: Sequence[Stretch], max_duration: Time | None
) -> tuple[tuple[tuple[float, ...], ...], float]:
    """Return ``Fit.profile`` and ``Fit.missing``."""
    unit = profile.unit
    begin = stretches[0].start.clock(unit, max_duration)
    now = stretches[-1].end.clock(unit, max_duration) - begin
    if not now > 0:
        raise ProfileError(f"{profile} needs a clock in {unit}, and that of the record stood still: use another unit")
    curve: list[tuple[float, ...]] = []
    later, share = now, 1.0
    # From the newest point to the oldest, so that for recursive profiles each decay spans a single step: a warm-up is
    # a product over all its updates.
    for stretch in reversed(stretches):
        start, end = (edge.clock(unit, max_duration) - begin for edge in (stretch.start, stretch.end))
        values: list[float] = []
        for clock in reversed(_line(start, end, 1 + min(_POINTS, stretch.num_updates))):
            before = max(0.0, min(clock, later))  # a clock that was set back meanwhile stands still
            share = share * profile.decay(before, later) if profile.recursive else profile.decay(before, now)
            later = before
            values.append(share)
        curve.append(tuple(reversed(values)))
    missing = curve[-1][0]
    if not missing < 1:
        raise ProfileError(f"{profile} gives all weight to what was before the record: use a shorter one")
    return tuple(tuple((f - missing) / (1 - missing) for f in values) for values in reversed(curve)), missing


def _line(start: float, end: float, points: int) -> list[float]:
    return [start + (end - start) * j / (points - 1) for j in range(points)]


def _integral(stretch: Stretch, values: Sequence[float]) -> float:
    """Integrate over a stretch by the trapezoid rule: the sum over its updates when they are all there."""
    return (sum(values) - (values[0] + values[-1]) / 2) * stretch.num_updates / (len(values) - 1)


def _spline(stretches: Sequence[Stretch], curve: Sequence[Sequence[float]]) -> list[float]:
    """Return the values at the edges of the linear spline from 0 to 1 that is nearest to ``curve``.

    The sums on both sides of the equations are over the same points: a curve that is itself such a spline comes out
    exactly.
    """
    size = len(stretches) + 1
    diagonal, beside, right = [0.0] * size, [0.0] * size, [0.0] * size
    for i, (stretch, values) in enumerate(zip(stretches, curve, strict=True)):
        rising = _line(0.0, 1.0, len(values))
        falling = rising[::-1]
        square = _integral(stretch, [r * r for r in rising])
        diagonal[i] += square
        diagonal[i + 1] += square
        beside[i] = _integral(stretch, [r * f for r, f in zip(rising, falling, strict=True)])
        right[i] += _integral(stretch, [v * f for v, f in zip(values, falling, strict=True)])
        right[i + 1] += _integral(stretch, [v * r for v, r in zip(values, rising, strict=True)])
    knots = [0.0] * (size - 1) + [1.0]
    if size == 2:
        return knots
    # Gauss's elimination for the inner edges; the outer two are given.
    right[-2] -= beside[-2]
    for i in range(2, size - 1):
        factor = beside[i - 1] / diagonal[i - 1]
        diagonal[i] -= factor * beside[i - 1]
        right[i] -= factor * right[i - 1]
    for i in range(size - 2, 0, -1):
        onward = beside[i] * knots[i + 1] if i < size - 2 else 0.0
        knots[i] = (right[i] - onward) / diagonal[i]
    return knots
