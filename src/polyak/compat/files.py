"""Files from anywhere, opened and read without running code that they may hold."""

import json
import mmap
import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from polyak.compat.saved import load_saved
from polyak.compat.words import shown
from polyak.errors import CheckpointError

Content = Mapping[Any, Any]

_MOST_JSON_BYTES = 16 << 20
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
        CheckpointError: If it is none, is empty, or may not be read.
    """
    try:
        _require_regular(path, path.stat().st_mode)
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
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
        raise CheckpointError(f"the file must be readable ({shown(path)}: {error.strerror})") from None
    except ValueError as error:  # a name with a null byte; or it has shrunk since
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"the file must be readable ({shown(path)}: {shown(error)})") from None


def _require_regular(path: Path, mode: int) -> None:
    for is_kind, name in _KINDS.items():
        if is_kind(mode):
            raise CheckpointError(f"it must be a file ({shown(path)} is {name}); give a file")


def load(path: Path, *, mapped: bool = True, strict: bool = False) -> Content:
    """Return what is in a file, without running code that it may hold, in memory bounded by the file's size.

    Args:
        path: Of a safetensors file, or one of ``torch.save``, compressed or not.
        mapped: Whether tensors may be the file's own bytes, which stay on disk until they are used; the file must then
            not change. They can be written to, which does not change the file.
        strict: Whether to refuse what is no tensor, container, number or text. Otherwise something stands in for it.

    Raises:
        CheckpointError: If it cannot be read so, with the reason.
    """
    data = opened(path)
    try:
        content = load_bytes(data, path, mapped=mapped, strict=strict)
    except CheckpointError as error:
        raise CheckpointError(f"{shown(path)} cannot be read: {error}") from None
    except MemoryError:
        raise CheckpointError(f"{shown(path)} cannot be read: it needs more memory than there is") from None
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{shown(path)} must hold a state dict or a checkpoint (got {_kind(content)}); save its state_dict()"
        )
    return content


def _kind(content: object) -> str:
    return f"a {getattr(content, 'of', type(content).__name__)}"


def load_bytes(data: memoryview, path: Path, *, mapped: bool = True, strict: bool = False) -> Any:
    """Return what is in the bytes of a file, as `load` does.

    Args:
        data: The bytes.
        path: Of the file that they are all of.
        mapped: As for `load`.
        strict: As for `load`.

    Raises:
        CheckpointError: As `load`, without the name of the file.
    """
    if _is_safetensors(data):
        found = _safetensors(data, path)
        return found if mapped else {name: tensor.clone() for name, tensor in found.items()}
    if path.suffix == ".safetensors":
        raise CheckpointError("it is no safetensors file, or is truncated")
    return load_saved(data, mapped=mapped, strict=strict)


def _is_safetensors(data: memoryview) -> bool:
    length = int.from_bytes(data[:8], "little")
    return len(data) > 8 and bytes(data[8:9]) == b"{" and length <= len(data) - 8


def _safetensors(data: memoryview, path: Path) -> dict[str, Tensor]:
    length = int.from_bytes(data[:8], "little")
    header = _json(bytes(data[8 : 8 + min(length, _MOST_JSON_BYTES + 1)]), "its header")
    unread = {n: one.get("dtype") for n, one in header.items() if isinstance(one, Mapping) and n != "__metadata__"}
    found = dict[str, Tensor]()
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  not a mapping
                try:
                    found[name] = file.get_tensor(name)
                except (RuntimeError, AttributeError, KeyError, TypeError) as error:
                    raise CheckpointError(
                        f"its tensor {shown(name)} has the dtype {shown(unread.get(name))}, which cannot be read ("
                        f"{shown(error)})"
                    ) from None
    except (SafetensorError, OSError, RuntimeError) as error:
        raise CheckpointError(f"it is no whole safetensors file ({shown(error)})") from None
    return found


def read_json(path: Path) -> Any:
    """Return what is in a JSON file.

    Args:
        path: Where it is.

    Raises:
        CheckpointError: If it is none, or a very large one.
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
