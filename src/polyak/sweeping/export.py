"""Writes an average of a record, with the statistics of BatchNorm layers recomputed for it."""

import os
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file

from polyak.profiles import Profile
from polyak.record import Record
from polyak.storage.atomic import replacing, require_new, temporary_path
from polyak.storage.safetensors import TensorInfo, disk_errors, write_tensors
from polyak.sweeping.candidates import Batchnorm, recomputed
from polyak.time import Time


def export(
    record: Record,
    profile: Profile,
    path: str | Path,
    batchnorm: Batchnorm | None = None,
    *,
    at: Time | str | None = None,
    overwrite: bool = False,
) -> None:
    """Write an average as ``Record.export`` does, with recomputed BatchNorm statistics if ``batchnorm`` is given.

    Args:
        record: The record.
        profile: As for ``Record.average``.
        path: The file to write.
        batchnorm: As for ``sweep``.
        at: As for ``Record.average``.
        overwrite: Whether an existing file is replaced, once the new one is complete.

    Raises:
        ExistsError: If there is a file already.
        ProfileError: If the record does not resolve the profile.
        RecordError: If a file is missing, truncated or corrupt, or cannot be written.
    """
    if batchnorm is None:
        record.export(profile, path, at, overwrite=overwrite)
        return
    path = Path(path)
    require_new(path, overwrite=overwrite)
    without = temporary_path(path.with_name(f"{path.name}.averaged"), process=os.getpid())
    try:
        record.export(profile, without, at, overwrite=True)
        with safe_open(without, framework="pt") as file:
            metadata = {**file.metadata(), "polyak.batchnorm": "recomputed"}
        state = recomputed(load_file(without), batchnorm)
    finally:
        without.unlink(missing_ok=True)
    infos = {name: TensorInfo(one.dtype, tuple(one.shape), averaged=False) for name, one in state.items()}
    with disk_errors(f"exporting to {path}"), replacing(path) as temporary:
        write_tensors(temporary, infos, state.__getitem__, metadata)
