"""The files of a record: safetensors, written and read one tensor at a time.

The format is public: eight bytes with the length of a JSON header, the header, then the raw tensors. safetensors' own
writers want all tensors in memory at once; its reader is used as it is.

A stretch is one file, or, where several ranks have written it together, a folder with a file for the part of each.
"""

import ctypes
import errno
import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from polyak.record.manifest import DTYPE_NAMES, RecordError, Stretch, TensorInfo

# What of a tensor: for each dimension a slice with a start and a stop, as it is indexed.
Box = tuple[slice, ...]
# Gives a box of a tensor, or all of it for None; what is written comes from one, which is open meanwhile.
Read = Callable[[str, Box | None], Tensor]
Source = AbstractContextManager[Read]

# At the end of the names of what is not complete yet.
PASSING = ".tmp"
# In the folder of a stretch: its parts, with the size and hash of each.
PARTS = "parts.json"
_PART = re.compile(r"\d{5,}\.safetensors")
# How torch.distributed.checkpoint says in a safetensors file where in the whole tensors its own begin.
PLACES = "DCP_SHARDING_INFO"
OFFSETS = "saved_offsets"

_ADVICE = {
    errno.ENOSPC: "make room on the disk",
    errno.EDQUOT: "make room within the quota",
    errno.EACCES: "make the folder writable, or record to another",
    errno.EPERM: "make the folder writable, or record to another",
    errno.EROFS: "record to a disk that can be written",
}


@dataclass(frozen=True, slots=True)
class Written:
    """A stretch that is on disk under a passing name.

    Args:
        path: That name.
        size_bytes: As in ``Stretch``.
        sha256: As in ``Stretch``.
        sharded: As in ``Stretch``.
    """

    path: Path
    size_bytes: int
    sha256: str
    sharded: bool


@contextmanager
def disk_errors(doing: str) -> Iterator[None]:
    """Turn what the disk refuses within a ``with`` block into a ``RecordError`` that says what to do.

    Args:
        doing: What was being done.

    Raises:
        RecordError: In place of an ``OSError``.
    """
    try:
        yield
    except RecordError:
        raise
    except OSError as error:
        advice = _ADVICE.get(error.errno or 0, "see to the disk")
        raise RecordError(
            f"{doing} failed: {error}. What was there before is unchanged: {advice} and continue"
        ) from error


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
        RecordError: If a finite value is infinite in the dtype it is to have.
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


def flush_folder(folder: Path) -> None:
    """See that the names in a folder are on disk.

    Args:
        folder: Which.

    Raises:
        OSError: If the disk refuses.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
        name: To name it in errors.
        tensor: Any.
        dtype: Of the result.

    Raises:
        RecordError: If a finite value is infinite in that dtype.
    """
    return _cast(name, tensor, TensorInfo(dtype, tuple(tensor.shape), averaged=False))


@dataclass(frozen=True, slots=True)
class _Piece:
    """What one file holds of a tensor: all of it, or a box."""

    file: "_Open"
    box: Box


@dataclass(slots=True)
class _Open:
    """A file that is open for reading. It is compared with its hash before the first tensor is read from it."""

    path: Path
    sha256: str
    handle: Any
    verified: set[Path]

    def checked(self) -> Any:
        if self.path not in self.verified:
            _check_hash(self.path, self.sha256)
            self.verified.add(self.path)
        return self.handle


def whole(shape: Sequence[int]) -> Box:
    """Return the box that is all of a tensor.

    Args:
        shape: Of the tensor.
    """
    return tuple(slice(0, size) for size in shape)


class StretchFile:
    """A stretch, open for reading. ``open_stretch`` makes it.

    Args:
        tensors: What is in it.
        pieces: Where, by name.
    """

    def __init__(self, tensors: Mapping[str, TensorInfo], pieces: Mapping[str, Sequence[_Piece]]) -> None:
        self._tensors = tensors
        self._pieces = pieces

    def read(self, name: str, box: Box | None = None) -> Tensor:
        """Return a tensor, backed by the file if it lies in one: do not write to it.

        Args:
            name: Which.
            box: What of it; None for all.

        Raises:
            RecordError: If a file that it is read from does not have the hash in the manifest.
        """
        pieces = self._pieces[name]
        if box is None and len(pieces) == 1:
            return pieces[0].file.checked().get_tensor(name)
        info = self._tensors[name]
        box = whole(info.shape) if box is None else box
        found = [(piece, common) for piece in pieces if (common := _common(piece.box, box)) is not None]
        if len(found) == 1:
            return _slice(*found[0], name)
        result = torch.empty([side.stop - side.start for side in box], dtype=info.dtype)
        for piece, common in found:
            result[_seen_from(common, box)] = _slice(piece, common, name)
        return result


def _slice(piece: _Piece, box: Box, name: str) -> Tensor:
    return piece.file.checked().get_slice(name)[_seen_from(box, piece.box)]


def _seen_from(box: Box, outer: Box) -> Box:
    return tuple(slice(i.start - o.start, i.stop - o.start) for i, o in zip(box, outer, strict=True))


