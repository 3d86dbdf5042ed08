"""The writer of a record: append a stretch, merge as they age, rewind, pin.

Files are written under a passing name, then renamed, and only then does a new manifest take the old one's place, in
one step. Whatever happens in between, the record on disk is the one before or the one after. Files that no manifest
names are deleted afterwards, or when the next writer opens the record.
"""

import errno
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from polyak.errors import MismatchError
from polyak.record.files import check_size, open_stretch, write_tensors
from polyak.record.lock import Lock
from polyak.record.manifest import (
    MANIFEST,
    STRETCH_FILE,
    Edge,
    Manifest,
    Pin,
    RecordError,
    Stretch,
    TensorInfo,
    load_manifest,
)
from polyak.time import Time

_PASSING = ".tmp"
_ADVICE = {
    errno.ENOSPC: "make room on the disk",
    errno.EDQUOT: "make room within the quota",
    errno.EACCES: "make the folder writable, or record to another",
    errno.EPERM: "make the folder writable, or record to another",
    errno.EROFS: "record to a disk that can be written",
}


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
        raise RecordError(f"{doing} failed: {error}. What was there before is as it was: {advice} and go on") from error


class Writer:
    """Writes the record in a folder. One at a time; for use by one thread.

    Args:
        folder: Where the record is, or will be.
        tensors: What is kept, by name. A record that is there already must keep the same.
        per_level: Stretches of one level that are kept beside the two that merge next, at least 1; None merges none.
        max_duration: The length of the run, if known.
        aliases: Further names of tied tensors, and the name that each is kept under.

    Raises:
        RecordError: If another writer is at it, the folder cannot be written, or holds a record that cannot be read,
            or one with another ``per_level``.
        MismatchError: If the record that is there keeps other tensors.

    Example:
        >>> tensors = {"weight": TensorInfo(torch.float32, (2,), averaged=True)}
        >>> from polyak.time import Timestamp
        >>> start, end = Edge(0, Timestamp()), Edge(1, Timestamp().to_next_batch())
        >>> with Writer("my-record", tensors) as writer:
        ...     writer.append({"weight": torch.ones(2)}, start, end).num_updates
        1
    """

    def __init__(
        self,
        folder: str | Path,
        tensors: Mapping[str, TensorInfo],
        *,
        per_level: int | None = 4,
        max_duration: Time | None = None,
        aliases: Mapping[str, str] | None = None,
    ) -> None:
        wanted = Manifest(dict(tensors), per_level, max_duration, dict(aliases or {}))
        self.folder = Path(folder)
        with disk_errors(f"opening {self.folder} to record"):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = Lock(self.folder)
        try:
            with disk_errors(f"opening {self.folder} to record"):
                self._manifest = self._open(wanted)
        except BaseException:
            self._lock.release()
            raise

    def _open(self, wanted: Manifest) -> Manifest:
        if not (self.folder / MANIFEST).exists():
            lost = [path.name for path in self.folder.iterdir() if STRETCH_FILE.fullmatch(path.name)]
            if lost:
                raise RecordError(
                    f"{self.folder} must have a {MANIFEST} for its {len(lost)} stretches: restore it from a copy, or "
                    "record to another folder"
                )
            self._commit(wanted)
            return wanted
        found = load_manifest(self.folder)
        _check_same(self.folder, found, wanted)
        self._clean(found)
        return replace(found, max_duration=wanted.max_duration, aliases=wanted.aliases)

    @property
    def stretches(self) -> tuple[Stretch, ...]:
        """What the record holds, oldest first."""
        return self._manifest.stretches

    @property
    def pins(self) -> Mapping[str, Pin]:
        """What is kept for checkpoints, by name."""
        return self._manifest.pins

    def append(self, tensors: Mapping[str, Tensor], start: Edge, end: Edge) -> Stretch:
        """Write a stretch, and merge what has aged. If this fails, the record is as before and it may be tried again.

        Args:
            tensors: The means over the updates after ``start``, up to and including ``end``; of the tensors that are
                not averaged, their values at ``end``. On any device.
            start: Where the record ends so far; on an empty record, update 0.
            end: Where the stretch ends.

        Raises:
            RecordError: If the stretch does not follow on the record, or the disk refuses.
            MismatchError: If the tensors are not those of the record.
        """
        manifest = self._manifest
        _check_tensors(manifest.tensors, tensors)
        if manifest.stretches:
            last = manifest.stretches[-1].end
            if start.updates != last.updates:
                raise RecordError(
                    f"a stretch must start where {self.folder} ends, after {last.updates} updates (got "
                    f"{start.updates}): rewind the record to the checkpoint that the run resumed from, or record to "
                    "another folder"
                )
            start = last  # the same moment, which a host may by now call the start of the next epoch
        with self._failing_cleanly(f"adding a stretch to {self.folder}"):
            stretch = self._write(tensors.__getitem__, start, end, level=0)
            stretches = self._merge([*manifest.stretches, stretch])
            self._commit(replace(manifest, stretches=tuple(stretches)))
        return stretch

    def state_dict(self) -> dict[str, Any]:
        """Return what ``rewind`` needs, as plain containers. ``pin`` it, or later merges may delete the files."""
        return {"stretches": [stretch.to_plain() for stretch in self.stretches]}

    def rewind(self, state: Mapping[str, Any]) -> None:
        """Make the record what it was when ``state_dict`` was called.

        Args:
            state: What that returned.

        Raises:
            RecordError: If files that it refers to are gone, or the disk refuses.
        """
        entries = state["stretches"]
        stretches = tuple(Stretch.from_plain(one, f"stretches[{i}]") for i, one in enumerate(entries))
        if stretches == self.stretches:
            return
        try:
            for stretch in stretches:
                check_size(self.folder, stretch)
        except RecordError as error:
            raise RecordError(
                f"{self.folder} can be rewound only to a checkpoint whose files it still has; it is pinned to "
                f"{sorted(self.pins)}: resume from one of these, or record to another folder ({error})"
            ) from error
        with self._failing_cleanly(f"rewinding {self.folder}"):
            self._commit(replace(self._manifest, stretches=stretches))

    def pin(self, name: str, path: str | Path | None = None) -> None:
        """Keep the files that the record now consists of until ``unpin``.

        Args:
            name: Of the pin; one of the same name is replaced.
            path: Where the checkpoint is that refers to these files, for ``unpin_gone``.

        Raises:
            RecordError: If the disk refuses.
        """
        seen_from_here = None if path is None else Path(os.path.relpath(path, self.folder)).as_posix()
        pin = Pin(tuple(stretch.file for stretch in self.stretches), seen_from_here)
        self._set_pins({**self.pins, name: pin})

    def unpin(self, name: str) -> None:
        """Let the files of a pin go, as far as nothing else refers to them.

        Args:
            name: Of the pin; one that is not there is no error.

        Raises:
            RecordError: If the disk refuses.
        """
        self._set_pins({other: pin for other, pin in self.pins.items() if other != name})

    def unpin_gone(self) -> None:
        """Let go of every pin whose checkpoint is no longer where it was. Call it when no checkpoint is being written.

        Raises:
            RecordError: If the disk refuses.
        """
        self._set_pins(
            {name: pin for name, pin in self.pins.items() if pin.path is None or (self.folder / pin.path).exists()}
        )

    def close(self) -> None:
        """Let the next writer in. What was appended is already on disk."""
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _set_pins(self, pins: Mapping[str, Pin]) -> None:
        if pins != self.pins:
            with self._failing_cleanly(f"changing the pins of {self.folder}"):
                self._commit(replace(self._manifest, pins=dict(pins)))

    def _merge(self, stretches: list[Stretch]) -> list[Stretch]:
        """Merge what has aged, after one more of level 0."""
        level = 0
        while (i := due([stretch.level for stretch in stretches], level, self._manifest.per_level)) is not None:
            stretches = [*stretches[:i], self._merged(*stretches[i : i + 2]), *stretches[i + 2 :]]
            level += 1
        return stretches

    def _merged(self, older: Stretch, newer: Stretch) -> Stretch:
        infos = self._manifest.tensors
        with open_stretch(self.folder, older, infos) as old, open_stretch(self.folder, newer, infos) as new:

            def read(name: str) -> Tensor:
                if not infos[name].averaged:
                    return new.read(name)
                exact = torch.complex128 if infos[name].dtype.is_complex else torch.float64
                total = old.read(name).to(exact).mul_(older.num_updates)
                total.add_(new.read(name), alpha=newer.num_updates)
                return total.div_(older.num_updates + newer.num_updates)

            return self._write(read, older.start, newer.end, level=older.level + 1)

    def _write(self, read: Callable[[str], Tensor], start: Edge, end: Edge, *, level: int) -> Stretch:
        passing = self.folder / f"stretch{_PASSING}"
        metadata = {"format": "pt", "polyak.updates": f"{start.updates}-{end.updates}"}
        size_bytes, sha256 = write_tensors(passing, self._manifest.tensors, read, metadata)
        stretch = Stretch(start, end, level, size_bytes, sha256)
        passing.replace(self.folder / stretch.file)
        return stretch

    def _commit(self, manifest: Manifest) -> None:
        """Put ``manifest`` in the place of the one on disk, then delete what it no longer names."""
        _flush_folder(self.folder)  # so that no manifest is on disk before the files it names
        passing = self.folder / f"{MANIFEST}{_PASSING}"
        with passing.open("w", encoding="utf-8") as file:
            file.write(manifest.to_json())
            file.flush()
            os.fsync(file.fileno())
        passing.replace(self.folder / MANIFEST)
        self._manifest = manifest
        with suppress(OSError):  # it is in place; all that is open is whether a power cut would bring back the last one
            _flush_folder(self.folder)
        self._clean(manifest)

    @contextmanager
    def _failing_cleanly(self, doing: str) -> Iterator[None]:
        try:
            with disk_errors(doing):
                yield
        except BaseException:
            self._clean(self._manifest)
            raise

    def _clean(self, manifest: Manifest) -> None:
        """Delete files of ours that ``manifest`` does not name. What cannot be deleted now is left to the next time."""
        named = manifest.files
        with suppress(OSError):
            for path in list(self.folder.iterdir()):
                ours = STRETCH_FILE.fullmatch(path.name) and path.name not in named
                if ours or path.name in {f"stretch{_PASSING}", f"{MANIFEST}{_PASSING}"}:
                    path.unlink(missing_ok=True)


