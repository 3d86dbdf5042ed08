"""Writes an average of a record to a safetensors file, a tensor at a time."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from polyak.profiles import Profile
from polyak.record.combining import combine
from polyak.record.fitting import Fit
from polyak.record.passes import averaged_as, opened, weights
from polyak.storage.atomic import replacing
from polyak.storage.safetensors import disk_errors, write_tensors

if TYPE_CHECKING:
    from polyak.record.reader import Record


def export(  # noqa: PLR0917  the average, and all that is written about it
    record: "Record", profile: Profile, fitted: Fit, error: float, path: Path, dtype: torch.dtype | None
) -> None:
    """Write an average, with its profile, moment and error in the file's metadata.

    Args:
        record: What is read.
        profile: As asked for.
        fitted: What ``fit`` returned for it.
        error: The estimate of its error.
        path: The file. An existing one is replaced once the new one is complete.
        dtype: As for ``Record.average``.

    Raises:
        RecordError: As ``Record.average``, and if the disk refuses.
    """
    end, raw = fitted.segments[-1].end, bool(fitted.raw)
    shares = weights(fitted, len(fitted.segments), raw=raw)
    metadata = {
        "format": "pt",
        "polyak.profile": repr(profile),
        "polyak.moment": json.dumps({"updates": end.updates, **end.timestamp.state_dict()}),
        "polyak.error_estimate": f"{error:.3g}",
        "polyak.record": record.folder.resolve().name.encode(errors="backslashreplace").decode(),
    }
    names = {name: name for name in record.tensors} | dict(record.aliases)
    infos = {name: averaged_as(record.tensors[kept], dtype) for name, kept in names.items()}
    with disk_errors(f"exporting to {path}"), opened(record, fitted.segments, raw=raw) as files:

        def read(name: str) -> Tensor:
            info = record.tensors[names[name]]
            if not info.averaged:
                return files[len(fitted.segments) - 1].read(names[name])
            total = torch.empty(info.shape, dtype=torch.complex128 if info.dtype.is_complex else torch.float64)
            combine(files, names[name], info, [shares], [total])
            return total

        with replacing(path) as temporary:
            write_tensors(temporary, infos, read, metadata)
