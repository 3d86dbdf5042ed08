"""``sweep``: evaluates averages of a record, as many from one pass over its files as fit into memory."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from polyak.averaging.habits import kind_of
from polyak.errors import ArgumentError, ProfileError
from polyak.profiles import HalfLife, Profile, named
from polyak.record import Record, fit
from polyak.record.moments import ends, moment
from polyak.storage.safetensors import disk_errors
from polyak.sweeping.direction import asked, direction
from polyak.sweeping.evaluation import Batchnorm, Evaluator
from polyak.sweeping.grid import grid, narrowed, newest, resolves
from polyak.sweeping.held import HeldRecord, held, up_to
from polyak.sweeping.outcome import SweepResult
from polyak.sweeping.results import Kept, Result, value_of
from polyak.sweeping.returned import Evaluate
from polyak.sweeping.source import named as named_function
from polyak.time import Time, TimeUnit

# Called before each evaluation with the number done, the largest total, and the name of the next.
Progress = Callable[[int, int, str], None]


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
        progress: Called before each evaluation with the number done, the largest total, and the name of the next.

    Returns:
        The results in the order of evaluation: a list, with ``best``, ``table()`` and ``report(folder)``.

    Raises:
        EvaluationError: If ``evaluate`` fails or returns a wrong type, ``results`` is not a file of results, or nothing
            says whether a higher or a lower value is better.
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
    record = Record(record) if isinstance(record, str | Path) else record
    newest(record)  # checks that it has a segment
    path = None if results is None else Path(results)
    with held(record) as whole, disk_errors(f"keeping results in {path}"), Kept(path) as kept:
        records = {None: whole} if at is None else {moment(end): up_to(whole, end) for end in ends(whole, at)}
        planned = {end: _planned(one, end, profiles, points) for end, one in records.items()}
        given = {name: Path(file) for name, file in (others or {}).items()}
        raw = "raw" not in given and getattr(whole, "raw", None) is not None
        total = sum(len(one) + 1 + (refine if _unit(one) else 0) for one in planned.values()) + len(given) + raw
        run = _Run(Evaluator(evaluate, batchnorm, kept, fresh), metric, function, wanted, total, progress)
        if raw:
            run.add("raw", lambda: run.evaluator.raw(whole))
        for name, file in given.items():
            run.add(name, lambda name=name, file=file: run.evaluator.given(whole, name, file))
        for end, one in records.items():
            run.moment(one, end, planned[end], refine)
    read = whole.source if isinstance(whole, HeldRecord) and whole is not record else record
    return SweepResult(run.found, read, run.name, maximize=run.maximize, batchnorm=batchnorm is not None)


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


def _unit(planned: Sequence[Profile]) -> TimeUnit | None:
    return next((span.unit for one in planned if (span := named(one).half_life) is not None), None)


@dataclass(slots=True)
class _Run:
    """The evaluations of one call of ``sweep``, in their order.

    Args:
        evaluator: Evaluates one set of weights.
        metric: As for ``sweep``.
        function: The name of the evaluation.
        wanted: ``maximize``, as the user says; None for nothing.
        total: The largest number of evaluations.
        progress: As for ``sweep``.
    """

    evaluator: Evaluator
    metric: str | None
    function: str
    wanted: bool | None
    total: int
    progress: Progress | None
    found: list[Result] = field(default_factory=list[Result], init=False)

    @property
    def name(self) -> str:
        """The name of the metric that decides."""
        return next(iter(self.found[0].metrics)) if self.metric is None else self.metric

    @property
    def maximize(self) -> bool:
        """Whether a higher value of it is better."""
        return direction(self.name, self.function, maximize=self.wanted)

    def add(self, name: str, evaluate: Callable[[], Result]) -> None:
        """Evaluate one set of weights.

        Args:
            name: For the progress.
            evaluate: Returns the result.
        """
        if self.progress is not None:
            self.progress(len(self.found), self.total, name)
        self.found.append(evaluate())
        value_of(self.found[-1], self.metric)
        direction(self.name, self.function, maximize=self.wanted)  # an error comes after the first evaluation

    def moment(self, record: Record, at: Time | None, planned: Sequence[Profile], refine: int) -> None:
        """Evaluate the averages of one end moment.

        Args:
            record: The record up to that moment.
            at: The moment; None for the end of the whole record.
            planned: The profiles.
            refine: The largest number of further half-lives.
        """
        suffix = "" if at is None else f" at {at}"
        first = len(self.found)
        means = [mean for mean in [newest(record)] if resolves(record, mean)]  # checkpoints of moments give none
        averages = self.evaluator.averages(record, [*means, *planned])

        def average(name: str, profile: Profile) -> None:
            self.add(f"{name}{suffix}", lambda: self.evaluator.average(averages, name, profile, at))

        for mean in means:
            average("newest mean", mean)
        for profile in planned:
            average(named(profile).describe(), profile)
        unit = _unit(planned)
        for _ in range(refine if unit else 0):
            following = self._next(self.found[first:], unit)
            if following is None:
                break
            average(following.describe(), following)

    def _next(self, found: Sequence[Result], unit: TimeUnit | None) -> HalfLife | None:
        """Return the half-life to evaluate after these results; None once the best is found."""
        values = {
            float(one.half_life): value_of(one, self.metric)
            for one in found
            if one.half_life is not None and one.half_life.unit is unit
        }
        following = narrowed(values, maximize=self.maximize)
        return None if following is None or unit is None else HalfLife(Time(following, unit), unbiased=True)
