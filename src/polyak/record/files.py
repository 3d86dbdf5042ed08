"""Reads the files of a record one tensor at a time, and compares them with their hashes.

A segment is one safetensors file, or, where several ranks have written it together, a folder with a file of each rank.
"""

import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from polyak.errors import RecordError
from polyak.record.differences import SCALE, from_steps, is_difference, scale_shape
from polyak.record.manifest import Segment
from polyak.storage.safetensors import DTYPES, TensorInfo

# Some of the elements of a tensor: for each dimension a slice with a start and a stop.
Box = tuple[slice, ...]
# Returns a box of a tensor, or all of it for None. A source, while it is open, gives what is written.
Read = Callable[[str, Box | None], Tensor]
Source = AbstractContextManager[Read]

# In the folder of a segment: its files, with the size and hash of each.
PARTS = "parts.json"
_PART = re.compile(r"\d{5,}\.safetensors")
# Where torch.distributed.checkpoint notes, in a safetensors file, the offsets of shards in the full tensors.
PLACES = "DCP_SHARDING_INFO"
OFFSETS = "saved_offsets"


@dataclass(frozen=True, slots=True)
class _Stored:
    """A box of a tensor that one file holds; it may be all of the tensor."""

    file: "_Open"
    box: Box
    dtype: torch.dtype
    is_difference: bool = False

    def full(self, name: str) -> Tensor:
        handle = self.file.checked()
        found = handle.get_tensor(name)
        return from_steps(found, handle.get_tensor(f"{name}{SCALE}")) if self.is_difference else found

    def part(self, name: str, box: Box) -> Tensor:
        handle, inner = self.file.checked(), _seen_from(box, self.box)
        found = handle.get_slice(name)[inner]
        if not self.is_difference:
            return found
        scales = handle.get_tensor(f"{name}{SCALE}")
        return from_steps(found, scales[inner[:1]] if len(inner) > 1 else scales)


@dataclass(slots=True)
class _Open:
    """A file that is open for reading. It is checked against its hash before the first read."""

    path: Path
    sha256: str
    handle: Any
    verified: set[Path]

    def checked(self) -> Any:
        if self.path not in self.verified:
            _check_hash(self.path, self.sha256)
            self.verified.add(self.path)
        return self.handle


def full_box(shape: Sequence[int]) -> Box:
    """Return the box that is all of a tensor.

    Args:
        shape: The shape of the tensor.
    """
    return tuple(slice(0, size) for size in shape)


