"""The report of a sweep as one HTML page that needs nothing else: no network, no fonts, no scripts from elsewhere."""

import json
import math
from collections.abc import Callable, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from polyak.profiles import HalfLife
from polyak.report import svg
from polyak.report.layout import half_life_scale, levels, metric_scale, percent_scale
from polyak.report.scale import Scale, number
from polyak.report.swept import Point, Swept
from polyak.report.words import compared, headline, measured, other_name, percent

_KINDS = ("raw", "online")


def page(swept: Swept) -> str:
    """Return the page.

    Args:
        swept: What is shown.
    """
    here = files("polyak.report")
    style, script = (here.joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    # A script's element ends at the first "</script", whatever surrounds it.
    data = json.dumps(_averages(swept), ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    title = escape(f"Sweep of {swept.record}")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; \
script-src 'unsafe-inline'">
<title>{title}</title>
<style>
{style}</style>
</head>
<body class="still">
<main>
<header>
<h1>{escape(headline(swept))}</h1>
<p class="quiet">{escape(compared(swept))}</p>
</header>
<aside class="note" role="note">
<p><strong>Choose on validation data.</strong> A half-life that was chosen on the test set is no result: the best of
many is good by chance as well. Report what the chosen one gets on data that had no part in the choice.</p>
</aside>
{_chooser(swept)}
<div class="panels">
{_metric(swept)}
{_profile(swept)}
{_error(swept)}
{_distance(swept)}
</div>
{_table(swept)}
{_about(swept)}
</main>
<script type="application/json" id="averages">{data}</script>
<script>
{script}</script>
</body>
</html>
"""


def _metric(swept: Swept) -> str:
    x, y = half_life_scale(swept), metric_scale(swept)
    stretched = [svg.line("curve", svg.path([(x.at(a), y.at(b)) for a, b in swept.line]))]
    placed: list[str] = []
    found = levels(swept)
    for level in found:
        kind = level.kind if level.kind in _KINDS else "other"
        end, dx = ("end", -2) if level.right else ("start", 2)
        placed.append(svg.rule(kind, y=level.height))
        placed.append(
            svg.text(f"name {end} {kind}", level.right, level.height, level.label, dx=dx, dy=-7 if level.above else 17)
        )
    placed.append(svg.rule("cursor", x=0, identity="metric-cursor"))
    for i, point in enumerate(swept.points):
        value = point.result.metrics[swept.metric]
        if math.isnan(value):
            continue
        a, b = x.at(point.half_life), y.at(value)
        half_life = isinstance(point.result.profile, HalfLife)
        placed.append(svg.dot("dot" if half_life else "beside", a, b, 4.5 if half_life else 5))
        if i == swept.best:
            placed.append(svg.dot("best", a, b, 9))
        if point.result.name == "newest mean":
            placed.append(svg.text("name averaged", a, b, "newest mean", dx=-5, dy=-13))
    placed.append(svg.dot("here", 0, 0, 6, identity="metric-here"))
    label = (
        f"{swept.metric} against half-life in {swept.unit}: "
        + "; ".join(f"{point.result.name} {measured(point.result.metrics[swept.metric])}" for point in swept.points)
        + "".join(f"; {level.label}" for level in found)
    )
    hollow = any(not isinstance(point.result.profile, HalfLife) for point in swept.points)
    caption = f"{'Higher' if swept.maximize else 'Lower'} is better; the ring is the best. Choose another above." + (
        " Hollow: not half-lives, at the age of which half of the average is younger." if hollow else ""
    )
    plot = svg.panel(label, x, y, stretched, placed)
    return _figure(f"{swept.metric} against half-life", caption, plot, f"half-life ({swept.unit})", "wide")


def _heights(points: Sequence[Point], y: Scale, value_of: Callable[[Point], float | None]) -> list[float | None]:
    values = [value_of(point) for point in points]
    return [None if value is None or not math.isfinite(value) else y.at(100 * value) for value in values]


def _error_of(point: Point) -> float | None:
    return point.result.error


def _distance_of(point: Point) -> float | None:
    return point.result.distance


def _small(
    swept: Swept, name: str, heading: str, caption: str, value_of: Callable[[Point], float | None], *, doubled: bool
) -> str:
    """Return a panel of percentages against half-life."""
    x, y = half_life_scale(swept), percent_scale(swept.points, value_of, doubled=doubled)
    shown = [
        (x.at(point.half_life), value)
        for point in swept.points
        if isinstance(point.result.profile, HalfLife)
        and (value := value_of(point)) is not None
        and math.isfinite(value)
    ]
    along = [(a, y.at(100 * value)) for a, value in shown]
    stretched = [svg.line("curve", svg.path(along))]
    if doubled:
        twice = [(a, y.at(200 * value)) for a, value in shown]
        stretched.insert(0, svg.line("band", svg.path([*along, *reversed(twice)], closed=True)))
    beside = [
        svg.dot("beside", x.at(point.half_life), y.at(100 * value), 3.5)
        for point in swept.points
        if not isinstance(point.result.profile, HalfLife)
        and (value := value_of(point)) is not None
        and math.isfinite(value)
    ]
    placed = [
        *beside,
        svg.rule("cursor", x=0, identity=f"{name}-cursor"),
        svg.dot("here", 0, 0, 5, identity=f"{name}-here"),
    ]
    label = f"{heading}: " + "; ".join(f"{point.result.name} {percent(value_of(point))}" for point in swept.points)
    plot = svg.panel(label, x, y, stretched, placed, tick=lambda value: f"{number(value)} %")
    return _figure(heading, caption, plot, f"half-life ({swept.unit})")


def _error(swept: Swept) -> str:
    caption = (
        "Of |last weights - average|, from the record alone. An estimate and no bound: the band reaches to twice it."
    )
    return _small(swept, "error", "Estimated error of the average", caption, _error_of, doubled=True)


def _distance(swept: Swept) -> str:
    caption = "|newest mean - average| of |newest mean|: how far the average lies from where the run ended."
    return _small(swept, "distance", "Distance between weights and average", caption, _distance_of, doubled=False)


def _profile(swept: Swept) -> str:
    x = Scale(swept.edges[0], swept.edges[-1])
    old, young, asked, since = _shape(swept, swept.points[swept.best])
    stretched = [
        svg.line("old", old, identity="old"),
        svg.line("young", young, identity="young"),
        svg.line("asked", asked, identity="asked"),
    ]
    placed = [svg.rule("cursor", x=since, identity="since")]
    label = (
        f"How much each moment of training counts in the chosen average, from {number(swept.edges[0])} to "
        f"{number(swept.edges[-1])} {swept.unit}; half of it comes after the dotted line"
    )
    plot = svg.panel(label, x, None, stretched, placed)
    caption = "Steps: the stretches of the record, the younger half of the average dark. Dashed: what was asked for."
    heading = "How much each moment of training counts"
    return _figure(heading, caption, plot, f"training ({swept.unit})", "wide low")


def _shape(swept: Swept, point: Point) -> tuple[str, str, str, float]:
    """Return the lines of an average over training time: its older half, its younger half, what was asked for."""
    x = Scale(swept.edges[0], swept.edges[-1])
    top = 1.05 * max(*point.steps, *point.curve, 0.0) or 1.0
    edges = [x.at(edge) for edge in swept.edges]
    heights = [max(0.0, step) / top for step in point.steps]
    since = x.at(point.since)
    at = next((i for i, edge in enumerate(edges[1:]) if edge >= since), len(heights) - 1)
    old = svg.steps([*edges[: at + 1], since], heights[: at + 1])
    young = svg.steps([since, *edges[at + 1 :]], heights[at:])
    corners: list[tuple[float, float]] = []
    for i, height in enumerate(point.curve):
        corners.append(((x.at(swept.moments[i]) + x.at(swept.moments[i + 1])) / 2, max(0.0, height) / top))
    ends = [(0.0, corners[0][1]), *corners, (1.0, corners[-1][1])]
    return old, young, svg.path(ends), since


def _averages(swept: Swept) -> list[dict[str, Any]]:
    """Return what changes on the page with the slider, ready to be put in place."""
    x, y = half_life_scale(swept), metric_scale(swept)
    values = [point.result.metrics[swept.metric] for point in swept.points]
    heights = {
        "metric": [None if math.isnan(value) else y.at(value) for value in values],
        "error": _heights(swept.points, percent_scale(swept.points, _error_of, doubled=True), _error_of),
        "distance": _heights(swept.points, percent_scale(swept.points, _distance_of, doubled=False), _distance_of),
    }
    found: list[dict[str, Any]] = []
    for i, point in enumerate(swept.points):
        old, young, asked, since = _shape(swept, point)
        found.append(
            {
                "texts": _texts(swept, point),
                "spoken": f"{point.result.name}, {swept.metric} {measured(point.result.metrics[swept.metric])}"
                + (", the best" if i == swept.best else ""),
                "best": i == swept.best,
                "x": svg.percents(x.at(point.half_life)),
                "heights": {
                    name: None if places[i] is None else svg.percents(1 - (places[i] or 0.0))
                    for name, places in heights.items()
                },
                "paths": {"old": old, "young": young, "asked": asked},
                "since": svg.percents(since),
            }
        )
    return found


def _texts(swept: Swept, point: Point) -> dict[str, str]:
    result = point.result
    younger = swept.edges[-1] - point.since
    return {
        "value-name": result.name,
        **{f"value-{i}": measured(value) for i, value in enumerate(result.metrics.values())},
        "value-error": percent(result.error),
        "value-distance": percent(result.distance),
        "value-since": f"{younger:,.4g} {swept.unit}" if younger < 10_000 else f"{younger:,.0f} {swept.unit}",
    }


def _chooser(swept: Swept) -> str:
    best = swept.points[swept.best]
    texts = _texts(swept, best)
    rows = [
        *((name, f"value-{i}") for i, name in enumerate(best.result.metrics)),
        ("estimated error", "value-error"),
        ("distance", "value-distance"),
        ("half is younger than", "value-since"),
    ]
    values = "".join(
        f'<div><dt>{escape(name)}</dt><dd id="{identity}">{escape(texts[identity])}</dd></div>'
        for name, identity in rows
    )
    return f"""<section class="chooser" aria-label="Choose an average">
<div class="ends"><label for="slider">Half-life</label><span aria-hidden="true">shorter to longer</span></div>
<input id="slider" type="range" min="0" max="{len(swept.points) - 1}" step="1" value="{swept.best}">
<output for="slider"><strong id="value-name">{escape(texts["value-name"])}</strong>
<span class="badge" id="is-best">best</span>
<dl>{values}</dl></output>
</section>"""


def _figure(heading: str, caption: str, plot: str, axis: str, kind: str = "") -> str:
    return (
        f'<figure class="{kind}"><h2>{escape(heading)}</h2><figcaption>{escape(caption)}</figcaption>'
        f'<div class="frame">{plot}<div class="axis" aria-hidden="true">{escape(axis)}</div></div></figure>'
    )


def _table(swept: Swept) -> str:
    names = list(swept.points[swept.best].result.metrics)
    heads = "".join(f'<th scope="col">{escape(name)}</th>' for name in (*names, "error", "distance"))
    rows: list[str] = []
    shown = [(other_name(one.name), one, False) for one in swept.others]
    shown += [(point.result.name, point.result, i == swept.best) for i, point in enumerate(swept.points)]
    for name, result, chosen in shown:
        cells = [measured(result.metrics[metric]) if metric in result.metrics else "" for metric in names]
        cells += [percent(result.error), percent(result.distance)] if result.profile is not None else ["", ""]
        badge = ' <span class="badge">best</span>' if chosen else ""
        rows.append(
            f'<tr{" class=chosen" if chosen else ""}><th scope="row">{escape(name)}{badge}</th>'
            + "".join(f"<td>{escape(cell)}</td>" for cell in cells)
            + "</tr>"
        )
    return (
        '<section><div class="scroll" tabindex="0" role="region" aria-label="All that was measured"><table>'
        f"<caption>All that was measured</caption><thead><tr><th scope=col>weights</th>{heads}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div></section>"
    )


def _about(swept: Swept) -> str:
    parts = [
        "The average is a mean of the weights over training, put together from the record after the run; the newest "
        "mean is that over the record's last stretch alone, the least averaged weights that it holds. Half-lives are "
        "unbiased: the first weights count no more than others.",
        "The error is estimated from the record alone. Where the truth was known, the estimate was within a factor of "
        "about 2.5 of it.",
    ]
    best = swept.points[swept.best].result.profile
    again = ""
    if isinstance(best, HalfLife):
        command = f"polyak reconstruct {swept.record} --half-life {best.span}{' --unbiased' if best.unbiased else ''}"
        again = (
            '<p class="quiet">The best average is in best.safetensors, beside this page. To export it again:</p>'
            f"<pre><code>{escape(command)} -o averaged.safetensors</code></pre>"
        )
    if swept.batchnorm:
        parts.append("Statistics of BatchNorm layers were recomputed for each average, and not for other weights.")
    paragraphs = "".join(f'<p class="quiet">{escape(part)}</p>' for part in parts)
    return f"<section>{again}{paragraphs}</section>"