def _common(a: Box, b: Box) -> Box | None:
    common = tuple(slice(max(i.start, j.start), min(i.stop, j.stop)) for i, j in zip(a, b, strict=True))
    return common if all(side.start < side.stop for side in common) else None


@contextmanager
def open_stretch(
    folder: Path, stretch: Stretch, tensors: Mapping[str, TensorInfo], verified: set[Path] | None = None
) -> Iterator[StretchFile]:
    """Open a stretch for the length of a ``with`` block, and see that it is what the manifest says.

    Args:
        folder: Of the record.
        stretch: Which.
        tensors: What must be in it.
        verified: Files that were compared with their hashes already; those that are now join them.

    Raises:
        RecordError: If it is missing, truncated, or another one.
    """
    path = folder / stretch.file
    files = check_size(folder, stretch)
    verified = set() if verified is None else verified
    try:
        with ExitStack() as stack:
            opened = [
                _Open(file, sha256, stack.enter_context(safe_open(file, framework="pt")), verified)
                for file, sha256 in files.items()
            ]
            yield StretchFile(tensors, _pieces(path, opened, tensors))
    except SafetensorError as error:
        raise RecordError(f"{path} must be a safetensors file ({error}): restore it from a copy") from error


def _pieces(path: Path, files: Sequence[_Open], tensors: Mapping[str, TensorInfo]) -> dict[str, list[_Piece]]:
    """Return where each tensor lies; see that all of it is there."""
    pieces: dict[str, list[_Piece]] = {name: [] for name in tensors}
    wrong = set[str]()
    for file in files:
        handle = file.handle
        places = json.loads((handle.metadata() or {}).get(PLACES, "{}"))
        for name in handle.keys():  # noqa: SIM118 (a method, not a dict)
            here, info = handle.get_slice(name), tensors.get(name)
            box = whole(here.get_shape())
            if name in places:
                box = tuple(slice(at, at + b.stop) for at, b in zip(places[name][OFFSETS], box, strict=True))
            if info is None or here.get_dtype() != DTYPE_NAMES[info.dtype] or not _within(box, info.shape):
                wrong.add(name)
            else:
                pieces[name].append(_Piece(file, box))
    # What was written does not overlap: if there are as many numbers as there must be, all are there.
    wrong |= {name for name, info in tensors.items() if sum(map(_size, pieces[name])) != prod(info.shape)}
    if wrong:
        raise RecordError(
            f"{path} must hold the tensors of its manifest (other are {sorted(wrong)[:5]}): it is foreign"
        )
    return pieces


def _size(piece: _Piece) -> int:
    return prod(side.stop - side.start for side in piece.box)


def _within(box: Box, shape: tuple[int, ...]) -> bool:
    return len(box) == len(shape) and all(0 <= b.start <= b.stop <= size for b, size in zip(box, shape, strict=True))


def _listed(folder: Path, name: str, sha256: str) -> dict[Path, tuple[int | None, str]]:
    """Return the files of a stretch, and the size and the hash that each must have, as far as they are known."""
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
            f"{path} cannot be opened ({error.strerror}). If a run is writing this record it may just have merged the "
            "file: open the record again. Otherwise restore the file from a copy"
        ) from error


def check_size(folder: Path, stretch: Stretch) -> dict[Path, str]:
    """See that the files of a stretch are there and have their full size; return them with their hashes.

    Args:
        folder: Of the record.
        stretch: Which.

    Raises:
        RecordError: If not.
    """
    files = _listed(folder, stretch.file, stretch.sha256)
    for path, (size, _) in files.items():
        expected = stretch.size_bytes if size is None else size
        with _missing(path):
            size_bytes = path.stat().st_size
        if size_bytes != expected:
            raise RecordError(
                f"{path} must have {expected} bytes (got {size_bytes}): it is damaged, restore it from a copy"
            )
    return {path: sha256 for path, (_, sha256) in files.items()}


def hash_in(name: str) -> str:
    """Return the digits of the hash that are in the name of a stretch's file or folder.

    Args:
        name: As in the manifest.

    Example:
        >>> hash_in("0000000000-0000004096-d77a7f3a8f1f7b0a.safetensors")
        'd77a7f3a8f1f7b0a'
    """
    return name.removesuffix(".safetensors").rpartition("-")[2]


def check_content(folder: Path, name: str, sha256: str) -> None:
    """See that the files of a stretch hold what was written.

    Args:
        folder: Of the record.
        name: Of the file or folder, as in the manifest.
        sha256: Its hash, or the first digits of that.

    Raises:
        RecordError: If not.
    """
    for path, (_, expected) in _listed(folder, name, sha256).items():
        _check_hash(path, expected)


def _check_hash(path: Path, sha256: str) -> None:
    with _missing(path), path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if not found.startswith(sha256):
        raise RecordError(_DAMAGED.format(path=path))


_DAMAGED = "{path} must have the SHA-256 in the manifest: it is damaged, restore it from a copy"
