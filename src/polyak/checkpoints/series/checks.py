"""Whether the checkpoints of a series are of one run, and complete."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from polyak.checkpoints.series.averages import Average
from polyak.checkpoints.weights import is_extra_state
from polyak.compat.files import read_json
from polyak.compat.words import listed, shown
from polyak.errors import CheckpointError
from polyak.profiles import Profile
from polyak.time import TimeUnit

_CONFIG = "config.json"
# They change with the library or from save to save, not with the run.
_VOLATILE = {
    "_name_or_path",
    "transformers_version",
    "_diffusers_version",
    "torch_dtype",
    "dtype",
    "use_cache",
    "resume",
}
_PLAIN = (str, int, float, bool)


def require_one_run(averages: Sequence[Average]) -> None:
    """Raise unless averages can be from one run, each saved once.

    Args:
        averages: Oldest first.

    Raises:
        CheckpointError: If two are of one moment, their epochs fall, or their tensors or settings differ.
    """
    by_profile = dict[tuple[Profile | None, float], list[Average]]()
    for one in averages:
        by_profile.setdefault((one.profile, one.origin), []).append(one)
    for series in by_profile.values():
        for before, after in pairwise(series):
            _require_later(before, after)
    for one in averages[:-1]:
        _require_same_tensors(one, averages[-1])
    settings = [_settings(one) for one in averages]
    for (before, first), (after, second) in pairwise(zip(averages, settings, strict=True)):
        # NaN is the same setting.
        if differing := sorted(key for key in first.keys() & second.keys() if str(first[key]) != str(second[key])):
            raise CheckpointError(
                f"checkpoints must be of one run ({shown(after.checkpoint.path)} has another {listed(differing)} than "
                f"{shown(before.checkpoint.path)}); leave a run out"
            )


def _require_later(before: Average, after: Average) -> None:
    names = shown(before.checkpoint.path), shown(after.checkpoint.path)
    if before.updates == after.updates:
        raise CheckpointError(
            f"each checkpoint must be of another step ({names[0]} and {names[1]} are both of step {after.updates}: one "
            "is a copy, or of another run); leave one out"
        )
    for unit in (TimeUnit.EPOCH, TimeUnit.BATCH):
        times = before.clock.get(unit), after.clock.get(unit)
        if times[0] is not None and times[1] is not None and times[1] < times[0]:
            raise CheckpointError(
                f"checkpoints must be of one run ({names[1]} is of a later update than {names[0]}, but of {times[1]:g} "
                f"{unit}, not {times[0]:g}); leave a run out"
            )


def _require_same_tensors(one: Average, newest: Average) -> None:
    here, there = ({name for name in a.checkpoint.tensors if not is_extra_state(name)} for a in (one, newest))
    names = shown(one.checkpoint.path), shown(newest.checkpoint.path)
    if differing := sorted(here ^ there):
        raise CheckpointError(
            f"checkpoints must be of one run ({names[0]} has other tensors than {names[1]}: {listed(differing)}); "
            "leave a run out"
        )
    for name in here:
        mine, other = one.checkpoint.tensors[name], newest.checkpoint.tensors[name]
        if mine.shape != other.shape or mine.dtype.is_floating_point != other.dtype.is_floating_point:
            raise CheckpointError(
                f"checkpoints must be of one run ({shown(name)} is {mine.dtype} of {mine.shape} in {names[0]}, and "
                f"{other.dtype} of {other.shape} in {names[1]}); leave a run out"
            )


def _settings(average: Average) -> dict[str, Any]:
    """Return what a run was started with, from its checkpoint or the file next to its weights."""
    path = average.checkpoint.path / _CONFIG
    config = read_json(path) if path.is_file() else {}
    plain = config.items() if isinstance(config, Mapping) else ()
    return {
        **average.checkpoint.settings,
        **{key: value for key, value in plain if isinstance(value, _PLAIN) and key not in _VOLATILE},
    }
