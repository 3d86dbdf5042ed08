"""The half-lives that a sweep evaluates: an even grid on a log scale, then steps toward the best. Numbers only."""

import math
from collections.abc import Mapping

from polyak.errors import ProfileError
from polyak.profiles import HalfLife, Profile, Uniform
from polyak.record import Record, fit
from polyak.time import Time, TimeUnit

# No metric distinguishes half-lives with a smaller ratio than this.
_CLOSE = 1.05
_GOLDEN = (3 - math.sqrt(5)) / 2


def tidy(value: float) -> float:
    """Return ``value`` rounded to three significant digits.

    Args:
        value: Above 0.

    Example:
        >>> tidy(1234.5), tidy(0.012345)
        (1230.0, 0.0123)
    """
    return float(f"{value:.3g}")


def newest(record: Record) -> Uniform:
    """Return the profile of the newest segment of a record: the least averaged weights that the record holds.

    Args:
        record: A record with at least one segment.

    Raises:
        ProfileError: If the record has no segment.
    """
    if not record.stretches:
        raise ProfileError("a record must have at least one segment for a sweep (got none); record for longer")
    first, last = record.stretches[0], record.stretches[-1]
    return Uniform(Time(last.start.clock(TimeUnit.BATCH) - first.start.clock(TimeUnit.BATCH), TimeUnit.BATCH))


def resolves(record: Record, profile: Profile) -> bool:
    """Return whether a record gives an average at its end.

    Args:
        record: The record.
        profile: The profile of the average.
    """
    try:
        fit(profile, record.segments, max_duration=record.max_duration)
    except ProfileError:
        return False
    return True


def finest_half_life(record: Record, unit: TimeUnit = TimeUnit.BATCH) -> HalfLife:
    """Return the shortest half-life that a record resolves at its end.

    Args:
        record: The record.
        unit: The unit of the half-life.

    Raises:
        ProfileError: If the record resolves no half-life.
    """
    limit = max(record.stretches[-2:], key=lambda segment: segment.num_updates, default=None)
    if limit is not None:
        shortest = limit.end.clock(unit, record.max_duration) - limit.start.clock(unit, record.max_duration)
        longest = _length(record, unit)
        # In a short record more than half of an average is younger than its half-life, so that a longer one is needed.
        while 0 < shortest < longest:
            profile = HalfLife(Time(shortest, unit), unbiased=True)
            try:
                fit(profile, record.stretches, max_duration=record.max_duration)
            except ProfileError:
                shortest = max(tidy(1.01 * shortest), math.nextafter(shortest, math.inf))
            else:
                return profile
    raise ProfileError(
        f"the record must resolve at least one half-life (it has {len(record.stretches)} segments); record for longer, "
        "or with a shorter interval"
    )


def grid(record: Record, points: int = 9, unit: TimeUnit = TimeUnit.BATCH) -> list[HalfLife]:
    """Return half-lives from the shortest that a record resolves to the length of the record.

    Args:
        record: The record.
        points: The number of half-lives, at least 2.
        unit: The unit of the half-lives.

    Raises:
        ProfileError: If ``points`` is below 2, or the record resolves no half-life.
    """
    if points < 2:
        raise ProfileError(f"points must be at least 2, for the shortest half-life and the whole run (got {points})")
    shortest, longest = float(finest_half_life(record, unit).span), _length(record, unit)
    inner = [tidy(shortest * (longest / shortest) ** (i / (points - 1))) for i in range(1, points - 1)]
    values = sorted({shortest, longest, *(value for value in inner if shortest < value < longest)})
    return [HalfLife(Time(value, unit), unbiased=True) for value in values]


def narrowed(values: Mapping[float, float], *, maximize: bool = False) -> float | None:
    """Return the half-life to evaluate next, by golden-section search on a log scale; None once the best is found.

    Args:
        values: The metric by half-life. NaN is worse than any number.
        maximize: Whether a higher value is better.

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
    # The wider gap first; of two equal gaps, as on a grid, the better side.
    other = max(neighbours, key=lambda x: (round(abs(math.log(x / middle)), 1), -rank[x]))
    following = tidy(middle * (other / middle) ** _GOLDEN)
    near = min(abs(math.log(following / x)) for x in ordered)
    return following if near > math.log(_CLOSE) else None


def _length(record: Record, unit: TimeUnit) -> float:
    ends = (record.stretches[0].start, record.stretches[-1].end)
    start, end = (edge.clock(unit, record.max_duration) for edge in ends)
    return end - start
