"""The Plotly charts of a sweep's page, from the same numbers as the matplotlib figure.

A trace that follows the slider has a ``uid``; ``page.js`` changes its data. ``LIGHT`` and ``DARK`` have the same keys:
for readers who prefer a dark page, ``page.js`` replaces each colour of the first by that of the second.
"""

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

import plotly.graph_objects as go

from polyak.report.swept import Point, Swept
from polyak.report.words import level_label, percent, written

LIGHT = {
    "paper": "#ffffff",
    "ink": "#1b1f24",
    "quiet": "#545d68",
    "rule": "#d9dee3",
    "averaged": "#0072b2",
    "soft": "rgba(0,114,178,0.28)",
    "raw": "#b14a00",
    "online": "#00734f",
}
DARK = {
    "paper": "#14181d",
    "ink": "#e8ecf0",
    "quiet": "#a3adb8",
    "rule": "#343c45",
    "averaged": "#5bb8f0",
    "soft": "rgba(91,184,240,0.3)",
    "raw": "#ff9a57",
    "online": "#3fd0a0",
}
_DASHES = {"raw": "dash", "online": "dot"}
_FROM_ZERO: dict[str, Any] = {"rangemode": "tozero", "autorangeoptions": {"minallowed": 0}}
_FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif'


def charts(swept: Swept, others: Sequence[Swept] = ()) -> dict[str, go.Figure]:
    """Return the charts by name, with the best average chosen. Further metrics are ``metric-1``, ``metric-2``, ...

    Args:
        swept: The numbers of the sweep.
        others: Sweeps at other moments, or of other records, whose half-lives are thin lines in the charts of metrics.
    """
    metrics = {f"metric-{i}" if i else "metric": _metric(swept.of(m), others) for i, m in enumerate(swept.metrics)}
    return metrics | {
        "profile": _profile(swept),
        "error": _percentages(swept, error_of, twice=True),
        "distance": _percentages(swept, distance_of),
    }


def error_of(point: Point) -> float | None:
    """Return the estimated error of an average in per cent; None if it is unknown.

    Args:
        point: The average.
    """
    return _hundredfold(point.result.error)


def distance_of(point: Point) -> float | None:
    """Return the distance of an average from the newest mean in per cent; None if it is unknown.

    Args:
        point: The average.
    """
    return _hundredfold(point.result.distance)


def _hundredfold(share: float | None) -> float | None:
    return None if share is None or not math.isfinite(share) else 100 * share


def training(moments: Sequence[Swept]) -> go.Figure:
    """Return a chart of the metric over training: of the best average at each moment, and of the newest mean.

    Args:
        moments: The sweeps of one record, oldest first.
    """
    ends = [one.edges[-1] for one in moments]
    figure = _figure(moments[-1], half_lives=False)
    best = [one.points[one.best] for one in moments]
    figure.add_scatter(
        x=ends,
        y=[one.value(point) for one, point in zip(moments, best, strict=True)],
        error_y=_bars([one.margins(point) for one, point in zip(moments, best, strict=True)]),
        text=[
            _plain(f"at {one.at or 'the end'}: {point.result.name}, {one.metric} {written(one, one.value(point))}")
            for one, point in zip(moments, best, strict=True)
        ],
        hoverinfo="text",
        mode="lines+markers",
        line={"color": LIGHT["averaged"], "width": 2.5},
        marker={"size": 9},
        name="best average",
    )
    least = [min(one.points, key=lambda point: point.half_life) for one in moments]
    figure.add_scatter(
        x=ends,
        y=[one.value(point) for one, point in zip(moments, least, strict=True)],
        mode="lines+markers",
        line={"color": LIGHT["raw"], "width": 1.5, "dash": "dash"},
        marker={"size": 6},
        name="newest mean, little averaged",
        hoverinfo="y",
    )
    figure.update_xaxes(range=[0, ends[-1] * 1.03])
    figure.update_yaxes(title={"text": _plain(moments[-1].metric)})
    figure.update_layout(showlegend=True)
    return figure


