"""The frames of the charts on the page, each with a summary for screen readers, and the table of all results."""

from collections.abc import Callable, Sequence
from html import escape

from polyak.report.over_training import Panel
from polyak.report.swept import Point, Swept
from polyak.report.words import level_label, number, other_name, percent, written
from polyak.sweeping import Result


def panels(sweeps: Sequence[Swept], more: Sequence[Panel]) -> str:
    """Return the frames.

    Args:
        sweeps: The numbers of the sweeps; the first is shown first.
        more: Charts over training.
    """
    swept = sweeps[0]
    shown = [_metric(sweeps), _profile(swept), _error(swept), _distance(swept)]
    if sum(one.folder == swept.folder for one in sweeps) > 1:
        shown.insert(1, _training(sweeps))
    shown += [frame(one.name, one.heading, one.caption, one.summary, "wide") for one in more]
    return "\n".join(shown)


def _metric(sweeps: Sequence[Swept]) -> str:
    swept = sweeps[0]
    best = "highest" if swept.maximize else "lowest"
    caption = f"The ring is the best average, that with the {best} {swept.metric}; the dot is the chosen one: move the "
    caption += "slider, or click a point."
    if any(not point.on_line for point in swept.points):
        caption += " Hollow: other profiles, at the median age of what they average."
    if any(swept.differs_by(point) for point in swept.points):
        caption += " Bars: 95 % intervals of the difference from the best average, over the same examples."
    if len(sweeps) > 1:
        caption += " Thin lines: the other moments or records."
    values = "; ".join(f"{point.result.name} {written(swept, swept.value(point))}" for point in swept.points)
    values += "".join(f"; {level_label(level, swept)}" for level in swept.levels)
    summary = f"{swept.metric} against half-life in {swept.unit}: {values}"
    return frame("metric", f"{swept.metric} against half-life", caption, summary, "wide")


def _training(sweeps: Sequence[Swept]) -> str:
    of_record = [one for one in sweeps if one.folder == sweeps[0].folder]
    values = "; ".join(
        f"at {one.at or 'the end'} {point.result.name} {written(one, one.value(point))}"
        for one in of_record
        for point in [one.points[one.best]]
    )
    metric = sweeps[0].metric
    caption = "The best average at each moment, and the weights nearly as they were, without averaging."
    return frame("training", f"{metric} over training", caption, f"{metric} over training: {values}", "wide low")


def _profile(swept: Swept) -> str:
    return frame(
        "profile",
        "How much each moment of training counts in the chosen average",
        "Steps: the segments of the record; the newer half of the average is dark. Dashed: what was asked for.",
        f"The weight of each moment of training in the chosen average, from {number(swept.edges[0])} to "
        f"{number(swept.edges[-1])} {swept.unit}; half of the average is of weights after the dotted line",
        "wide low",
    )


def _error(swept: Swept) -> str:
    return frame(
        "error",
        "How exact the average is",
        "Estimated error, in % of the distance between the last weights and the average. It is no bound: the band "
        "reaches to twice the estimate.",
        _spoken("Estimated error", swept.points, lambda point: point.result.error),
    )


def _distance(swept: Swept) -> str:
    return frame(
        "distance",
        "How far the average is from the last weights",
        "Distance from the newest mean of the record, in % of the norm of that mean.",
        _spoken("Distance from the newest mean", swept.points, lambda point: point.result.distance),
    )


def _spoken(heading: str, points: Sequence[Point], value_of: Callable[[Point], float | None]) -> str:
    return f"{heading}: " + "; ".join(f"{point.result.name} {percent(value_of(point))}" for point in points)


def frame(name: str, heading: str, caption: str, summary: str, kind: str = "") -> str:
    """Return a frame for a chart, with a summary in words for screen readers.

    Args:
        name: The key of the chart.
        heading: The heading of the frame.
        caption: Below the heading.
        summary: The summary for screen readers.
        kind: Classes of the frame.
    """
    return (
        f'<figure class="{kind}"><h2 id="{name}-heading">{escape(heading)}</h2>'
        f"<figcaption>{escape(caption)}</figcaption>"
        f'<div class="chart" id="{name}-chart" role="img" aria-label="{escape(summary)}"></div></figure>'
    )


def table(sweeps: Sequence[Swept]) -> str:
    """Return the table of all results.

    Args:
        sweeps: The numbers of the sweeps.
    """
    first = sweeps[0]
    intervals = any(one.margins(point) for one in sweeps for point in one.points)
    names = [*first.metrics, *([_interval_of(first)] if intervals else []), "error", "distance"]
    heads = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
    rows, folders = list[str](), set[str]()
    for one in sweeps:
        if len(sweeps) > 1:
            rows.append(f'<tr class=part><th scope="rowgroup" colspan={len(names) + 1}>{escape(one.label)}</th></tr>')
        # Other weights are those of the end of the run, whatever the moment of the averages.
        others = () if one.folder in folders else one.others
        folders.add(one.folder)
        rows += [_row(one, result, first.metrics, intervals=intervals) for result in others]
        rows += [_row(one, point.result, first.metrics, intervals=intervals) for point in one.points]
    return (
        '<section><div class="scroll" tabindex="0" role="region" aria-label="All results"><table>'
        f"<caption>All results</caption><thead><tr><th scope=col>weights</th>{heads}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div></section>"
    )


def _interval_of(swept: Swept) -> str:
    return f"95 % interval of {swept.metric}" if len(swept.metrics) > 1 else "95 % interval"


def _row(swept: Swept, result: Result, metrics: Sequence[str], *, intervals: bool) -> str:
    chosen = result is swept.points[swept.best].result
    cells = [written(swept.of(name), result.metrics[name]) if name in result.metrics else "" for name in metrics]
    if intervals:
        interval = result.interval(swept.metric)
        cells.append("" if interval is None else " to ".join(written(swept, bound) for bound in interval))
    cells += [percent(result.error), percent(result.distance)] if result.profile is not None else ["", ""]
    name = result.name if result.profile is not None else other_name(result.name)
    badge = ' <span class="badge">best</span>' if chosen else ""
    listed = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
    return f'<tr{" class=chosen" if chosen else ""}><th scope="row">{escape(name)}{badge}</th>{listed}</tr>'
