"""One writer at a time: a lock on a file or folder, held until it is released or the process ends.

The lock is a ``flock``: it ends with its process, however that ends, and excludes a second writer in the same process
too, which a POSIX lock (``lockf``) does not. But a forked process inherits it, and would hold it after its parent was
killed. So a forked process closes its copy of the descriptor immediately, which leaves the parent's lock as it is.

Systems without ``flock`` get a file that exists while the lock is held. It excludes other writers just as well, but a
killed process leaves it, and then a person must delete it. The error says so.
"""

import os
import re
import stat
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_CONTENT = re.compile(rb"\d{0,20}\n?")  # a process id, or nothing


class Lock:
    """Hold the lock of a file or folder until ``release``, or until this process ends in any way.

    Args:
        path: What is locked: a folder or file that exists, or, with ``foreign``, a file for the lock alone. That is
            made if it is absent, holds the id of the process, and stays: deleting it could let in two.
        busy: Returns the error for when another writer holds the lock, from words for that writer: "process 1234", or
            "another process" if its id is not known.
        foreign: Returns the error for when ``path`` is not a lock file of polyak, from what it is. None locks a folder
            or file that has other content.

    Raises:
        OSError: If ``path`` cannot be opened. And what ``busy`` and ``foreign`` return.

    Example:
        >>> _ = Path("results.jsonl").write_text("")
        >>> lock = Lock(Path("results.jsonl"), busy=lambda who: BlockingIOError(f"{who} is writing it"))
        >>> lock.is_own, lock.is_in_place
        (True, True)
        >>> lock.release()
    """

    def __init__(
        self, path: Path, busy: Callable[[str], Exception], foreign: Callable[[str], Exception] | None = None
    ) -> None:
        self.process = os.getpid()
        self._path = path
        self._busy = busy
        self._foreign = foreign
        if foreign is not None and path.is_symlink():
            raise foreign("a symbolic link")
        folder = path.is_dir()
        if fcntl is None and folder:  # Windows cannot open a folder, and nothing of it must be open
            self._descriptor, self._locked, close = -1, path.stat(), _do_nothing
        else:
            self._descriptor = os.open(path, _flags(create=foreign is not None, folder=folder), 0o666)
            self._locked, close = os.fstat(self._descriptor), os.close
        # Also where an interrupt comes before anybody has this object.
        self._close = weakref.finalize(self, close, self._descriptor)
        self._unmark = lambda: None
        _HELD.add(self)
        try:
            self._acquire()
        except BaseException:
            self._close()
            raise

    def _acquire(self) -> None:
        content = b"" if self._foreign is None else self._checked_content(self._foreign)
        if fcntl is None:
            self._mark(content)
        else:
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise self._busy(_process_in(content)) from None
        if self._foreign is not None and self.is_in_place:
            os.ftruncate(self._descriptor, 0)
            os.lseek(self._descriptor, 0, os.SEEK_SET)
            os.write(self._descriptor, f"{self.process}\n".encode())

    def _checked_content(self, foreign: Callable[[str], Exception]) -> bytes:
        status = os.fstat(self._descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
            raise foreign("a special file or a hard link")
        content = os.read(self._descriptor, 32)
        if not _CONTENT.fullmatch(content):
            raise foreign("a file with other content")
        return content

    def _mark(self, content: bytes) -> None:
        """Hold the lock without ``flock``, with a file that only one process can create."""
        mark = self._path.absolute().with_name(f".{self._path.absolute().name}.held")
        try:
            os.close(os.open(mark, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            raise self._busy(f"{_process_in(content)} (if it was killed, delete {mark})") from None
        self._unmark = weakref.finalize(self, _unmark, mark, self.process)

    @property
    def is_own(self) -> bool:
        """Whether this process took the lock, and is not a fork of the one that did."""
        return self.process == os.getpid()

    @property
    def is_in_place(self) -> bool:
        """Whether the locked file or folder is still what is at its path."""
        try:
            there = self._path.lstat() if self._foreign is not None else self._path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return False
        return os.path.samestat(there, self._locked)

    def release(self) -> None:
        """Let the next writer in. In a forked process, do nothing."""
        if self.is_own and self._close.alive:
            if fcntl is not None:
                fcntl.flock(self._descriptor, fcntl.LOCK_UN)
            self._unmark()
            self._close()


def _do_nothing(fd: int) -> None:
    del fd


def _flags(*, create: bool, folder: bool) -> int:
    wanted = ["O_CLOEXEC", "O_BINARY"]
    if create:
        wanted += ["O_CREAT", "O_NOFOLLOW", "O_NONBLOCK"]
    flags = os.O_RDONLY if folder and not create else os.O_RDWR
    for name in wanted:
        flags |= getattr(os, name, 0)  # no system has all of them
    return flags


def _process_in(content: bytes) -> str:
    process = content.decode().strip()
    return f"process {process}" if process else "another process"


def _unmark(mark: Path, process: int) -> None:
    if process == os.getpid():
        with suppress(OSError):
            mark.unlink(missing_ok=True)


_HELD = weakref.WeakSet[Lock]()


def _close_copies() -> None:
    for lock in list(_HELD):
        lock._close()  # noqa: SLF001  of this module


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_copies)
