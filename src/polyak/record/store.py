"""The writer of a record: append a stretch, merge as they age, rewind, pin.

Files are written under a passing name, then renamed, and only then does a new manifest take the old one's place, in
one step. Whatever happens in between, the record on disk is the one before or the one after. Files that no manifest
names are deleted afterwards, or when the next writer opens the record.
"""

import hashlib
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

import torch
from torch import Tensor

from polyak.errors import MismatchError, PlanWarning, RecordError
from polyak.record.files import PASSING, Box, Read, Source, Written, check_size, open_stretch
from polyak.record.lock import RecordLock
from polyak.record.manifest import MANIFEST, STRETCH_FILE, Edge, Manifest, Pin, Stretch, load_manifest
from polyak.sharding import Ranks, local
from polyak.storage.atomic import flush_folder, replacing
from polyak.storage.safetensors import TensorInfo, disk_errors, write_tensors
from polyak.time import Time

if TYPE_CHECKING:
    from polyak.record.together import Together

T = TypeVar("T")

# Of one writer alone, and of several together.
_PASSING_STRETCH = re.compile(rf"stretch(-[0-9a-f]+)?{re.escape(PASSING)}")


class Alone:
    """The only process that writes a record; ``together.Together`` is many."""

    is_first = True

    def first(self, act: Callable[[], T]) -> T:
        """Return what ``act`` returns.

        Args:
            act: What one must do alone.
        """
        return act()

    def agree(self, what: str, facts: Mapping[str, Any]) -> None:
        """Agree with oneself."""

    def write(
        self,
        folder: Path,
        tensors: Mapping[str, TensorInfo],
        like: Mapping[str, Tensor],
        source: Source,
        metadata: Mapping[str, str],
    ) -> Written:
        """Write a stretch under a passing name, and see that it is on disk.

        Args:
            folder: Of the record.
            tensors: What is written.
            like: Not used.
            source: Gives the values.
            metadata: For the header.
        """
        del like
        path = folder / f"stretch{PASSING}"
        with source as read:
            size_bytes, sha256 = write_tensors(path, tensors, lambda name: read(name, None), metadata)
        return Written(path, size_bytes, sha256, sharded=False)

    def close(self) -> None:
        """Have nothing to let go."""


