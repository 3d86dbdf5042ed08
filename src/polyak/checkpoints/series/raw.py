"""Checkpoints that say nothing of an average: the weights of one moment, or an average whose profile the user gives."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from polyak.checkpoints.moments import counted_from_1
from polyak.checkpoints.opening import Checkpoint, open_checkpoint
from polyak.checkpoints.series.averages import Average, Options, Series, as_count
from polyak.checkpoints.snapshots import average_named
from polyak.compat.words import listed, shown
from polyak.errors import CheckpointError
from polyak.time import TimeUnit

KIND = "checkpoints of training weights"
_KIND_OF_AVERAGES = "checkpoints of averages"
_AVERAGE = re.compile(r"ema|avg|average|teacher|shadow|swa", re.IGNORECASE)
# Of these the first that all checkpoints know is counted.
_UNITS = (TimeUnit.BATCH, TimeUnit.ITERATION, TimeUnit.EPOCH, TimeUnit.SAMPLE, TimeUnit.TOKEN)


def accepts(path: Path, content: Mapping[Any, Any]) -> bool:
    """Return True: any checkpoint is.

    Args:
        path: The path of the checkpoint.
        content: What is in it.
    """
    del path, content
    return True


def read(paths: Sequence[Path], options: Options) -> Series:
    """Return the checkpoints as moments, or as averages of the profile that the user gives.

    Args:
        paths: The paths of the checkpoints.
        options: What the user says.

    Raises:
        CheckpointError: If one cannot be read or does not say when it was saved, or has an average of no known profile.
    """
    if options.stored is not None and len(options.stored) != 1:
        raise CheckpointError(f"there must be one profile for all checkpoints (got {len(options.stored)}); give one")
    profile = None if options.stored is None else options.stored[0]
    opened = [open_checkpoint(path, options.key, options.prefix) for path in paths]
    if profile is None:
        for one in opened:
            _require_no_average(one, options)
    unit, pairs = _in_order(opened, options)
    untrained = [one.path.name for one, clock in pairs if not clock[unit]]
    if not (pairs := pairs[len(untrained) :]):
        raise CheckpointError(
            f"there must be checkpoints of a run that has begun ({listed(untrained)} is of {unit} 0); give others"
        )
    first, second = (pair[1][unit] for pair in (pairs * 2)[:2])
    begin = 0.0 if profile is not None else max(0.0, 2 * first - second) if len(pairs) > 1 else 0.0
    found = [
        Average(
            replace(one, moment=clock),
            one.path.name,
            as_count(one.path, f"time in whole {unit}", clock[unit] - begin),
            clock if unit is TimeUnit.BATCH else {**clock, TimeUnit.BATCH: clock[unit]},
            profile,
        )
        for one, clock in pairs
    ]
    start = {unit: begin, TimeUnit.BATCH: begin}
    raw = found[-1].checkpoint.tensors if profile is None else None
    left_out = [f"{name}: of {unit} 0, before training" for name in untrained]
    return Series(KIND if profile is None else _KIND_OF_AVERAGES, found, start, raw, left_out)


def _require_no_average(one: Checkpoint, options: Options) -> None:
    if options.key is None and (kind := average_named(one.path.name)):
        raise CheckpointError(
            f"the profile of an average must be known (by its name {shown(one.path)} is one, {kind}); give it as "
            "stored=HalfLife('1000ba'), or --stored half-life=1000ba, or rename the files"
        )
    if _AVERAGE.search(said := f"{one.place} {options.prefix or ''}"):
        raise CheckpointError(
            f"the profile of an average must be known ({shown(one.path)} has one at {shown(said.strip())}); give it as "
            "stored=HalfLife('1000ba'), or --stored half-life=1000ba, or take the weights by key"
        )


def _in_order(
    opened: Sequence[Checkpoint], options: Options
) -> tuple[TimeUnit, list[tuple[Checkpoint, dict[TimeUnit, float]]]]:
    """Return the unit that all checkpoints know, and them with their clocks in that order."""
    clocks = [{t.unit: float(t)} if (t := options.times.get(one.path)) else dict(one.moment) for one in opened]
    for one, clock in zip(opened, clocks, strict=True):
        if not clock:
            raise CheckpointError(
                f"a checkpoint must say when it was saved ({shown(one.path)} does not); name it so: step-500.pt, or "
                "give times=['100ba', '200ba'] for all to Record.from_checkpoints"
            )
    unit = next((unit for unit in _UNITS if all(unit in clock for clock in clocks)), None)
    if unit is None:
        raise CheckpointError(
            f"checkpoints must say their times in one unit ({shown(opened[0].path)} in {_units(clocks[0])}, and "
            f"{shown(opened[-1].path)} in {_units(clocks[-1])}); give times for all to Record.from_checkpoints"
        )
    if unit is TimeUnit.EPOCH:
        epochs = counted_from_1([clock[unit] for clock in clocks])
        clocks = [{**clock, unit: epoch} for clock, epoch in zip(clocks, epochs, strict=True)]
    return unit, sorted(zip(opened, clocks, strict=True), key=lambda pair: pair[1][unit])


def _units(clock: Mapping[TimeUnit, float]) -> str:
    return ", ".join(map(str, clock))
