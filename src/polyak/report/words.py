"""What a sweep has found, in words."""

import math

from polyak.profiles import HalfLife
from polyak.report.swept import Swept

_NAMES = {"raw": "raw weights", "online": "online EMA"}


def headline(swept: Swept) -> str:
    """Say which average is best.

    Args:
        swept: What is shown.
    """
    result = swept.points[swept.best].result
    return f"Best: {result.name}, with {swept.metric} {measured(result.metrics[swept.metric])}"


def measured(value: float) -> str:
    """Write a metric.

    Args:
        value: Any.

    Example:
        >>> measured(0.60634), measured(1234.5678), measured(80.0), measured(float("nan"))
        ('0.6063', '1235', '80', 'not a number')
    """
    return "not a number" if math.isnan(value) else f"{value:.4g}"


def percent(share: float | None) -> str:
    """Write an error or a distance in two digits.

    Args:
        share: 1 is 100 %; None where it is not known.

    Example:
        >>> percent(0.00234), percent(1.5), percent(None)
        ('0.23 %', '150 %', 'not known')
    """
    if share is None or not math.isfinite(share):
        return "not known"
    if share < 1e-9:
        return "0 %"  # what is exact is so up to rounding
    return f"{100 * share:.2g} %" if share < 0.995 else f"{100 * share:.0f} %"


def other_name(name: str) -> str:
    """Return what people call weights to compare with.

    Args:
        name: As given to ``sweep``.
    """
    return _NAMES.get(name, name)


def compared(swept: Swept) -> str:
    """Say how the best compares with the other weights, and where it lies.

    Args:
        swept: What is shown.
    """
    best = swept.points[swept.best]
    value = best.result.metrics[swept.metric]
    others = [(other_name(one.name), one.metrics.get(swept.metric, math.nan)) for one in swept.others]
    parts = [
        f"{'Highest' if swept.maximize else 'Lowest'} of {len(swept.points)} averages of the record {swept.record}."
    ]
    if others:
        parts.append("To compare: " + ", ".join(f"{name} {measured(other)}" for name, other in others) + ".")
        better = [name for name, other in others if (other > value if swept.maximize else other < value)]
        if better:
            parts.append(f"No average of the record is better than the {' and the '.join(better)}.")
    half_lives = [point for point in swept.points if isinstance(point.result.profile, HalfLife)]
    if half_lives and best is half_lives[-1]:
        parts.append("It is the longest half-life that was measured: longer ones may be better still.")
    if half_lives and best is half_lives[0]:
        parts.append("It is the shortest half-life that was measured: shorter ones may be better still.")
    return " ".join(parts)
