"""Evaluates one set of weights: builds it, calls the custom function, and keeps the result."""

import hashlib
import math
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from polyak.averaging.batchnorm import update_bn
from polyak.errors import PlanWarning, RecordError
from polyak.profiles import Profile
from polyak.record import Record
from polyak.record.stored import all_stored
from polyak.sweeping.averages import Averages
from polyak.sweeping.results import EvaluationError, Kept, Result
from polyak.sweeping.returned import Evaluate, measured
from polyak.sweeping.source import named, source_hash
from polyak.time import Time

Batchnorm = tuple[nn.Module, Iterable[Any]]


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

    def averages(self, record: Record, profiles: Sequence[Profile]) -> Averages:
        """Return the averages at the end of a record; only those without a result are computed.

        Args:
            record: The record, up to the moment of the averages.
            profiles: Those to evaluate, in this order.
        """
        newest = record.segments[-1].file
        return Averages(record, [one for one in profiles if self._already(self._key(one, newest), one) is None])

    def average(self, averages: Averages, name: str, profile: Profile, at: Time | None) -> Result:
        """Return the result of the average at the end of a record.

        Args:
            averages: What ``averages`` returned for the record.
            name: A name for people.
            profile: The profile of the average.
            at: The moment, for the result; None for the end of the whole record.

        Raises:
            EvaluationError: If the evaluation fails or returns a wrong type.
            RecordError: If a file is missing, truncated or corrupt.
        """
        record = averages.record

        def state_and_numbers() -> tuple[dict[str, Tensor], float, float | None]:
            state, error = averages.take(profile)
            distance = None if all_stored(record.segments) else _distance(record, state)  # which have no newest mean
            if self.batchnorm is not None:
                try:
                    state = recomputed(state, self.batchnorm)
                except Exception as problem:
                    raise EvaluationError(_failed(f"recomputing BatchNorm for {name}", problem)) from problem
            return state, error, distance

        return replace(self._measured(record, name, profile, record.segments[-1].file, state_and_numbers), at=at)

    def raw(self, record: Any) -> Result:
        """Return the result of the raw weights at the end of a record.

        Args:
            record: A record that keeps them.

        Raises:
            EvaluationError: If the evaluation fails or returns a wrong type.
            RecordError: If a file is missing, truncated or corrupt.
        """
        return self._measured(record, "raw", None, record.raw.file, lambda: (record.raw_weights(), None, None))

    def given(self, record: Record, name: str, path: Path) -> Result:
        """Return the result of weights from a file.

        Args:
            record: The record that they are compared with.
            name: A name for people.
            path: The safetensors file.

        Raises:
            EvaluationError: If the evaluation fails or returns a wrong type.
            RecordError: If the file cannot be read as safetensors.
        """
        try:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()

            def state_and_numbers() -> tuple[dict[str, Tensor], None, None]:
                return load_file(path), None, None

            return self._measured(record, name, None, digest, state_and_numbers)
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise RecordError(
                f"the {name} weights must be a safetensors file ({path}: {reason}); give another file"
            ) from error

    def _measured(
        self,
        record: Record,
        name: str,
        profile: Profile | None,
        source: str,
        state_and_numbers: Callable[[], tuple[dict[str, Tensor], float | None, float | None]],
    ) -> Result:
        key = self._key(profile, source)
        if (already := self._already(key, profile)) is not None:
            return self._checked(replace(already, name=name))  # the same weights may have another name now
        self._warn_of_other_source(key, profile)
        state, error, distance = state_and_numbers()
        began = time.perf_counter()
        try:
            returned = self.evaluate(state)
        except Exception as problem:
            raise EvaluationError(_failed(f"evaluating {name}", problem)) from problem
        metrics, examples = measured(returned, name)
        seconds = time.perf_counter() - began
        result = self._checked(Result(name, profile, metrics, error, distance, seconds, examples=examples))
        self.kept.add(key, result, self._code, record.folder)
        return result

    def _key(self, profile: Profile | None, source: str) -> dict[str, Any]:
        function = named(self.evaluate)
        return {
            "profile": None if profile is None else repr(profile),
            "of": source,
            "evaluate": f"{function.__module__}:{function.__qualname__}",
            "batchnorm": self.batchnorm is not None and profile is not None,
        }

    def _already(self, key: Mapping[str, Any], profile: Profile | None) -> Result | None:
        """Return the result that is kept for a key; None if it is to be evaluated, for the first time or again."""
        found = None if self.fresh else self.kept.find(key, profile)
        return found[0] if found is not None and found[1] == self._code else None

    def _warn_of_other_source(self, key: Mapping[str, Any], profile: Profile | None) -> None:
        if not self._warned and not self.fresh and self.kept.find(key, profile) is not None:
            self._warned = True
            warnings.warn(
                f"the source of {named(self.evaluate).__qualname__} has changed since the results in {self.kept.path}; "
                "the averages are evaluated again",
                PlanWarning,
                stacklevel=6,
            )

    def _checked(self, result: Result) -> Result:
        """Check that the evaluation returns the values of the same examples each time."""
        for metric, values in result.examples.items():
            before = self._counts.setdefault(metric, len(values))
            if before != len(values):
                raise EvaluationError(
                    f"an evaluation must return {metric} for the same examples each time (got {len(values)} for "
                    f"{result.name}, {before} before); evaluate all of the validation data"
                )
        return result


def _failed(doing: str, error: Exception) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    last = traceback.format_exception_only(error)[-1].strip()
    return f"{doing} failed: {last} ({frame.filename}, line {frame.lineno}); earlier results are kept"


def recomputed(state: Mapping[str, Tensor], batchnorm: Batchnorm) -> dict[str, Tensor]:
    """Return a state with the statistics of BatchNorm layers recomputed for its weights.

    Args:
        state: The state.
        batchnorm: As for ``sweep``.
    """
    model, loader = batchnorm
    model.load_state_dict(state)
    parameter = next(model.parameters(), None)
    update_bn(model, loader, None if parameter is None else parameter.device)
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


@torch.no_grad()
def _distance(record: Record, average: Mapping[str, Tensor]) -> float:
    """Return |average - newest mean| / |newest mean|."""
    difference = size = 0.0
    with record.open(record.stretches[-1]) as file:
        for name, info in record.tensors.items():
            if info.averaged:
                mean = file.read(name).to(average[name].dtype)
                difference += float(torch.linalg.vector_norm(average[name] - mean)) ** 2
                size += float(torch.linalg.vector_norm(mean)) ** 2
    return math.sqrt(difference / size) if size else math.nan
