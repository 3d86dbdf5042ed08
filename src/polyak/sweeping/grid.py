"""Which half-lives are measured: evenly spaced in their logarithm, then ever closer to the best. Numbers only."""

import math
from collections.abc import Mapping

from polyak.errors import ProfileError
from polyak.profiles import HalfLife, Uniform
from polyak.record import Record, fit
from polyak.time import Time, TimeUnit

# Half-lives closer than this ratio are not told apart by any metric.
_CLOSE = 1.05
_GOLDEN = (3 - math.sqrt(5)) / 2


def tidy(value: float) -> float:
    """Return ``value`` in three digits.

    Args:
        value: Above 0.

    Example:
        >>> tidy(1234.5), tidy(0.012345)
        (1230.0, 0.0123)
    """
    return float(f"{value:.3g}")


def newest(record: Record) -> Uniform:
    """Return the profile of a record's newest stretch: the least averaged weights that it holds.

    Args:
        record: With at least one stretch.

    Raises:
        ProfileError: If it has none.
    """
    if not record.stretches:
        raise ProfileError("a sweep needs a record with at least one stretch (got none)")
    first, last = record.stretches[0], record.stretches[-1]
    return Uniform(Time(last.start.clock(TimeUnit.BATCH) - first.start.clock(TimeUnit.BATCH), TimeUnit.BATCH))


def finest_half_life(record: Record, unit: TimeUnit = TimeUnit.BATCH) -> HalfLife:
    """Return the shortest half-life that can be told at the end of a record.

    Args:
        record: Any.
        unit: To give it in.

    Raises:
        ProfileError: If no half-life can be told.
    """
    limit = max(record.stretches[-2:], key=lambda stretch: stretch.num_updates, default=None)
    if limit is not None:
        shortest = limit.end.clock(unit, record.max_duration) - limit.start.clock(unit, record.max_duration)
        longest = _length(record, unit)
        # Within a short record half of an average is younger than a half-life: then it takes a little more.
        while 0 < shortest < longest:
            profile = HalfLife(Time(shortest, unit), unbiased=True)
            try:
                fit(profile, record.stretches, max_duration=record.max_duration)
            except ProfileError:
                shortest = max(tidy(1.01 * shortest), math.nextafter(shortest, math.inf))
            else:
                return profile
    raise ProfileError(
        f"the record tells no half-life yet (it has {len(record.stretches)} stretches): record for longer, or with a "
        "shorter interval"
    )


def grid(record: Record, points: int = 9, unit: TimeUnit = TimeUnit.BATCH) -> list[HalfLife]:
    """Return half-lives from the shortest that a record can tell to the whole run.

    Args:
        record: Any.
        points: How many, at least 2.
        unit: Of the half-lives.

    Raises:
        ProfileError: If ``points`` is below 2, or the record tells no half-life.
    """
    if points < 2:
        raise ProfileError(f"a grid needs at least 2 points, the shortest half-life and the whole run (got {points})")
    shortest, longest = float(finest_half_life(record, unit).span), _length(record, unit)
    inner = [tidy(shortest * (longest / shortest) ** (i / (points - 1))) for i in range(1, points - 1)]
    values = sorted({shortest, longest, *(value for value in inner if shortest < value < longest)})
    return [HalfLife(Time(value, unit), unbiased=True) for value in values]


def narrowed(values: Mapping[float, float], *, maximize: bool = False) -> float | None:
    """Return the half-life to measure next, by golden section on the logarithm; None once the best is pinned down.

    Args:
        values: What was measured, by half-life. NaN is worse than any number.
        maximize: Whether more is better.

    Example:
        >>> narrowed({1: 3.0, 10: 1.0, 100: 2.0})
        24.1
    """
    rank = {x: math.inf if math.isnan(y) else (-y if maximize else y) for x, y in values.items()}
    ordered = sorted(rank)
    if len(ordered) < 2 or all(math.isinf(value) for value in rank.values()):
        return None
    at = min(range(len(ordered)), key=lambda i: rank[ordered[i]])
    middle = ordered[at]
    neighbours = [ordered[i] for i in (at - 1, at + 1) if 0 <= i < len(ordered)]
    # The wider gap first; of two alike, as on a grid, the side that is better.
    other = max(neighbours, key=lambda x: (round(abs(math.log(x / middle)), 1), -rank[x]))
    following = tidy(middle * (other / middle) ** _GOLDEN)
    near = min(abs(math.log(following / x)) for x in ordered)
    return following if near > math.log(_CLOSE) else None


def _length(record: Record, unit: TimeUnit) -> float:
    ends = (record.stretches[0].start, record.stretches[-1].end)
    start, end = (edge.clock(unit, record.max_duration) for edge in ends)
    return end - start
