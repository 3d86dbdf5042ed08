"""The report of sweeps as one HTML file with Plotly charts. It contains plotly.js and loads nothing from a network."""

import json
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from typing import Any

from plotly.offline import get_plotlyjs

from polyak.profiles import named
from polyak.report.charts import DARK, LIGHT, charts, distance_of, error_of, training
from polyak.report.over_training import Panel, sweep_panels, watched_panels
from polyak.report.panels import panels, table
from polyak.report.provenance import Provenance
from polyak.report.swept import Point, Swept
from polyak.report.words import compared, headline, percent, written, younger
from polyak.watching import Moment

# Nothing comes from a network. Plotly draws a heat map as an image in the page.
CONTENT_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
_SCALES = {"near": "near the best", "all": "all averages", "log": "logarithmic"}
# After the headline: what the numbers are, and how to choose by them.
_EXPLAINED = """\
<p class="quiet">Each average is a mean of the weights of one training run, made after it. The half-life says how far
back it reaches: weights that are one half-life older count half as much.</p>
</header>
<div class="note" role="note">
<p><strong>Choose on validation data.</strong> If the half-life is chosen on the test set, the test result is biased:
the best of many values is partly luck. Report the metric of the chosen average on data that had no part in the choice.
</p>
</div>
<noscript><p class="note">The charts need JavaScript. The table below has all numbers.</p></noscript>"""


