"""Checkpoints of icefall with ``model_avg``: the plain mean of the weights at every ``average_period`` steps so far.

Two such means give the mean between them exactly: https://github.com/k2-fsa/icefall/pull/337.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from polyak.checkpoints.moments import number
from polyak.checkpoints.opening import open_checkpoint
from polyak.checkpoints.opening import read as read_content
from polyak.checkpoints.series.averages import Average, Options, PlainMean, Series, as_count
from polyak.checkpoints.stored import Files
from polyak.compat.words import shown
from polyak.errors import CheckpointError
from polyak.time import TimeUnit

KIND = "checkpoints of icefall"
_AVERAGE, _STEP, _PERIOD = "model_avg", "batch_idx_train", "average_period"
_DEFAULT_PERIOD = 100


def accepts(path: Path, content: Mapping[Any, Any]) -> bool:
    """Return whether a checkpoint is icefall's and has an average.

    Args:
        path: The path of the checkpoint.
        content: What is in it.
    """
    del path
    return isinstance(content.get(_AVERAGE), Mapping) and _STEP in content


def read(paths: Sequence[Path], options: Options) -> Series:
    """Return the averages in checkpoints, with the weights of the last.

    Args:
        paths: The paths of the checkpoints.
        options: What the user says.

    Raises:
        CheckpointError: If one cannot be read, or they are of several runs.
    """
    found = [_average(path, options) for path in paths]
    periods = {one.name: period for one, period in found}
    if len(set(periods.values())) > 1:
        first, second = (
            next(k for k, v in periods.items() if v == period) for period in sorted(set(periods.values()))[:2]
        )
        raise CheckpointError(
            f"checkpoints must be of one run ({first} has {_PERIOD} {periods[first]}, and {second} {periods[second]}); "
            "leave a run out"
        )
    newest = max((one for one, _ in found), key=lambda one: one.updates)
    raw = open_checkpoint(newest.checkpoint.path, "model").tensors
    return Series(KIND, [one for one, _ in found], raw=raw)


def _average(path: Path, options: Options) -> tuple[Average, int]:
    content = read_content(path, Files()).content
    step = as_count(path, _STEP, number(content.get(_STEP)))
    said = number(content.get(_PERIOD))
    period = options.update_every or (_DEFAULT_PERIOD if said is None else as_count(path, _PERIOD, said))
    if step < period:
        raise CheckpointError(
            f"an average must have been updated ({shown(path)} is of step {step}, and the first update is at step "
            f"{period}); leave it out"
        )
    checkpoint = open_checkpoint(path, _AVERAGE, options.prefix)
    clock = {**checkpoint.moment, TimeUnit.BATCH: float(step)}
    return Average(replace(checkpoint, moment=clock), path.name, step // period, clock, PlainMean()), period
