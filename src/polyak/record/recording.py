"""``Recording``: the running mean, the segments and the state of a ``Recorder`` for one model."""

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from polyak.averaging.nothing import warn_of_nothing
from polyak.averaging.weights import Shadow
from polyak.errors import PlanWarning, RecordError
from polyak.events import State
from polyak.record.clock import RecordClock
from polyak.record.manifest import Edge
from polyak.record.queue import OpenSegment, SegmentQueue
from polyak.record.roles import Roles
from polyak.record.settings import Settings, pinned
from polyak.record.writer import Writer
from polyak.sharding import is_initialized
from polyak.tensors.slots import averaged_parameters, unwrap
from polyak.time import Timestamp


class Recording:
    """Records a model.

    Args:
        settings: The settings of the ``Recorder``.
        state: The state of the loop.

    Attributes:
        state: As given, or of the loop that the model is in now.
        queue: The segments that are not on disk yet.
        settings: As given, or, where that gives none, those of the record that a loaded state continues.
    """

    def __init__(self, settings: Settings, state: State) -> None:
        self.queue = SegmentQueue(settings.folder, settings.interval)
        self.settings = settings
        self._mean: Shadow | None = None
        self._clock = RecordClock()
        self._loaded: str | None = None  # what the writer is rewound to when training starts
        self._fitting = self._fitted = False  # a run is recorded now; one was
        self._num_quarantined = 0  # that were warned of
        self.bind(state)

    def bind(self, state: State) -> None:
        """Record the same model in another loop.

        Args:
            state: The state of that loop.
        """
        self.state = state
        self._roles = Roles(state.model)

    def begin(self) -> None:
        """Open the record, where the run starts.

        Raises:
            RecordError: If it cannot be opened, or does not end where this run continues.
            ShardingError: If ranks disagree, or stages of a pipeline have different tensors of one name.
            TimeError: If the length of a segment is not known.
        """
        if self._fitting:
            return
        roles, state = Roles(self.state.model), self.state
        self._roles = roles  # a stage of a pipeline may have been made since
        interval = self.settings.interval_of(state)
        if roles.several is not None:
            roles.refuse_temporary(temporary=self.settings.temporary)
            roles.refuse_unsynchronized(state.model, self.settings.policy)
            if roles.sharded:
                self._mean = self._mean or self.settings.new_mean(state)
            self._agree(self._mean)
            roles.agree_on_names(state.model)
            roles.refuse_seconds(interval, state.max_duration)
        roles.run(self._open_record)
        if roles.several is not None:  # ranks that only count must count the segments of the record that rank 0 resumes
            self.settings = replace(self.settings, interval=roles.several.from_rank_0(self.settings.interval))
        self._fitting = True
        if self.queue.num_updates == 0:
            self.queue.open = OpenSegment(Edge(0, state.timestamp))
        else:
            self._clock.resume(state.timestamp, self.queue.open.start.timestamp)

    def _agree(self, mean: Shadow | None) -> None:
        count = self.queue.open.count
        facts = {"recorder": self.settings.shown, "updates": self.queue.num_updates}
        self._roles.agree(mean, {**facts, "updates in the open segment": count})

    def _open_record(self) -> None:
        roles, state = self._roles, self.state
        mean = self._mean = self._mean or self.settings.new_mean(state)
        if not averaged_parameters(state.model, self.settings.policy):
            warn_of_nothing(unwrap(state.model), self.settings.shown)
        new = self.queue.num_updates == 0 and self._loaded is None
        self.queue.begin(lambda: self.settings.writer(mean, state, roles.separate(), new=new), self._rewind_to_state)

    def _rewind_to_state(self, writer: Writer) -> None:
        """Rewind to the checkpoint; check that the record ends where this recorder continues."""
        if self._loaded is not None:
            writer.rewind(json.loads(self._loaded))
            self._loaded = None
            writer.unpin_gone()
        held = writer.segments[-1].end.updates if writer.segments else 0
        if held != self.queue.num_written:
            raise RecordError(
                f"{self.settings.folder} has a record of {held} updates already, and this run has made "
                f"{self.queue.num_updates}: resume it from its checkpoint, record to another folder, or replace "
                "the record by Recorder(..., overwrite=True)"
            )

    def update(self, state: State) -> None:
        """Add the weights to the open segment; end it if it is long enough.

        Args:
            state: The state of the loop, after a batch.

        Raises:
            RecordError: If the segment before cannot be written.
        """
        if not self._fitting:
            shown = self.settings.shown
            raise RecordError(f"{shown} must have seen FIT_START before a batch ends; does the loop fire it?")
        interval, now, segment = self.settings.interval_of(state), self._clock.now(state.timestamp), self.queue.open
        if now.batch.value <= segment.start.timestamp.batch.value + segment.count:
            return  # mixed precision has skipped this step
        segment.count += 1
        if self._mean is not None:
            self._mean.update_(1 / segment.count)
        before = segment.start.timestamp.intervals(interval, state.max_duration)
        if now.intervals(interval, state.max_duration) > before:
            # Before the copy is made, so that at most one is in memory in addition to the running mean. If the segment
            # before cannot be written, the open one stays open.
            self._roles.run(lambda: self.queue.wait(warn=True))
            if self._roles.sharded:
                self._agree(self._mean)
            self._end_segment(now)

    def _end_segment(self, now: Timestamp, *, with_raw: bool = False) -> None:
        if self._mean is not None and self.queue.appender is not None:
            self._num_quarantined = self._mean.warn_of_quarantine(self._num_quarantined)
        self.queue.end_segment(now, self._mean, with_raw=with_raw)

    def flush(self) -> None:
        """Wait until the segment that has ended is on disk.

        Raises:
            RecordError: If it cannot be written, or this rank does not record.
        """
        if self._roles.follows:
            raise RecordError("a record must be read on rank 0, which alone records this model (got another rank)")
        if self.queue.appender is not None and not self.queue.is_forked:
            self.queue.wait()

    def end(self) -> None:
        """Close at the end of a run, if a record is open."""
        if self._fitting or self.queue.appender is not None:
            self.close()

    def close(self) -> None:
        """Write all that is not on disk yet, and release the record.

        Raises:
            RecordError: If it cannot be written.
        """
        roles, queue = self._roles, self.queue
        unwritten = self._fitting or (self._fitted and not queue.is_empty)
        if queue.is_forked or not unwritten:
            self._release()  # what an interrupt left open
            return
        run = roles.run if self._fitting else _run_here
        try:
            if not self._fitting and not roles.follows:
                self._open_record()
            if queue.open.count or self._fitting:
                run(lambda: queue.wait(warn=True))
                # After the run the model may hold other weights than those where the segment ends.
                self._end_segment(self._clock.now(self.state.timestamp), with_raw=self._fitting)
            run(queue.wait)
        finally:
            self._release()

    def close_after_an_error(self) -> None:
        """Close without the other ranks, which may be at another batch; warn about what is lost."""
        queue, sharded = self.queue, self._roles.sharded
        if queue.appender is None or queue.is_forked:
            self._release()
            return
        lost: object = None
        segment = queue.open
        try:
            if sharded and segment.before is not None and segment.before.failed:
                lost = "other ranks may not try again to write it"
            else:
                queue.wait()
            if segment.count and self._fitting:
                if sharded:
                    lost = f"other ranks may not have made the last of its {segment.count} updates"
                else:
                    self._end_segment(self._clock.now(self.state.timestamp))
                    queue.wait()
        except Exception as error:  # the error that ends the run must be seen
            lost = f"{error} (it is kept in memory: close() of the Recorder tries again)"
        finally:
            self._release()
        if lost is not None:
            warnings.warn(f"the last segment was not recorded: {lost}", PlanWarning, stacklevel=2)

    def _release(self) -> None:
        self._fitted, self._fitting = self._fitting or self._fitted, False
        self.queue.release()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the ``Recorder``, and keep the files that it refers to; wait for the disk."""
        self.queue.wait()
        segment, roles, state = self.queue.open, self._roles, self.state
        saved: dict[str, Any] = {"repr": self.settings.shown, "num_updates": self.queue.num_updates}
        saved["count"] = segment.count
        if self._mean is None and not is_initialized():
            return saved
        roles.refuse_unsynchronized(state.model, self.settings.policy)
        mean = None if roles.follows else self._mean or self.settings.new_mean(state)
        if roles.sharded:
            self._agree(mean)
        saved["start"] = {"updates": segment.start.updates, **segment.start.timestamp.state_dict()}
        saved["ahead"] = dict(self._clock.ahead)
        if mean is not None:
            saved["mean"] = mean.state_dict()
            saved["record"] = self._loaded or (self._pin(mean) if self._mean else "")
        return saved

    def _pin(self, mean: Shadow) -> str:
        roles, state = self._roles, self.state
        own = self.queue.appender.writer if self.queue.appender else None
        writer = own or self.settings.writer(mean, state, roles.separate())  # after the run it is opened once more
        try:
            plain = pinned(writer, state.saving_to, self.queue.num_updates)
            return json.dumps({**plain, **self.settings.to_resume()})
        finally:
            if own is None:
                writer.close()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from what ``state_dict`` returned.

        Args:
            state: The saved state.

        Raises:
            MismatchError: If names or shapes differ from the model's.
        """
        if "start" not in state:
            return
        if not self._roles.follows and state["record"]:
            self._mean = self.settings.new_mean(self.state)
            self._mean.load_state_dict(state["mean"])
            self._num_quarantined = self._mean.num_quarantined
            self._loaded = state["record"]
            self.settings = self.settings.resumed(json.loads(state["record"]))
        self._clock.ahead = dict(state.get("ahead", {}))
        self._fitted = False
        start = dict(state["start"])
        edge = Edge(int(start.pop("updates")), Timestamp.from_state_dict(start))
        self.queue.open = OpenSegment(edge, int(state["count"]))


def _run_here(act: Callable[[], None]) -> None:
    act()
