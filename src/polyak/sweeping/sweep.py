"""``sweep``: evaluates averages of a record, as many from one pass over its files as fit into memory."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from polyak.averaging.habits import kind_of
from polyak.errors import ArgumentError, ProfileError
from polyak.profiles import Profile
from polyak.record import Record, fit
from polyak.record.moments import ends, moment
from polyak.storage.safetensors import disk_errors
from polyak.sweeping.candidates import Batchnorm, Candidate, given, raw
from polyak.sweeping.direction import asked, direction
from polyak.sweeping.evaluation import Evaluator
from polyak.sweeping.grid import grid, newest
from polyak.sweeping.held import HeldRecord, held_by_all, up_to
from polyak.sweeping.outcome import SweepResult
from polyak.sweeping.results import Kept
from polyak.sweeping.returned import Evaluate
from polyak.sweeping.run import Progress, Run, unit_of
from polyak.sweeping.source import named as named_function
from polyak.sweeping.workers import Parallel, Workers, working
from polyak.time import Time

# In the default repr of an object, and another one on each rank.
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def sweep(
    record: Record | str | Path,
    evaluate: Evaluate,
    profiles: Sequence[Profile] | None = None,
    *,
    points: int = 9,
    refine: int = 3,
    metric: str | None = None,
    maximize: bool | None = None,
    minimize: bool | None = None,
    at: str | Time | Sequence[str | Time] | None = None,
    others: Mapping[str, str | Path] | None = None,
    batchnorm: Batchnorm | None = None,
    results: str | Path | None = None,
    fresh: bool = False,
    progress: Progress | None = None,
    parallel: Parallel = False,
) -> SweepResult:
    """Evaluate averages of a record under many profiles, then search for the best half-life.

    The first evaluations are for comparison: the raw weights at the end of the run, if the record keeps them, those of
    ``others``, and the newest mean of the record. Evaluate on validation data: if the half-life is chosen on the test
    set, the test result is biased. A run may still be writing the record: the sweep reads it as it is at the start,
    each file once for as many averages as fit into 4 GB, as ``Record.averages`` does.

    Args:
        record: The record or its folder.
        evaluate: Takes a dict of tensors by name, as for ``load_state_dict``; returns a number, or numbers by name. In
            place of a number, it may return the losses of single examples, a list or a tensor of one dimension: their
            mean counts, and the result says which half-lives are as good as the best.
        profiles: The profiles to evaluate; None for half-lives from the shortest that the record resolves to the length
            of the record.
        points: The number of these half-lives, at least 2.
        refine: The largest number of further half-lives, between the neighbours of the best.
        metric: The metric to compare; None for the first.
        maximize: Whether a higher value is better. None leaves it to the name of the metric: a loss, an error or a
            perplexity is minimized, and so is a number without a name.
        minimize: The reverse; give one of the two.
        at: The end moments of the averages: shares of the record such as ``["50%", "100%"]``, or times; None for the
            end of the record.
        others: Files of other weights by name, such as a model of another run; they are evaluated unchanged. One that
            is named ``raw`` takes the place of the raw weights of the record.
        batchnorm: A model and batches for it, to recompute the statistics of BatchNorm layers for each average.
        results: A JSON Lines file that keeps the results. Results in it are reused if the name and the source of
            ``evaluate`` and the newest file of the record are the same.
        fresh: Whether to evaluate everything again, whatever ``results`` has.
        progress: Called before each evaluation with the number done, the largest total, and the name of the next; of
            several ranks on rank 0 alone.
        parallel: Whether the ranks of ``torchrun`` evaluate between them, each other averages. All of them must call
            this with the same arguments. Where ``evaluate`` is seen to have a sharded model, and with ``"together"``,
            all ranks evaluate each average. Otherwise this process evaluates all.

    Returns:
        The results in the order of evaluation: a list, with ``best``, ``table()`` and ``report(folder)``. All ranks
        return the same, which is what one process returns, bit for bit.

    Raises:
        EvaluationError: If ``evaluate`` fails or returns a wrong type, ``results`` is not a file of results, or nothing
            says whether a higher or a lower value is better.
        ArgumentError: If `parallel` is something else.
        ShardingError: If ranks evaluate different averages and communicate, or were called with other arguments.
        ProfileError: If the record does not resolve a profile, or resolves no half-life.
        RecordError: If a file is missing, truncated or corrupt.
        TimeError: If no segment of the record ends at one of the moments.

    Example:
        >>> import torch
        >>> from polyak.record import Edge, TensorInfo, Writer
        >>> from polyak.time import Timestamp
        >>> edges = [Edge(n, Timestamp().to_next_batch(steps=n)) for n in range(65)]
        >>> with Writer("run", {"weight": TensorInfo(torch.float32, (1,), averaged=True)}) as writer:
        ...     for start, end in zip(edges, edges[1:]):
        ...         segment = writer.append({"weight": torch.tensor([float((-1) ** end.updates)])}, start, end)
        >>> results = sweep("run", lambda state: float(state["weight"].abs()), points=4, refine=1)
        >>> results.best.name
        'half-life 64ba'
        >>> print(results.table())
        weights                    value     error  distance
        ----------------------------------------------------
        newest mean                    1       0 %       0 %
        half-life 1ba             0.3099    0.29 %      69 %
        half-life 4ba            0.04128    0.21 %      96 %
        half-life 16ba          0.003436   0.026 %     100 %
        half-life 37.7ba       0.0008764  0.0072 %     100 %
        half-life 64ba (best)  0.0004264  0.0036 %     100 %
    """
    wanted = asked(maximize=maximize, minimize=minimize)
    function = named_function(evaluate).__qualname__.rpartition(".")[2]
    if metric is not None:
        direction(metric, function, maximize=wanted)  # before anything is evaluated
    if refine < 0:
        raise ProfileError(f"refine must be at least 0 (got {refine}); 0 evaluates the grid alone")
    if not isinstance(record, Record | str | Path):
        raise ArgumentError(
            f"a sweep takes a record, or the folder of one, then a function of the weights (got {kind_of(record)}); "
            "record the run by a Recorder first"
        )
    path = None if results is None else Path(results)
    with working(parallel, evaluate) as workers:
        record = Record(record) if isinstance(record, str | Path) else record
        newest(record)  # checks that it has a segment
        with held_by_all(record, workers) as whole, disk_errors(f"keeping results in {path}"):
            plan = _Plan.of(whole, at, profiles, points, refine, others)
            with Kept(path if workers.is_first else None) as kept:
                evaluator = Evaluator(evaluate, batchnorm, kept, fresh)
                _agree(workers, evaluator, plan, (metric, wanted, refine, batchnorm is None, fresh))
                run = Run(evaluator, workers, metric, function, wanted, plan.total, progress)
                for candidate in plan.others:
                    run.add(candidate)
                for end, profiles_there in plan.profiles.items():
                    run.moment(plan.records[end], end, profiles_there, refine)
    read = whole.source if isinstance(whole, HeldRecord) and whole is not record else record
    return SweepResult(run.found, read, run.name, maximize=run.maximize, batchnorm=batchnorm is not None)


@dataclass(frozen=True, slots=True)
class _Plan:
    """What a sweep evaluates.

    Args:
        others: The weights for comparison.
        records: The record up to each end moment.
        profiles: Those to evaluate there.
        total: The largest number of evaluations.
    """

    others: Sequence[Candidate]
    records: Mapping[Time | None, Record]
    profiles: Mapping[Time | None, Sequence[Profile]]
    total: int

    @classmethod
    def of(  # noqa: PLR0917  as ``sweep`` has them
        cls,
        whole: Record,
        at: str | Time | Sequence[str | Time] | None,
        profiles: Sequence[Profile] | None,
        points: int,
        refine: int,
        others: Mapping[str, str | Path] | None,
    ) -> "_Plan":
        records: dict[Time | None, Record] = (
            {None: whole} if at is None else {moment(end): up_to(whole, end) for end in ends(whole, at)}
        )
        planned = {end: _planned(one, end, profiles, points) for end, one in records.items()}
        compared = [given(whole, name, Path(file)) for name, file in (others or {}).items()]
        if getattr(whole, "raw", None) is not None and all(one.name != "raw" for one in compared):
            compared.insert(0, raw(whole))
        total = sum(len(one) + 1 + (refine if unit_of(one) else 0) for one in planned.values())
        return cls(compared, records, planned, total + len(compared))


def _planned(record: Record, at: Time | None, profiles: Sequence[Profile] | None, points: int) -> list[Profile]:
    """Return the profiles to evaluate at the end of a record; check that it resolves them."""
    try:
        planned = list[Profile](grid(record, points)) if profiles is None else list(profiles)
        for profile in planned:
            fit(profile, record.segments, max_duration=record.max_duration)
    except ProfileError as error:
        if at is None:
            raise
        raise ProfileError(f"the record must resolve half-lives at {at}: {error}") from error
    return planned


def _agree(workers: Workers, evaluator: Evaluator, plan: _Plan, options: tuple[object, ...]) -> None:
    """Check that all ranks evaluate the same, and give all of them the results so far."""
    facts = {
        "function": named_function(evaluator.evaluate).__qualname__,
        "source": evaluator.code,
        "other weights": [one.source for one in plan.others],
        "averages": {str(end): [_ADDRESS.sub("", repr(one)) for one in there] for end, there in plan.profiles.items()},
        "options": options,
    }
    workers.agree(facts)
    evaluator.kept.lines = workers.from_first(evaluator.kept.lines)
