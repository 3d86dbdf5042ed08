"""A record that a sweep reads while a run may still write it: its files stay open, as they were at the start.

A run that goes on merges segments and deletes the old files. A file that is open can still be read.
"""

import copy
import hashlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from io import BufferedReader
from pathlib import Path

from polyak.errors import RecordError
from polyak.record import Record, Segment, SegmentFile, check_size, open_segment
from polyak.record.series import SeriesRecord
from polyak.sweeping.workers import Workers

# How often a record is opened again because a run has merged a file between reading its name and opening it.
_TRIES = 20


class HeldRecord(Record):
    """A record whose files are open; ``held`` makes it.

    Args:
        record: The record, as it was when that object was made.
        stack: Closes the files.

    Attributes:
        source: The record that this was made of, which does not hold its files.
    """

    def __init__(self, record: Record, stack: ExitStack) -> None:
        vars(self).update(vars(record))  # what it was, and not what the manifest says now
        self.source = record
        self._verified = set()
        self._stack = stack
        self._held: dict[str, SegmentFile] = {}

    def open(self, segment: Segment) -> AbstractContextManager[SegmentFile]:
        """Return the open file of a segment for a ``with`` block, which does not close it.

        Args:
            segment: One of ``segments``.
        """
        return nullcontext(self._held[segment.file])

    def hold(self) -> None:
        """Open all files, and only then check them against their hashes: opening them is quick, reading takes long.

        Raises:
            OSError: If a file is missing or damaged.
        """
        contents, opened = list[tuple[Path, str]](), list[BufferedReader]()
        with ExitStack() as reading:
            for segment in self.segments:
                contents += check_size(self.folder, segment).items()
                opened += [reading.enter_context(path.open("rb")) for path, _ in contents[len(opened) :]]
                file = open_segment(self.folder, segment, self.tensors, self._verified)
                self._held[segment.file] = self._stack.enter_context(file)
            for (path, sha256), file in zip(contents, opened, strict=True):
                if not hashlib.file_digest(file, "sha256").hexdigest().startswith(sha256):
                    raise RecordError(
                        f"{path} must have the SHA-256 in the manifest: it is damaged, restore it from a copy"
                    )
                self._verified.add(path)


def up_to(record: Record, segment: Segment) -> Record:
    """Return a record as it was at the end of a segment.

    Args:
        record: The record.
        segment: One of its segments.
    """
    earlier = copy.copy(record)
    earlier.segments = record.segments[: record.segments.index(segment) + 1]
    return earlier


@contextmanager
def held(record: Record) -> Iterator[Record]:
    """Open a record with all its files for a ``with`` block. It stays the same even if the run continues to write it.

    Args:
        record: The record. If a run has merged its files since, the newer record is opened in its place.

    Raises:
        RecordError: If a file is missing or damaged.
    """
    if isinstance(record, HeldRecord | SeriesRecord):  # whose files are open
        yield record
        return
    for attempt in range(_TRIES):
        with ExitStack() as stack:
            opened = HeldRecord(record, stack)
            try:
                opened.hold()
            except OSError:
                newer = Record(record.folder)
                if attempt + 1 == _TRIES or newer.segments == record.segments:
                    raise
                record = newer
                continue
            yield opened
            return


def as_on_first(record: Record, workers: Workers) -> Record:
    """Return a record as rank 0 has it: a run that is writing it may have written more between two ranks.

    Args:
        record: The record, as this rank has it. One whose files are open stays as it is.
        workers: The ranks.
    """
    if workers.ranks.world_size == 1 or isinstance(record, HeldRecord | SeriesRecord):
        return record
    there = copy.copy(record)
    there.segments, there.raw = workers.from_first((record.segments, record.raw))
    return there


@contextmanager
def held_by_all(record: Record, workers: Workers) -> Iterator[Record]:
    """Open a record as ``held`` does, the same on all ranks, even if the run that is writing it continues meanwhile.

    Args:
        record: The record, as this rank has it. Of several, that of rank 0 is opened.
        workers: The ranks.

    Raises:
        RecordError: If a file is missing or damaged, or not all ranks can open the same record.
    """
    fixed = workers.ranks.world_size == 1 or isinstance(record, HeldRecord | SeriesRecord)
    found: list[list[str]] = []
    for _ in range(1 if fixed else _TRIES):
        with held(as_on_first(record, workers)) as whole:
            found = workers.exchange([one.file for one in whole.segments])
            if all(files == found[0] for files in found):
                yield whole
                return
        record = record if fixed else Record(record.folder)
    raise RecordError(
        f"all ranks must read the same record, and {record.folder} has other files on some (the newest: "
        f"{', '.join(dict.fromkeys(files[-1] for files in found))}); give a folder that all ranks see, or wait until "
        "the run has ended"
    )
