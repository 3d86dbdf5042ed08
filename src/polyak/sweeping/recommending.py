"""``recommend``: a half-life of a sixteenth of the run, unless an evaluation shows that another average is better."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from polyak.errors import ProfileError
from polyak.profiles import HalfLife, named
from polyak.record import Record, fit
from polyak.record.recommendation import Comparison, Recommendation, sixteenth, unit_of
from polyak.sweeping.examples import interval
from polyak.sweeping.grid import finest_half_life, grid, newest
from polyak.sweeping.held import as_on_first
from polyak.sweeping.outcome import SweepResult
from polyak.sweeping.results import Result, value_of
from polyak.sweeping.returned import Evaluate
from polyak.sweeping.run import Progress
from polyak.sweeping.sweep import sweep
from polyak.sweeping.workers import Parallel, working

# Fewer values than these say little of their own spread.
_FEWEST = 8
# The evaluated half-life nearest to the default is compared in its place if it is this close, as a factor.
_NEAR = 1.5


def recommend(
    record: Record | str | Path,
    evaluate: Evaluate | None = None,
    *,
    metric: str | None = None,
    maximize: bool | None = None,
    minimize: bool | None = None,
    points: int = 9,
    refine: int = 3,
    batchnorm: tuple[nn.Module, Iterable[Any]] | None = None,
    results: str | Path | None = None,
    fresh: bool = False,
    progress: Progress | None = None,
    parallel: Parallel = False,
) -> Recommendation:
    """Recommend an average of a record.

    Without a function this is a half-life of a sixteenth of the run, unbiased, as ``EMA("auto")`` keeps it; or the
    shortest that the record resolves, if that is longer. With one, the best average of a sweep is recommended if it is
    better by more than the noise of the evaluation, and otherwise a sixteenth: the best of many values on a small
    validation set is partly luck. The noise is known if the function returns the losses of single examples, or the
    metric on eight or more parts of the validation data. What is compared is the difference on the same examples, by
    its 95 % interval, which allows for the choice among all averages.

    Args:
        record: The record or its folder.
        evaluate: As for ``sweep``; None for no evaluation.
        metric: As for ``sweep``.
        maximize: As for ``sweep``.
        minimize: As for ``sweep``.
        points: As for ``sweep``.
        refine: As for ``sweep``.
        batchnorm: As for ``sweep``.
        results: As for ``sweep``.
        fresh: As for ``sweep``.
        progress: As for ``sweep``.
        parallel: As for ``sweep``.

    Raises:
        ProfileError: If the record resolves no half-life.
        EvaluationError: As ``sweep``.
        RecordError: If a file is missing, truncated or corrupt.

    Example:
        >>> import torch
        >>> from polyak.record import Edge, TensorInfo, Writer
        >>> from polyak.time import Timestamp
        >>> edges = [Edge(n, Timestamp().to_next_batch(steps=n)) for n in range(65)]
        >>> with Writer("run-to-average", {"weight": TensorInfo(torch.float32, (1,), averaged=True)}) as writer:
        ...     for start, end in zip(edges, edges[1:]):
        ...         segment = writer.append({"weight": torch.tensor([float((-1) ** end.updates)])}, start, end)
        >>> print(recommend("run-to-average"))
        half-life 4ba: a sixteenth of the run, the default without an evaluation
        >>> result = recommend("run-to-average", lambda state: [float(state["weight"].abs())] * 10, refine=0)
        >>> result.half_life, round(result.comparison.gain, 3)
        (Time(64, 'ba'), 0.041)
    """
    record = Record(record) if isinstance(record, str | Path) else record
    newest(record)  # checks that it has a segment
    if evaluate is None:
        default, reason = default_of(record)
        return Recommendation(record, default, reason, record.error(default))
    with working(parallel, evaluate) as workers:
        record = as_on_first(record, workers)
        default, _ = default_of(record)
        swept = sweep(
            record,
            evaluate,
            [default, *(one for one in grid(record, points, unit_of(record)) if one != default)],
            refine=refine,
            metric=metric,
            maximize=maximize,
            minimize=minimize,
            batchnorm=batchnorm,
            results=results,
            fresh=fresh,
            progress=progress,
            parallel=parallel,
        )
        return recommended(swept)


def recommended(results: SweepResult) -> Recommendation:
    """Recommend an average from the results of a sweep, by the rule of ``recommend``.

    The default is the half-life nearest to a sixteenth of the run that was evaluated.

    Args:
        results: The results of a sweep with half-lives. If it has several end moments, that of the best average counts.

    Raises:
        EvaluationError: If the metric is NaN for every average.
        ProfileError: If no half-life near a sixteenth of the run was evaluated.
    """
    best = results.best
    here, record = results.at(best.at), results.record_at(best.at)
    base = _nearest(here, record)
    compared = _compared(here, base, best)
    chosen, reason = _chosen(record, base, best, compared)
    assert chosen.profile is not None
    # The error is known from the sweep, and so the same on all ranks.
    error = record.error(chosen.profile) if chosen.error is None else chosen.error
    return Recommendation(record, chosen.profile, reason, error, compared)


def default_of(record: Record) -> tuple[HalfLife, str]:
    """Return the half-life that needs no evaluation, and the reason for it.

    Args:
        record: A record with a segment.

    Raises:
        ProfileError: If the record resolves no half-life.
    """
    wanted = sixteenth(record)
    try:
        fit(wanted, record.segments, max_duration=record.max_duration)
    except ProfileError:
        return finest_half_life(record, unit_of(record)), (
            f"the shortest that the record resolves; a sixteenth of the run, {_short(wanted)}, is shorter"
        )
    return wanted, "a sixteenth of the run, the default without an evaluation"


def _nearest(results: SweepResult, record: Record) -> Result:
    """Return the result that is nearest to the default."""
    wanted, _ = default_of(record)
    unit = wanted.span.unit
    found = [one for one in results if one.half_life is not None and one.half_life.unit is unit and one.half_life > 0]
    far = [abs(math.log(float(one.half_life or 1) / float(wanted.span))) for one in found]
    if not far or min(far) > math.log(_NEAR):
        raise ProfileError(
            f"a sweep must have a half-life near {_short(wanted)} to recommend one (got {len(found)} half-lives in "
            f"{unit}); evaluate it too"
        )
    return found[far.index(min(far))]


def _compared(results: SweepResult, base: Result, best: Result) -> Comparison:
    metric, maximize = results.metric, results.maximize
    of_base, of_best = (one.examples.get(metric, ()) for one in (base, best))
    averages = sum(one.profile is not None for one in results)
    bounds = None
    if base is not best and len(of_base) == len(of_best) >= _FEWEST:
        sign = 1 if maximize else -1
        bounds = interval([sign * (b - a) for a, b in zip(of_base, of_best, strict=True)], comparisons=averages - 1)
    values = value_of(base, metric), value_of(best, metric)
    raw = next((value_of(one, metric) for one in results if one.profile is None and one.name == "raw"), None)
    assert base.profile is not None
    assert best.profile is not None
    return Comparison(
        metric=metric,
        maximize=maximize,
        default=base.profile,
        default_value=values[0],
        best=best.profile,
        best_value=values[1],
        gain=values[1] - values[0] if maximize else values[0] - values[1],
        interval=bounds,
        examples=max(1, len(of_base)),
        averages=averages,
        raw=raw,
    )


def _chosen(record: Record, base: Result, best: Result, compared: Comparison) -> tuple[Result, str]:
    """Return what is recommended, and why."""
    metric, averages = compared.metric, compared.averages
    which = _place(record, base)
    if base is best:
        return base, f"{which}, and the best {metric} of {averages} averages"
    better = f"its {metric} is {'higher' if compared.maximize else 'lower'} than that of {which}, {_name(base)}"
    if math.isnan(compared.default_value):
        return best, f"the best {metric} of {averages} averages; {which} gives no number"
    if compared.interval is None:
        missing = "one number" if compared.examples < 2 else f"{compared.examples} values"
        return base, (
            f"{which}; {_name(best)} has a better {metric}, by {compared.gain:.3g}, and whether that is noise is not "
            f"known, since the evaluation returns {missing}: return the losses of single examples, or the {metric} on "
            f"{_FEWEST} or more parts of the data"
        )
    low, high = compared.interval
    within = f"95 % interval {low:.3g} to {high:.3g}, over {compared.examples:,} examples and for {averages} averages"
    if low > 0:
        return best, f"{better}, by {compared.gain:.3g} ({within})"
    return base, (
        f"{which}; {_name(best)} has a better {metric}, by {compared.gain:.3g}, within the noise of the evaluation "
        f"({within})"
    )


def _place(record: Record, base: Result) -> str:
    """Return what the compared half-life is, in words."""
    default, _ = default_of(record)
    if base.profile == default:
        return "a sixteenth of the run" if default == sixteenth(record) else "the shortest that the record resolves"
    return "of the evaluated half-lives the nearest to a sixteenth of the run"


def _name(result: Result) -> str:
    return result.name if result.profile is None else named(result.profile).describe()


def _short(profile: HalfLife) -> str:
    return f"{float(profile.span):.4g}{profile.span.unit}"
