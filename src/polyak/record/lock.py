"""One writer at a time: an advisory lock on a file in the record's folder."""

import fcntl
import os
from pathlib import Path

from polyak.record.manifest import RecordError

LOCK = "lock"


class Lock:
    """Hold the lock of a record until ``release``, or until this process ends in any way.

    Args:
        folder: Of the record.

    Raises:
        RecordError: If another writer holds it; the message names its process.
        OSError: If the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self._descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, f"{os.getpid()}\n".encode(), 0)
        except BlockingIOError:
            holder = os.pread(self._descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(self._descriptor)
            raise RecordError(
                f"a record must have one writer at a time, and process {holder} is writing {folder}: wait until it has "
                "ended, or record to another folder"
            ) from None
        except BaseException:
            os.close(self._descriptor)
            raise

    def release(self) -> None:
        """Let the next writer in. The file stays: removing it could let in two."""
        fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        os.close(self._descriptor)
