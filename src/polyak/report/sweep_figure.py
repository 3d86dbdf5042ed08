"""The matplotlib figure of a sweep, for papers: the metric, the best profile, the error and the distance."""

import math
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from polyak.report.figures import AVERAGED, GREY, INK, RAW, RULE, STYLE
from polyak.report.swept import Point, Swept
from polyak.report.words import headline, level_label, number

ONLINE = "#007A55"
_LEVELS: dict[str, dict[str, Any]] = {
    "raw": {"color": RAW, "linestyle": (0, (5, 3))},
    "online": {"color": ONLINE, "linestyle": (0, (1, 2))},
}
_COLUMNS = 4
_OTHER: dict[str, Any] = {"color": GREY, "linestyle": (0, (6, 2, 1, 2))}
_HOLLOW: dict[str, Any] = {
    "marker": "o",
    "linestyle": "none",
    "color": "white",
    "markeredgecolor": AVERAGED,
    "markeredgewidth": 1.6,
}


def sweep_figure(swept: Swept) -> Figure:
    """Return a figure of the metric, the error and the distance against half-life, and of the best profile over time.

    Args:
        swept: The numbers of the sweep.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9, 7.2))
        grid = figure.add_gridspec(
            3, 2, height_ratios=[2.3, 0.9, 1.2], left=0.08, right=0.955, top=0.79, bottom=0.08, hspace=0.72
        )
        subtitle = f"{len(swept.points)} averages of one record, {swept.record}"
        figure.text(0.02, 0.96, headline(swept), fontsize=15.5, fontweight="bold", va="center")
        figure.text(0.02, 0.923, subtitle, fontsize=9.5, color=GREY, va="center")
        _draw_metric(figure.add_subplot(grid[0, :]), swept)
        _draw_profile(figure.add_subplot(grid[1, :]), swept, swept.points[swept.best])
        left, right = figure.add_subplot(grid[2, 0]), figure.add_subplot(grid[2, 1])
        _draw_percent(left, swept, "Estimated error, and twice it", [p.result.error for p in swept.points], band=True)
        _draw_percent(right, swept, "Distance from the newest mean", [p.result.distance for p in swept.points])
        return figure


def _furnish(axes: Axes, swept: Swept, heading: str, *, half_life: bool = True, pad: float = 7) -> None:
    axes.set_title(heading, loc="left", fontsize=10.5, fontweight="bold", color=INK, pad=pad)
    axes.grid(axis="y", color=RULE, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    axes.spines["left"].set_visible(False)
    if half_life:
        axes.set_xscale("log")
        half_lives = [point.half_life for point in swept.points if point.half_life > 0]
        few_decades = max(half_lives) < 1000 * min(half_lives)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few_decades else (1,)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(_tick))
        axes.set_xlabel(f"half-life ({swept.unit})")


def _tick(value: float, position: int | None = None) -> str:
    del position
    return number(value)


def _percent_tick(value: float, position: int | None = None) -> str:
    del position
    return f"{value:g} %"


def _draw_metric(axes: Axes, swept: Swept) -> None:
    better = "higher" if swept.maximize else "lower"
    rows = math.ceil((3 + len(swept.levels)) / _COLUMNS)
    _furnish(axes, swept, f"{swept.metric} ({better} is better)", pad=8 + 16 * rows)
    if swept.line:
        label = "half-lives"
        axes.plot(*zip(*swept.line, strict=True), color=AVERAGED, linewidth=2.2, marker="o", markersize=5, label=label)
    others = [(point.half_life, swept.value(point)) for point in swept.points if not point.on_line]
    if others:
        axes.plot(*zip(*others, strict=True), markersize=6, **_HOLLOW, label="other profiles")
    best = swept.points[swept.best]
    ring: dict[str, Any] = {"marker": "o", "linestyle": "none", "color": "none", "markeredgecolor": INK}
    axes.plot(best.half_life, swept.value(best), markersize=13, markeredgewidth=1.6, **ring, label="best")
    for level in swept.levels:
        style = _LEVELS.get(level.name, _OTHER)
        axes.axhline(level.value, linewidth=1.6, label=level_label(level), **style)
    axes.set_ylim(*swept.metric_range)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.yaxis.set_major_formatter(FuncFormatter(_tick))
    place: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (-0.01, 0.985), "borderaxespad": 0}
    axes.legend(ncols=_COLUMNS, frameon=False, fontsize=9, columnspacing=1.6, handlelength=2.2, **place)


def _draw_profile(axes: Axes, swept: Swept, best: Point) -> None:
    _furnish(axes, swept, "The weight of each moment in the best average; its newer half is dark", half_life=False)
    axes.stairs(best.steps, swept.edges, fill=True, color=AVERAGED, alpha=0.3, linewidth=0)
    later = [max(edge, best.since) for edge in swept.edges]
    axes.stairs(best.steps, later, fill=True, color=AVERAGED, linewidth=0)
    axes.plot(swept.middles, best.curve, color=INK, linewidth=1.1, linestyle=(0, (4, 2)))
    axes.set_xlim(swept.edges[0], swept.edges[-1])
    axes.set_ylim(0, None)
    axes.set_yticks([])
    axes.xaxis.set_major_formatter(FuncFormatter(_tick))
    axes.set_xlabel(f"training ({swept.unit})")


def _draw_percent(
    axes: Axes, swept: Swept, heading: str, values: Sequence[float | None], *, band: bool = False
) -> None:
    _furnish(axes, swept, heading)
    known = [
        (point.half_life, 100 * value, point.on_line)
        for point, value in zip(swept.points, values, strict=True)
        if value is not None and math.isfinite(value)
    ]
    half_lives, heights = [x for x, _, on_line in known if on_line], [y for _, y, on_line in known if on_line]
    axes.plot(half_lives, heights, color=AVERAGED, linewidth=1.8, marker="o", markersize=3, clip_on=False)
    if band:
        axes.fill_between(half_lives, heights, [2 * y for y in heights], color=AVERAGED, alpha=0.25, linewidth=0)
    for x, y, on_line in known:
        if not on_line:
            axes.plot(x, y, markersize=4.5, **_HOLLOW, clip_on=False)
    axes.set_ylim(0, None)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4))
    axes.yaxis.set_major_formatter(FuncFormatter(_percent_tick))
