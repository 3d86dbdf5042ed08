"""The folder of a record that is kept for as long as its ``Recorder``, or a ``Record`` of it, is referred to."""

import os
import shutil
import tempfile
import weakref
from pathlib import Path


class TemporaryFolder:
    """A new folder, deleted with the last reference to this object, and when the process ends.

    A forked process, which has a copy of this object, deletes nothing. Nor does a process that is killed: then the
    folder is left where the system keeps temporary files.

    Attributes:
        path: The folder.
    """

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="polyak-record-"))
        self._deleted = weakref.finalize(self, _delete, self.path, os.getpid())


def _delete(path: Path, process: int) -> None:
    if process == os.getpid():
        shutil.rmtree(path, ignore_errors=True)
