"""``sweep``: one average after the other is put together from the record, measured, and forgotten."""

import hashlib
import inspect
import math
import os
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from polyak.averaging.batchnorm import update_bn
from polyak.errors import PlanWarning, ProfileError, RecordError
from polyak.profiles import HalfLife, PowerFunction, Profile, Smoothing, Uniform, Window
from polyak.record import Record, fit
from polyak.storage.atomic import replacing, temporary_path
from polyak.storage.safetensors import TensorInfo, disk_errors, write_tensors
from polyak.sweeping.grid import grid, narrowed, newest
from polyak.sweeping.results import EvaluationError, Kept, Result, value_of
from polyak.time import Time

Evaluate = Callable[[dict[str, Tensor]], float | Mapping[str, float]]
Batchnorm = tuple[nn.Module, Iterable[Any]]


def sweep(
    record: Record | str | Path,
    evaluate: Evaluate,
    profiles: Sequence[Profile] | None = None,
    *,
    points: int = 9,
    refine: int = 3,
    metric: str | None = None,
    maximize: bool = False,
    others: Mapping[str, str | Path] | None = None,
    batchnorm: Batchnorm | None = None,
    results: str | Path | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> list[Result]:
    """Measure averages of a record under many profiles, then narrow in on the best half-life.

    What comes first is ``others`` and the record's newest mean, to compare with. Choose on validation data: a half-life
    that was chosen on the test set is no result.

    Args:
        record: Or its folder.
        evaluate: Takes a dict of tensors by name, as for ``load_state_dict``, and returns a number, or numbers by name.
        profiles: What to measure; None for half-lives from the shortest that the record can tell to the whole run.
        points: How many half-lives that are, at least 2.
        refine: How many more half-lives to measure, at most, between those next to the best.
        metric: Which number counts; None for the first.
        maximize: Whether more is better.
        others: Files of weights to compare with, by name, such as the raw ones; they are measured as they are.
        batchnorm: A model and batches for it, to recompute the statistics of BatchNorm layers for each average.
        results: A file of JSON lines to keep the results in. Those that it has are not measured again; they belong to
            the name of ``evaluate`` and to the record as it is.
        progress: Called before each evaluation with how many are done, how many there will be at most, and its name.

    Returns:
        The results in the order of their measurement.

    Raises:
        EvaluationError: If ``evaluate`` fails or returns something else, or ``results`` is no such file.
        ProfileError: If a profile is finer than the record can tell, or the record tells none.
        RecordError: If a file is missing, truncated or foreign.

    Example:
        >>> from polyak.record import Edge, Writer
        >>> from polyak.time import Timestamp
        >>> edges = [Edge(n, Timestamp().to_next_batch(steps=n)) for n in range(65)]
        >>> with Writer("run", {"weight": TensorInfo(torch.float32, (1,), averaged=True)}) as writer:
        ...     for start, end in zip(edges, edges[1:]):
        ...         stretch = writer.append({"weight": torch.tensor([float((-1) ** end.updates)])}, start, end)
        >>> from polyak.sweeping import best
        >>> results = sweep("run", lambda state: float(state["weight"].abs()), points=4, refine=1)
        >>> [result.name for result in results]
        ['newest mean', 'half-life 1ba', 'half-life 4ba', 'half-life 16ba', 'half-life 64ba', 'half-life 37.7ba']
        >>> best(results).name
        'half-life 64ba'
    """
    if isinstance(record, str | Path):
        record = Record(record)
    if refine < 0:
        raise ProfileError(f"refine must be at least 0 (got {refine})")
    least = newest(record)
    planned = grid(record, points) if profiles is None else list(profiles)
    for profile in planned:
        fit(profile, record.stretches, max_duration=record.max_duration)
    unit = next((one.span.unit for one in planned if isinstance(one, HalfLife)), None)
    with disk_errors(f"keeping results in {results}"), Kept(None if results is None else Path(results)) as kept:
        run = _Run(record, evaluate, batchnorm, kept)
        total = len(others or {}) + 1 + len(planned) + (refine if unit else 0)
        found: list[Result] = []

        def measure(name: str, profile: Profile | None, path: str | Path = "") -> None:
            if progress is not None:
                progress(len(found), total, name)
            result = run.given(name, Path(path)) if profile is None else run.average(name, profile)
            value_of(result, metric)
            found.append(result)

        for name, path in (others or {}).items():
            measure(name, None, path)
        measure("newest mean", least)
        for profile in planned:
            measure(describe(profile), profile)
        for _ in range(refine):
            half_lives = {
                float(one.profile.span): value_of(one, metric)
                for one in found
                if isinstance(one.profile, HalfLife) and one.profile.span.unit is unit
            }
            following = narrowed(half_lives, maximize=maximize)
            if following is None or unit is None:
                break
            profile = HalfLife(Time(following, unit), unbiased=True)
            measure(describe(profile), profile)
        return found


def describe(profile: Profile) -> str:
    """Return what people call a profile.

    Args:
        profile: Any.

    Example:
        >>> describe(HalfLife("500ba")), describe(Window("10ep")), describe(PowerFunction(sigma_rel=0.1))
        ('half-life 500ba', 'window 10ep', 'power function 0.1')
    """
    match profile:
        case HalfLife():
            return f"half-life {profile.span}"
        case Window():
            return f"window {profile.span}"
        case Uniform():
            return f"uniform from {profile.since}"
        case Smoothing():
            return f"smoothing {profile.value:g}"
        case PowerFunction() if profile.sigma_rel is not None:
            return f"power function {profile.sigma_rel:g}"
        case _:
            return str(profile)


def export(record: Record, profile: Profile, path: str | Path, batchnorm: Batchnorm | None = None) -> None:
    """Write an average as ``Record.export`` does, with statistics of BatchNorm layers recomputed if asked for.

    Args:
        record: Any.
        profile: As for ``Record.average``.
        path: Of the file. One that is there is replaced once the new one is complete.
        batchnorm: As for ``sweep``.

    Raises:
        ProfileError: If the profile is finer than the record can tell.
        RecordError: If a file is missing, truncated or foreign, and if the disk refuses.
    """
    if batchnorm is None:
        record.export(profile, path)
        return
    path = Path(path)
    without = temporary_path(path.with_name(f"{path.name}.averaged"), process=os.getpid())
    try:
        record.export(profile, without)
        with safe_open(without, framework="pt") as file:
            metadata = {**file.metadata(), "polyak.batchnorm": "recomputed"}
        state = _recomputed(load_file(without), batchnorm)
    finally:
        without.unlink(missing_ok=True)
    infos = {name: TensorInfo(one.dtype, tuple(one.shape), averaged=False) for name, one in state.items()}
    with disk_errors(f"exporting to {path}"), replacing(path) as temporary:
        write_tensors(temporary, infos, state.__getitem__, metadata)


@dataclass(frozen=True, slots=True)
class _Run:
    record: Record
    evaluate: Evaluate
    batchnorm: Batchnorm | None
    kept: Kept

    def average(self, name: str, profile: Profile) -> Result:
        newest_file = self.record.stretches[-1].file

        def state_and_numbers() -> tuple[dict[str, Tensor], float, float]:
            # The error stands beside every result; a warning for each would say it twice.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", PlanWarning)
                state = self.record.average(profile)
                error = self.record.error(profile)
            distance = _distance(self.record, state)
            if self.batchnorm is not None:
                try:
                    state = _recomputed(state, self.batchnorm)
                except Exception as problem:
                    raise EvaluationError(_failed(f"recomputing BatchNorm for {name}", problem)) from problem
            return state, error, distance

        return self._measured(name, profile, newest_file, state_and_numbers)

    def given(self, name: str, path: Path) -> Result:
        try:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()

            def state_and_numbers() -> tuple[dict[str, Tensor], None, None]:
                return load_file(path), None, None

            return self._measured(name, None, digest, state_and_numbers)
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise RecordError(f"the {name} weights must be a safetensors file ({path}: {reason})") from error

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
                    f"{self.kept.path} has results from before the code of the evaluation was changed, and they are "
                    "taken as they are; remove the file to measure all anew",
                    PlanWarning,
                    stacklevel=5,
                )
            return replace(result, name=name)  # the same weights may be given under another
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
        # A loss that overflowed is as bad as one that is not a number, and in either sense never the best.
        metrics = {metric: value if math.isfinite(value) else math.nan for metric, value in metrics.items()}
    except (TypeError, ValueError, RuntimeError):
        metrics = dict[str, float]()
    if not metrics:
        raise EvaluationError(
            f"an evaluation must return a number, or a dict of numbers by name (got {returned!r} for {name})"
        )
    return metrics


def _failed(doing: str, error: Exception) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    last = traceback.format_exception_only(error)[-1].strip()
    return f"{doing} failed: {last} ({frame.filename}, line {frame.lineno}); what was measured before is kept"


def _named(evaluate: Any) -> Any:
    """Return what an evaluation is known by in the next process: the function, or the class of an object."""
    while isinstance(evaluate, partial):
        evaluate = evaluate.func
    return evaluate if hasattr(evaluate, "__qualname__") else type(evaluate)


def _code(named: Any) -> str | None:
    try:
        file = inspect.getsourcefile(inspect.unwrap(named))
        return None if file is None else hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]
    except (TypeError, OSError):
        return None


def _recomputed(state: Mapping[str, Tensor], batchnorm: Batchnorm) -> dict[str, Tensor]:
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
