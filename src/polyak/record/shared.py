"""The manifest of a record that is being written. All ranks have it, and rank 0 changes it on disk."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from polyak.record.folder import RecordFolder
from polyak.record.manifest import MANIFEST, Manifest, Segment
from polyak.record.output import Written
from polyak.sharding import Communicator
from polyak.storage.safetensors import disk_errors


class SharedManifest:
    """The manifest that all ranks of a ``Writer`` share. All ranks make the same calls.

    Args:
        folder: The folder of the record, absolute.
        ranks: Those that write together.

    Attributes:
        current: What the record is. It is empty before ``open``.
    """

    def __init__(self, folder: Path, ranks: Communicator) -> None:
        self.current = Manifest({})
        self._files, self._ranks = RecordFolder(folder), ranks

    def open(self, wanted: Manifest, *, back_up: bool, overwrite: bool) -> None:
        """Lock the folder, begin a record there or open the one that exists, and check that all ranks see the same.

        Args:
            wanted: The manifest of a new record. One that exists must keep the same tensors.
            back_up: As for ``Writer``.
            overwrite: As for ``Writer``.

        Raises:
            RecordError: As ``Writer``.
            MismatchError: As ``Writer``.
            ShardingError: If another rank has failed, wants another manifest or does not see the same folder.
        """
        self.current = self._ranks.on_rank_0(lambda: self._files.open(wanted, back_up=back_up, overwrite=overwrite))
        self._ranks.agree(f"the record in {self._files.path}", self._facts(wanted))

    def _facts(self, wanted: Manifest) -> dict[str, Any]:
        """Return what all ranks must agree on: what is to be kept, and what they see in the folder."""
        path = self._files.path / MANIFEST
        return {
            "sha256 of its manifest": hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None,
            "per_level": wanted.per_level,
            "tensors": {name: str(info) for name, info in wanted.tensors.items()},
            "aliases": wanted.aliases,
        }

    def name(self, written: Written, segment: Segment) -> Segment:
        """Give a segment its final name, and return it.

        Args:
            written: The segment under its temporary name.
            segment: Its entry in the manifest.

        Raises:
            OSError: If the disk refuses.
        """
        return self._ranks.on_rank_0(lambda: self._files.name(written, segment))

    def commit(self, manifest: Manifest) -> None:
        """Replace the manifest, and delete the files that the new one does not name.

        Args:
            manifest: The new one.

        Raises:
            RecordError: If the folder is not this writer's any more.
            OSError: If the disk refuses.
        """
        self._ranks.on_rank_0(lambda: self._files.commit(manifest))
        self.current = manifest

    @contextmanager
    def changing(self, doing: str) -> Iterator[None]:
        """Check the lock before a ``with`` block, and delete what the block has written if it ends with an error.

        The error may have come after the new manifest was on disk, from another rank that was killed or an interrupt.
        So what is kept, and what the record now is, is read from the disk.

        Args:
            doing: What is done, to name it in errors.

        Raises:
            RecordError: If the folder is not this writer's any more, or the disk refuses.
        """
        try:
            with disk_errors(doing):
                self._ranks.on_rank_0(self._files.check_lock)
                yield
        except BaseException:
            if self._ranks.rank == 0 and (found := self._files.clean_after_an_error()) is not None:
                self.current = replace(self.current, segments=found.segments, pins=found.pins, raw=found.raw)
            raise

    def close(self) -> None:
        """Let the next writer in."""
        self._files.close()
