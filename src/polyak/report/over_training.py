"""Charts over training: the curves of ``polyak watch``, and the metric by half-life and moment as a heat map."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import plotly.graph_objects as go

from polyak.averaging.schedule import AUTO_SHARE
from polyak.report.charts import LIGHT, empty_figure
from polyak.report.swept import UNIT_WORDS, Swept
from polyak.report.words import measured
from polyak.time import TimeUnit
from polyak.watching import Moment, Reading
from polyak.watching.moment import HALF_LIFE, NEWEST, RAW

_ROWS = 24  # of a heat map whose half-lives differ by moment


@dataclass(frozen=True, slots=True)
class Panel:
    """A chart over training, with its text.

    Args:
        name: The key of the chart.
        heading: The heading of its frame.
        caption: Below the heading.
        summary: The summary for screen readers.
        figure: The chart.
        low: Whether it needs less height than the main chart.
    """

    name: str
    heading: str
    caption: str
    summary: str
    figure: go.Figure
    low: bool = False


@dataclass(frozen=True, slots=True)
class Column:
    """The half-lives of one moment.

    Args:
        time: The moment.
        values: The metric, by half-life as a share of the training up to the moment.
    """

    time: float
    values: Mapping[float, float]


def watched_panels(moments: Sequence[Moment]) -> list[Panel]:
    """Return the panels of what ``polyak watch`` has read: curves, and a heat map if there are several moments.

    Args:
        moments: Oldest first; at least one.
    """
    return [_curves(moments), *_heat_of_moments(moments)]


def sweep_panels(moments: Sequence[Swept]) -> list[Panel]:
    """Return a heat map of the sweeps of one record at several moments; nothing for a single moment.

    Args:
        moments: Oldest first.
    """
    columns = [
        Column(end, {x / (end - one.edges[0]): y for x, y in one.line if x > 0})
        for one in moments
        if (end := one.edges[-1]) > one.edges[0]
    ]
    return _heat(columns, moments[0].metric, moments[0].unit, maximize=moments[0].maximize)


def _heat_of_moments(moments: Sequence[Moment]) -> list[Panel]:
    columns = [
        Column(_time(one), {r.share: one.value(r) for r in one.readings if r.kind == HALF_LIFE and r.share})
        for one in moments
    ]
    return _heat(columns, moments[-1].metric, UNIT_WORDS[TimeUnit.BATCH], maximize=moments[-1].maximize)


def _time(moment: Moment) -> float:
    return moment.timestamp.elapsed(TimeUnit.BATCH)


# Curves


def _curves(moments: Sequence[Moment]) -> Panel:
    last, metric = moments[-1], moments[-1].metric
    figure = _figure(UNIT_WORDS[TimeUnit.BATCH])
    times = [_time(one) for one in moments]
    shares = sorted({one.share for moment in moments for one in moment.cooldowns if one.share is not None})
    lines: list[tuple[str, list[Reading | None], dict[str, Any]]] = [
        ("raw", [one.get(RAW) for one in moments], {"color": LIGHT["raw"], "width": 1.5}),
        ("newest mean", [one.get(NEWEST) for one in moments], {"color": LIGHT["raw"], "width": 1.5, "dash": "dash"}),
        ("half-life T/16", [one.sixteenth for one in moments], {"color": LIGHT["averaged"], "width": 2.5}),
        ("best half-life", [one.best for one in moments], {"color": LIGHT["averaged"], "width": 1.5, "dash": "dot"}),
        *(
            (
                f"cooldown {share:.0%}",
                [one.get("cooldown", share) for one in moments],
                {"color": LIGHT["online"], "width": 1.5, "dash": ("solid", "dash", "dot", "dashdot")[i % 4]},
            )
            for i, share in enumerate(shares)
        ),
    ]
    for name, readings, line in lines:
        values = [moment.value(reading) for moment, reading in zip(moments, readings, strict=True)]
        if all(map(math.isnan, values)):
            continue
        figure.add_scatter(
            x=times,
            y=[None if math.isnan(value) else value for value in values],
            text=[
                "" if one is None else escape(f"{name}: {one.name}, {metric} {measured(value)}", quote=False)
                for one, value in zip(readings, values, strict=True)
            ],
            hoverinfo="text",
            mode="lines+markers",
            line=line,
            marker={"size": 5},
            name=name,
            connectgaps=True,
        )
    figure.update_yaxes(title={"text": escape(metric, quote=False)}, range=_range(moments))
    figure.update_layout(showlegend=True)
    spoken = "; ".join(f"{name.replace('_', ' ')} {measured(last.value(one))}" for name, one in last.named())
    return Panel(
        "watched",
        f"{metric} over training, with what averages would give",
        "T is the training up to each moment. The cooldowns are virtual: averages that stand for a learning rate which "
        "falls to 0 over the last part of the run, as if it were annealed now.",
        f"{metric} over training in {len(moments)} moments; at the last: {spoken}",
        figure,
    )


def _range(moments: Sequence[Moment]) -> list[float] | None:
    """Return the ends of the axis without the start of training, which would flatten the rest; None for all."""
    settled = moments[len(moments) // 5 :]
    values = [moment.value(one) for moment in settled for one in moment.readings]
    known = [value for value in values if math.isfinite(value)]
    if len(moments) < 5 or not known:
        return None
    low, high = min(known), max(known)
    margin = 0.06 * (high - low) or 0.05
    return [low - margin, high + margin]


# Heat maps


def _heat(columns: Sequence[Column], metric: str, unit: str, *, maximize: bool) -> list[Panel]:
    """Return a heat map of the metric by half-life and moment, if there are several of both."""
    known = [
        Column(one.time, found)
        for one in columns
        if len(found := {x: y for x, y in one.values.items() if math.isfinite(y)}) > 1
    ]
    if len(known) < 2:
        return []
    rows = _rows(known)
    table = [[_between(column.values, share) for column in known] for share in rows]
    best = [(max if maximize else min)(column.values.values()) for column in known]
    at_best = [next(x for x, y in column.values.items() if y == b) for column, b in zip(known, best, strict=True)]
    figure = _figure(unit)
    times = [column.time for column in known]
    figure.add_heatmap(
        x=times,
        y=rows,
        z=[[None if v is None else abs(v - b) for v, b in zip(row, best, strict=True)] for row in table],
        text=[
            [_cell(metric, share, t, v) for v, t in zip(row, times, strict=True)]
            for share, row in zip(rows, table, strict=True)
        ],
        hoverinfo="text",
        colorscale=[[0, LIGHT["averaged"]], [1, LIGHT["rule"]]],
        zmin=0,
        zmax=_far([abs(v - b) for row in table for v, b in zip(row, best, strict=True) if v is not None]),
        colorbar={"title": {"text": "from the best", "side": "right"}, "thickness": 12, "outlinewidth": 0},
    )
    ring = {"color": "rgba(0,0,0,0)", "size": 11, "line": {"color": LIGHT["ink"], "width": 2}}
    figure.add_scatter(x=times, y=at_best, mode="markers", marker=ring, hoverinfo="skip", name="best")
    figure.add_hline(y=AUTO_SHARE, line={"color": LIGHT["ink"], "width": 1, "dash": "dot"})
    ticks = [2.0**-n for n in range(12) if rows[0] / 1.5 <= 2.0**-n <= rows[-1] * 1.5]
    shown = {"tickvals": ticks, "ticktext": [_share(tick) for tick in ticks], "title": {"text": "half-life"}}
    figure.update_yaxes(type="log", showgrid=False, **shown)
    figure.update_xaxes(showgrid=False)
    spoken = "; ".join(f"at {t:,.6g} the best is {_share(x)}" for t, x in zip(times, at_best, strict=True))
    return [
        Panel(
            "heatmap",
            f"{metric} by half-life and moment of training",
            "Blue: near the best half-life of that moment, which has a ring; grey: far from it. Half-lives are shares "
            "of the training up to the moment; the dotted line is a sixteenth.",
            f"The distance of {metric} from the best half-life of each moment: {spoken}",
            figure,
        )
    ]


def _cell(metric: str, share: float, moment: float, value: float | None) -> str:
    """Return what is shown of a cell under the pointer."""
    if value is None:
        return ""
    where = f"half-life {_share(share)} of the training up to {moment:,.6g}"
    return escape(f"{where}: {metric} {measured(value)}", quote=False)


def _rows(columns: Sequence[Column]) -> list[float]:
    """Return the half-lives of the rows: those that all moments have, or even steps on a log scale."""
    shares = [{float(f"{x:.6g}") for x in column.values} for column in columns]
    if all(one == shares[0] for one in shares):
        return sorted(columns[0].values)
    low, high = (find(x for column in columns for x in column.values) for find in (min, max))
    return [low * (high / low) ** (i / (_ROWS - 1)) for i in range(_ROWS)]


def _between(values: Mapping[float, float], share: float) -> float | None:
    """Return the metric at a half-life, by linear interpolation on a log scale; None beyond what was evaluated."""
    ordered = sorted(values)
    if not ordered[0] * (1 - 1e-6) <= share <= ordered[-1] * (1 + 1e-6):
        return None
    at = next((i for i, x in enumerate(ordered) if x >= share * (1 - 1e-9)), len(ordered) - 1)
    if at == 0 or math.isclose(ordered[at], share, rel_tol=1e-6):
        return values[ordered[at]]
    low, high = ordered[at - 1], ordered[at]
    part = math.log(share / low) / math.log(high / low)
    return values[low] + part * (values[high] - values[low])


def _far(distances: Sequence[float]) -> float:
    """Return the distance of the palest colour: nine tenths of the cells are below, so no outlier hides them."""
    ordered = sorted(distances)
    return ordered[len(ordered) * 9 // 10] or ordered[-1] or 1.0


def _share(share: float) -> str:
    inverse = 1 / share
    return "T" if math.isclose(inverse, 1, rel_tol=0.02) else f"T/{inverse:.3g}"


def _figure(unit: str) -> go.Figure:
    """Return an empty chart over training."""
    return empty_figure({"tickformat": ",~r", "nticks": 8, "title": {"text": f"training ({unit})"}})
