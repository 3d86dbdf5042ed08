"""The segments of a run that are not on disk yet: the open one, and at most one that has ended."""

import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from polyak.averaging.weights import Shadow
from polyak.errors import PlanWarning, RecordError
from polyak.record.appender import Appender, Ended
from polyak.record.manifest import Edge
from polyak.record.writer import Writer
from polyak.sharding import local, sharded_like
from polyak.tensors.slots import places_of
from polyak.time import Time, Timestamp

# How long training may wait for the disk, all in all, before it warns.
_PATIENCE_S = 5.0


@dataclass(slots=True)
class OpenSegment:
    """The segment to which updates are added, and the one before. A single assignment, which is atomic, ends it.

    Args:
        start: Where it begins.
        count: How many updates it is the mean of.
        before: The segment before, until it is on disk.
    """

    start: Edge
    count: int = 0
    before: Ended | None = None


class SegmentQueue:
    """Lets a thread write segments that have ended, one at a time, and keeps those that are not written.

    Args:
        folder: The folder of the record, for messages.
        interval: The length of a segment, for messages.

    Attributes:
        open: The open segment.
        appender: What writes, while a record is open.
    """

    def __init__(self, folder: Path, interval: Time | None) -> None:
        self.open = OpenSegment(Edge(0, Timestamp()))
        self.appender: Appender | None = None
        self._folder = folder
        self._interval = interval
        self._waited_s = 0.0

    @property
    def num_updates(self) -> int:
        """How many updates were recorded."""
        return self.open.start.updates + self.open.count

    @property
    def is_empty(self) -> bool:
        """Whether all that was recorded is on disk."""
        return self.open.before is None and not self.open.count

    @property
    def num_written(self) -> int:
        """How many updates the record on disk must hold."""
        before = self.open.before
        return (before.start if before is not None and not before.written else self.open.start).updates

    @property
    def is_forked(self) -> bool:
        """Whether this is a copy in a forked process, which cannot write."""
        return self.appender is not None and self.appender.forked

    def begin(self, make_writer: Callable[[], Writer], prepare: Callable[[Writer], None]) -> None:
        """Open the record.

        Args:
            make_writer: Returns its writer.
            prepare: What to do with the writer first.
        """
        self.release()  # what an interrupt left open
        writer = make_writer()
        try:
            prepare(writer)
            self.appender = Appender(writer)
        except BaseException:
            writer.close()
            raise

    def end_segment(self, now: Timestamp, mean: Shadow | None, *, with_raw: bool) -> None:
        """End the open segment, and have a copy of it written. The one before must be on disk.

        Args:
            now: The clock of the record.
            mean: The running mean; None on ranks that do not record.
            with_raw: Whether the raw weights are written too, as at the end of a run.
        """
        end, ended = Edge(self.num_updates, now), None
        if mean is not None and self.appender is not None:
            places = places_of(mean.model)
            means = _copies(places.as_full(mean.averages)) if self.open.count else {}
            raw = _copies(places.as_full(mean.training_tensors())) if with_raw and end.updates else None
            ended = Ended(means, self.open.start, end, raw)
        self.open = OpenSegment(end, before=ended)
        if ended is not None and self.appender is not None:
            self.appender.begin(ended)

    def wait(self, *, warn: bool = False) -> None:
        """Wait until the segment that has ended is on disk. If that fails, the next call tries again.

        Args:
            warn: Whether to warn if training has waited for long.

        Raises:
            RecordError: If it cannot be written.
        """
        ended = self.open.before
        if ended is None:
            return
        if self.appender is None:
            raise RecordError(
                f"the segment up to update {ended.end.updates} must be written to {self._folder}, and that failed when "
                "the run ended: call close() of the Recorder"
            )
        waited_before, began = self._waited_s, time.perf_counter()
        self.appender.wait(ended)
        self.open.before = None
        self._waited_s += time.perf_counter() - began
        if warn and waited_before <= _PATIENCE_S < self._waited_s:
            warnings.warn(
                f"training has waited {self._waited_s:.1f} s for the disk: a segment of {self._interval or 'T/1024'} "
                f"ends before the last is in {self._folder}; take a longer interval, a faster disk, or a 16-bit dtype",
                PlanWarning,
                stacklevel=3,
            )

    def release(self) -> None:
        """Wait for the thread, end it, and let the next writer in."""
        if self.appender is not None:
            self.appender.close()
            self.appender = None


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: sharded_like(tensor, local(tensor).to("cpu", copy=True)) for name, tensor in tensors.items()}
