"""The lock of a record: one process writes to a folder, and only while the folder is where it was."""

import os
from functools import partial
from pathlib import Path

from polyak.errors import RecordError
from polyak.storage.lock import Lock

LOCK = "lock"


class RecordLock:
    """Hold the lock of a record until ``release``, or until this process ends in any way.

    Args:
        folder: The folder of the record.

    Raises:
        RecordError: If another writer holds the lock (the message names its process), or the file is not one of
            polyak's.
        OSError: If the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = Lock(folder / LOCK, partial(_busy, folder), partial(_foreign, folder))
        self.check()  # the folder may have been moved since the file was opened

    def check(self) -> None:
        """Check that the locked file is still in the folder, and that this process locked it.

        Raises:
            RecordError: If it is not; then nothing may be written there.
            OSError: If the folder cannot be read.
        """
        if not self._lock.is_own:
            raise RecordError(
                f"a record must be written by the process that opened it, {self._lock.process} (got {os.getpid()}, "
                f"forked from it): stop recording to {self._folder} in the forked process"
            )
        if not self._lock.is_in_place:
            raise RecordError(
                f"{self._folder} must stay in its place while a run records to it, and it was deleted, moved or "
                "replaced: nothing was written to the new one; move it back, or resume the run from a checkpoint with "
                "another folder"
            )

    def release(self) -> None:
        """Let the next writer in. In a forked process, do nothing."""
        self._lock.release()


def _busy(folder: Path, owner: str) -> RecordError:
    return RecordError(
        f"a record must have one writer at a time, and {owner} is writing {folder}: wait until it has ended, or record "
        "to another folder"
    )


def _foreign(folder: Path, found: str) -> RecordError:
    return RecordError(
        f"{folder / LOCK} must be the lock file of a record (got {found}), and its content would be lost: delete it, "
        "or record to another folder"
    )
