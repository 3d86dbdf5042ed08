"""The files of a record: safetensors, written and read one tensor at a time.

The format is public: eight bytes with the length of a JSON header, the header, then the raw tensors. safetensors' own
writers want all tensors in memory at once; its reader is used as it is.
"""

import ctypes
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from polyak.record.manifest import DTYPE_NAMES, RecordError, Stretch, TensorInfo


def _layout(tensors: Mapping[str, TensorInfo]) -> list[str]:
    """Return the names in the order of their data: the widest first, so that all are aligned."""
    return sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))


def _header(tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    offset = 0
    for name in _layout(tensors):
        info = tensors[name]
        end = offset + torch.Size(info.shape).numel() * info.dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[info.dtype], "shape": list(info.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _raw(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor without copying them. They are valid while the tensor lives."""
    size_bytes = tensor.numel() * tensor.element_size()
    if not size_bytes:
        return memoryview(b"")
    return memoryview((ctypes.c_char * size_bytes).from_address(tensor.data_ptr())).cast("B")


def write_tensors(
    path: Path, tensors: Mapping[str, TensorInfo], read: Callable[[str], Tensor], metadata: Mapping[str, str]
) -> tuple[int, str]:
    """Write a safetensors file and see that it is on disk; return its size in bytes and its SHA-256.

    Args:
        path: Where. If writing fails, nothing stays there.
        tensors: What is written. The same tensors give the same bytes.
        read: Gives each tensor by name when its turn comes; it is cast to the dtype in ``tensors``.
        metadata: For the header.

    Raises:
        OSError: If the disk refuses.
        RecordError: If a finite value has no finite float16.
    """
    assert sys.byteorder == "little", "safetensors files are little-endian"
    digest = hashlib.sha256()
    try:
        with path.open("wb") as file:
            header = _header(tensors, metadata)
            digest.update(header)
            file.write(header)
            for name in _layout(tensors):
                tensor = _cast(name, read(name), tensors[name])
                raw = _raw(tensor)
                digest.update(raw)
                file.write(raw)
                del raw, tensor  # before the next one is read
            file.flush()
            os.fsync(file.fileno())
            return file.tell(), digest.hexdigest()
    except BaseException:
        with suppress(OSError):
            path.unlink(missing_ok=True)
        raise


@torch.no_grad()
def _cast(name: str, tensor: Tensor, info: TensorInfo) -> Tensor:
    assert tuple(tensor.shape) == info.shape, (name, tensor.shape, info)
    cast = tensor.detach().to("cpu", info.dtype).contiguous()
    if info.dtype is torch.float16 and tensor.dtype is not torch.float16 and not cast.isfinite().all():
        largest = float(tensor.detach().abs().max())
        raise RecordError(
            f"a float16 record must hold values of at most 65504 (got {largest:g} in {name!r}): use bfloat16 or float32"
        )
    return cast


class StretchFile:
    """A stretch's file, open for reading. ``open_stretch`` makes it.

    Args:
        handle: Of safetensors.
    """

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def read(self, name: str) -> Tensor:
        """Return a tensor, backed by the file: do not write to it.

        Args:
            name: Which.
        """
        return self._handle.get_tensor(name)


@contextmanager
def open_stretch(folder: Path, stretch: Stretch, tensors: Mapping[str, TensorInfo]) -> Iterator[StretchFile]:
    """Open a stretch's file for the length of a ``with`` block, and see that it is what the manifest says.

    Args:
        folder: Of the record.
        stretch: Which.
        tensors: What must be in it.

    Raises:
        RecordError: If it is missing, truncated, or another file.
    """
    path = folder / stretch.file
    check_size(folder, stretch)
    try:
        with safe_open(path, framework="pt") as handle:
            slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 (a method, not a dict)
            found = {name: (one.get_dtype(), tuple(one.get_shape())) for name, one in slices.items()}
            expected = {name: (DTYPE_NAMES[info.dtype], info.shape) for name, info in tensors.items()}
            if found != expected:
                wrong = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
                raise RecordError(
                    f"{path} must hold the tensors of its manifest (other are {wrong[:5]}): it is foreign"
                )
            del slices
            yield StretchFile(handle)
    except SafetensorError as error:
        raise RecordError(f"{path} must be a safetensors file ({error}): restore it from a copy") from error


def check_size(folder: Path, stretch: Stretch) -> None:
    """See that a stretch's file is there and has its full size.

    Args:
        folder: Of the record.
        stretch: Which.

    Raises:
        RecordError: If not.
    """
    path = folder / stretch.file
    try:
        size_bytes = path.stat().st_size
    except OSError as error:
        raise RecordError(
            f"{path} cannot be opened ({error.strerror}). If a run is writing this record it may just have merged the "
            "file: open the record again. Otherwise restore the file from a copy"
        ) from error
    if size_bytes != stretch.size_bytes:
        raise RecordError(
            f"{path} must have {stretch.size_bytes} bytes (got {size_bytes}): it is damaged, restore it from a copy"
        )


def check_content(folder: Path, stretch: Stretch) -> None:
    """See that a stretch's file holds what was written, by its hash.

    Args:
        folder: Of the record.
        stretch: Which.

    Raises:
        RecordError: If not.
    """
    check_size(folder, stretch)
    path = folder / stretch.file
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != stretch.sha256:
            raise RecordError(f"{path} must have the SHA-256 in the manifest: it is damaged, restore it from a copy")
