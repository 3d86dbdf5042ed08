"""Evaluates weights by a custom function, and keeps the results."""

import time
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from polyak.errors import PlanWarning
from polyak.sweeping.candidates import Batchnorm, Candidate, failed
from polyak.sweeping.results import EvaluationError, Kept, Result
from polyak.sweeping.returned import Evaluate, measured
from polyak.sweeping.source import named, source_hash


@dataclass(slots=True)
class Evaluator:
    """Evaluates one set of weights after another, and reuses the results that a file keeps.

    Args:
        evaluate: As for ``sweep``.
        batchnorm: As for ``sweep``.
        kept: The results so far.
        fresh: Whether to evaluate what has a result, too.
    """

    evaluate: Evaluate
    batchnorm: Batchnorm | None
    kept: Kept
    fresh: bool = False
    _code: str | None = field(init=False)
    _warned: bool = field(default=False, init=False)
    _counts: dict[str, int] = field(default_factory=dict[str, int], init=False)

    def __post_init__(self) -> None:
        self._code = source_hash(self.evaluate)

    @property
    def code(self) -> str | None:
        """The hash of the source of the function."""
        return self._code

    def key(self, candidate: Candidate) -> dict[str, Any]:
        """Return what identifies the result of weights.

        Args:
            candidate: The weights.
        """
        function, profile = named(self.evaluate), candidate.profile
        return {
            "profile": None if profile is None else repr(profile),
            "of": candidate.source,
            "evaluate": f"{function.__module__}:{function.__qualname__}",
            "batchnorm": self.batchnorm is not None and profile is not None,
        }

    def known(self, candidate: Candidate) -> Result | None:
        """Return the kept result; None if the weights must be evaluated, for the first time or again.

        Args:
            candidate: The weights.
        """
        found = None if self.fresh else self.kept.find(self.key(candidate), candidate.profile)
        return found[0] if found is not None and found[1] == self._code else None

    def measure(self, candidate: Candidate) -> Result:
        """Evaluate weights.

        Args:
            candidate: The weights.

        Raises:
            EvaluationError: If the evaluation fails or returns a wrong type.
            RecordError: If a file is missing, truncated or corrupt.
        """
        state, error, distance = candidate.weights()
        began = time.perf_counter()
        try:
            returned = self.evaluate(state)
        except Exception as problem:
            raise EvaluationError(failed(f"evaluating {candidate.name}", problem)) from problem
        metrics, examples = measured(returned, candidate.name)
        seconds = time.perf_counter() - began
        return Result(candidate.name, candidate.profile, metrics, error, distance, seconds, examples=examples)

    def keep(self, candidate: Candidate, result: Result) -> None:
        """Keep the result of an evaluation.

        Args:
            candidate: The weights.
            result: Their result.

        Raises:
            EvaluationError: As ``checked``.
        """
        self.kept.add(self.key(candidate), self.checked(result), self._code, candidate.record.folder)

    def warn_of_other_source(self, candidates: Iterable[Candidate]) -> None:
        """Warn, once, if weights are evaluated again because the source of the function has changed.

        Args:
            candidates: What is to be evaluated.
        """
        again = (self.kept.find(self.key(one), one.profile) for one in candidates)
        if not self._warned and not self.fresh and any(one is not None for one in again):
            self._warned = True
            warnings.warn(
                f"the source of {named(self.evaluate).__qualname__} has changed since the results in {self.kept.path}; "
                "the averages are evaluated again",
                PlanWarning,
                stacklevel=5,  # the caller of ``sweep``
            )

    def checked(self, result: Result) -> Result:
        """Return a result; check that the evaluation returns the values of the same examples each time.

        Args:
            result: The result.

        Raises:
            EvaluationError: If it does not.
        """
        for metric, values in result.examples.items():
            before = self._counts.setdefault(metric, len(values))
            if before != len(values):
                raise EvaluationError(
                    f"an evaluation must return {metric} for the same examples each time (got {len(values)} for "
                    f"{result.name}, {before} before); evaluate all of the validation data"
                )
        return result
