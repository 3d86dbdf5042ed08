"""Tensors that are on disk, and the files that they are in."""

import mmap
import os
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polyak.checkpoints.sharded import sizes_of
from polyak.compat.files import opened
from polyak.compat.folders import Box
from polyak.compat.saved import Checksum, compare
from polyak.compat.tensors import copy_if_unaligned
from polyak.compat.words import shown
from polyak.errors import CheckpointError

_CHUNK_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Saved:
    """Where ``torch.distributed.checkpoint`` saved a tensor.

    Args:
        fqn: Its name in the metadata.
        keys: By which it is in the mappings that were saved.
        shards: The files that have its shards: where each begins and ends in each dimension, and the name of the file.
    """

    fqn: str
    keys: tuple[str | int, ...]
    shards: tuple[tuple[Box, str], ...]


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file.

    Args:
        dtype: The dtype of the tensor.
        shape: The shape of the tensor.
        grain: What is read begins and ends at multiples of this number of elements.
        read: Returns the elements from one number to another, in order, as a tensor of one dimension.
        saved: Where it is in a folder of ``torch.distributed.checkpoint``; None in any other checkpoint.
        shards: How many shards have elements of one row: a read should have so many times as many elements.
        take: Returns a part of it, given where that begins and ends in each dimension; None to read its rows.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    grain: int
    read: Callable[[int, int], Tensor]
    saved: Saved | None = None
    shards: int = 1
    take: "Callable[[Box], StoredTensor] | None" = None

    @property
    def numel(self) -> int:
        """The number of elements."""
        return torch.Size(self.shape).numel()

    @property
    def size_bytes(self) -> int:
        """The size of the values."""
        return self.numel * self.dtype.itemsize

    def whole(self) -> Tensor:
        """Return all of it, in its shape."""
        return self.read(0, self.numel).reshape(self.shape)

    def part(self, box: Box) -> "StoredTensor":
        """Return a part of it, as a tensor of its own.

        Args:
            box: Where the part begins and ends in each dimension.
        """
        if sizes_of(box) == self.shape:
            return self
        return self._rows(box) if self.take is None else self.take(box)

    def _rows(self, box: Box) -> "StoredTensor":
        ((top, _), *others), sizes = box, sizes_of(box)
        row, narrow = torch.Size(self.shape[1:]).numel(), max(1, torch.Size(sizes[1:]).numel())

        def read(first: int, last: int) -> Tensor:
            found = self.read((top + first // narrow) * row, (top + last // narrow) * row)
            rows = found.reshape(last // narrow - first // narrow, *self.shape[1:])
            return rows[(slice(None), *(slice(*one) for one in others))].reshape(-1)

        return StoredTensor(self.dtype, sizes, narrow, read)


class Files:
    """The files of one checkpoint. They are mapped into memory, and what was read can be let go.

    Attributes:
        unchecked: The checksums that have not been compared yet, by the address of what they are of.
    """

    def __init__(self) -> None:
        self.unchecked: dict[int, Checksum] = {}
        self._open: dict[Path, tuple[memoryview, tuple[int, ...]]] = {}

    def open(self, path: Path) -> memoryview:
        """Return the bytes of a file, which are read when they are used.

        Args:
            path: Where it is.

        Raises:
            CheckpointError: If it cannot be read.
        """
        if path not in self._open:
            state = _state(path)
            data = opened(path)
            if isinstance(data.obj, mmap.mmap) and hasattr(mmap, "MADV_SEQUENTIAL"):
                data.obj.madvise(mmap.MADV_SEQUENTIAL)
            self._open[path] = data, state
        return self._open[path][0]

    @property
    def paths(self) -> list[Path]:
        """The files that were opened, which are those with weights."""
        return [*self._open]

    @property
    def states(self) -> list[tuple[str, tuple[int, ...]]]:
        """What identifies the files beyond their names: inode, size and time of the last change."""
        return [(str(path.absolute()), state) for path, (_, state) in self._open.items()]

    @property
    def size_bytes(self) -> int:
        """The total size of the files that were opened."""
        return sum(len(data) for data, _ in self._open.values())

    def stored(self, tensor: Tensor) -> StoredTensor:
        """Return a tensor whose memory is a file.

        Args:
            tensor: As it was built from the file.
        """
        shape = tuple(tensor.shape)
        flat = tensor.reshape(-1) if tensor.is_contiguous() else None
        grain = 1 if flat is not None else max(1, torch.Size(shape[1:]).numel())

        def read(first: int, last: int) -> Tensor:
            self.check(tensor)
            if flat is not None:
                return copy_if_unaligned(flat[first:last])
            return tensor[first // grain : last // grain].reshape(-1)

        def take(box: Box) -> StoredTensor:
            return self.stored(tensor[tuple(slice(*one) for one in box)])

        return StoredTensor(tensor.dtype, shape, grain, read, take=take)

    def check(self, tensor: Tensor) -> None:
        """Check the checksum of a tensor's bytes, once.

        Args:
            tensor: As it was built from the file.

        Raises:
            CheckpointError: If the bytes are not those that were saved.
        """
        address = tensor.untyped_storage().data_ptr()
        if (pending := self.unchecked.get(address)) is None:
            return
        checksum = 0
        for begin in range(0, len(pending.data), _CHUNK_BYTES):
            checksum = zlib.crc32(pending.data[begin : begin + _CHUNK_BYTES], checksum)
            if len(pending.data) > 2 * _CHUNK_BYTES:
                self.release()
        compare(checksum, pending.expected, pending.entry)
        del self.unchecked[address]

    def release(self) -> None:
        """Release the memory into which files were read. They are read again when they are used."""
        for data, _ in self._open.values():
            if isinstance(data.obj, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
                data.obj.madvise(mmap.MADV_DONTNEED)

    def require_unchanged(self) -> None:
        """Raise if a file was written to since it was opened.

        Raises:
            CheckpointError: If one was.
        """
        for path, (_, state) in self._open.items():
            if _state(path) != state:
                raise CheckpointError(
                    f"a checkpoint must not change while it is read ({shown(path)} did); wait until it is complete"
                )


def _state(path: Path) -> tuple[int, ...]:
    try:
        found = os.stat(path)  # noqa: PTH116  as the file is opened
    except (OSError, ValueError):
        return ()  # to open it says why
    return found.st_ino, found.st_size, found.st_mtime_ns


@dataclass(frozen=True, slots=True)
class Found:
    """What a reader found at a path.

    Args:
        content: Mappings and lists, with `StoredTensor` or tensors whose memory is a file in them.
        layout: By tensor, the name of the file that it is in, for a folder of several such files.
        clock: When it was saved, as files next to the weights say: counts by their names.
        format: What exactly it is, for people; empty for what the reader says.
        folder: In which folder of the checkpoint the weights are; empty for itself.
        blobs: Extra states of ``torch.distributed.checkpoint`` by their names, each with its keys and its bytes.
    """

    content: Mapping[Any, Any]
    layout: Mapping[str, str] = field(default_factory=dict)
    clock: Mapping[str, Any] = field(default_factory=dict)
    format: str = ""
    folder: str = ""
    blobs: Mapping[str, tuple[tuple[str | int, ...], memoryview]] = field(default_factory=dict)
