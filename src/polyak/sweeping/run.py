"""``Run``: the evaluations of one sweep, in their order, on one rank or between several."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from polyak.errors import ShardingError
from polyak.profiles import HalfLife, Profile, named
from polyak.record import Record
from polyak.sweeping.averages import Averages
from polyak.sweeping.candidates import Candidate, as_text, average
from polyak.sweeping.direction import direction
from polyak.sweeping.evaluation import Evaluator
from polyak.sweeping.grid import narrowed, newest, resolves
from polyak.sweeping.results import Result, require_equal, value_of
from polyak.sweeping.together import messages
from polyak.sweeping.workers import Workers, portable
from polyak.time import Time, TimeUnit

# Called before each evaluation with the number done, the largest total, and the name of the next.
Progress = Callable[[int, int, str], None]


@dataclass(slots=True)
class Run:
    """The evaluations of one call of ``sweep``, in their order.

    Args:
        evaluator: Evaluates one set of weights.
        workers: The ranks that evaluate.
        metric: As for ``sweep``.
        function: The name of the evaluation.
        wanted: ``maximize``, as the user says; None for nothing.
        total: The largest number of evaluations.
        progress: As for ``sweep``.

    Attributes:
        found: The results so far.
    """

    evaluator: Evaluator
    workers: Workers
    metric: str | None
    function: str
    wanted: bool | None
    total: int
    progress: Progress | None
    found: list[Result] = field(default_factory=list[Result], init=False)
    _pending: list[Candidate] = field(default_factory=list[Candidate], init=False)
    _done: dict[str, Result] = field(default_factory=dict[str, Result], init=False)

    @property
    def name(self) -> str:
        """The name of the metric that decides."""
        return next(iter(self.found[0].metrics)) if self.metric is None else self.metric

    @property
    def maximize(self) -> bool:
        """Whether a higher value of it is better."""
        return direction(self.name, self.function, maximize=self.wanted)

    def add(self, candidate: Candidate) -> None:
        """Evaluate weights, with the next averages.

        Args:
            candidate: The weights.
        """
        self._pending.append(candidate)

    def moment(self, record: Record, at: Time | None, planned: Sequence[Profile], refine: int) -> None:
        """Evaluate the averages of one end moment.

        Args:
            record: The record up to that moment.
            at: The moment; None for the end of the whole record.
            planned: The profiles.
            refine: The largest number of further half-lives.
        """
        first = len(self.found) + len(self._pending)
        means = [mean for mean in [newest(record)] if resolves(record, mean)]  # checkpoints of moments give none
        averages = Averages(record, self.workers.ranks.world_size)
        batchnorm = self.evaluator.batchnorm
        for mean in means:
            self.add(average(averages, "newest mean", mean, at, batchnorm))
        for profile in planned:
            self.add(average(averages, named(profile).describe(), profile, at, batchnorm))
        self._evaluate()
        unit = unit_of(planned)
        for _ in range(refine if unit else 0):
            following = self._next(self.found[first:], unit)
            if following is None:
                break
            self.add(average(averages, following.describe(), following, at, batchnorm))
            self._evaluate()

    def _evaluate(self) -> None:
        """Evaluate what is pending: each rank its own part, in rounds. Take the results in order."""
        pending, self._pending = self._pending, list[Candidate]()
        new = dict[str, Candidate]()  # by key, since of equal ones only one is evaluated
        for one in pending:
            key = self._key(one)
            if key not in self._done and self.evaluator.known(one) is None:
                new.setdefault(key, one)
        if self.workers.is_first:
            self.evaluator.warn_of_other_source(new.values())
        rounds = self._rounds(list(new.values()))
        for one in pending:
            if self.progress is not None and self.workers.is_first:
                self.progress(len(self.found), self.total, one.name if one.at is None else f"{one.name} at {one.at}")
            while (result := self._result(one)) is None:
                self._round(next(rounds))
            self.found.append(self.evaluator.checked(replace(result, name=one.name, profile=one.profile, at=one.at)))
            value_of(self.found[-1], self.metric)
            direction(self.name, self.function, maximize=self.wanted)  # an error comes after the first evaluation

    def _rounds(self, new: Sequence[Candidate]) -> Iterator[Sequence[Candidate]]:
        """Return in turn what the ranks evaluate at the same time; note the averages that this one will need."""
        lanes = self.workers.lanes
        own = new[self.workers.lane :: lanes]
        for averages in {id(one.averages): one.averages for one in own if one.averages is not None}.values():
            averages.plan([one.profile for one in own if one.averages is averages and one.profile is not None])
        return (new[start : start + lanes] for start in range(0, len(new), lanes))

    def _round(self, candidates: Sequence[Candidate]) -> None:
        """Evaluate one set of weights on each rank; keep the results of all."""
        workers, own, before = self.workers, None, 0
        result, error = None, None
        if workers.lane < len(candidates):
            own = candidates[workers.lane]
            before = messages() if workers.lanes > 1 else 0
            try:
                result = self.evaluator.measure(own)
            except Exception as problem:
                error = problem
        mixed = own is not None and workers.lanes > 1 and messages() != before
        sent = (None if result is None else replace(result, profile=None), mixed)  # a profile may not be one to pickle
        alone = workers.ranks.world_size == 1
        failed = None if error is None or alone else portable(error, workers.ranks.rank)
        found = workers.exchange((*sent, failed))
        if any(one[1] for one in found):
            workers.raise_first([_communicated(candidates[0])])
        self._keep(candidates, [one[0] for one in found])
        errors = [one[2] for one in found]
        errors[workers.ranks.rank] = error
        workers.raise_first(errors)

    def _keep(self, candidates: Sequence[Candidate], results: Sequence[Result | None]) -> None:
        if self.workers.together:
            if None in results:
                return  # an error follows
            require_equal([one for one in results if one is not None])
        for candidate, result in zip(candidates, results, strict=False):
            if result is not None:
                self.evaluator.keep(candidate, result)
                self._done[self._key(candidate)] = result

    def _result(self, candidate: Candidate) -> Result | None:
        done = self._done.get(self._key(candidate))
        return self.evaluator.known(candidate) if done is None else done

    def _key(self, candidate: Candidate) -> str:
        key = as_text(self.evaluator.key(candidate))
        return f"{key} {id(candidate)}" if self.evaluator.fresh else key  # also what is given twice

    def _next(self, found: Sequence[Result], unit: TimeUnit | None) -> HalfLife | None:
        """Return the half-life to evaluate after these results; None once the best is found."""
        values = {
            float(one.half_life): value_of(one, self.metric)
            for one in found
            if one.half_life is not None and one.half_life.unit is unit
        }
        following = narrowed(values, maximize=self.maximize)
        return None if following is None or unit is None else HalfLife(Time(following, unit), unbiased=True)


def unit_of(planned: Sequence[Profile]) -> TimeUnit | None:
    """Return the unit of the first half-life; None if there is none.

    Args:
        planned: Profiles.
    """
    return next((span.unit for one in planned if (span := named(one).half_life) is not None), None)


def _communicated(candidate: Candidate) -> ShardingError:
    return ShardingError(
        f"ranks that evaluate different averages must not communicate (the function sent messages while it evaluated "
        f"{candidate.name}): give parallel='together', or --together in the command, and all ranks evaluate each "
        "average"
    )
