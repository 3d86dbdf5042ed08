"""The picture of a sweep, for papers: what the page shows of the best average."""

import math
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from polyak.profiles import HalfLife
from polyak.report.figures import _STYLE, AVERAGED, GREY, INK, RAW, RULE
from polyak.report.layout import half_life_scale, levels, metric_scale
from polyak.report.scale import number
from polyak.report.swept import Point, Swept
from polyak.report.words import headline

ONLINE = "#007A55"
_LINES: dict[str, dict[str, Any]] = {
    "raw": {"color": RAW, "linestyle": (0, (5, 3))},
    "online": {"color": ONLINE, "linestyle": (0, (1, 2))},
}
_OTHER: dict[str, Any] = {"color": GREY, "linestyle": (0, (6, 2, 1, 2))}


def sweep_figure(swept: Swept) -> Figure:
    """Draw the metric, the error and the distance against half-life, and the best profile over training.

    Args:
        swept: What is shown.
    """
    best = swept.points[swept.best]
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(9, 6.8))
        grid = figure.add_gridspec(
            3, 2, height_ratios=[2.3, 0.9, 1.2], left=0.08, right=0.955, top=0.845, bottom=0.085, hspace=0.72
        )
        figure.text(
            0.02,
            0.955,
            headline(swept),
            fontsize=15.5,
            fontweight="bold",
            va="center",
        )
        averages = sum(isinstance(point.result.profile, HalfLife) for point in swept.points)
        figure.text(
            0.02, 0.915, f"{averages} half-lives of one record, {swept.record}", fontsize=9.5, color=GREY, va="center"
        )
        _draw_metric(figure.add_subplot(grid[0, :]), swept)
        _draw_profile(figure.add_subplot(grid[1, :]), swept, best)
        left, right = figure.add_subplot(grid[2, 0]), figure.add_subplot(grid[2, 1])
        _draw_percent(left, swept, "Estimated error, and twice it", [p.result.error for p in swept.points], band=True)
        _draw_percent(right, swept, "Distance from the newest mean", [p.result.distance for p in swept.points])
        return figure


def _furnish(axes: Axes, swept: Swept, heading: str, *, half_life: bool = True) -> None:
    axes.set_title(heading, loc="left", fontsize=10.5, fontweight="bold", color=INK, pad=7)
    axes.grid(axis="y", color=RULE, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    axes.spines["left"].set_visible(False)
    if half_life:
        axes.set_xscale("log")
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
    _furnish(axes, swept, f"{swept.metric} ({better} is better)")
    axes.plot(*zip(*swept.line, strict=True), color=AVERAGED, linewidth=2.2, marker="o", markersize=5)
    for i, point in enumerate(swept.points):
        place = (point.half_life, point.result.metrics[swept.metric])
        if not isinstance(point.result.profile, HalfLife):
            axes.plot(*place, marker="o", markersize=6, color="white", markeredgecolor=AVERAGED, markeredgewidth=1.6)
        if point.result.name == "newest mean":
            axes.annotate("newest mean", place, (-4, 9), textcoords="offset points", color=AVERAGED)
        if i == swept.best:
            axes.plot(*place, marker="o", markersize=13, color="none", markeredgecolor=INK, markeredgewidth=1.6)
    x, y = half_life_scale(swept), metric_scale(swept)
    axes.set_xlim(x.low, x.high)
    axes.set_ylim(y.low, y.high)
    axes.yaxis.set_major_locator(FixedLocator(y.ticks))
    axes.yaxis.set_major_formatter(FuncFormatter(_tick))
    for level in levels(swept):
        style = _LINES.get(level.kind, _OTHER)
        axes.axhline(y.low + level.height * (y.high - y.low), linewidth=1.6, **style)
        axes.annotate(
            level.label,
            xy=(level.right, level.height),
            xycoords="axes fraction",
            xytext=(-3 if level.right else 3, 5 if level.above else -13),
            textcoords="offset points",
            ha="right" if level.right else "left",
            color=style["color"],
            fontweight="bold",
            bbox={"facecolor": "white", "linewidth": 0, "pad": 0.5},
        )


def _draw_profile(axes: Axes, swept: Swept, best: Point) -> None:
    _furnish(axes, swept, "How much each moment counts in the best average, its younger half dark", half_life=False)
    axes.stairs(best.steps, swept.edges, fill=True, color=AVERAGED, alpha=0.3, linewidth=0)
    later = [max(edge, best.since) for edge in swept.edges]
    axes.stairs(best.steps, later, fill=True, color=AVERAGED, linewidth=0)
    middles = [(a + b) / 2 for a, b in zip(swept.moments[:-1], swept.moments[1:], strict=True)]
    axes.plot(middles, best.curve, color=INK, linewidth=1.1, linestyle=(0, (4, 2)))
    axes.set_xlim(swept.edges[0], swept.edges[-1])
    axes.set_ylim(0, None)
    axes.set_yticks([])
    axes.xaxis.set_major_formatter(FuncFormatter(_tick))
    axes.set_xlabel(f"training ({swept.unit})")


def _draw_percent(
    axes: Axes, swept: Swept, heading: str, values: Sequence[float | None], *, band: bool = False
) -> None:
    _furnish(axes, swept, heading)
    shown = [
        (point.half_life, 100 * value)
        for point, value in zip(swept.points, values, strict=True)
        if value is not None and math.isfinite(value) and isinstance(point.result.profile, HalfLife)
    ]
    half_lives, heights = [x for x, _ in shown], [y for _, y in shown]
    axes.plot(half_lives, heights, color=AVERAGED, linewidth=1.8)
    if band:
        axes.fill_between(half_lives, heights, [2 * y for y in heights], color=AVERAGED, alpha=0.25, linewidth=0)
    for point, value in zip(swept.points, values, strict=True):
        if value is not None and math.isfinite(value) and not isinstance(point.result.profile, HalfLife):
            style = {"color": "white", "markeredgecolor": AVERAGED, "clip_on": False}
            axes.plot(point.half_life, 100 * value, marker="o", markersize=4.5, **style)
    axes.set_ylim(0, None)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4))
    axes.yaxis.set_major_formatter(FuncFormatter(_percent_tick))
