"""``sweep``: builds one average after another from a record and evaluates it. One average is in memory at a time."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file

from polyak.errors import ProfileError
from polyak.profiles import HalfLife, Profile, named
from polyak.record import Record, fit
from polyak.storage.atomic import replacing, temporary_path
from polyak.storage.safetensors import TensorInfo, disk_errors, write_tensors
from polyak.sweeping.evaluation import Batchnorm, Evaluate, Evaluator, recomputed
from polyak.sweeping.grid import grid, narrowed, newest
from polyak.sweeping.results import Kept, Result, value_of
from polyak.time import Time, TimeUnit


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
    """Evaluate averages of a record under many profiles, then search for the best half-life.

    The first evaluations are those of ``others`` and of the newest mean of the record, for comparison. Evaluate on
    validation data: if the half-life is chosen on the test set, the test result is biased.

    Args:
        record: The record or its folder.
        evaluate: Takes a dict of tensors by name, as for ``load_state_dict``; returns a number, or numbers by name.
        profiles: The profiles to evaluate; None for half-lives from the shortest that the record resolves to the length
            of the record.
        points: The number of these half-lives, at least 2.
        refine: The largest number of further half-lives, between the neighbours of the best.
        metric: The metric to compare; None for the first.
        maximize: Whether a higher value is better.
        others: Files of other weights by name, such as the raw weights; they are evaluated unchanged.
        batchnorm: A model and batches for it, to recompute the statistics of BatchNorm layers for each average.
        results: A JSON Lines file that keeps the results. Results in it are reused if the name of ``evaluate`` and the
            newest file of the record are the same.
        progress: Called before each evaluation with the number done, the largest total, and the name of the next.

    Returns:
        The results in the order of evaluation.

    Raises:
        EvaluationError: If ``evaluate`` fails or returns a wrong type, or ``results`` is not a file of results.
        ProfileError: If the record does not resolve a profile, or resolves no half-life.
        RecordError: If a file is missing, truncated or corrupt.

    Example:
        >>> import torch
        >>> from polyak.record import Edge, Writer
        >>> from polyak.time import Timestamp
        >>> edges = [Edge(n, Timestamp().to_next_batch(steps=n)) for n in range(65)]
        >>> with Writer("run", {"weight": TensorInfo(torch.float32, (1,), averaged=True)}) as writer:
        ...     for start, end in zip(edges, edges[1:]):
        ...         segment = writer.append({"weight": torch.tensor([float((-1) ** end.updates)])}, start, end)
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
        raise ProfileError(f"refine must be at least 0 (got {refine}); 0 evaluates the grid alone")
    least = newest(record)
    planned = grid(record, points) if profiles is None else list(profiles)
    for profile in planned:
        fit(profile, record.stretches, max_duration=record.max_duration)
    unit = next((span.unit for one in planned if (span := named(one).half_life) is not None), None)
    with disk_errors(f"keeping results in {results}"), Kept(None if results is None else Path(results)) as kept:
        run = Evaluator(record, evaluate, batchnorm, kept)
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
            measure(named(profile).describe(), profile)
        for _ in range(refine):
            profile = None if unit is None else _next(found, unit, metric, maximize=maximize)
            if profile is None:
                break
            measure(profile.describe(), profile)
        return found


def _next(found: Sequence[Result], unit: TimeUnit, metric: str | None, *, maximize: bool) -> HalfLife | None:
    """Return the half-life to evaluate after these results; None once the best is found."""
    values = {
        float(one.half_life): value_of(one, metric)
        for one in found
        if one.half_life is not None and one.half_life.unit is unit
    }
    following = narrowed(values, maximize=maximize)
    return None if following is None else HalfLife(Time(following, unit), unbiased=True)


def export(record: Record, profile: Profile, path: str | Path, batchnorm: Batchnorm | None = None) -> None:
    """Write an average as ``Record.export`` does, with recomputed BatchNorm statistics if ``batchnorm`` is given.

    Args:
        record: The record.
        profile: As for ``Record.average``.
        path: The file to write. An existing file is replaced once the new one is complete.
        batchnorm: As for ``sweep``.

    Raises:
        ProfileError: If the record does not resolve the profile.
        RecordError: If a file is missing, truncated or corrupt, or cannot be written.
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
        state = recomputed(load_file(without), batchnorm)
    finally:
        without.unlink(missing_ok=True)
    infos = {name: TensorInfo(one.dtype, tuple(one.shape), averaged=False) for name, one in state.items()}
    with disk_errors(f"exporting to {path}"), replacing(path) as temporary:
        write_tensors(temporary, infos, state.__getitem__, metadata)