def _metric(swept: Swept, sweeps: Sequence[Swept] = ()) -> go.Figure:
    figure = _figure(swept)
    for one in (other.of(swept.metric) for other in sweeps):
        if line := one.line:
            x, y = zip(*line, strict=True)
            quiet = {"color": LIGHT["quiet"], "width": 1}
            name = _plain(one.label)
            figure.add_scatter(x=x, y=y, mode="lines", line=quiet, name=name, hoverinfo="name")
    on_line = [point for point in swept.points if point.on_line and swept.known(point)]
    others = [point for point in swept.points if not point.on_line and swept.known(point)]
    for level in swept.levels:
        line = {"color": LIGHT.get(level.name, LIGHT["quiet"]), "width": 2, "dash": _DASHES.get(level.name, "dashdot")}
        name = _plain(level_label(level, swept))
        figure.add_scatter(x=_ends(swept), y=[level.value] * 2, mode="lines", line=line, name=name, hoverinfo="name")
    figure.add_scatter(
        **_hovered(on_line, lambda point: _value(swept, point)),
        y=[swept.value(point) for point in on_line],
        error_y=_bars([swept.differs_by(point) for point in on_line]),
        mode="lines+markers",
        line={"color": LIGHT["averaged"], "width": 2.5},
        marker={"color": LIGHT["averaged"], "size": 8},
        name="half-lives",
    )
    if others:
        figure.add_scatter(
            **_hovered(others, lambda point: _value(swept, point)),
            y=[swept.value(point) for point in others],
            error_y=_bars([swept.differs_by(point) for point in others]),
            mode="markers",
            marker=_hollow(9),
            name="other profiles",
        )
    best = swept.points[swept.best]
    ring = {"color": "rgba(0,0,0,0)", "size": 19, "line": {"color": LIGHT["ink"], "width": 2}}
    figure.add_scatter(
        x=[best.half_life], y=[swept.value(best)], mode="markers", marker=ring, name="best", hoverinfo="skip"
    )
    _add_chosen(figure, best, swept.value(best), name="chosen")
    figure.update_yaxes(range=swept.near_range or swept.metric_range, title={"text": _plain(swept.metric)})
    if swept.near_range is None:
        figure.update_traces(cliponaxis=False, selector=lambda trace: trace.mode != "lines")
    figure.update_layout(showlegend=True)
    return figure


def _percentages(swept: Swept, value_of: Callable[[Point], float | None], *, twice: bool = False) -> go.Figure:
    figure = _figure(swept)
    known = [(point, value) for point in swept.points if (value := value_of(point)) is not None]
    on_line = [(point, value) for point, value in known if point.on_line]
    others = [(point, value) for point, value in known if not point.on_line]
    style = {"color": LIGHT["averaged"], "width": 2.5}
    line = _hovered([point for point, _ in on_line], lambda point: percent((value_of(point) or 0.0) / 100))
    figure.add_scatter(**line, y=[value for _, value in on_line], mode="lines+markers", line=style, marker={"size": 5})
    if twice:
        band = [2 * value for _, value in on_line]
        figure.add_scatter(
            x=line["x"],
            y=band,
            line={"width": 0},
            fill="tonexty",
            fillcolor=LIGHT["soft"],
            hoverinfo="skip",
            mode="lines",
        )
    hollow = _hovered([point for point, _ in others], lambda point: percent((value_of(point) or 0.0) / 100))
    figure.add_scatter(**hollow, y=[value for _, value in others], mode="markers", marker=_hollow(7))
    best = swept.points[swept.best]
    _add_chosen(figure, best, value_of(best))
    figure.update_yaxes(**_FROM_ZERO, ticksuffix=" %")
    figure.update_traces(cliponaxis=False)
    return figure


def _profile(swept: Swept) -> go.Figure:
    best = swept.points[swept.best]
    figure = _figure(swept, half_lives=False)
    heights = [*best.steps, 0.0]
    for uid, colour, edges in (
        ("older", "soft", [min(edge, best.since) for edge in swept.edges]),
        ("newer", "averaged", [max(edge, best.since) for edge in swept.edges]),
    ):
        line = {"shape": "hv", "width": 0}
        figure.add_scatter(
            x=edges,
            y=heights,
            mode="lines",
            line=line,
            fill="tozeroy",
            fillcolor=LIGHT[colour],
            uid=uid,
            hoverinfo="skip",
        )
    dashed = {"color": LIGHT["ink"], "width": 1.5, "dash": "dash"}
    figure.add_scatter(x=swept.middles, y=best.curve, mode="lines", line=dashed, uid="asked", hoverinfo="skip")
    _add_cursor(figure, best.since)
    figure.update_yaxes(**_FROM_ZERO, showgrid=False, showticklabels=False)
    return figure


