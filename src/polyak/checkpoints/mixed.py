"""Checks that checkpoints are from one run. Two runs in one folder are a mistake that an average would hide."""

import os
import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from polyak.checkpoints.copies import copies_in
from polyak.checkpoints.opening import Checkpoint
from polyak.checkpoints.provenance import provenance_of
from polyak.checkpoints.snapshots import Snapshot, average_named
from polyak.compat.files import read_json
from polyak.compat.words import listed, shown
from polyak.errors import CheckpointError
from polyak.time import TimeUnit

_CONFIG = "config.json"
_SEGMENT = re.compile(r"\d{10,20}-\d{10,20}-[0-9a-f]{16}\.safetensors")  # as a Recorder names them
# They change with the library, not with the model.
_VOLATILE = {"_name_or_path", "transformers_version", "_diffusers_version", "torch_dtype", "dtype", "use_cache"}


def require_one_run(opened: Sequence[Checkpoint]) -> None:
    """See that the checkpoints of each folder can be of one run.

    Two are not if they were saved at the same step, if their steps grow while their epochs fall, if one is an average
    by its name and the other is none or of another kind, if their weights are the same, or if their hyper-parameters
    or the configurations next to their weights differ.

    Args:
        opened: The checkpoints.

    Raises:
        CheckpointError: If they are of several.
    """
    _require_no_outputs(opened)
    folders = dict[Path, list[Checkpoint]]()
    for one in opened:
        folders.setdefault(one.path.absolute().parent, []).append(one)
    for inside in folders.values():
        _require_no_segments(inside)
        _require_one_width(inside)
        _require_one_kind(inside)
        _require_steps_to_grow(inside)
        _require_one_config([one for one in inside if (one.path / _CONFIG).is_file()])
        _require_same_settings([one for one in inside if one.settings])
        _require_no_copies(inside)


def _require_no_outputs(opened: Sequence[Checkpoint]) -> None:
    """See that none is an average of others: the output of a command is often in the folder that it read."""
    given = {os.path.realpath(one.path): one.path for one in opened}
    for one in opened:
        here = Path(os.path.realpath(one.path)).parent
        made_from = [os.path.normpath(here / str(said.get("path"))) for said in provenance_of(one.path)]
        if inside := [given[path] for path in made_from if path in given]:
            raise CheckpointError(
                f"a checkpoint must not be averaged with an average of it ({shown(one.path)} was made from "
                f"{listed(inside)}); leave one out, or average all with --mixed"
            )


def _require_no_segments(opened: Sequence[Checkpoint]) -> None:
    if found := [one.path for one in opened if _SEGMENT.fullmatch(one.path.name)]:
        raise CheckpointError(
            f"segments of a record are of different lengths ({shown(found[0])} is one): polyak reconstruct "
            f"{shown(found[0].parent)} gives their averages; average them as they are with --mixed"
        )


def _require_one_width(opened: Sequence[Checkpoint]) -> None:
    widths = {found.width: one.path for one in opened if (found := Snapshot.named(one.path.name))}
    if len(widths) > 1:
        (width, path), (other, another), *_ = widths.items()
        raise CheckpointError(
            f"snapshots must be averages of one width ({shown(path)} is of {width}, {shown(another)} of {other}); give "
            f"those of one, such as {shown(f'*-{width}{path.suffix}')}, or average all with --mixed"
        )


def _require_one_kind(opened: Sequence[Checkpoint]) -> None:
    """See that names say of all that they are averages of one decay, or of none: a run may write both side by side."""
    kinds = {average_named(one.path.name): one.path for one in opened}
    if len(kinds) > 1:
        (kind, path), (other, another), *_ = kinds.items()
        raise CheckpointError(
            f"checkpoints must be averages of one kind, or training weights (by its name {shown(path)} is "
            f"{kind or 'no average'}, and {shown(another)} {other or 'no average'}); give those of one by a pattern, "
            "or average all with --mixed"
        )


def _require_no_copies(opened: Sequence[Checkpoint]) -> None:
    if (found := copies_in(opened)) is not None:
        raise CheckpointError(
            f"each checkpoint must have other weights ({shown(found[0].path)} and {shown(found[1].path)} have the "
            "same: one is a copy); leave one out, or average both with --mixed"
        )


def _require_steps_to_grow(opened: Iterable[Checkpoint]) -> None:
    known = sorted((one for one in opened if TimeUnit.BATCH in one.moment), key=lambda one: one.moment[TimeUnit.BATCH])
    for before, after in pairwise(known):
        step = after.moment[TimeUnit.BATCH]
        if before.moment[TimeUnit.BATCH] == step:
            raise CheckpointError(
                f"each checkpoint must be of another step ({shown(before.path)} and {shown(after.path)} are both of "
                f"step {step:g}: one is a copy, or of another run); leave one out, or average both with --mixed"
            )
        epochs = [one.moment.get(TimeUnit.EPOCH, 0.0) for one in (before, after)]
        if TimeUnit.EPOCH in before.moment and TimeUnit.EPOCH in after.moment and epochs[1] < epochs[0]:
            raise CheckpointError(
                f"checkpoints must be of one run ({shown(after.path)} is of a later step than {shown(before.path)}, "
                f"but of an earlier epoch: {epochs[1]:g}, not {epochs[0]:g}); leave a run out, or average all with "
                "--mixed"
            )


def _require_one_config(opened: Sequence[Checkpoint]) -> None:
    configs = [(one, _settings(read_json(one.path / _CONFIG))) for one in opened]
    for (before, first), (after, second) in pairwise(configs):
        if differing := sorted(str(key) for key in first.keys() | second.keys() if first.get(key) != second.get(key)):
            raise CheckpointError(
                f"checkpoints must be of one run (in {_CONFIG} of {shown(after.path)} is another {listed(differing)} "
                f"than in that of {shown(before.path)}); leave a run out, or average all with --mixed"
            )


def _require_same_settings(opened: Sequence[Checkpoint]) -> None:
    for before, after in pairwise(opened):
        both = before.settings.keys() & after.settings.keys()  # a later release may save more of them
        differing = [name for name in before.settings if name in both and _differ(before, after, name)]
        if differing:
            name = differing[0]
            values = f"{name} is {shown(after.settings[name])}, not {shown(before.settings[name])}"
            more = f", and {listed(differing[1:])} differ" if len(differing) > 1 else ""
            raise CheckpointError(
                f"checkpoints must be of one run (in {shown(after.path)} {values} as in {shown(before.path)}{more}); "
                "leave a run out, or average all with --mixed"
            )


def _differ(before: Checkpoint, after: Checkpoint, name: str) -> bool:
    first, second = before.settings[name], after.settings[name]
    return first != second and str(first) != str(second)  # NaN is the same setting


def _settings(config: Any) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in _VOLATILE} if isinstance(config, dict) else {}
