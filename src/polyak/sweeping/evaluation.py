"""Evaluates one set of weights: builds it, calls the custom function, and keeps the result."""

import hashlib
import inspect
import math
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
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
from polyak.sweeping.results import EvaluationError, Kept, Result

Evaluate = Callable[[dict[str, Tensor]], float | Mapping[str, float]]
Batchnorm = tuple[nn.Module, Iterable[Any]]


@dataclass(frozen=True, slots=True)
class Evaluator:
    """Evaluates one set of weights after another, and reuses the results that a file keeps.

    Args:
        record: The record.
        evaluate: As for ``sweep``.
        batchnorm: As for ``sweep``.
        kept: The results so far.
    """

    record: Record
    evaluate: Evaluate
    batchnorm: Batchnorm | None
    kept: Kept

    def average(self, name: str, profile: Profile) -> Result:
        """Return the result of an average of the record.

        Args:
            name: A name for people.
            profile: The profile of the average.

        Raises:
            EvaluationError: If the evaluation fails or returns a wrong type.
            RecordError: If a file is missing, truncated or corrupt.
        """
        newest_file = self.record.stretches[-1].file

        def state_and_numbers() -> tuple[dict[str, Tensor], float, float]:
            # Every result has its error; a warning would repeat it.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", PlanWarning)
                state = self.record.average(profile)
                error = self.record.error(profile)
            distance = _distance(self.record, state)
            if self.batchnorm is not None:
                try:
                    state = recomputed(state, self.batchnorm)
                except Exception as problem:
                    raise EvaluationError(_failed(f"recomputing BatchNorm for {name}", problem)) from problem
            return state, error, distance

        return self._measured(name, profile, newest_file, state_and_numbers)

    def given(self, name: str, path: Path) -> Result:
        """Return the result of weights from a file.

        Args:
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

            return self._measured(name, None, digest, state_and_numbers)
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise RecordError(
                f"the {name} weights must be a safetensors file ({path}: {reason}); give another file"
            ) from error

    def _measured(
        self,
        name: str,
        profile: Profile | None,
        source: str,
        state_and_numbers: Callable[[], tuple[dict[str, Tensor], float | None, float | None]],
    ) -> Result:
        named = _named(self.evaluate)
        key = {
            "profile": None if profile is None else repr(profile),
            "of": source,
            "evaluate": f"{named.__module__}:{named.__qualname__}",
            "batchnorm": self.batchnorm is not None and profile is not None,
        }
        code = _code(named)
        if (already := self.kept.find(key, profile)) is not None:
            result, measured_by = already
            if measured_by != code:
                warnings.warn(
                    f"the evaluation should have the same code as for the results in {self.kept.path} (it has changed, "
                    "and the results are reused); remove the file to evaluate again",
                    PlanWarning,
                    stacklevel=5,
                )
            return replace(result, name=name)  # the same weights may have another name now
        state, error, distance = state_and_numbers()
        began = time.perf_counter()
        metrics = _metrics(self.evaluate, state, name)
        result = Result(name, profile, metrics, error, distance, time.perf_counter() - began)
        self.kept.add(key, result, code)
        return result


def _metrics(evaluate: Evaluate, state: dict[str, Tensor], name: str) -> dict[str, float]:
    try:
        returned = evaluate(state)
    except Exception as error:
        raise EvaluationError(_failed(f"evaluating {name}", error)) from error
    try:
        named = returned if isinstance(returned, Mapping) else {"value": returned}
        metrics = {str(metric): float(value) for metric, value in named.items()}
        # An infinite loss is treated as NaN: it is never the best, whether lower or higher is better.
        metrics = {metric: value if math.isfinite(value) else math.nan for metric, value in metrics.items()}
    except (TypeError, ValueError, RuntimeError):
        metrics = dict[str, float]()
    if not metrics:
        raise EvaluationError(
            f"an evaluation must return a number, or a dict of numbers by name (got {returned!r} for {name}); change "
            "the function"
        )
    return metrics


def _failed(doing: str, error: Exception) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    last = traceback.format_exception_only(error)[-1].strip()
    return f"{doing} failed: {last} ({frame.filename}, line {frame.lineno}); earlier results are kept"


def _named(evaluate: Any) -> Any:
    """Return the object whose name identifies an evaluation across processes: the function, or the class."""
    while isinstance(evaluate, partial):
        evaluate = evaluate.func
    return evaluate if hasattr(evaluate, "__qualname__") else type(evaluate)


def _code(named: Any) -> str | None:
    try:
        file = inspect.getsourcefile(inspect.unwrap(named))
        return None if file is None else hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]
    except (TypeError, OSError):
        return None


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
