"""Which checkpoints are averaged, in which order, and how much each counts."""

from collections.abc import Sequence
from math import isnan
from pathlib import Path

from polyak.checkpoints.averaging import Plan, plan
from polyak.checkpoints.metrics import values_of
from polyak.checkpoints.mixed import require_one_run
from polyak.checkpoints.moments import counted_from_1, in_natural_order
from polyak.checkpoints.opening import Checkpoint, open_checkpoint
from polyak.checkpoints.output import check_output, write_average
from polyak.checkpoints.profiles import weights_at
from polyak.compat.words import listed
from polyak.errors import ArgumentError
from polyak.profiles import NamedProfile
from polyak.storage.atomic import require_new
from polyak.time import Time, TimeUnit

# Several checkpoints may be of one epoch.
_FINEST_FIRST = (TimeUnit.BATCH, TimeUnit.ITERATION, TimeUnit.SAMPLE, TimeUnit.TOKEN, TimeUnit.EPOCH)


def average_checkpoints(
    paths: Sequence[str | Path],
    output: str | Path,
    *,
    weights: Sequence[float] | None = None,
    profile: NamedProfile | None = None,
    last: int | None = None,
    best: int | None = None,
    metric: str | None = None,
    maximize: bool = False,
    log: str | Path | None = None,
    times: Sequence[Time | str] | None = None,
    key: str | None = None,
    prefix: str | None = None,
    common: bool = False,
    mixed: bool = False,
    overwrite: bool = False,
) -> Plan:
    """Average checkpoints, write the average, and return what was averaged.

    Args:
        paths: Files of torch or safetensors, or folders of Transformers, diffusers, peft, Accelerate or
            ``torch.distributed.checkpoint``.
        output: A ``.safetensors`` or ``.pt`` file; without a suffix a folder like the newest checkpoint's.
        weights: How much each checkpoint counts; None for equal weights.
        profile: Gives the weights instead, at the times when the checkpoints were saved.
        last: Take the last so many only.
        best: Take only so many with the best ``metric``. Of equal ones the newest are taken.
        metric: The name of a metric in the checkpoints, in their names or in ``log``.
        maximize: Whether a higher ``metric`` is better.
        log: A file with a JSON object on each line: ``step`` or ``epoch``, and metrics.
        times: When each was saved, such as ``"100ba"``; None to read it from the checkpoints or their names.
        key: Where the weights are in a checkpoint, such as ``"model"``; None to find out.
        prefix: How the names of the tensors to take begin, such as ``"teacher."``, which is left out of them.
        common: Whether to average the tensors that all checkpoints have, where the names differ.
        mixed: Whether checkpoints of one folder may be of several runs. With ``weights`` they may.
        overwrite: Whether a file at ``output`` is replaced, once the new one is complete.

    Raises:
        ExistsError: If there is something at ``output`` already.
        ArgumentError: If an argument is wrong or excludes another, or a checkpoint does not have the metric.
        CheckpointError: If a checkpoint cannot be read, or they are not of one model.
        OSError: If the disk refuses.

    Example:
        >>> import torch
        >>> for step in (1, 2, 3):
        ...     torch.save({"w": torch.full((2,), float(step))}, f"step-{step}.pt")
        >>> _ = average_checkpoints(["step-1.pt", "step-2.pt", "step-3.pt"], "averaged.pt", last=2)
        >>> torch.load("averaged.pt")
        {'w': tensor([2.5000, 2.5000])}
    """
    made = choose(
        [open_checkpoint(Path(path), key, prefix) for path in paths],
        weights=weights,
        profile=profile,
        last=last,
        best=best,
        metric=metric,
        maximize=maximize,
        log=None if log is None else Path(log),
        times=times,
        common=common,
        mixed=mixed,
    )
    check_output(Path(output), made)
    require_new(Path(output), overwrite=overwrite)
    write_average(made, Path(output))
    return made