def due(levels: Sequence[int], level: int, per_level: int | None) -> int | None:
    """Return which stretch is to merge with the next: the oldest of a level that has more than ``per_level + 1``.

    Args:
        levels: Of all stretches, oldest first.
        level: Where to look.
        per_level: See ``Writer``.

    Example:
        >>> due([1, 0, 0, 0, 0], 0, per_level=2)
        1
    """
    return levels.index(level) if per_level is not None and levels.count(level) > per_level + 1 else None


def _check_same(folder: Path, found: Manifest, wanted: Manifest) -> None:
    if found.per_level != wanted.per_level:
        raise RecordError(
            f"per_level must be that of the record in {folder}, {found.per_level} (got {wanted.per_level}): use that, "
            "or record to another folder"
        )
    _check_tensors(found.tensors, wanted.tensors)
    changed = sorted(name for name, info in wanted.tensors.items() if info != found.tensors[name])
    if changed:
        name = changed[0]
        raise RecordError(
            f"tensors must be kept as in the record in {folder}: {name!r} as {found.tensors[name]} (got "
            f"{wanted.tensors[name]}): use the same dtype, or record to another folder"
        )


def _check_tensors(expected: Mapping[str, TensorInfo], got: Mapping[str, Tensor] | Mapping[str, TensorInfo]) -> None:
    shapes = {name: (expected[name].shape, tuple(got[name].shape)) for name in expected if name in got}
    misshaped = {name: pair for name, pair in shapes.items() if pair[0] != pair[1]}
    if misshaped or expected.keys() != got.keys():
        raise MismatchError(
            "the tensors must be those that the record keeps; to record others, use another folder:",
            missing=expected.keys() - got.keys(),
            unexpected=got.keys() - expected.keys(),
            misshaped=misshaped,
        )


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
