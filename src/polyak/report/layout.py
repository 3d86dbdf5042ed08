"""Where everything of a sweep lies in its panels: for the page and for the picture. Nothing is drawn here."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from polyak.report.scale import Scale, side, span
from polyak.report.swept import Point, Swept
from polyak.report.words import measured, other_name

# How much of a panel a name takes: at a phone's width more than half.
_WIDTH, _LINE = 0.6, 0.08


@dataclass(frozen=True, slots=True)
class Level:
    """A level line: the metric of weights to compare with.

    Args:
        kind: As given to ``sweep``.
        label: Its name and number.
        height: From 0 to 1.
        right: Whether the label is at the right end.
        above: Whether it is above the line.
    """

    kind: str
    label: str
    height: float
    right: bool
    above: bool


def half_life_scale(swept: Swept) -> Scale:
    """Return the scale of half-lives.

    Args:
        swept: What is shown.
    """
    ages = [point.half_life for point in swept.points if point.half_life > 0]
    return Scale(min(ages) / 1.15, max(ages) * 1.15, log=True)


def metric_scale(swept: Swept) -> Scale:
    """Return the scale of the metric, for all averages: a line far from all would flatten them and is left at the edge.

    Args:
        swept: What is shown.
    """
    values = [value for point in swept.points if not math.isnan(value := point.result.metrics[swept.metric])]
    room = 1.5 * (max(values) - min(values)) or math.inf
    others = [one.metrics.get(swept.metric, math.nan) for one in swept.others]
    return span([*values, *(v for v in others if min(values) - room <= v <= max(values) + room)], margin=0.15)


def percent_scale(points: Sequence[Point], value_of: Callable[[Point], float | None], *, doubled: bool) -> Scale:
    """Return a scale of percentages that begins at 0.

    Args:
        points: What is shown.
        value_of: Gives shares; None where not known.
        doubled: Whether twice the value is to be seen as well.
    """
    values = [value for point in points if (value := value_of(point)) is not None and math.isfinite(value)]
    return span([(200 if doubled else 100) * value for value in values] or [1.0], zero=True)


def levels(swept: Swept) -> list[Level]:
    """Return the lines of weights to compare with, the highest first.

    Args:
        swept: What is shown.
    """
    x, y = half_life_scale(swept), metric_scale(swept)
    taken = [(x.at(point.half_life), y.at(point.result.metrics[swept.metric])) for point in swept.points]
    along = [(x.at(a), y.at(b)) for a, b in swept.line]
    for (a, b), (c, d) in pairwise(along):
        taken += [(a + (c - a) * i / 8, b + (d - b) * i / 8) for i in range(1, 8)]
    found: list[Level] = []
    values = [(one.metrics.get(swept.metric, math.nan), one.name) for one in swept.others]
    for value, name in sorted((pair for pair in values if not math.isnan(pair[0])), reverse=True):
        height = y.at(value)
        beyond = "" if y.low <= value <= y.high else " (off the scale)"
        right, above = side(height, taken, width=_WIDTH, line=_LINE)
        found.append(Level(name, f"{other_name(name)} {measured(value)}{beyond}", height, right, above))
        taken += [(float(right), height), (float(right), height + (_LINE if above else -_LINE))]
    return found
