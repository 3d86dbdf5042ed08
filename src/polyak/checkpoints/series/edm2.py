"""Snapshots of EDM2: ``network-snapshot-0001234-0.050.pkl``, power functions of relative width 0.050 in images."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from polyak.checkpoints.opening import open_checkpoint
from polyak.checkpoints.series.averages import Average, Options, Series
from polyak.checkpoints.snapshots import Snapshot
from polyak.compat.files import read_json
from polyak.compat.words import listed, shown
from polyak.errors import CheckpointError, ProfileError
from polyak.profiles import PowerFunction
from polyak.time import TimeUnit

KIND = "snapshots of EDM2"
_SETTINGS = "training_options.json"


def accepts(path: Path, content: Mapping[Any, Any]) -> bool:
    """Return whether a checkpoint is named like a snapshot of EDM2.

    Args:
        path: The path of the checkpoint.
        content: What is in it.
    """
    del content
    return Snapshot.named(path.name) is not None


def read(paths: Sequence[Path], options: Options) -> Series:
    """Return the averages in snapshots.

    Args:
        paths: The paths of the snapshots.
        options: What the user says.

    Raises:
        CheckpointError: If a snapshot cannot be read, or they are of several runs.
    """
    runs = sorted({found.run for path in paths if (found := Snapshot.named(path.name))})
    if len(runs) > 1:
        raise CheckpointError(
            f"snapshots must be of one run (their names begin with {listed(runs)}); give a pattern, such "
            f"as {shown(str(paths[0].parent / runs[0]))}-*"
        )
    return Series(KIND, [_average(path, options) for path in paths])


def _average(path: Path, options: Options) -> Average:
    found = Snapshot.named(path.name)
    assert found is not None
    if options.stored is not None:
        raise CheckpointError(f"the name of a snapshot says its profile ({shown(path)}); leave out stored")
    try:
        profile = PowerFunction(sigma_rel=float(found.width), unit=TimeUnit.SAMPLE)
    except ProfileError as error:
        raise CheckpointError(f"the profile of a snapshot must be known ({shown(path)}: {error}); rename it") from None
    if not found.images:
        raise CheckpointError(f"a snapshot must be of a run that has begun ({shown(path)} is of image 0); leave it out")
    batch_size = options.batch_size or _batch_size(path.parent)
    steps = max(1, round(found.images / batch_size))
    checkpoint = open_checkpoint(path, options.key, options.prefix)
    clock = {TimeUnit.SAMPLE: float(found.images), TimeUnit.BATCH: float(steps)}
    return Average(checkpoint, path.name, steps, clock, profile, copied=checkpoint.buffers)


def _batch_size(folder: Path) -> int:
    """Return the number of images in a batch, from the options of the run; 1 if they do not say it."""
    path = folder / _SETTINGS
    settings = read_json(path) if path.is_file() else None
    found = settings.get("batch_size") if isinstance(settings, Mapping) else None
    return found if type(found) is int and found > 0 else 1