def page(
    swept: Swept,
    *others: Swept,
    about: Provenance | None = None,
    notes: Sequence[str] = (),
    watched: Sequence[Moment] = (),
) -> str:
    """Return the HTML of the page.

    Args:
        swept: The numbers of the sweep that is shown first.
        *others: Those of the same record at other moments, or of other records.
        about: Where the page comes from.
        notes: Further sentences about the result.
        watched: What ``polyak watch`` has read of the record while the run trained.
    """
    here, sweeps = files("polyak.report"), [swept, *others]
    more = _over_training(sweeps, watched)
    style, script = (here.joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    notes = "".join(f'<p class="quiet">{escape(note)}</p>' for note in filter(None, (compared(swept), *notes)))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{CONTENT_POLICY}">
<title>{escape(f"Sweep of {swept.record}")}</title>
<style>
{style}</style>
</head>
<body class="still">
<main>
<header>
<h1>{escape(headline(swept))}</h1>
{notes}
{_EXPLAINED}
{_chooser(sweeps)}
<div class="panels">
{panels(sweeps, more)}
</div>
{table(sweeps)}
{_about(swept, about)}
</main>
{embedded("sweeps", _sweeps(sweeps, more))}
{embedded("colours", {LIGHT[name]: DARK[name] for name in LIGHT})}
<script>{get_plotlyjs()}</script>
<script>
{script}</script>
</body>
</html>
"""


def _over_training(sweeps: Sequence[Swept], watched: Sequence[Moment]) -> list[Panel]:
    """Return the charts over training. Of two heat maps, that of ``polyak watch`` is shown: it has more moments."""
    found = [*sweep_panels(of_one_record(sweeps)), *(watched_panels(watched) if watched else [])]
    return list({panel.name: panel for panel in found}.values())


def embedded(identity: str, data: Any) -> str:
    """Return an element that holds JSON.

    Args:
        identity: The element's id.
        data: Anything that JSON can hold.
    """
    # A script element ends at the first "</script", even inside a string.
    text = json.dumps(data, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    return f'<script type="application/json" id="{identity}">{text}</script>'


def _sweeps(sweeps: Sequence[Swept], more: Sequence[Panel]) -> list[dict[str, Any]]:
    """Return what the script draws: for each sweep its charts, the scales of the axis, and what the slider changes."""
    moments = of_one_record(sweeps)
    plain = list[dict[str, Any]]()
    for one in sweeps:
        drawn = charts(one, [other for other in sweeps if other is not one])
        if len(moments) > 1:
            drawn["training"] = training(moments)
        drawn |= {panel.name: panel.figure for panel in more}
        metrics = {f"metric-{i}" if i else "metric": one.of(name) for i, name in enumerate(one.metrics)}
        plain.append(
            {
                "charts": {name: chart.to_plotly_json() for name, chart in drawn.items()},
                "scales": {
                    name: {"near": numbers.near_range, "all": numbers.metric_range, "log": numbers.log_range}
                    for name, numbers in metrics.items()
                },
                "averages": [_average(one, i) for i in range(len(one.points))],
                "best": one.best,
                "edges": _rounded(one.edges),
            }
        )
    return plain


def of_one_record(sweeps: Sequence[Swept]) -> list[Swept]:
    """Return the sweeps of the same record as the first, oldest moment first.

    Args:
        sweeps: All.
    """
    return sorted((one for one in sweeps if one.folder == sweeps[0].folder), key=lambda one: one.edges[-1])


def _rounded(values: Sequence[float]) -> list[float]:
    """Return values with six significant digits, more than a screen can resolve."""
    return [float(f"{value:.6g}") for value in values]


def _average(swept: Swept, i: int) -> dict[str, Any]:
    """Return the texts of an average, and the data of the traces that follow the slider."""
    point, heights = swept.points[i], dict[str, float | None]()
    for number, name in enumerate(swept.metrics):
        of = swept.of(name)
        heights[f"metric-{number}" if number else "metric"] = of.value(point) if of.known(point) else None
    return {
        "texts": _texts(swept, point),
        "spoken": f"{point.result.name}, {swept.metric} {written(swept, swept.value(point))}"
        + (", the best" if i == swept.best else ""),
        "best": i == swept.best,
        "x": point.half_life,
        "heights": {**heights, "error": error_of(point), "distance": distance_of(point)},
        "since": point.since,
        "steps": _rounded(point.steps),
        "curve": _rounded(point.curve),
    }


def _texts(swept: Swept, point: Point) -> dict[str, str]:
    result = point.result
    return {
        "value-name": result.name,
        **{f"value-{i}": written(of := swept.of(m), of.value(point)) for i, m in enumerate(swept.metrics)},
        "value-error": percent(result.error),
        "value-distance": percent(result.distance),
        "value-since": younger(swept, point),
    }


def _chooser(sweeps: Sequence[Swept]) -> str:
    swept = sweeps[0]
    texts = _texts(swept, swept.points[swept.best])
    rows = [
        *((name, f"value-{i}") for i, name in enumerate(swept.metrics)),
        ("estimated error", "value-error"),
        ("distance", "value-distance"),
        ("half is newer than", "value-since"),
    ]
    values = "".join(
        f'<div><dt>{escape(name)}</dt><dd id="{identity}">{escape(texts[identity])}</dd></div>'
        for name, identity in rows
    )
    return f"""<section class="chooser" aria-label="Choose an average">
{_selects(sweeps)}
<div class="ends"><label for="slider">Half-life</label><span aria-hidden="true">shorter to longer</span></div>
<input id="slider" type="range" min="0" max="{len(swept.points) - 1}" step="1" value="{swept.best}">
<output for="slider"><strong id="value-name">{escape(texts["value-name"])}</strong>
<span class="badge" id="is-best">best</span>
<dl>{values}</dl></output>
</section>"""


def _selects(sweeps: Sequence[Swept]) -> str:
    """Return the controls for the sweep, the metric and the scale, where there is a choice."""
    swept = sweeps[0]
    lists = list[str]()
    if len(sweeps) > 1:
        of = "Averages of" if any(one.folder != swept.folder for one in sweeps) else "Averages at"
        names = [one.label if of.endswith("of") else one.at or "the end of the record" for one in sweeps]
        lists.append(_select("sweep", of, {str(i): name for i, name in enumerate(names)}))
    if len(swept.metrics) > 1:
        keys = [f"metric-{i}" if i else "metric" for i in range(len(swept.metrics))]
        lists.append(_select("metric", "Metric", dict(zip(keys, swept.metrics, strict=True))))
    views = [one.of(name) for one in sweeps for name in one.metrics]
    if any(view.near_range or view.log_range for view in views):
        lists.append(_select("scale", "Scale", _SCALES))
    return f'<div class="selects">{"".join(lists)}</div>' if lists else ""


def _select(name: str, label: str, options: dict[str, str]) -> str:
    listed = "".join(f'<option value="{escape(key)}">{escape(text)}</option>' for key, text in options.items())
    return f'<label for="pick-{name}">{escape(label)} <select id="pick-{name}">{listed}</select></label>'


def _about(swept: Swept, about: Provenance | None) -> str:
    parts = [
        "The averages are computed from the record after the run. The newest mean is the mean over the last segment of "
        "the record, the least averaged weights that it has for every run. The half-lives of the grid are unbiased: "
        "the first weights count no more than others.",
        "The error is what the record's resolution costs, estimated from the record alone. Where the exact error was "
        "known, the estimate was within a factor of about 2.5 of it.",
    ]
    if swept.batchnorm:
        parts.append("The statistics of BatchNorm layers were recomputed for each average, but not for other weights.")
    paragraphs = "".join(f'<p class="quiet">{escape(part)}</p>' for part in parts)
    rows = list[tuple[str, str]]() if about is None else about.rows
    origin = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>" for name, text in rows)
    origin = f'<h2>How this page was made</h2><dl class="origin">{origin}</dl>' if rows else ""
    return f"<section>{_command(swept)}{paragraphs}{origin}</section>"


def _command(swept: Swept) -> str:
    """Return the command that exports the best average, if its profile has options on the command line."""
    best = swept.points[swept.best].result
    options = None if best.profile is None else named(best.profile).options
    if options is None or not swept.source:
        return ""
    at = f" --at {swept.at}" if swept.at else ""
    command = f"polyak reconstruct {swept.source} {options}{at} -o averaged.safetensors"
    return f'<p class="quiet">To export the best average, run:</p><pre><code>{escape(command)}</code></pre>'
