"""Describes the outcome of a sweep in words, and formats numbers."""

import math

from polyak.report.swept import Level, Point, Swept

_NAMES = {"raw": "raw weights", "online": "online EMA"}


def headline(swept: Swept) -> str:
    """Return a sentence that names the best average.

    Args:
        swept: The numbers of the sweep.
    """
    best = swept.points[swept.best]
    at = f" at {swept.at}" if swept.at else ""
    margins = swept.margins(best)
    interval = "" if margins is None else f" ± {written(swept, max(margins))}"
    return f"Best: {best.result.name}{at}, with {swept.metric} {written(swept, swept.value(best))}{interval}"


def measured(value: float) -> str:
    """Return a metric as text, in four significant digits.

    Args:
        value: The metric.

    Example:
        >>> measured(0.60634), measured(1234.5678), measured(80.0), measured(float("nan"))
        ('0.6063', '1235', '80', 'NaN')
    """
    return "NaN" if math.isnan(value) else f"{value:.4g}"


def written(swept: Swept, value: float) -> str:
    """Return a value of the metric as text, with no more digits than distinguish the averages near the best.

    Two digits of the interval of the best average are shown, or, without one, of the spread of the better half.

    Args:
        swept: The numbers of the sweep.
        value: The value.
    """
    best = swept.points[swept.best]
    margins = swept.margins(best)
    if margins is not None:
        scale = max(margins)
    else:
        values = [swept.value(point) for point in swept.points if swept.known(point)]
        far = sorted(abs(one - swept.value(best)) for one in values)
        scale = next((one for one in far[len(far) // 2 :] if one > 0), 0.0)
    if not math.isfinite(value) or not math.isfinite(scale) or scale <= 0:
        return measured(value)
    known = [swept.value(point) for point in swept.points] + [
        one.metrics.get(swept.metric, 0.0) for one in swept.others
    ]
    exact = max(_decimals(measured(one)) for one in known if math.isfinite(one))
    decimals = min(1 - math.floor(math.log10(scale)), exact)
    digits = decimals + 1 + math.floor(math.log10(abs(value))) if value else 1
    return f"{value:.{max(0, decimals)}f}" if 0 < digits <= 7 and decimals <= 7 else measured(value)


def _decimals(text: str) -> int:
    return len(text.partition(".")[2]) if "e" not in text else 7


def number(value: float) -> str:
    """Return a number as text for an axis.

    Args:
        value: The number.

    Example:
        >>> number(0.25), number(1000.0), number(16384), number(2_500_000)
        ('0.25', '1,000', '16,384', '2.5M')
    """
    if abs(value) >= 1e9:
        return f"{value / 1e9:g}G"
    if abs(value) >= 1e6:
        return f"{value / 1e6:g}M"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}"


def percent(share: float | None) -> str:
    """Return an error or a distance as text, in two significant digits.

    Args:
        share: The fraction, 1 for 100 %; None if unknown.

    Example:
        >>> percent(0.00234), percent(1.5), percent(None)
        ('0.23 %', '150 %', 'unknown')
    """
    if share is None or not math.isfinite(share):
        return "unknown"
    if share < 1e-9:
        return "0 %"  # an exact average has rounding errors
    return f"{100 * share:.2g} %" if share < 0.995 else f"{100 * share:.0f} %"


def other_name(name: str) -> str:
    """Return the name of other weights, as text for people.

    Args:
        name: The name given to ``sweep``.
    """
    return _NAMES.get(name, name)


def compared(swept: Swept) -> str:
    """Return sentences that compare the best average with the other weights and say whether it is at an end.

    Args:
        swept: The numbers of the sweep.
    """
    best = swept.points[swept.best]
    value = swept.value(best)
    others = [(other_name(one.name), one.metrics.get(swept.metric, math.nan)) for one in swept.others]
    parts = [
        f"{'Highest' if swept.maximize else 'Lowest'} of {len(swept.points)} averages of the record {swept.record}."
    ]
    if others:
        parts.append("For comparison: " + ", ".join(f"{name} {written(swept, other)}" for name, other in others) + ".")
        better = [name for name, other in others if (other > value if swept.maximize else other < value)]
        if better:
            parts.append(f"No average of the record is better than the {' and the '.join(better)}.")
    half_lives = [point for point in swept.points if point.on_line]
    if half_lives and best is half_lives[-1]:
        parts.append("It is the longest half-life that was evaluated: longer ones may be better still.")
    if half_lives and best is half_lives[0]:
        parts.append("It is the shortest half-life that was evaluated: shorter ones may be better still.")
    return " ".join(parts)


def level_label(level: Level, swept: Swept | None = None) -> str:
    """Return the name and the value of a level line.

    Args:
        level: The line.
        swept: The numbers of the sweep, which say how many digits matter.
    """
    value = measured(level.value) if swept is None else written(swept, level.value)
    return f"{other_name(level.name)} {value}{'' if level.on_scale else ' (off the scale)'}"


def younger(swept: Swept, point: Point) -> str:
    """Return the median age of an average, with its unit.

    Args:
        swept: The numbers of the sweep.
        point: The average.
    """
    age = swept.edges[-1] - point.since
    return f"{age:,.0f} {swept.unit}" if age >= 100 else f"{age:.3g} {swept.unit}"
