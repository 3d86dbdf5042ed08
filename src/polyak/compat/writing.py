"""Keeps an average as a safetensors file."""

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from polyak.compat.found import Averaged
from polyak.compat.saved import most_bytes
from polyak.compat.words import listed, shown
from polyak.errors import CheckpointError
from polyak.storage.atomic import replacing
from polyak.storage.safetensors import DTYPE_NAMES, TensorInfo, write_tensors


def write(found: Averaged, path: Path, source: Path) -> None:
    """Keep an average as a safetensors file that says where it is from. It is complete, or ``path`` is as it was.

    Args:
        found: What ``read`` found.
        path: The path of the file.
        source: What was read.

    Raises:
        CheckpointError: If safetensors cannot hold it, or it would be far larger than the source.
        OSError: If the disk refuses.
    """
    check_writable(found.tensors, source)
    metadata = {
        "format": "pt",
        "polyak.source": _text(Path(os.path.realpath(source)).name),
        "polyak.source_format": _text(found.format),
        "polyak.notes": _text("; ".join(found.notes)),
    }
    if source.is_file():
        with source.open("rb") as file:
            metadata["polyak.source_sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    infos = {name: TensorInfo.of(tensor, averaged=False) for name, tensor in found.tensors.items()}
    try:
        with replacing(path) as temporary:
            write_tensors(temporary, infos, found.tensors.__getitem__, metadata)
    except OSError as error:
        raise OSError(f"{shown(path)} must be a file that can be written ({error.strerror}); choose another") from error
    except (MemoryError, RuntimeError):  # torch's allocator
        raise CheckpointError("there must be memory for each tensor in turn; use a machine with more") from None


def check_writable(tensors: Mapping[str, Tensor], source: Path) -> None:
    """Raise unless a safetensors file can hold what was found.

    Args:
        tensors: The tensors, by name.
        source: What was read.

    Raises:
        CheckpointError: If a tensor cannot be in one, or all are far larger than the source.
    """
    if other := [name for name, tensor in tensors.items() if tensor.dtype not in DTYPE_NAMES]:
        dtypes = listed(f"{name}: {tensors[name].dtype}" for name in other)
        raise CheckpointError(
            f"all tensors must have a dtype of safetensors (got {dtypes}); convert them to another, and save again"
        )
    require_names(tensors)
    held = sum(one.stat().st_size for one in (source.iterdir() if source.is_dir() else [source]) if one.is_file())
    claimed = {name: tensor.numel() * tensor.dtype.itemsize for name, tensor in tensors.items()}
    if sum(claimed.values()) > most_bytes(held):
        name = max(claimed, key=claimed.__getitem__)
        raise CheckpointError(
            f"the tensors must not be far larger than the file ({shown(name)} repeats its numbers to {claimed[name]:,} "
            f"bytes, of a file of {held:,}); save it contiguous"
        )


def require_names(names: Iterable[str]) -> None:
    """See that a safetensors file can hold names of tensors.

    Args:
        names: Which.

    Raises:
        CheckpointError: If it cannot.
    """
    for name in names:
        if name == "__metadata__" or _text(name) != name:
            raise CheckpointError(
                f"names must be text that safetensors can hold (got {shown(name)}); rename the tensor"
            )


def _text(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()
