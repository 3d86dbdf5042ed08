"""One writer at a time: an advisory lock on a file in the record's folder.

It is a ``flock``: it ends with its process, however that ends, and excludes a second writer in the same process too,
which a POSIX lock (``lockf``) does not. But a forked process inherits it, and would hold it after its parent was
killed. So a forked process closes its copy of the file immediately, which leaves the parent's lock as it is.
"""

import fcntl
import os
import re
import stat
import weakref
from pathlib import Path

from polyak.errors import RecordError

LOCK = "lock"
_CONTENT = re.compile(rb"\d{0,20}\n?")  # a process id, or nothing


class Lock:
    """Hold the lock of a record until ``release``, or until this process ends in any way.

    Args:
        folder: Of the record.

    Raises:
        RecordError: If another writer holds it (the message names its process), or the file is not one of polyak's.
        OSError: If the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / LOCK
        self._process = os.getpid()
        if self._path.is_symlink():
            raise RecordError(_foreign(self._path, "a symbolic link"))
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        self._descriptor = os.open(self._path, flags, 0o666)
        # Also where an interrupt comes before anybody has this object.
        self._close = weakref.finalize(self, os.close, self._descriptor)
        _HELD.add(self)
        try:
            self._acquire()
        except BaseException:
            self._close()
            raise

    def _acquire(self) -> None:
        status = os.fstat(self._descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
            raise RecordError(_foreign(self._path, "a special file or a hard link"))
        content = os.pread(self._descriptor, 32, 0)
        if not _CONTENT.fullmatch(content):
            raise RecordError(_foreign(self._path, "a file with other content"))
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = content.decode().strip() or "unknown"
            raise RecordError(
                f"a record must have one writer at a time, and process {owner} is writing {self._folder}: wait until "
                "it has ended, or record to another folder"
            ) from None
        self.check()  # the folder may have been moved since the file was opened
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"{os.getpid()}\n".encode(), 0)

    def check(self) -> None:
        """See that the locked file is still the one in the folder, and that this process locked it.

        Raises:
            RecordError: If not; then nothing may be written there.
            OSError: If the folder cannot be read.
        """
        if self._process != os.getpid():
            raise RecordError(
                f"a record must be written by the process that opened it, {self._process} (got {os.getpid()}, forked "
                f"from it): stop recording to {self._folder} in the forked process"
            )
        try:
            there = self._path.lstat()
        except (FileNotFoundError, NotADirectoryError):
            there = None
        if there is None or not os.path.samestat(there, os.fstat(self._descriptor)):
            raise RecordError(
                f"{self._folder} must stay in its place while a run records to it, and it was deleted, moved or "
                "replaced: nothing was written to what is there now; move it back, or resume the run from a checkpoint "
                "with another folder"
            )

    def release(self) -> None:
        """Let the next writer in. The file stays: removing it could let in two."""
        if self._process == os.getpid() and self._close.alive:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
            self._close()


def _foreign(path: Path, what: str) -> str:
    return (
        f"{path} must be the lock file of a record (got {what}), and what is in it would be lost: delete it, or record "
        "to another folder"
    )


_HELD = weakref.WeakSet[Lock]()


def _close_copies() -> None:
    for lock in list(_HELD):
        lock._close()  # noqa: SLF001  of this module


os.register_at_fork(after_in_child=_close_copies)
