"""Opens and reads files from anywhere, without running code that they may hold."""

import errno
import json
import mmap
import os
import stat
from collections.abc import Mapping, Sequence
from math import prod
from operator import itemgetter
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from polyak.compat.kinds import other_kind
from polyak.compat.modules import with_state_dicts
from polyak.compat.saved import Checksum, load_saved
from polyak.compat.tensors import copy_if_unaligned
from polyak.compat.words import shown
from polyak.errors import CheckpointError
from polyak.storage.safetensors import DTYPES

Content = Mapping[Any, Any]

_MOST_JSON_BYTES = 16 << 20
_MOST_DIMENSIONS = 64
_LFS = b"version https://git-lfs"
# Without waiting for a pipe. Windows lacks some.
_FLAGS = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
_KINDS = {
    stat.S_ISDIR: "a folder",
    stat.S_ISFIFO: "a pipe",
    stat.S_ISSOCK: "a socket",
    stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
}


def opened(path: Path) -> memoryview:
    """Return the bytes of a regular file. They are read when they are used, and may be changed without changing it.

    Args:
        path: Where it is.

    Raises:
        CheckpointError: If it is not one, is empty, or may not be read.
    """
    try:
        _require_regular(path, path.stat().st_mode)
        descriptor = os.open(path, _FLAGS)
        try:
            found = os.fstat(descriptor)
            _require_regular(path, found.st_mode)
            if not found.st_size:
                raise CheckpointError(f"the file must hold something ({shown(path)} is empty)")
            return memoryview(mmap.mmap(descriptor, found.st_size, access=mmap.ACCESS_COPY))
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        raise CheckpointError(f"the file must exist (there is no {shown(path)})") from None
    except OSError as error:
        more = "; allow more open files, as by ulimit -n 65536" if error.errno == errno.EMFILE else ""
        raise CheckpointError(f"the file must be readable ({shown(path)}: {error.strerror}){more}") from None
    except ValueError as error:  # a name with a null byte; or it has shrunk since
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"the file must be readable ({shown(path)}: {shown(error)})") from None


def _require_regular(path: Path, mode: int) -> None:
    for is_kind, name in _KINDS.items():
        if is_kind(mode):
            raise CheckpointError(f"it must be a file ({shown(path)} is {name}); give a file")


def load(
    path: Path,
    *,
    mapped: bool = True,
    strict: bool = False,
    data: memoryview | None = None,
    unchecked: dict[int, Checksum] | None = None,
) -> Content:
    """Return what is in a file, without running code that it may hold, in memory bounded by the file's size.

    Args:
        path: The path of a safetensors file, or one of ``torch.save``, compressed or not.
        mapped: Whether tensors may be the file's own bytes, which stay on disk until they are used; the file must then
            not change. They can be written to, which does not change the file.
        strict: Whether to refuse what is not a tensor, container, number or text. Otherwise something stands in for it.
        data: The file's bytes, if it is open.
        unchecked: As for `load_saved`: to read no tensor now.

    Raises:
        CheckpointError: If it cannot be read so, with the reason.
    """
    data = opened(path) if data is None else data
    try:
        content = load_bytes(data, path, mapped=mapped, strict=strict, unchecked=unchecked)
        content = content if strict else with_state_dicts(content)
    except CheckpointError as error:
        raise CheckpointError(f"{shown(path)} cannot be read: {error}") from None
    except MemoryError:
        raise CheckpointError(f"{shown(path)} cannot be read: it needs more memory than there is") from None
    if isinstance(content, (list, tuple)) and any(isinstance(one, Mapping) for one in content):
        return dict(enumerate(content))  # `--key 0` is the first
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{shown(path)} must hold a state dict or a checkpoint (got {_kind(content)}); save its state_dict()"
        )
    return content


def _kind(content: object) -> str:
    return f"a {getattr(content, 'of', type(content).__name__)}"


def load_bytes(
    data: memoryview,
    path: Path,
    *,
    mapped: bool = True,
    strict: bool = False,
    unchecked: dict[int, Checksum] | None = None,
) -> Any:
    """Return what is in the bytes of a file, as `load` does.

    Args:
        data: The bytes.
        path: The path of the file that they are all in.
        mapped: As for `load`.
        strict: As for `load`.
        unchecked: As for `load`.

    Raises:
        CheckpointError: As `load`, without the name of the file.
    """
    if bytes(data[: len(_LFS)]) == _LFS:
        raise CheckpointError("it is a pointer of Git LFS in place of the file; run git lfs pull")
    if _is_safetensors(data):
        found = _safetensors(data)
        if not mapped:
            return {name: tensor.clone() for name, tensor in found.items()}
        return found if unchecked is not None else {name: copy_if_unaligned(one) for name, one in found.items()}
    if (other := other_kind(data, path.name)) is not None:
        raise CheckpointError(f"it must be a file of torch or safetensors (it is {other})")
    if path.suffix == ".safetensors":
        raise CheckpointError("it is no safetensors file, or is truncated")
    return load_saved(data, mapped=mapped, strict=strict, unchecked=unchecked)


