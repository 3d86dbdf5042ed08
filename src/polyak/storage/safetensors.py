"""Writes safetensors files, one tensor at a time.

The format is public: eight bytes with the length of a JSON header, the header, then the raw tensors. The library's own
writers want all tensors in memory at the same time.
"""

import ctypes
import errno
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from polyak.errors import RecordError
from polyak.storage.atomic import flush

# The names that safetensors gives to dtypes.
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_ADVICE = {
    errno.ENOSPC: "make room on the disk",
    errno.EDQUOT: "make room within the quota",
    errno.EACCES: "make the folder writable, or record to another",
    errno.EPERM: "make the folder writable, or record to another",
    errno.EROFS: "record to a disk that can be written",
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """How a file keeps a tensor.

    Args:
        dtype: The dtype of the file.
        shape: The shape of the tensor, or of the local shard that the file has.
        averaged: Whether a segment holds its mean, or its last value.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    averaged: bool

    @classmethod
    def of(cls, tensor: Tensor, *, averaged: bool, dtype: torch.dtype | None = torch.float32) -> Self:
        """Return how ``tensor`` is kept.

        Args:
            tensor: Any tensor.
            averaged: Whether a segment holds its mean, or its last value.
            dtype: The dtype for the means of floating-point tensors: float32, float16, bfloat16, or int8 for
                differences; None for float16. With the last two, tensors in float64 keep that.

        Example:
            >>> TensorInfo.of(torch.zeros(2, dtype=torch.float64), averaged=True)
            TensorInfo(dtype=torch.float32, shape=(2,), averaged=True)
        """
        if dtype is None or dtype == torch.int8:
            dtype = torch.float64 if tensor.dtype == torch.float64 else dtype or torch.float16
        kept = dtype if averaged and tensor.is_floating_point() else tensor.dtype
        return cls(kept, tuple(tensor.shape), averaged)


@contextmanager
def disk_errors(doing: str) -> Iterator[None]:
    """Turn an ``OSError`` in a ``with`` block into a ``RecordError`` that says what to do.

    Args:
        doing: What the block does: "writing a file".

    Raises:
        RecordError: Instead of an ``OSError``.
    """
    try:
        yield
    except RecordError:
        raise
    except OSError as error:
        advice = _ADVICE.get(error.errno or 0, "repair the disk")
        raise RecordError(
            f"{doing} failed: {error.strerror or error}. What was on disk before is unchanged: {advice} and continue"
        ) from error


def _order(tensors: Mapping[str, TensorInfo]) -> list[str]:
    """Return the names in the order of their data: the widest first, so that all tensors are aligned."""
    return sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))


def layout_of(tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int], int]:
    """Return the header of a file, the place of each tensor in the file in order, and the size of the file.

    Args:
        tensors: What is in the file.
        metadata: The metadata for the header.

    Example:
        >>> header, places, size = layout_of({"a": TensorInfo(torch.float32, (2,), averaged=False)}, {})
        >>> places["a"] == len(header), size - len(header)
        (True, 8)
    """
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    offset = 0
    for name in _order(tensors):
        info = tensors[name]
        end = offset + torch.Size(info.shape).numel() * info.dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[info.dtype], "shape": list(info.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    begin = 8 + len(text)
    places = {name: begin + header[name]["data_offsets"][0] for name in _order(tensors)}
    return len(text).to_bytes(8, "little") + text, places, begin + offset


def raw_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor without a copy. They are valid while the tensor exists.

    Args:
        tensor: Contiguous, on the CPU.
    """
    size_bytes = tensor.numel() * tensor.element_size()
    if not size_bytes:
        return memoryview(b"")
    return memoryview((ctypes.c_char * size_bytes).from_address(tensor.data_ptr())).cast("B")


def write_tensors(
    path: Path, tensors: Mapping[str, TensorInfo], read: Callable[[str], Tensor], metadata: Mapping[str, str]
) -> tuple[int, str]:
    """Write a safetensors file and flush it to the disk; return its size in bytes and its SHA-256.

    Args:
        path: A temporary name. If writing fails, nothing stays there.
        tensors: What is written. The same tensors give the same bytes.
        read: Returns a tensor by name. It is called for one at a time, and the result is cast to its dtype in
            ``tensors``.
        metadata: The metadata for the header of the file.

    Raises:
        OSError: If the disk refuses.
        RecordError: If a finite value is infinite in the dtype of the file.
    """
    assert sys.byteorder == "little", "safetensors files are little-endian"
    digest = hashlib.sha256()
    try:
        with path.open("wb") as file:
            header, _, _ = layout_of(tensors, metadata)
            digest.update(header)
            file.write(header)
            for name in _order(tensors):
                tensor = _cast(name, read(name), tensors[name])
                raw = raw_bytes(tensor)
                digest.update(raw)
                file.write(raw)
                del raw, tensor  # before the next one is read
            flush(file)
            return file.tell(), digest.hexdigest()
    except BaseException:
        with suppress(OSError):
            path.unlink(missing_ok=True)
        raise


@torch.no_grad()
def _cast(name: str, tensor: Tensor, info: TensorInfo) -> Tensor:
    assert tuple(tensor.shape) == info.shape, (name, tensor.shape, info)
    cast = tensor.detach().to("cpu", info.dtype).contiguous()
    if cast.dtype != tensor.dtype and _overflows(tensor, cast):
        largest, most = float(tensor.detach().abs().max()), torch.finfo(info.dtype).max
        raise RecordError(
            f"values must be at most {most:g} to be kept as {info.dtype} (got {largest:g} in {name!r}): use a dtype "
            "with a wider range, such as bfloat16 or float32"
        )
    return cast


def _overflows(tensor: Tensor, cast: Tensor) -> bool:
    """Return whether a finite value became infinite when it was cast."""
    if not (cast.is_floating_point() or cast.is_complex()) or bool(cast.isfinite().all()):
        return False
    return bool((tensor.detach().to("cpu").isfinite() & ~cast.isfinite()).any())


def cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor on the CPU in another dtype.

    Args:
        name: The tensor's name, for errors.
        tensor: Any tensor.
        dtype: The dtype of the result.

    Raises:
        RecordError: If a finite value is infinite in that dtype.
    """
    return _cast(name, tensor, TensorInfo(dtype, tuple(tensor.shape), averaged=False))
