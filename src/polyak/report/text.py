"""The outcome of a sweep as plain text, for a terminal."""

from polyak.errors import ProfileError
from polyak.report.columns import table
from polyak.report.words import measured, other_name, percent
from polyak.sweeping import Result, SweepResult, recommended


def sweep_table(results: SweepResult, width: int) -> str:
    """Return a table of the results: other weights first, then the averages of each end moment, shortest first.

    Args:
        results: The results of a sweep.
        width: The width in characters.
    """
    chosen = results.best if results.has_best else None
    metrics = list(results[0].metrics)
    intervals = any(one.interval(results.metric) for one in results)
    headings = ["weights", *metrics, *(["95 % interval"] if intervals else []), "error", "distance"]
    ordered = [one for one in results if one.profile is None]
    for moment in results.moments:
        ordered += sorted((one for one in results.at(moment) if one.profile is not None), key=_place)
    rows: list[list[str]] = []
    for one in ordered:
        name = other_name(one.name) + ("" if one.at is None else f" at {one.at}") + (" (best)" if one is chosen else "")
        cells = [measured(one.metrics[metric]) if metric in one.metrics else "" for metric in metrics]
        cells += [bounds(one, results.metric)] if intervals else []
        cells += ["", ""] if one.profile is None else [percent(one.error), percent(one.distance)]
        rows.append([name, *cells])
    return table(headings, rows, width)


def bounds(result: Result, metric: str) -> str:
    """Return the interval of a metric as text; "" if there is none.

    Args:
        result: A result of a sweep.
        metric: The name of the metric.
    """
    interval = result.interval(metric)
    return "" if interval is None else " to ".join(map(measured, interval))


def as_good(results: SweepResult) -> str:
    """Return a sentence that says which half-lives are as good as the best; "" if that is not known.

    Args:
        results: The results of a sweep.
    """
    examples = len(results.best.examples.get(results.metric, ()))
    if examples < 2 or not (found := results.as_good):
        return ""
    shortest, longest = found[0].half_life, found[-1].half_life
    which = f"{shortest} alone" if len(found) == 1 else f"{shortest} to {longest}"
    return f"As good as the best: {which}, by the paired difference over {examples:,} examples (95 % interval)."


def advice(results: SweepResult) -> str:
    """Return a sentence that says which average to take, by the rule of ``recommend``; "" if nothing can be said.

    Args:
        results: The results of a sweep.
    """
    try:
        found = recommended(results)
    except ProfileError:  # no half-life near a sixteenth of the run was evaluated
        return ""
    return f"Recommended: {found}."


def _place(result: Result) -> tuple[int, float]:
    """Return where a result is in the table: half-lives by their length, after other profiles."""
    return (0, 0.0) if result.half_life is None else (1, float(result.half_life))