def _is_safetensors(data: memoryview) -> bool:
    length = int.from_bytes(data[:8], "little")
    return len(data) > 8 and bytes(data[8:9]) == b"{" and length <= len(data) - 8


def safetensors_metadata(data: memoryview) -> Mapping[str, Any]:
    """Return the texts in the header of a safetensors file; nothing for any other file.

    Args:
        data: The file's bytes.

    Raises:
        CheckpointError: If its header cannot be read.
    """
    found = _header(data).get("__metadata__") if _is_safetensors(data) else None
    return found if isinstance(found, Mapping) else {}


def _header(data: memoryview) -> Mapping[str, Any]:
    begin = 8 + int.from_bytes(data[:8], "little")
    header = _json(bytes(data[8 : min(begin, 9 + _MOST_JSON_BYTES)]), "its header")
    if not isinstance(header, Mapping):
        raise CheckpointError("it is no whole safetensors file (its header must be a mapping)")
    return header


def _safetensors(data: memoryview) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, over the file's own bytes."""
    begin = 8 + int.from_bytes(data[:8], "little")
    header = _header(data)
    about = header.get("__metadata__")
    if isinstance(about, Mapping) and "polyak.before" in about:
        raise CheckpointError(
            "it must be a model by itself, and it has differences from another file of a record; give the folder of "
            "the record"
        )
    places = {name: _place(name, one) for name, one in header.items() if name != "__metadata__"}
    at = 0
    for first, last, _, _ in sorted(places.values(), key=itemgetter(0, 1)):
        if first != at:
            raise CheckpointError("it is no whole safetensors file (its tensors must follow each other)")
        at = last
    if begin + at != len(data):
        raise CheckpointError(
            f"it is no whole safetensors file ({begin + at:,} bytes must be there, {len(data):,} are)"
        )
    found = dict[str, Tensor]()
    for name, (first, last, dtype, shape) in places.items():
        if first == last:
            found[name] = torch.empty(shape, dtype=dtype)
        else:
            found[name] = torch.frombuffer(data[begin + first : begin + last], dtype=dtype).reshape(shape)
    return found


def _place(name: str, entry: object) -> tuple[int, int, torch.dtype, tuple[int, ...]]:
    """Return where a tensor begins and ends in a safetensors file, its dtype and its shape."""
    if not isinstance(entry, Mapping):
        raise CheckpointError(f"it is no whole safetensors file ({shown(name)} must have a dtype, shape and place)")
    offsets, shape, kind = entry.get("data_offsets"), entry.get("shape"), entry.get("dtype")
    if not _are_whole(offsets) or len(offsets) != 2 or not _are_whole(shape):
        raise CheckpointError(f"it is no whole safetensors file ({shown(name)} must have a shape and a place)")
    dtype = DTYPES.get(kind) if isinstance(kind, str) else None
    if dtype is None:
        raise CheckpointError(f"its tensor {shown(name)} has the dtype {shown(kind)}, which cannot be read")
    if offsets[1] - offsets[0] != prod(shape) * dtype.itemsize:
        raise CheckpointError(f"it is no whole safetensors file ({shown(name)} must have as many bytes as its shape)")
    return offsets[0], offsets[1], dtype, tuple(shape)


def _are_whole(value: object) -> TypeGuard[list[int]]:
    """Return whether it is a short list of whole numbers, none very large: their product must be cheap."""
    return (
        isinstance(value, list)
        and len(value) <= _MOST_DIMENSIONS
        and all(type(one) is int and 0 <= one < 1 << 62 for one in value)
    )


def read_json(path: Path) -> Any:
    """Return what is in a JSON file.

    Args:
        path: Where it is.

    Raises:
        CheckpointError: If it is not one, or a very large one.
    """
    return _json(bytes(opened(path)[: _MOST_JSON_BYTES + 1]), shown(path))


def _json(text: bytes, what: str) -> Any:
    if len(text) > _MOST_JSON_BYTES:
        raise CheckpointError(f"{what} is larger than {_MOST_JSON_BYTES >> 20} MiB of JSON")
    try:
        return json.loads(text, object_pairs_hook=_once)
    except RecursionError:
        raise CheckpointError(f"{what} is nested too deeply") from None
    except ValueError as error:
        raise CheckpointError(f"{what} must be JSON ({shown(error)})") from None


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("it has a name twice")
    return found
