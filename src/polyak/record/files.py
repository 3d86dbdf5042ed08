"""The files of a record: safetensors, written and read one tensor at a time.

The format is public: eight bytes with the length of a JSON header, the header, then the raw tensors. safetensors' own
writers want all tensors in memory at once; its reader is used as it is.

A stretch is one file, or, where several ranks have written it together, a folder with a file for the part of each.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from polyak.errors import RecordError
from polyak.record.manifest import Stretch
from polyak.storage.safetensors import DTYPE_NAMES, TensorInfo

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
