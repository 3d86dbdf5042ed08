"""The folder of a record: its lock, its manifest, and the deletion of files.

A new manifest replaces the old one in one step, and only then are files deleted. Whatever happens meanwhile, the record
on disk is the one before or the one after. Files that no manifest names are deleted afterwards, or when the next writer
opens the record.
"""

import re
import shutil
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from itertools import count
from pathlib import Path

from torch import Tensor

from polyak.errors import MismatchError, PlanWarning, RecordError
from polyak.record.files import check_size
from polyak.record.lock import RecordLock
from polyak.record.manifest import MANIFEST, SEGMENT_FILE, Manifest, Segment, load_manifest
from polyak.record.output import Written
from polyak.storage.atomic import TEMPORARY, flush_folder, remove, replacing, temporary_path
from polyak.storage.safetensors import TensorInfo, disk_errors

_MANIFEST_TEMPORARY = {temporary_path(Path(MANIFEST)).name, f"{MANIFEST}{TEMPORARY}"}  # the second of earlier versions
_SEGMENT_TEMPORARY = re.compile(rf"stretch(-[0-9a-f]+)?{re.escape(TEMPORARY)}")


class RecordFolder:
    """A record on disk, for the process that writes it.

    Args:
        path: The folder, absolute.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: RecordLock | None = None

    def open(self, wanted: Manifest, *, back_up: bool, overwrite: bool = False) -> Manifest:
        """Lock the folder, which is made if it is absent; return the manifest of the record in it.

        Args:
            wanted: The manifest of a new record. One that exists must keep the same tensors.
            back_up: Whether to move an existing record to a backup and begin a new one.
            overwrite: Whether to delete an existing record, readable or not, and begin a new one.

        Raises:
            RecordError: If another writer has it, the disk refuses, or the record is another one.
            MismatchError: If the record keeps other tensors.
        """
        with disk_errors(f"opening {self.path} to record"):
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = RecordLock(self.path)
            if overwrite:
                self.commit(wanted)  # which deletes the old files, once the new manifest is in place
                return wanted
            if back_up:
                move_to_backup(self.path)
            if not (self.path / MANIFEST).exists():
                self._refuse_lost_manifest()
                self.commit(wanted)
                return wanted
            found = load_manifest(self.path)
            _check_same(self.path, found, wanted)
            self.clean(found)
            return replace(found, max_duration=wanted.max_duration, aliases=wanted.aliases)

    def _refuse_lost_manifest(self) -> None:
        lost = [path.name for path in self.path.iterdir() if SEGMENT_FILE.fullmatch(path.name)]
        if lost:
            raise RecordError(
                f"{self.path} must have a {MANIFEST} for its {len(lost)} segments: restore it from a copy, record "
                "to another folder, or replace the record by overwrite=True"
            )

    def check_lock(self) -> None:
        """Check that the folder is still this writer's, before anything in it is changed.

        Raises:
            RecordError: If it is not.
        """
        if self._lock is None:
            raise RecordError(f"a Writer must be open to change a record, and that of {self.path} was closed")
        self._lock.check()

    def name(self, written: Written, segment: Segment) -> Segment:
        """Give a segment its final name, and return it.

        Args:
            written: The segment under its temporary name.
            segment: Its entry in the manifest.

        Raises:
            OSError: If the disk refuses.
        """
        path = self.path / segment.file
        if path.is_dir():  # a folder with content cannot be replaced in one step
            try:
                check_size(self.path, segment)
            except RecordError:  # left by a deletion that was interrupted
                shutil.rmtree(path)
            else:  # kept by a pin, with the same content
                shutil.rmtree(written.path)
                return segment
        written.path.replace(path)
        return segment

    def commit(self, manifest: Manifest) -> None:
        """Replace the manifest on disk, then delete the files that the new one does not name.

        Args:
            manifest: The new one.

        Raises:
            RecordError: If the folder is not this writer's any more.
            OSError: If the disk refuses.
        """
        self.check_lock()
        flush_folder(self.path)  # so that no manifest is on disk before the files it names
        with replacing(self.path / MANIFEST, exclusive=True) as path, path.open("w", encoding="utf-8") as file:
            file.write(manifest.to_json())
        self.clean(manifest)

    def clean(self, manifest: Manifest) -> None:
        """Delete files of this format that ``manifest`` does not name. If one cannot be deleted, the next call does it.

        Args:
            manifest: The one on disk.
        """
        named = manifest.files
        with suppress(OSError):
            for path in list(self.path.iterdir()):
                unnamed = SEGMENT_FILE.fullmatch(path.name) and path.name not in named
                if unnamed or _SEGMENT_TEMPORARY.fullmatch(path.name) or path.name in _MANIFEST_TEMPORARY:
                    remove(path)

    def clean_after_an_error(self) -> Manifest | None:
        """Delete what the manifest on disk does not name, and return it; None if the folder is not this writer's."""
        with suppress(OSError, RecordError):
            self.check_lock()
            manifest = load_manifest(self.path)
            self.clean(manifest)
            return manifest
        return None

    def close(self) -> None:
        """Release the lock for the next writer."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None


def move_to_backup(folder: Path) -> None:
    """Move a record to a folder inside its own, and warn of where it is; delete it if it is empty.

    Args:
        folder: The folder of the record, whose lock must be held.

    Raises:
        OSError: If the disk refuses.
    """
    files = [path for path in folder.iterdir() if SEGMENT_FILE.fullmatch(path.name)]
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


def check_tensors(expected: Mapping[str, TensorInfo], got: Mapping[str, Tensor] | Mapping[str, TensorInfo]) -> None:
    """Check that tensors are those that a record keeps.

    Args:
        expected: The tensors in the record.
        got: The tensors to be recorded.

    Raises:
        MismatchError: If names or shapes differ.
    """
    shapes = {name: (expected[name].shape, tuple(got[name].shape)) for name in expected if name in got}
    misshaped = {name: pair for name, pair in shapes.items() if pair[0] != pair[1]}
    if misshaped or expected.keys() != got.keys():
        raise MismatchError(
            "the tensors must be those that the record keeps; to record others, use another folder, or replace the "
            "record by overwrite=True:",
            missing=expected.keys() - got.keys(),
            unexpected=got.keys() - expected.keys(),
            misshaped=misshaped,
        )


def _check_same(folder: Path, found: Manifest, wanted: Manifest) -> None:
    if found.per_level != wanted.per_level:
        raise RecordError(
            f"per_level must be that of the record in {folder}, {found.per_level} (got {wanted.per_level}): use that, "
            "record to another folder, or replace the record by overwrite=True"
        )
    check_tensors(found.tensors, wanted.tensors)
    changed = sorted(name for name, info in wanted.tensors.items() if info != found.tensors[name])
    if changed:
        name = changed[0]
        raise RecordError(
            f"tensors must be kept as in the record in {folder}: {name!r} as {found.tensors[name]} (got "
            f"{wanted.tensors[name]}): use the same dtype, record to another folder, or replace the record by "
            "overwrite=True"
        )
