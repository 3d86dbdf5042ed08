"""``sweep_checkpoints``: evaluates the means of the newest checkpoints on disk, by their number and distance."""

import hashlib
import json
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from polyak.checkpoints import Checkpoint, Plan, choose, open_checkpoint
from polyak.checkpoints.newest import Newest, choices
from polyak.checkpoints.running import RunningMean
from polyak.errors import PlanWarning
from polyak.storage.safetensors import disk_errors
from polyak.sweeping.checkpoint_outcome import CheckpointSweep, Tried
from polyak.sweeping.direction import asked, direction
from polyak.sweeping.results import EvaluationError, Kept, Result, value_of
from polyak.sweeping.returned import Evaluate, measured
from polyak.sweeping.source import named, source_hash
from polyak.sweeping.sweep import Progress


def sweep_checkpoints(
    checkpoints: Sequence[str | Path | Checkpoint],
    evaluate: Evaluate,
    *,
    counts: Sequence[int] | None = None,
    spacings: Sequence[int] = (1, 2, 4),
    metric: str | None = None,
    maximize: bool | None = None,
    minimize: bool | None = None,
    key: str | None = None,
    prefix: str | None = None,
    common: bool = False,
    mixed: bool = False,
    results: str | Path | None = None,
    fresh: bool = False,
    progress: Progress | None = None,
) -> CheckpointSweep:
    """Evaluate means of the newest checkpoints of a run: how many of them, and at which distance, is best?

    Each checkpoint is read once for each distance, at most. The sum of the weights is in memory, in float64, and the
    mean that is evaluated. Evaluate on validation data: what is chosen on the test set makes the test result biased.

    Args:
        checkpoints: As for `polyak.checkpoints.average_checkpoints`, in any order, or open ones.
        evaluate: Takes a dict of tensors by name, as for ``load_state_dict``; returns a number, or numbers by name.
        counts: How many checkpoints; None for 1, 2, 3, 5, 10, 20, 30, 50 and so on, and all.
        spacings: Their distances: 1 for all, 2 for every second one, counted back from the newest. What needs more
            checkpoints than there are is left out.
        metric: The metric to compare; None for the first.
        maximize: Whether a higher value is better; None leaves it to the name of the metric, as ``sweep`` does.
        minimize: The reverse; give one of the two.
        key: Where the weights are in a checkpoint; None to find out.
        prefix: How the names of the tensors to take begin.
        common: Whether to average the tensors that all checkpoints have, where the names differ.
        mixed: Whether checkpoints of one folder may be of several runs.
        results: A JSON Lines file that keeps the results. Those in it are reused if the checkpoints, and the name and
            the source of ``evaluate`` are the same.
        fresh: Whether to evaluate everything again, whatever ``results`` has.
        progress: Called before each evaluation with the number done, the total, and the name of the next.

    Raises:
        ArgumentError: If an argument is wrong.
        CheckpointError: If a checkpoint cannot be read, or they are not of one run.
        EvaluationError: If ``evaluate`` fails or returns a wrong type, or ``results`` is not a file of results.

    Example:
        >>> import torch
        >>> for step in range(1, 7):
        ...     torch.save({"w": torch.tensor([float((-1) ** step * (8 - step))])}, f"step-{step}.pt")
        >>> paths = [f"step-{step}.pt" for step in range(1, 7)]
        >>> found = sweep_checkpoints(paths, lambda state: float(state["w"].abs()), spacings=[1, 2])
        >>> print(found)
        checkpoints    since  value
        newest         6ba    2
        last 2 (best)  5ba    0.5
        last 3         4ba    1
        last 5         2ba    0.8
        last 6         1ba    0.5
        2, every 2nd   4ba    3
        3, every 2nd   2ba    4
    """
    wanted = asked(maximize=maximize, minimize=minimize)
    function = named(evaluate).__qualname__.rpartition(".")[2]
    if metric is not None:
        direction(metric, function, maximize=wanted)  # before anything is evaluated
    opened = [one if isinstance(one, Checkpoint) else open_checkpoint(Path(one), key, prefix) for one in checkpoints]
    whole = choose(opened, common=common, mixed=mixed)
    which = choices(len(whole.checkpoints), counts, spacings)
    path = None if results is None else Path(results)
    with disk_errors(f"keeping results in {path}"), Kept(path) as kept:
        run = _Run(whole, evaluate, kept, fresh, len(which), progress)
        for every in dict.fromkeys(one.every for one in which):
            for one in run.evaluated([one for one in which if one.every == every]):
                name = next(iter(one.metrics)) if metric is None else metric
                value_of(one, metric)
                direction(name, function, maximize=wanted)  # an error comes after the first evaluation
    tried = tuple(Tried(one, _plan(whole, one), run.found[one]) for one in which)
    name = next(iter(tried[0].result.metrics)) if metric is None else metric
    return CheckpointSweep(tried, name, direction(name, function, maximize=wanted))


