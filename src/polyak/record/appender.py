"""Writes segments on a background thread, one at a time."""

import os
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from polyak.background import Worker
from polyak.errors import RecordError
from polyak.record.manifest import Edge
from polyak.record.writer import Writer


@dataclass(slots=True)
class Ended:
    """A segment that has ended, in memory until it is on disk.

    Args:
        tensors: As ``Writer.append`` takes them.
        start: Where it begins.
        end: Where it ends. If that is where it begins, only the raw weights are written.
        raw: The raw weights where it ends, at the end of a run.
        written: Whether it is on disk.
        error: Why the last try to write it failed, until that was raised.
        failed: Whether an error was ever raised.
    """

    tensors: Mapping[str, Tensor]
    start: Edge
    end: Edge
    raw: Mapping[str, Tensor] | None = None
    written: bool = False
    error: Exception | None = None
    failed: bool = False


class Appender:
    """Appends to a record on a background thread. The caller keeps segments until they are written.

    Args:
        writer: The writer of the record; closed with this object.

    Attributes:
        writer: As given. Use it only while nothing is being written.
        process: The id of the process that may write. A forked process has neither this thread nor the lock.
    """

    def __init__(self, writer: Writer) -> None:
        self.writer = writer
        self.process = os.getpid()
        self._thread = Worker("polyak-record")
        self._closed = False
        _APPENDERS.add(self)

    @property
    def forked(self) -> bool:
        """Whether this is a copy in a forked process, which cannot write."""
        return self.process != os.getpid()

    def begin(self, ended: Ended) -> None:
        """Start writing a segment; return immediately.

        Args:
            ended: The segment.
        """
        self._check_process()
        self._thread.submit(lambda: self._write(ended))

    def wait(self, ended: Ended) -> None:
        """Wait until a segment is on disk. If it cannot be written, raise why; the next call tries again.

        Args:
            ended: The segment.

        Raises:
            RecordError: If it cannot be written.
        """
        self._check_process()
        # After the first try, and instead of it if an interrupt came before that was submitted.
        self._thread.finish(lambda: self._write(ended))
        if ended.error is not None:
            error, ended.error, ended.failed = ended.error, None, True
            raise error

    def close(self) -> None:
        """Wait for the thread, end it and let the next writer in. In a forked process, do nothing."""
        if not self.forked:
            self._closed = True
            self._thread.close()
            self.writer.close()

    def settle(self) -> None:
        """Wait until every segment that was begun is on disk, or has failed to be written."""
        if not (self._closed or self.forked):
            self._thread.finish(lambda: None)

    def _write(self, ended: Ended) -> None:
        if ended.written or ended.error is not None:
            return
        try:
            if ended.end.updates > ended.start.updates:
                self.writer.append(ended.tensors, ended.start, ended.end)
                ended.tensors, ended.start = (
                    dict[str, Tensor](),
                    ended.end,
                )  # if the rest fails, only the rest is tried again
            if ended.raw is not None:
                self.writer.keep_raw(ended.raw)
            ended.written = True
        except Exception as error:
            ended.error = error

    def _check_process(self) -> None:
        if self.forked:
            raise RecordError(
                f"a run must be recorded by the process that began it, {self.process} (got {os.getpid()}, forked from "
                "it): detach the Recorder in the forked process"
            )


_APPENDERS = weakref.WeakSet[Appender]()


def settle(folder: Path) -> None:
    """Wait for what this process is writing to a record, so that a reader finds all segments that have ended.

    Args:
        folder: The folder of the record.
    """
    for appender in list(_APPENDERS):
        if appender.writer.folder == folder:
            appender.settle()