class Writer:
    """Writes the record in a folder. One at a time; for use by one thread.

    Ranks that write one together each have a ``Writer`` and make the same calls. Each writes its part of a stretch; the
    first does the rest.

    Args:
        folder: Where the record is, or will be.
        tensors: What is kept, by name. A record that is there already must keep the same.
        per_level: Stretches of one level that are kept beside the two that merge next, at least 1; None merges none.
        max_duration: The length of the run, if known.
        aliases: Further names of tied tensors, and the name that each is kept under.
        ranks: That write it together, in a group that is this writer's alone; None for one process.
        anew: Whether to begin an empty record. One that is there already is moved to a folder in this one,
            ``backup-1`` or the next number that is free, where it can be read.

    Raises:
        RecordError: If another writer is at it, the folder cannot be written, or holds a record that cannot be read,
            or one with another ``per_level``.
        MismatchError: If the record that is there keeps other tensors.
        ShardingError: If another rank has failed, keeps other tensors or does not see the same folder.

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
        ranks: Ranks | None = None,
        anew: bool = False,
    ) -> None:
        self.folder = Path(folder).absolute()  # for good, also if the program changes its directory
        self._lock: RecordLock | None = None
        self._writers = Alone() if ranks is None else _together(ranks)
        try:
            wanted = Manifest(dict(tensors), per_level, max_duration, dict(aliases or {}))
            self._manifest = self._writers.first(lambda: self._opened(wanted, anew=anew))
            self._writers.agree(f"the record in {self.folder}", self._facts(wanted))
        except BaseException:
            self.close()
            raise

    def _opened(self, wanted: Manifest, *, anew: bool) -> Manifest:
        with disk_errors(f"opening {self.folder} to record"):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = RecordLock(self.folder)
            if anew:
                move_to_backup(self.folder)
            return self._open(wanted)

    def _facts(self, wanted: Manifest) -> dict[str, Any]:
        """Return what all ranks must say alike: what is to be kept, and what they see in the folder."""
        path = self.folder / MANIFEST
        return {
            "sha256 of its manifest": hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None,
            "per_level": wanted.per_level,
            "tensors": {name: str(info) for name, info in wanted.tensors.items()},
            "aliases": wanted.aliases,
        }

    def _open(self, wanted: Manifest) -> Manifest:
        if not (self.folder / MANIFEST).exists():
            lost = [path.name for path in self.folder.iterdir() if STRETCH_FILE.fullmatch(path.name)]
            if lost:
                raise RecordError(
                    f"{self.folder} must have a {MANIFEST} for its {len(lost)} stretches: restore it from a copy, or "
                    "record to another folder"
                )
            self._replace(wanted)
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

    def _check_lock(self) -> None:
        """See that the folder is still this writer's, before anything in it is changed."""
        if self._lock is None:
            raise RecordError(f"a Writer must be open to change a record, and that of {self.folder} was closed")
        self._lock.check()

    def append(self, tensors: Mapping[str, Tensor], start: Edge, end: Edge) -> Stretch:
        """Write a stretch, and merge what has aged. If this fails, the record is as before and it may be tried again.

        Args:
            tensors: The means over the updates after ``start``, up to and including ``end``; of the tensors that are
                not averaged, their values at ``end``. On any device. Several ranks give what is spread over them so.
            start: Where the record ends so far; on an empty record, update 0.
            end: Where the stretch ends.

        Raises:
            RecordError: If the stretch does not follow on the record, or the disk refuses.
            MismatchError: If the tensors are not those of the record.
            ShardingError: If the ranks that write together give different stretches.
        """
        manifest = self._manifest
        _check_tensors(manifest.tensors, tensors)
        self._writers.agree("the stretch to be written", {"start": start.updates, "end": end.updates})
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
            # What is merged is compared with its hash first, so that damage does not get into a file with a new hash.
            stretch = self._write(_given(tensors), tensors, start, end, level=0)
            stretches = self._merge([*manifest.stretches, stretch], tensors)
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
        self._writers.first(lambda: self._check_sizes(stretches))
        with self._failing_cleanly(f"rewinding {self.folder}"):
            self._commit(replace(self._manifest, stretches=stretches))

    def _check_sizes(self, stretches: Sequence[Stretch]) -> None:
        try:
            for stretch in stretches:
                check_size(self.folder, stretch)
        except RecordError as error:
            raise RecordError(
                f"{self.folder} can be rewound only to a checkpoint whose files it still has; it is pinned to "
                f"{sorted(self.pins)}: resume from one of these, or record to another folder ({error})"
            ) from error

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
        there = self._writers.first(
            lambda: {n: pin for n, pin in self.pins.items() if pin.path is None or (self.folder / pin.path).exists()}
        )
        self._set_pins(there)

    def close(self) -> None:
        """Let the next writer in. What was appended is already on disk."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None
        self._writers.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _set_pins(self, pins: Mapping[str, Pin]) -> None:
        if pins != self.pins:
            with self._failing_cleanly(f"changing the pins of {self.folder}"):
                self._commit(replace(self._manifest, pins=dict(pins)))

    def _merge(self, stretches: list[Stretch], like: Mapping[str, Tensor]) -> list[Stretch]:
        """Merge what has aged, after one more of level 0."""
        level = 0
        while (i := due([stretch.level for stretch in stretches], level, self._manifest.per_level)) is not None:
            merged = self._merged(stretches[i], stretches[i + 1], like)
            stretches = [*stretches[:i], merged, *stretches[i + 2 :]]
            level += 1
        return stretches

    def _merged(self, older: Stretch, newer: Stretch, like: Mapping[str, Tensor]) -> Stretch:
        return self._write(self._mean(older, newer), like, older.start, newer.end, level=older.level + 1)

    @contextmanager
    def _mean(self, older: Stretch, newer: Stretch) -> Iterator[Read]:
        infos = self._manifest.tensors
        with open_stretch(self.folder, older, infos) as old, open_stretch(self.folder, newer, infos) as new:

            def read(name: str, box: Box | None) -> Tensor:
                if not infos[name].averaged:
                    return new.read(name, box)
                exact = torch.complex128 if infos[name].dtype.is_complex else torch.float64
                total = old.read(name, box).to(exact).mul_(older.num_updates)
                total.add_(new.read(name, box), alpha=newer.num_updates)
                return total.div_(older.num_updates + newer.num_updates)

            yield read

    def _write(self, source: Source, like: Mapping[str, Tensor], start: Edge, end: Edge, *, level: int) -> Stretch:
        metadata = {"format": "pt", "polyak.updates": f"{start.updates}-{end.updates}"}
        written = self._writers.write(self.folder, self._manifest.tensors, like, source, metadata)
        stretch = Stretch(start, end, level, written.size_bytes, written.sha256, written.sharded)
        return self._writers.first(lambda: self._named(written.path, stretch))

    def _named(self, passing: Path, stretch: Stretch) -> Stretch:
        """Give a stretch its own name. No folder takes another's place in one step: one kept by a pin stays."""
        path = self.folder / stretch.file
        if path.is_dir():
            try:
                check_size(self.folder, stretch)
            except RecordError:  # nothing keeps it: it could not be deleted whole
                shutil.rmtree(path)
            else:  # it has the same in it
                shutil.rmtree(passing)
                return stretch
        passing.replace(path)
        return stretch

    def _commit(self, manifest: Manifest) -> None:
        self._writers.first(lambda: self._replace(manifest))
        self._manifest = manifest

    def _replace(self, manifest: Manifest) -> None:
        """Put ``manifest`` in the place of the one on disk, then delete what it no longer names."""
        self._check_lock()
        flush_folder(self.folder)  # so that no manifest is on disk before the files it names
        with replacing(self.folder / MANIFEST, exclusive=True) as path, path.open("w", encoding="utf-8") as file:
            file.write(manifest.to_json())
        self._clean(manifest)

    @contextmanager
    def _failing_cleanly(self, doing: str) -> Iterator[None]:
        try:
            with disk_errors(doing):
                self._writers.first(self._check_lock)
                yield
        except BaseException:
            if self._writers.is_first:
                with suppress(OSError):  # what is in a folder that is not ours (any more) stays
                    self._check_lock()
                    self._clean(self._manifest)
            raise

    def _clean(self, manifest: Manifest) -> None:
        """Delete files of ours that ``manifest`` does not name. What cannot be deleted now is left to the next time."""
        named = manifest.files
        with suppress(OSError):
            for path in list(self.folder.iterdir()):
                ours = STRETCH_FILE.fullmatch(path.name) and path.name not in named
                if ours or _PASSING_STRETCH.fullmatch(path.name) or path.name == f"{MANIFEST}{PASSING}":
                    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def move_to_backup(folder: Path) -> None:
    """Move a record out of the way, to a folder in its own; warn where it is. An empty one is deleted.

    Args:
        folder: Of the record, whose lock must be held.

    Raises:
        OSError: If the disk refuses.
    """
    files = [path for path in folder.iterdir() if STRETCH_FILE.fullmatch(path.name)]
    manifest = folder / MANIFEST
    if not files:
        manifest.unlink(missing_ok=True)
        return
    # A backup without a manifest, which comes last, is one that a process was moving when it was killed.
    backups = (folder / f"backup-{n}" for n in count(1))
    backup = next(path for path in backups if not (path / MANIFEST).exists())
    backup.mkdir(exist_ok=True)
    for path in files:
        path.replace(backup / path.name)
    if manifest.exists():
        manifest.replace(backup / MANIFEST)
    flush_folder(backup)
    warnings.warn(
        f"{folder} had a record of a run that left no checkpoint to resume from: a new one begins, and the old one is "
        f"now in {backup}; delete it if it is not needed",
        PlanWarning,
        stacklevel=2,
    )


def _together(ranks: Ranks) -> "Together":
    from polyak.record.together import Together  # noqa: PLC0415  importing DCP takes as long as half of torch

    return Together(ranks)


@contextmanager
def _given(tensors: Mapping[str, Tensor]) -> Iterator[Read]:
    # What is here of a tensor is what this rank is asked for.
    yield lambda name, _: local(tensors[name])


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