class SegmentFile:
    """A segment, open for reading. ``open_segment`` makes it.

    Args:
        tensors: What the segment holds, by name.
        stored: Where each tensor is stored, by name.
        before: The segment before, if this one has differences from it.
    """

    def __init__(
        self,
        tensors: Mapping[str, TensorInfo],
        stored: Mapping[str, Sequence[_Stored]],
        before: "SegmentFile | None" = None,
    ) -> None:
        self._tensors = tensors
        self._stored = stored
        self._before = before

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype in which this segment keeps a tensor: int8 if that is a difference.

        Args:
            name: The tensor's name.
        """
        return self._stored[name][0].dtype if self._stored[name] else self._tensors[name].dtype

    def is_difference(self, name: str) -> bool:
        """Return whether this segment keeps a tensor as the difference from the segment before.

        Args:
            name: The tensor's name.
        """
        return bool(self._stored[name]) and self._stored[name][0].is_difference

    def read(self, name: str, box: Box | None = None, before: Tensor | None = None) -> Tensor:
        """Return a tensor, backed by the file if it is in one file: do not write to it.

        Args:
            name: The tensor's name.
            box: Which of its elements; None for all.
            before: These elements in the segment before, so that they are not read again for a difference from them.

        Raises:
            RecordError: If a file that it is read from does not have the hash in the manifest.
        """
        found = self._read(name, box)
        if not self.is_difference(name):
            return found
        assert self._before is not None  # as was checked when it was opened
        return found.add_(self._before.read(name, box) if before is None else before)

    def _read(self, name: str, box: Box | None) -> Tensor:
        stored = self._stored[name]
        if box is None and len(stored) == 1:
            return stored[0].full(name)
        info = self._tensors[name]
        box = full_box(info.shape) if box is None else box
        found = [(one, common) for one in stored if (common := _common(one.box, box)) is not None]
        if len(found) == 1:
            return found[0][0].part(name, found[0][1])
        dtype = self.dtype(name)
        dtype = torch.float32 if info.averaged and dtype == torch.int8 else dtype
        result = torch.empty([side.stop - side.start for side in box], dtype=dtype)
        for one, common in found:
            result[_seen_from(common, box)] = one.part(name, common)
        return result


def _seen_from(box: Box, outer: Box) -> Box:
    return tuple(slice(i.start - o.start, i.stop - o.start) for i, o in zip(box, outer, strict=True))


def _common(a: Box, b: Box) -> Box | None:
    common = tuple(slice(max(i.start, j.start), min(i.stop, j.stop)) for i, j in zip(a, b, strict=True))
    return common if all(side.start < side.stop for side in common) else None


@contextmanager
def open_segment(
    folder: Path, segment: Segment, tensors: Mapping[str, TensorInfo], verified: set[Path] | None
) -> Iterator[SegmentFile]:
    """Open a segment for the length of a ``with`` block, and check it against the manifest.

    Args:
        folder: The folder of the record.
        segment: One of the record.
        tensors: What it must hold.
        verified: Files that were compared with their hashes already; new ones are added.

    Raises:
        RecordError: If it is missing or truncated, or holds something else.
    """
    path = folder / segment.file
    verified = set() if verified is None else verified
    earlier = nullcontext() if segment.before is None else open_segment(folder, segment.before, tensors, verified)
    with earlier as before:
        files = check_size(folder, segment)
        try:
            with ExitStack() as stack:
                opened = [
                    _Open(file, sha256, stack.enter_context(safe_open(file, framework="pt")), verified)
                    for file, sha256 in files.items()
                ]
                yield SegmentFile(tensors, _where(path, opened, tensors, segment.before is not None), before)
        except SafetensorError as error:
            raise RecordError(f"{path} must be a safetensors file ({error}): restore it from a copy") from error


def _where(
    path: Path, files: Sequence[_Open], tensors: Mapping[str, TensorInfo], has_differences: bool
) -> dict[str, list[_Stored]]:
    """Return where each tensor is stored; check that all its elements are there, with the scales of differences."""
    stored: dict[str, list[_Stored]] = {name: [] for name in tensors}
    wrong = set[str]()
    for file in files:
        handle = file.handle
        places = json.loads((handle.metadata() or {}).get(PLACES, "{}"))
        names = set(handle.keys())
        scales = {f"{name}{SCALE}" for name, info in tensors.items() if is_difference(info)} & names
        for name in names - scales:
            found, info = handle.get_slice(name), tensors.get(name)
            box = full_box(found.get_shape())
            if name in places:
                box = tuple(slice(at, at + b.stop) for at, b in zip(places[name][OFFSETS], box, strict=True))
            dtype = DTYPES.get(found.get_dtype())
            if info is None or dtype is None or not _fits(dtype, info) or not _within(box, info.shape):
                wrong.add(name)
            elif not is_difference(replace(info, dtype=dtype)):
                stored[name].append(_Stored(file, box, dtype))
            elif has_differences and _has_scales(handle, name, names):
                stored[name].append(_Stored(file, box, dtype, is_difference=True))
            else:
                wrong.add(name)
    # Boxes do not overlap: if there are as many elements as there must be, none is missing.
    wrong |= {name for name, info in tensors.items() if sum(map(_size, stored[name])) != prod(info.shape)}
    if wrong:
        raise RecordError(
            f"{path} must hold the tensors of its manifest (got others for {sorted(wrong)[:5]}): restore it from a copy"
        )
    return stored


def _fits(dtype: torch.dtype, info: TensorInfo) -> bool:
    """Return whether a file may keep a tensor in a dtype: a mean that needs more bits is kept in more."""
    narrow = info.dtype.is_floating_point or is_difference(info)
    return dtype == info.dtype or (info.averaged and dtype.is_floating_point and narrow)


def _has_scales(handle: Any, name: str, names: Collection[str]) -> bool:
    if f"{name}{SCALE}" not in names:
        return False
    found = handle.get_slice(f"{name}{SCALE}")
    return (found.get_dtype(), tuple(found.get_shape())) == ("F32", scale_shape(handle.get_slice(name).get_shape()))


def _size(one: _Stored) -> int:
    return prod(side.stop - side.start for side in one.box)


def _within(box: Box, shape: tuple[int, ...]) -> bool:
    return len(box) == len(shape) and all(0 <= b.start <= b.stop <= size for b, size in zip(box, shape, strict=True))


def _listed(folder: Path, name: str, sha256: str) -> dict[Path, tuple[int | None, str]]:
    """Return the files of a segment, each with its hash and, if known, its size."""
    path = folder / name
    if name.endswith(".safetensors"):
        return {path: (None, sha256)}
    with _missing(path / PARTS):
        text = (path / PARTS).read_bytes()
    if not hashlib.sha256(text).hexdigest().startswith(sha256):
        raise RecordError(_DAMAGED.format(path=path / PARTS))
    parts = json.loads(text)
    if not all(_PART.fullmatch(part) for part in parts):
        raise RecordError(f"{path / PARTS} must name the files in its folder (got {sorted(parts)[:5]})")
    return {path / part: (entry["size_bytes"], entry["sha256"]) for part, entry in parts.items()}


@contextmanager
def _missing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RecordError(
            f"{path} cannot be opened ({error.strerror}): if a run is writing this record and has just merged the "
            "file, open the record again; otherwise restore the file from a copy"
        ) from error


def check_size(folder: Path, segment: Segment) -> dict[Path, str]:
    """Check that the files of a segment exist and have their full size; return them with their hashes.

    Args:
        folder: The folder of the record.
        segment: One of the record.

    Raises:
        RecordError: If a file is missing or has another size.
    """
    files = _listed(folder, segment.file, segment.sha256)
    for path, (size, _) in files.items():
        expected = segment.size_bytes if size is None else size
        with _missing(path):
            size_bytes = path.stat().st_size
        if size_bytes != expected:
            raise RecordError(
                f"{path} must have {expected} bytes (got {size_bytes}): it is damaged, restore it from a copy"
            )
    return {path: sha256 for path, (_, sha256) in files.items()}


def hash_in(name: str) -> str:
    """Return the digits of the hash that the name of a segment's file or folder ends with.

    Args:
        name: As in the manifest.

    Example:
        >>> hash_in("0000000000-0000004096-d77a7f3a8f1f7b0a.safetensors")
        'd77a7f3a8f1f7b0a'
    """
    return name.removesuffix(".safetensors").rpartition("-")[2]


def check_content(folder: Path, name: str, sha256: str) -> None:
    """Check the files of a segment against their hashes.

    Args:
        folder: The folder of the record.
        name: The name of the file or folder, as in the manifest.
        sha256: Its hash, or the first digits of the hash.

    Raises:
        RecordError: If one differs.
    """
    for path, (_, expected) in _listed(folder, name, sha256).items():
        _check_hash(path, expected)


def _check_hash(path: Path, sha256: str) -> None:
    with _missing(path), path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if not found.startswith(sha256):
        raise RecordError(_DAMAGED.format(path=path))


_DAMAGED = "{path} must have the SHA-256 in the manifest: it is damaged, restore it from a copy"
