"""The report of a sweep as one HTML file with Plotly charts. It contains plotly.js and loads nothing from a network."""

import json
from collections.abc import Callable, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from plotly.offline import get_plotlyjs

from polyak.profiles import named
from polyak.report.charts import DARK, LIGHT, charts, distance_of, error_of
from polyak.report.swept import Point, Swept
from polyak.report.words import compared, headline, level_label, measured, number, other_name, percent, younger


def page(swept: Swept) -> str:
    """Return the HTML of the page.

    Args:
        swept: The numbers of the sweep.
    """
    here = files("polyak.report")
    style, script = (here.joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; \
script-src 'unsafe-inline'">
<title>{escape(f"Sweep of {swept.record}")}</title>
<style>
{style}</style>
</head>
<body class="still">
<main>
<header>
<h1>{escape(headline(swept))}</h1>
<p class="quiet">{escape(compared(swept))}</p>
</header>
<div class="note" role="note">
<p><strong>Choose on validation data.</strong> If the half-life is chosen on the test set, the test result is biased:
the best of many values is partly luck. Report the metric of the chosen average on data that had no part in the choice.
</p>
</div>
<noscript><p class="note">The charts need JavaScript. The table below has all numbers.</p></noscript>
{_chooser(swept)}
<div class="panels">
{_figures(swept)}
</div>
{_table(swept)}
{_about(swept)}
</main>
{_data("charts", {name: chart.to_plotly_json() for name, chart in charts(swept).items()})}
{_data("averages", _averages(swept))}
{_data("colours", {LIGHT[name]: DARK[name] for name in LIGHT})}
{_data("edges", _rounded(swept.edges))}
<script>{get_plotlyjs()}</script>
<script>
{script}</script>
</body>
</html>
"""


def _data(identity: str, data: Any) -> str:
    """Return an element that holds JSON."""
    # A script element ends at the first "</script", even inside a string.
    text = json.dumps(data, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    return f'<script type="application/json" id="{identity}">{text}</script>'


def _rounded(values: Sequence[float]) -> list[float]:
    """Return values in six significant digits, which a screen cannot resolve."""
    return [float(f"{value:.6g}") for value in values]


def _figures(swept: Swept) -> str:
    best = "Higher" if swept.maximize else "Lower"
    hollow = any(not point.on_line for point in swept.points)
    values = "; ".join(f"{point.result.name} {measured(swept.value(point))}" for point in swept.points)
    values += "".join(f"; {level_label(level)}" for level in swept.levels)
    return "\n".join(
        (
            _figure(
                "metric",
                f"{swept.metric} against half-life",
                f"{best} is better. The ring is the best average, the dot is the chosen one."
                + (" Hollow: other profiles, at the median age of what they average." if hollow else ""),
                f"{swept.metric} against half-life in {swept.unit}: {values}",
                "wide",
            ),
            _figure(
                "profile",
                "The weight of each moment of training in the chosen average",
                "Steps: the segments of the record; the newer half of the average is dark. Dashed: the profile itself.",
                f"The weight of each moment of training in the chosen average, from {number(swept.edges[0])} to "
                f"{number(swept.edges[-1])} {swept.unit}; half of the average is of weights after the dotted line",
                "wide low",
            ),
            _figure(
                "error",
                "Estimated error of the average",
                "Relative to |last weights - average|, computed from the record alone. It is an estimate, not a bound; "
                "the band reaches to twice the estimate.",
                _spoken("Estimated error", swept.points, lambda point: point.result.error),
            ),
            _figure(
                "distance",
                "Distance between weights and average",
                "|newest mean - average| / |newest mean|: how far the average is from the end of the run.",
                _spoken("Distance from the newest mean", swept.points, lambda point: point.result.distance),
            ),
        )
    )


def _spoken(heading: str, points: Sequence[Point], value_of: Callable[[Point], float | None]) -> str:
    return f"{heading}: " + "; ".join(f"{point.result.name} {percent(value_of(point))}" for point in points)


def _figure(name: str, heading: str, caption: str, summary: str, kind: str = "") -> str:
    """Return a frame for a chart, with a summary in words for screen readers."""
    return (
        f'<figure class="{kind}"><h2>{escape(heading)}</h2><figcaption>{escape(caption)}</figcaption>'
        f'<div class="chart" id="{name}-chart" role="img" aria-label="{escape(summary)}"></div></figure>'
    )


def _averages(swept: Swept) -> list[dict[str, Any]]:
    """Return what the slider changes: for each average the texts, and the data of the traces that follow it."""
    return [
        {
            "texts": _texts(swept, point),
            "spoken": f"{point.result.name}, {swept.metric} {measured(swept.value(point))}"
            + (", the best" if i == swept.best else ""),
            "best": i == swept.best,
            "x": point.half_life,
            "heights": {
                "metric": swept.value(point) if swept.known(point) else None,
                "error": error_of(point),
                "distance": distance_of(point),
            },
            "since": point.since,
            "steps": _rounded(point.steps),
            "curve": _rounded(point.curve),
        }
        for i, point in enumerate(swept.points)
    ]


def _texts(swept: Swept, point: Point) -> dict[str, str]:
    result = point.result
    return {
        "value-name": result.name,
        **{f"value-{i}": measured(value) for i, value in enumerate(result.metrics.values())},
        "value-error": percent(result.error),
        "value-distance": percent(result.distance),
        "value-since": younger(swept, point),
    }


def _chooser(swept: Swept) -> str:
    best = swept.points[swept.best]
    texts = _texts(swept, best)
    rows = [
        *((name, f"value-{i}") for i, name in enumerate(best.result.metrics)),
        ("estimated error", "value-error"),
        ("distance", "value-distance"),
        ("half is newer than", "value-since"),
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
        '<section><div class="scroll" tabindex="0" role="region" aria-label="All results"><table>'
        f"<caption>All results</caption><thead><tr><th scope=col>weights</th>{heads}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div></section>"
    )


def _about(swept: Swept) -> str:
    parts = [
        "An average is a mean of the weights over training, computed from the record after the run. The newest mean "
        "is the mean over the last segment of the record, the least averaged weights that the record holds. The "
        "half-lives of the grid are unbiased: the first weights count no more than others.",
        "The error is estimated from the record alone. Where the exact error was known, the estimate was within a "
        "factor of about 2.5 of it.",
    ]
    if swept.batchnorm:
        parts.append("The statistics of BatchNorm layers were recomputed for each average, but not for other weights.")
    paragraphs = "".join(f'<p class="quiet">{escape(part)}</p>' for part in parts)
    return f"<section>{_command(swept)}{paragraphs}</section>"


def _command(swept: Swept) -> str:
    """Return the command that exports the best average, if its profile has options on the command line."""
    best = swept.points[swept.best].result
    options = None if best.profile is None else named(best.profile).options
    if options is None:
        return ""
    command = f"polyak reconstruct {swept.record} {options} -o averaged.safetensors"
    return (
        '<p class="quiet">The best average is in best.safetensors, next to this page. To export it again:</p>'
        f"<pre><code>{escape(command)}</code></pre>"
    )
