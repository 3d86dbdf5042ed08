"""Checkpoints of torch's ``AveragedModel``: ``n_averaged`` updates, by default of their plain mean (SWA)."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from polyak.checkpoints.moments import number
from polyak.checkpoints.opening import open_checkpoint
from polyak.checkpoints.opening import read as read_content
from polyak.checkpoints.series.averages import Average, Options, PlainMean, Series, as_count, clock_before
from polyak.checkpoints.stored import Files
from polyak.checkpoints.weights import state_dicts
from polyak.compat.words import listed, shown
from polyak.errors import CheckpointError, PlanWarning
from polyak.profiles import Profile, Uniform

KIND = "checkpoints of AveragedModel"
_COUNT, _PREFIX = "n_averaged", "module."


def accepts(path: Path, content: Mapping[Any, Any]) -> bool:
    """Return whether a checkpoint has the state of an ``AveragedModel``.

    Args:
        path: The path of the checkpoint.
        content: What is in it.
    """
    del path
    return bool(_places(content))


def read(paths: Sequence[Path], options: Options) -> Series:
    """Return the averages in checkpoints.

    Args:
        paths: The paths of the checkpoints.
        options: What the user says.

    Raises:
        CheckpointError: If one cannot be read, has several averages, or its average has not begun.
    """
    if options.stored is None:
        warnings.warn(
            f"{shown(paths[0])} does not say how its AveragedModel averages: it is read as a plain mean, the default "
            "of torch; if it is, say so by stored=Uniform() or --stored uniform-from=0ba, and else give its profile",
            PlanWarning,
            stacklevel=5,
        )
    profile = options.stored[0] if options.stored else Uniform()
    plain = isinstance(profile, Uniform) and not profile.since.value
    found = sorted((_average(path, options, PlainMean() if plain else profile) for path in paths), key=_updates)
    begin = clock_before(found[0], found[1] if len(found) > 1 else None)
    return Series(KIND, found, begin)


def _updates(average: Average) -> int:
    return average.updates


def _average(path: Path, options: Options, profile: Profile) -> Average:
    content = read_content(path, Files()).content
    places = _places(content)
    if options.key is not None:
        places = {place: state for place, state in places.items() if place == options.key}
    if len(places) != 1:
        raise CheckpointError(
            f"it must be clear which average is meant ({shown(path)} has {listed(_places(content))}); say which by key"
        )
    (place, state), *_ = places.items()
    count = as_count(path, _COUNT, number(state[_COUNT]))
    if not count:
        raise CheckpointError(f"an average must have been updated ({shown(path)} has 0 updates); leave it out")
    checkpoint = open_checkpoint(path, place or None, _PREFIX)
    clock = {time.unit: float(time) for one, time in options.times.items() if one == path} or checkpoint.moment
    return Average(checkpoint, path.name, count, clock, profile)


def _places(content: Mapping[Any, Any]) -> dict[str, Mapping[Any, Any]]:
    return {
        place: state
        for place, state in state_dicts(content)
        if _COUNT in state
        and all(isinstance(name, str) and name.startswith(_PREFIX) for name in state if name != _COUNT)
    }
