"""The matplotlib figure of the demo: two metrics over a run, and the weight of each step in the final average."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from polyak.report.series import Curve, median_update

# Okabe and Ito's colours, which people with any colour vision can distinguish.
AVERAGED, RAW = "#0072B2", "#D55E00"
INK, GREY, RULE = "#1b1f24", "#5c6570", "#d9dee3"

STYLE: dict[str, Any] = {
    "axes.edgecolor": GREY,
    "axes.labelcolor": GREY,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.family": "DejaVu Sans",  # matplotlib ships it, so that the figure is the same everywhere
    "font.size": 10,
    "svg.hashsalt": "polyak",  # deterministic ids
    "text.color": INK,
    "text.parse_math": False,  # names may have dollar signs
    "xtick.color": GREY,
    "ytick.color": GREY,
}


@dataclass(frozen=True, slots=True)
class Comparison:
    """One metric of the raw and of the averaged weights.

    Args:
        name: The heading of its panel.
        raw: The metric of the weights in training.
        averaged: The metric of their average.
        label: Returns a value as text for the label of a curve.
        tick: Returns a value as text for the axis.
    """

    name: str
    raw: Curve
    averaged: Curve
    label: Callable[[float], str]
    tick: Callable[[float], str]


def comparison(
    title: str, subtitle: str, above: Comparison, below: Comparison, *, shares: Sequence[float], half_life: str
) -> Figure:
    """Return a figure of two metrics over the steps, and below them the share of each step in the final average.

    Args:
        title: The title.
        subtitle: The line below the title.
        above: A metric that rises in training.
        below: A metric that falls in training.
        shares: The share of each step in the final average, from the first step to the last.
        half_life: The half-life as text.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9, 6.4))
        panels = figure.subplots(
            3,
            1,
            sharex=True,
            height_ratios=[2.3, 1.8, 1.1],
            gridspec_kw={"left": 0.068, "right": 0.823, "top": 0.847, "bottom": 0.08, "hspace": 0.36},
        )
        figure.text(0.02, 0.958, title, fontsize=15.5, fontweight="bold", va="center")
        figure.text(0.02, 0.915, subtitle, fontsize=9.5, color=GREY, va="center")
        _draw_comparison(panels[0], above, rises=True)
        _draw_comparison(panels[1], below, rises=False)
        _draw_shares(panels[2], shares, half_life)
        panels[2].set_xlim(0, len(shares))
        panels[2].xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))
        panels[2].set_xlabel("steps of training")
        return figure


def percent(value: float) -> str:
    """Return a fraction as a percentage, with all its digits.

    Args:
        value: The fraction.

    Example:
        >>> percent(0.925), percent(0.9)
        ('92.5%', '90%')
    """
    return f"{100 * value:g}%"


def _furnish(axes: Axes, heading: str, tick: Callable[[float], str], bins: int) -> None:
    def written(value: float, position: int | None = None) -> str:
        del position
        return tick(value)

    axes.set_title(heading, loc="left", fontsize=10.5, fontweight="bold", color=INK, pad=8)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=bins))
    axes.yaxis.set_major_formatter(FuncFormatter(written))
    axes.grid(axis="y", color=RULE, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    axes.spines["left"].set_visible(False)


def _label_right(axes: Axes, height: float, lines: Sequence[str], colour: str, **style: Any) -> None:
    """Write lines of text to the right of the panel, around a height in data units."""
    for number, line in enumerate(lines):
        axes.annotate(
            line,
            xy=(1, height),
            xycoords=("axes fraction", "data"),
            xytext=(9, 15 * ((len(lines) - 1) / 2 - number)),
            textcoords="offset points",
            color=colour,
            va="center_baseline",
            annotation_clip=False,
            **style,
        )


def _draw_comparison(axes: Axes, metric: Comparison, *, rises: bool) -> None:
    _furnish(axes, metric.name, metric.tick, bins=5)
    # Fewer than three points are drawn as dots, too.
    dots: dict[str, Any] = {"marker": "o", "clip_on": False} if len(metric.raw.batches) < 3 else {}
    axes.plot(metric.raw.batches, metric.raw.values, color=RAW, linewidth=1.1, alpha=0.9, **dots)
    axes.plot(metric.averaged.batches, metric.averaged.values, color=AVERAGED, linewidth=2.6, **dots)
    low, high = _window(metric, rises=rises)
    axes.set_ylim(low, high)
    ends = {"averaged": (metric.averaged.last, AVERAGED), "raw": (metric.raw.last, RAW)}
    heights = _separate([value for value, _ in ends.values()], least=0.13 * (high - low), low=low, high=high)
    for (name, (value, colour)), height in zip(ends.items(), heights, strict=True):
        _label_right(axes, height, [f"{name} {metric.label(value)}"], colour, fontsize=10.5, fontweight="bold")


def _window(metric: Comparison, *, rises: bool) -> tuple[float, float]:
    """Return limits that leave out the start of the run, which would flatten the rest."""
    curves = (metric.raw, metric.averaged)
    settled = sorted(value for curve in curves for value in curve.values[len(curve.values) // 5 :])
    # Single outliers of the raw curve may be off the scale, too.
    trim = len(settled) // 100
    low, high = (settled[trim], settled[-1]) if rises else (settled[0], settled[-1 - trim])
    margin = 0.06 * (high - low) or 0.05
    return low - margin, high + margin


def _separate(values: Sequence[float], *, least: float, low: float, high: float) -> tuple[float, float]:
    """Return heights for two labels at which they neither overlap nor leave the panel."""
    first, second = (min(max(value, low), high) for value in values)
    sign = 1 if first >= second else -1
    if (short := least - abs(first - second)) > 0:
        first, second = first + sign * short / 2, second - sign * short / 2
    shift = max(0.0, low - min(first, second)) - max(0.0, max(first, second) - high)
    return first + shift, second + shift


def _draw_shares(axes: Axes, shares: Sequence[float], half_life: str) -> None:
    _furnish(axes, "The share of each step in the final average", percent, bins=2)
    end, middle = len(shares), median_update(shares)
    if middle > 0:
        dark, lines = slice(middle, end), [f"the last {end - middle} steps", "are half of it"]
    else:
        dark, lines = slice(1), ["the first weights", f"are still {shares[0]:.0%} of it"]
    edges = range(end + 1)
    axes.stairs(shares, edges, fill=True, color=AVERAGED, alpha=0.28, linewidth=0, snap=False)
    axes.stairs(
        shares[dark], edges[dark.start or 0 : dark.stop + 1], fill=True, color=AVERAGED, linewidth=0, snap=False
    )
    # The share of the first weights can exceed all others by far; the label states it then.
    top = max(shares[1:], default=0.0) or shares[0]
    axes.set_ylim(0, 1.15 * top)
    _label_right(axes, 0.575 * top, [*lines, f"(half-life {half_life})"], AVERAGED, fontsize=10)


def render(figure: Figure, kind: str) -> bytes:
    """Return the bytes of an image file.

    Args:
        figure: The figure.
        kind: ``"png"`` or ``"svg"``.
    """
    buffer = io.BytesIO()
    with mpl.rc_context(STYLE):
        # Without date and version, the same numbers give the same file.
        metadata: dict[str, None] = {"Date": None} if kind == "svg" else {"Software": None}
        figure.savefig(buffer, format=kind, dpi=200, facecolor="white", metadata=metadata)
    return buffer.getvalue()