def choose(
    opened: Sequence[Checkpoint],
    *,
    weights: Sequence[float] | None = None,
    profile: NamedProfile | None = None,
    last: int | None = None,
    best: int | None = None,
    metric: str | None = None,
    maximize: bool = False,
    log: Path | None = None,
    times: Sequence[Time | str] | None = None,
    common: bool = False,
    mixed: bool = False,
) -> Plan:
    """Return what is averaged. Without weights, checkpoints are sorted by when they were saved, or else by their names.

    Args:
        opened: The checkpoints.
        weights: As for `average_checkpoints`.
        profile: As for `average_checkpoints`.
        last: As for `average_checkpoints`.
        best: As for `average_checkpoints`.
        metric: As for `average_checkpoints`.
        maximize: As for `average_checkpoints`.
        log: As for `average_checkpoints`.
        times: As for `average_checkpoints`.
        common: As for `average_checkpoints`.
        mixed: As for `average_checkpoints`.

    Raises:
        ArgumentError: As `average_checkpoints`.
        CheckpointError: As `average_checkpoints`.
    """
    for name, values in (("weights", weights), ("times", times)):
        if values is not None and len(values) != len(opened):
            raise ArgumentError(f"{name} must have a value for each checkpoint (got {len(values)} for {len(opened)})")
    _require_one_choice(weights, profile, last, best, metric)
    if weights is None and not mixed:
        require_one_run(opened)
    unit = profile.unit if profile else None
    readings = _readings(opened, times, unit)
    if weights is None:
        names = [in_natural_order(one.path) for one in opened]
        keys = names if readings is None else [*zip(readings, names, strict=True)]
        order = sorted(range(len(opened)), key=keys.__getitem__)
        opened, readings = [opened[i] for i in order], [readings[i] for i in order] if readings else None
    if best is not None and metric is not None:
        taken = _best(opened, best, metric, log, maximize=maximize)
        opened, readings = [opened[i] for i in taken], [readings[i] for i in taken] if readings else None
    begin = -min(last or len(opened), len(opened))
    opened, readings = opened[begin:], readings and readings[begin:]
    if profile is not None:
        weights = weights_at(profile, readings if unit and readings else [float(i + 1) for i in range(len(opened))])
    elif weights is not None:
        weights = weights[begin:]
    return plan(opened, weights or [1.0] * len(opened), common=common)


def _require_one_choice(
    weights: Sequence[float] | None,
    profile: NamedProfile | None,
    last: int | None,
    best: int | None,
    metric: str | None,
) -> None:
    if weights is not None and (profile is not None or best is not None):
        other = "follow a profile" if best is None else "be equal for the best"
        raise ArgumentError(f"weights must be given or {other} (got both); leave one out")
    if last is not None and best is not None:
        raise ArgumentError("checkpoints must be the last or the best (got both); leave one out")
    if (best is None) != (metric is None):
        raise ArgumentError("the best must be those of a metric (got one without the other); give best and metric")
    for name, count in (("last", last), ("best", best)):
        if count is not None and not count >= 1:
            raise ArgumentError(f"{name} must be at least 1 (got {count})")


def _best(opened: Sequence[Checkpoint], count: int, metric: str, log: Path | None, *, maximize: bool) -> list[int]:
    """Return the indices of the best checkpoints, in order."""
    of_each = [(one.path, one.moment, one.metrics) for one in opened]
    paths, moments, metrics = zip(*of_each, strict=True) if of_each else ((), (), ())
    values = values_of(metric, paths, moments, metrics, log)
    known = [i for i, value in enumerate(values) if not isnan(value)]
    if len(known) < min(count, len(values)):
        raise ArgumentError(
            f"the best {count} must have numbers for {metric} (of {len(values)} checkpoints {len(known)} have one, and "
            "all else have NaN); take fewer"
        )
    ranked = sorted(known, key=lambda i: (-values[i] if maximize else values[i], -i))
    return sorted(ranked[:count])


def _readings(
    opened: Sequence[Checkpoint], times: Sequence[Time | str] | None, unit: TimeUnit | None
) -> list[float] | None:
    """Return when the checkpoints were saved: in the unit that is needed, or in any unit that all of them have."""
    if times is not None:
        given = [Time.from_input(time) for time in times]
        if other := [time for time in given if time.unit != (unit or given[0].unit)]:
            raise ArgumentError(
                f"times must be in one unit, that of the profile (got {other[0]}, not {unit or given[0].unit}); "
                "convert them"
            )
        return [float(time.value) for time in given]
    for known in _FINEST_FIRST if unit is None else (unit,):
        if all(known in one.moment for one in opened):
            found = [one.moment[known] for one in opened]
            return counted_from_1(found) if known is TimeUnit.EPOCH else found
    if unit is None:
        return None
    if unit is TimeUnit.DURATION and (found := _readings(opened, None, None)) is not None:
        return [reading / (max(found) or 1) for reading in found]  # the run is what there is of it
    unknown = [one.path for one in opened if unit not in one.moment]
    known = sorted({str(unit) for one in opened for unit in one.moment})
    raise ArgumentError(
        f"it must be known when each checkpoint was saved, in {unit} ({listed(unknown)} does not say; known: "
        f"{', '.join(known) or 'nothing'}); give its time, by --times"
    )
