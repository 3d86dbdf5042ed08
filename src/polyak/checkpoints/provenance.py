"""What an average was made from. `polyak average` and `polyak soup` write it into their outputs.

A safetensors file has it in its header, a file of torch in an entry of the archive that ``torch.load`` does not look
at, and a folder of ``torch.distributed.checkpoint`` in a file of its own.
"""

import json
import os
import zipfile
from pathlib import Path
from typing import Any

from polyak.checkpoints.companions import PROVENANCE
from polyak.checkpoints.digests import placeholder
from polyak.checkpoints.plan import Plan
from polyak.checkpoints.units import SAID
from polyak.compat.files import opened, read_json, safetensors_metadata
from polyak.compat.pickles import Window

_MOST_BYTES = 16 << 20


def made_from(plan: Plan, path: Path, fingerprint: str) -> list[dict[str, object]]:
    """Return what an average is made from: of each checkpoint the path from the output, hashes, moment and weight.

    Args:
        plan: What is averaged.
        path: The path of the output.
        fingerprint: The fingerprint of the plan; placeholders stand for the hashes.
    """
    here = Path(os.path.realpath(path)).parent
    return [
        {
            "path": Path(os.path.relpath(os.path.realpath(one.path), here)).as_posix(),
            "weights": one.place,
            "moment": {str(unit): value for unit, value in one.moment.items()},
            "weight": weight,
            "sha256": {file.name: placeholder(file, fingerprint) for file in one.files.paths},
        }
        for one, weight in zip(plan.checkpoints, plan.weights, strict=True)
    ]


def provenance_of(path: str | Path) -> list[dict[str, Any]]:
    """Return what an average was made from, one entry for each checkpoint; nothing for a file that does not say it.

    Args:
        path: The path of a file or a folder that `average_checkpoints` or a command wrote.

    Raises:
        CheckpointError: If it cannot be read.

    Example:
        >>> import torch
        >>> from polyak.checkpoints import average_checkpoints
        >>> for step in (1, 2):
        ...     torch.save({"w": torch.ones(2)}, f"step-{step}.pt")
        >>> _ = average_checkpoints(["step-1.pt", "step-2.pt"], "averaged.pt")
        >>> [(one["path"], one["moment"], one["weight"]) for one in provenance_of("averaged.pt")]
        [('step-1.pt', {'ba': 1.0}, 0.5), ('step-2.pt', {'ba': 2.0}, 0.5)]
    """
    path = Path(path)
    if path.is_dir():
        said = read_json(path / PROVENANCE) if (path / PROVENANCE).is_file() else _in_folder(path)
    else:
        said = _in_file(path)
    return [one for one in said if isinstance(one, dict)] if isinstance(said, list) else []


def _in_folder(path: Path) -> object:
    files = sorted(path.glob("*.safetensors"))
    return _in_file(files[0]) if files else None


def _in_file(path: Path) -> object:
    data = opened(path)
    if bytes(data[:4]) == b"PK\x03\x04":
        return _in_archive(data)
    text = safetensors_metadata(data).get(SAID)
    return _parsed(text) if isinstance(text, str) else None


def _in_archive(data: memoryview) -> object:
    try:
        with zipfile.ZipFile(Window(data, None, _MOST_BYTES)) as archive:
            entries = [one for one in archive.infolist() if one.filename.rpartition("/")[2] == PROVENANCE]
            if len(entries) != 1 or entries[0].file_size > _MOST_BYTES:
                return None
            return _parsed(archive.read(entries[0]).decode("utf-8", "replace"))
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError, EOFError, OSError):
        return None


def _parsed(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