def _figure(swept: Swept, *, half_lives: bool = True) -> go.Figure:
    """Return an empty chart with its axes."""
    ends = _ends(swept) if half_lives else [swept.edges[0], swept.edges[-1]]
    return empty_figure(
        {
            "type": "log" if half_lives else "linear",
            "showgrid": False,
            "range": [math.log10(end) for end in ends] if half_lives else ends,
            "tickformat": "~s" if ends[1] >= 1e6 else ",~r",
            "nticks": 8,
            "dtick": _log_step(*ends) if half_lives else None,
            "title": {"text": f"half-life ({swept.unit})" if half_lives else f"training ({swept.unit})"},
        }
    )


def empty_figure(x_axis: dict[str, Any]) -> go.Figure:
    """Return an empty chart in the page's style.

    Args:
        x_axis: What the axis of x has in addition.
    """
    axis: dict[str, Any] = {
        "automargin": True,
        "color": LIGHT["quiet"],
        "fixedrange": True,
        "gridcolor": LIGHT["rule"],
        "zeroline": False,
    }
    return go.Figure(
        layout={
            "template": "none",
            "font": {"family": _FONT, "size": 13, "color": LIGHT["quiet"]},
            "paper_bgcolor": LIGHT["paper"],
            "plot_bgcolor": LIGHT["paper"],
            "margin": {"l": 8, "r": 8, "t": 8, "b": 8},
            "showlegend": False,
            "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "itemclick": False}
            | {"itemdoubleclick": False, "entrywidth": 0},
            "hovermode": "closest",
            "dragmode": False,
            "xaxis": axis | x_axis,
            "yaxis": axis | {"nticks": 6},
        }
    )


def _log_step(low: float, high: float) -> str | int | None:
    """Return Plotly's ``dtick`` for a log axis: 1, 2, 5, 10 over a few decades, decades over many."""
    decades = math.log10(high / low)
    return None if decades < 1 else "D2" if decades < 3 else 1


def _ends(swept: Swept) -> list[float]:
    """Return the ends of the axis of half-lives."""
    positive = [point.half_life for point in swept.points if point.half_life > 0]
    return [min(positive) / 1.15, max(positive) * 1.15]


def _add_chosen(figure: go.Figure, point: Point, value: float | None, name: str | None = None) -> None:
    """Add the marker and the vertical line that follow the slider."""
    marker = {"color": LIGHT["ink"], "size": 11, "line": {"color": LIGHT["paper"], "width": 2}}
    figure.add_scatter(
        x=[point.half_life], y=[value], mode="markers", marker=marker, uid="chosen", name=name, hoverinfo="skip"
    )
    _add_cursor(figure, point.half_life)


def _add_cursor(figure: go.Figure, x: float) -> None:
    line = {"color": LIGHT["ink"], "width": 1, "dash": "dot"}
    figure.add_shape(type="line", x0=x, x1=x, y0=0, y1=1, yref="paper", line=line)


def _hovered(points: Sequence[Point], text: Callable[[Point], str]) -> dict[str, Any]:
    """Return the half-lives of points and the texts that Plotly shows for them under the pointer."""
    return {
        "x": [point.half_life for point in points],
        "text": [_plain(f"{point.result.name}: {text(point)}") for point in points],
        "hoverinfo": "text",
    }


def _value(swept: Swept, point: Point) -> str:
    margins = swept.margins(point)
    interval = "" if margins is None else f" ± {written(swept, max(margins))}"
    return f"{swept.metric} {written(swept, swept.value(point))}{interval}"


def _bars(margins: Sequence[tuple[float, float] | None]) -> dict[str, Any] | None:
    """Return the bars of 95 % intervals; None if no point has one."""
    if not any(margins):
        return None
    below, above = zip(*(one or (None, None) for one in margins), strict=True)
    shape = {"color": LIGHT["averaged"], "thickness": 1.2, "width": 4}
    return {"type": "data", "symmetric": False, "array": above, "arrayminus": below, **shape}


def _hollow(size: float) -> dict[str, Any]:
    return {"color": LIGHT["paper"], "size": size, "line": {"color": LIGHT["averaged"], "width": 2}}


def _plain(text: str) -> str:
    """Return text that Plotly shows as it is: Plotly reads a few tags and entities of HTML."""
    return escape(text, quote=False)