def _plan(whole: Plan, which: Newest) -> Plan:
    inside = which.of(whole.checkpoints)
    return Plan(inside, [1.0] * len(inside), whole.names, whole.left_out)


@dataclass(slots=True)
class _Run:
    """The evaluations of one call.

    Args:
        whole: All checkpoints.
        evaluate: As for `sweep_checkpoints`.
        kept: The results so far.
        fresh: As for `sweep_checkpoints`.
        total: How many evaluations there are.
        progress: As for `sweep_checkpoints`.
    """

    whole: Plan
    evaluate: Evaluate
    kept: Kept
    fresh: bool
    total: int
    progress: Progress | None
    found: dict[Newest, Result] = field(default_factory=dict[Newest, Result], init=False)
    _code: str | None = field(init=False)
    _warned: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self._code = source_hash(self.evaluate)

    def evaluated(self, which: Sequence[Newest]) -> Iterator[Result]:
        """Yield the results of means with one distance, each over more checkpoints."""
        self.found |= {one: result for one in which if (result := self._already(one)) is not None}
        left = [one for one in which if one not in self.found]
        yield from (self.found[one] for one in which if one in self.found)
        if not left:
            return
        mean, added = RunningMean(self.whole), 0
        for one in left:
            inside = one.of(self.whole.checkpoints)[::-1]
            for checkpoint in inside[added:]:
                mean.add(checkpoint)
            added = one.count
            self.found[one] = self._measured(one, mean)
            yield self.found[one]

    def _measured(self, which: Newest, mean: RunningMean) -> Result:
        name = which.describe()
        if self.progress is not None:
            self.progress(len(self.found), self.total, name)
        state, began = mean.mean(), time.perf_counter()
        try:
            returned = self.evaluate(state)
        except Exception as error:  # the function can raise anything
            last = traceback.format_exception_only(error)[-1].strip()
            raise EvaluationError(f"evaluating {name} failed: {last}; correct it (earlier results are kept)") from error
        metrics, examples = measured(returned, name)
        result = Result(name, None, metrics, seconds=time.perf_counter() - began, examples=examples)
        self.kept.add(self._key(which), result, self._code, self.whole.newest.path.parent)
        return result

    def _key(self, which: Newest) -> dict[str, Any]:
        inside = which.of(self.whole.checkpoints)
        said = [[str(one.path.absolute()), one.place, one.files.states] for one in inside]
        function = named(self.evaluate)
        return {
            "checkpoints": hashlib.sha256(json.dumps([said, self.whole.names]).encode()).hexdigest(),
            "count": which.count,
            "every": which.every,
            "evaluate": f"{function.__module__}:{function.__qualname__}",
        }

    def _already(self, which: Newest) -> Result | None:
        found = None if self.fresh else self.kept.find(self._key(which), None)
        if found is None or found[1] == self._code:
            return None if found is None else found[0]
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"the source of {named(self.evaluate).__qualname__} has changed since the results in "
                f"{self.kept.path}; the means are evaluated again",
                PlanWarning,
                stacklevel=5,
            )
        return None
