"""Plots as inline SVG that stretch to any width while their letters keep their size: text for a page, no plotting.

Lines live in a box of 1000 by 1000 that is stretched to the panel; what must not be distorted is placed in per cent.
"""

from collections.abc import Callable, Sequence
from html import escape

from polyak.report.scale import Scale, number

_BOX = 1000


def percents(place: float) -> str:
    """Write a place for an attribute.

    Args:
        place: From 0 to 1.
    """
    return f"{100 * place:.2f}%"


def path(places: Sequence[tuple[float, float]], *, closed: bool = False) -> str:
    """Return the ``d`` of a line through places, leaving out those that nobody could see.

    Args:
        places: From 0 to 1 each, y upwards.
        closed: Whether it ends where it began.
    """
    kept: list[tuple[float, float]] = []
    for i, place in enumerate(places):
        new = not kept or max(abs(place[0] - kept[-1][0]), abs(place[1] - kept[-1][1])) > 0.002
        if new or i == len(places) - 1:
            kept.append(place)
    text = "L".join(f"{_BOX * x:.1f} {_BOX * (1 - y):.1f}" for x, y in kept)
    return f"M{text}{'Z' if closed else ''}" if kept else ""


def steps(edges: Sequence[float], heights: Sequence[float]) -> str:
    """Return the ``d`` of the area under a staircase.

    Args:
        edges: From 0 to 1, one more than ``heights``.
        heights: From 0 to 1.
    """
    if not heights:
        return ""
    corners = [(edges[0], 0.0)]
    for i, height in enumerate(heights):
        corners += [(edges[i], height), (edges[i + 1], height)]
    return path([*corners, (edges[-1], 0.0)], closed=True)


def line(kind: str, d: str, *, identity: str = "") -> str:
    """Return a line in the stretched box.

    Args:
        kind: Its class.
        d: Its course.
        identity: Its id, if it is changed later.
    """
    return f'<path class="{kind}"{_id(identity)} d="{d}" vector-effect="non-scaling-stroke"/>'


def dot(kind: str, x: float, y: float, radius: float, *, identity: str = "") -> str:
    """Return a circle.

    Args:
        kind: Its class.
        x: From 0 to 1.
        y: From 0 to 1, upwards.
        radius: In pixels.
        identity: Its id, if it is changed later.
    """
    return f'<circle class="{kind}"{_id(identity)} cx="{percents(x)}" cy="{percents(1 - y)}" r="{radius:g}"/>'


def text(kind: str, x: float, y: float, content: str, *, dx: float = 0, dy: float = 0, identity: str = "") -> str:
    """Return letters.

    Args:
        kind: Their class.
        x: From 0 to 1.
        y: From 0 to 1, upwards.
        content: What they say.
        dx: Moved right by, in pixels.
        dy: Moved down by, in pixels.
        identity: Their id, if they are changed later.
    """
    place = f'x="{percents(x)}" y="{percents(1 - y)}" dx="{dx:g}" dy="{dy:g}"'
    return f'<text class="{kind}"{_id(identity)} {place}>{escape(content)}</text>'


def rule(kind: str, *, x: float | None = None, y: float | None = None, identity: str = "") -> str:
    """Return a straight line across the panel, upright at ``x`` or level at ``y``.

    Args:
        kind: Its class.
        x: From 0 to 1.
        y: From 0 to 1, upwards.
        identity: Its id, if it is changed later.
    """
    if x is not None:
        ends = f'x1="{percents(x)}" x2="{percents(x)}" y1="0%" y2="100%"'
    else:
        ends = f'x1="0%" x2="100%" y1="{percents(1 - (y or 0.0))}" y2="{percents(1 - (y or 0.0))}"'
    return f'<line class="{kind}"{_id(identity)} {ends}/>'


def panel(
    label: str,
    x: Scale,
    y: Scale | None,
    stretched: Sequence[str],
    placed: Sequence[str],
    *,
    tick: Callable[[float], str] = number,
) -> str:
    """Return a plot with its axes.

    Args:
        label: What is to be seen, for those who do not see it.
        x: Along.
        y: Up; None for an axis without numbers.
        stretched: Lines.
        placed: What lies above them.
        tick: Writes a number at the y axis.
    """
    axes: list[str] = []
    for value in y.ticks if y else [0.0]:
        height = y.at(value) if y else 0.0
        axes.append(rule("grid", y=height))
        axes.append(text("tick y", 0, height, tick(value) if y else "0", dx=-8, dy=4))
    for value in x.ticks:
        place = x.at(value)
        edge = " first" if place < 0.03 else " last" if place > 0.97 else ""
        axes.append(text(f"tick x{edge}", place, 0, number(value), dy=20))
    box = f'<svg viewBox="0 0 {_BOX} {_BOX}" preserveAspectRatio="none" width="100%" height="100%" aria-hidden="true">'
    return (
        f'<svg class="plot" role="img" aria-label="{escape(label, quote=True)}">'
        f"{''.join(axes)}{box}{''.join(stretched)}</svg>{''.join(placed)}</svg>"
    )


def _id(identity: str) -> str:
    return f' id="{identity}"' if identity else ""
