"""Checkpoints with states of ``EMA``, of polyak or Composer: as many averages as there are, each with its profile."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from polyak.checkpoints.moments import counters_in
from polyak.checkpoints.opening import Checkpoint, open_checkpoint
from polyak.checkpoints.opening import read as read_content
from polyak.checkpoints.series.averages import Average, Options, Series
from polyak.checkpoints.stored import Files
from polyak.compat.words import shown
from polyak.errors import CheckpointError
from polyak.profiles import HalfLife, Profile, Smoothing
from polyak.time import Time, TimeUnit

KIND = "checkpoints with states of EMA"
_STARTED, _MODEL = "ema_started", "ema_model"
_DEPTH = 7
_HALF_LIFE = re.compile(r"profile=HalfLife\(span=Time\(([\d.e+-]+), '(\w+)'\), unbiased=(True|False)\)")
_SMOOTHING = re.compile(r"profile=Smoothing\(value=([\d.e+-]+)\)")
_EVERY_STEP = "update_interval='1ba'"


def accepts(path: Path, content: Mapping[Any, Any]) -> bool:
    """Return whether a checkpoint has the state of an ``EMA``.

    Args:
        path: The path of the checkpoint.
        content: What is in it.
    """
    del path
    return next(_states(content), None) is not None


def read(paths: Sequence[Path], options: Options) -> Series:
    """Return the averages in checkpoints.

    Args:
        paths: The paths of the checkpoints.
        options: What the user says.

    Raises:
        CheckpointError: If one cannot be read, or an average has not begun, is in the model, or has no known profile.
    """
    return Series(KIND, [one for path in paths for one in _averages(path, options)])


def _averages(path: Path, options: Options) -> Iterator[Average]:
    states = list(_states(read_content(path, Files()).content))
    if options.stored is not None and len(options.stored) not in {1, len(states)}:
        raise CheckpointError(
            f"each average must have a profile ({shown(path)} has {len(states)}, and {len(options.stored)} are given); "
            "give them in the order of the checkpoint"
        )
    for i, (place, state) in enumerate(states):
        if not state[_STARTED] or state.get("lent") or state.get("ema_weights_active"):
            raise CheckpointError(
                f"a checkpoint must hold the average, separate from the weights ({shown(path)} was saved before "
                "averaging began, or with the average in the model); leave it out"
            )
        given = None if options.stored is None else options.stored[min(i, len(options.stored) - 1)]
        profile = _profile(path, state) if given is None else given
        checkpoint = _opened(path, place, state)
        updated = state.get("updated_at") if state.get("updated", True) else None
        clock = {**dict(counters_in(updated)), **checkpoint.moment}
        if not (steps := clock.get(TimeUnit.BATCH)):
            raise CheckpointError(f"a checkpoint must say its step ({shown(path)} does not); name it so: step-500.pt")
        clock = {unit: value for unit, value in clock.items() if value}
        name = path.name if len(states) == 1 else f"{path.name}:{i}"
        yield Average(checkpoint, name, round(steps), clock, profile, origin=_origin(state, profile))


def _states(value: object, place: str = "", depth: int = _DEPTH) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    """Yield the states of averages, with their places."""
    if isinstance(value, Mapping):
        if _STARTED in value and isinstance(value.get(_MODEL), Mapping):
            yield place, value
            return
        inside = [(str(key), one) for key, one in value.items() if isinstance(key, (str, int))]
    else:
        inside = [(str(i), one) for i, one in enumerate(value)] if isinstance(value, (list, tuple)) else []
    for key, one in inside if depth else ():
        if isinstance(one, (Mapping, list, tuple)) and "optim" not in key.lower():
            yield from _states(one, f"{place}.{key}" if place else key, depth - 1)


def _profile(path: Path, state: Mapping[Any, Any]) -> Profile:
    text = state.get("repr")
    text = text if isinstance(text, str) else ""
    if found := _HALF_LIFE.search(text):
        return HalfLife(Time(float(found[1]), TimeUnit(found[2])), unbiased=found[3] == "True")
    if (found := _SMOOTHING.search(text)) and _EVERY_STEP in text:
        return Smoothing(float(found[1]))
    raise CheckpointError(
        f"the profile of an average must be known ({shown(path)} does not say it, or not as a half-life); give it as "
        "stored=HalfLife('1000ba'), or --stored half-life=1000ba"
    )


def _origin(state: Mapping[Any, Any], profile: Profile) -> float:
    return 0.0 if profile.unit is None else dict(counters_in(state.get("origin"))).get(profile.unit, 0.0)


def _opened(path: Path, place: str, state: Mapping[Any, Any]) -> Checkpoint:
    """Open the tensors of an average: those of Composer are in two mappings, for parameters and buffers."""
    inner = f"{place}.{_MODEL}" if place else _MODEL
    held = state[_MODEL]
    if "named_parameters_dict" not in held:
        return open_checkpoint(path, inner)
    checkpoint = open_checkpoint(path, f"{inner}.named_parameters_dict")
    if not held.get("named_buffers_dict"):
        return checkpoint
    buffers = open_checkpoint(path, f"{inner}.named_buffers_dict").tensors
    return replace(checkpoint, tensors={**checkpoint.tensors, **buffers})
