"""``Recorder``: keeps a record of the weights while training, for averages of any profile to be taken afterwards."""

import json
import time
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from polyak.algorithm import Algorithm, MetricLogger, check_pickles
from polyak.averaging.weights import Shadow, refuse_unsynchronized
from polyak.errors import CheckpointError, CopyError, MismatchError, PlanWarning, RecordError, TimeError
from polyak.events import Event, State, refuse_uncounted
from polyak.record.appender import Appender, Ended
from polyak.record.manifest import Edge
from polyak.record.store import Writer
from polyak.sharding import Ranks, beside, is_initialized, local, refuse_stage
from polyak.storage.safetensors import TensorInfo
from polyak.tensors.slots import PolicyRule, all_slots, default_policy, unwrap, views_of
from polyak.time import Time, Timestamp, TimeUnit, as_span

# A state may be the one that is being written over the last, and then the last is still needed if that fails.
_PINS_PER_PATH = 2
# How long training may wait for the disk, all in all, before that is worth a warning.
_PATIENCE_S = 5.0


@dataclass(slots=True)
class _Open:
    """Where the recorder stands: in one object, so that one assignment, which no interrupt divides, ends a stretch."""

    start: Edge
    count: int = 0
    before: Ended | None = None


class Recorder(Algorithm):
    """Record the means of the weights over stretches of the run, merged as they age.

    Afterwards ``Record(folder)`` gives the average under any profile, half-life or window. While training this costs
    what an ``EMA`` does: one running mean in memory, one update a step; files are written and merged by a thread of
    its own. Training waits for it only if a stretch ends before the one before it is on disk, and then says so.

    If a stretch cannot be written, as on a full disk, that is raised at the end of the next one, and it stays in
    memory. Whoever catches the error, makes room and continues loses nothing: it is written then, and the open stretch
    gets longer meanwhile. After the last update ``close`` does that. So no more than that one copy is ever in memory.

    A checkpoint holds what is needed to go on: the open stretch, and which files it refers to. They stay on disk until
    that checkpoint is gone, or, where its path is not known, until two newer states were taken. A record that is ahead
    of a resumed checkpoint is rewound to it.

    Ranks that train one model together write one record. Of a sharded model each writes its shards, and the record can
    be gone on with on any number of ranks; all must then take the state together, as
    ``torch.distributed.checkpoint`` does. Of a model in ``DistributedDataParallel`` the first rank records alone. After
    an error on a rank the open stretch of a sharded model is lost, since the other ranks are elsewhere.

    Args:
        folder: Where the record is kept, on a disk that all ranks see. A record that is there already is continued
            only from a checkpoint. Under ``Trainer(autoresume=True)``, if there is no checkpoint yet, such a record is
            moved to ``backup-1`` in the folder, with a warning, and a new one begins.
        interval: Length of a stretch, in any unit: half-lives below it cannot be told afterwards. None takes a 512th of
            the run, for which the host must know ``max_duration``.
        per_level: How many stretches of one length are kept: 4 is exact to about 1 %, 8 to 0.3 % with half as many
            files again. None merges nothing, for averages that end anywhere in the run.
        dtype: Of the files: float32, float16 or bfloat16.
        device: Where the running mean is kept; None for where the model is.
        policy: Which tensors are averaged and which keep the last value of each stretch; the rest are not recorded.

    Raises:
        TimeError: If ``interval`` is no time, or not above 0.
        RecordError: If ``per_level`` is below 1.

    Attributes:
        folder: As given, made absolute: the program may change its directory.

    Example:
        >>> from polyak import HalfLife, Record, attach
        >>> model = nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with attach(Recorder("my-run", interval="20ba"), model, optimizer):
        ...     for _ in range(200):
        ...         optimizer.zero_grad()
        ...         nn.functional.mse_loss(model(torch.randn(8, 2)), torch.randn(8, 1)).backward()
        ...         optimizer.step()
        >>> averaged = Record("my-run").average(HalfLife("50ba", unbiased=True))
        >>> model.load_state_dict(averaged)
        <All keys matched successfully>
    """

    def __init__(
        self,
        folder: str | Path,
        interval: str | Time | None = None,
        per_level: int | None = 4,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        policy: PolicyRule = default_policy,
    ) -> None:
        if per_level is not None and per_level < 1:
            raise RecordError(f"per_level must be at least 1, or None to merge nothing (got {per_level!r})")
        self.folder = Path(folder).absolute()
        self._given = folder  # in ``repr``, by which ranks see that they record alike, whatever their disks are called
        self.interval = None if interval is None else as_span("interval", interval, above=0)
        self._per_level = per_level
        self._dtype = dtype
        self._device = device
        self._policy = policy
        self._state: State | None = None
        self._ranks: Ranks | None = None
        self._mean: Shadow | None = None
        self._open_stretch = _Open(Edge(0, Timestamp()))
        # By counter, how far the record's clock is ahead of the loop's, which may begin anew.
        self._ahead = dict[str, float]()
        self._loaded: str | None = None
        self._appender: Appender | None = None
        self._fitting = self._fitted = False  # a run is recorded now; one was
        self._waited_s = 0.0
        self._quarantine_warned = 0

    @property
    def num_updates(self) -> int:
        """How many updates were recorded."""
        return self._open_stretch.start.updates + self._open_stretch.count

    def __repr__(self) -> str:
        return f"Recorder('{self._given}', interval={self.interval}, per_level={self._per_level})"

    def __getstate__(self) -> dict[str, Any]:
        """Return what is copied or pickled, before it is at work: then it owns its folder, and a thread.

        Raises:
            CopyError: If it is at work.
        """
        if self._state is not None:
            raise CopyError(
                f"a Recorder must be copied or pickled before it is attached, and {self!r} writes to its folder "
                "already; make a new Recorder with a folder of its own"
            )
        check_pickles("policy", self._policy)
        return vars(self).copy()

    def match(self, event: Event, state: State) -> bool:
        """Return whether to act: at set-up, after each batch, where the run ends."""
        del state
        return event in {Event.INIT, Event.FIT_START, Event.BATCH_END, Event.FIT_END, Event.EXCEPTION}

    def apply(self, event: Event, state: State, logger: MetricLogger) -> None:
        """Take in the weights; write the stretch that ends."""
        del logger
        if event is Event.INIT:
            self._bind(state)
        elif event is Event.FIT_START:
            self._bind(state)
            self._open(state)
        elif event is Event.BATCH_END:
            self._take_in(state)
        elif event is Event.FIT_END:
            if self._fitting or self._appender is not None:
                self.close()
        else:
            self._close_after_an_error()

    def _bind(self, state: State) -> None:
        if self._state is not None and unwrap(self._state.model) is not unwrap(state.model):
            raise MismatchError("a Recorder records one model, and this one has another already; make a new Recorder")
        self._state = state
        self._ranks = Ranks.of(state.model)

    @property
    def _follows(self) -> bool:
        """Whether another rank, which has the same weights, records, and this one only counts along."""
        return self._ranks is not None and self._ranks.replicas and self._ranks.rank > 0

    @property
    def _sharded(self) -> bool:
        """Whether this rank records its part of the weights."""
        return self._ranks is not None and not self._ranks.replicas

    def _first(self, act: Callable[[], None]) -> None:
        """Run where there is a record to keep; raise what fails there on every rank."""
        if self._ranks is None:
            act()
        elif self._ranks.replicas:
            self._ranks.on_rank_0(act)
        else:
            self._ranks.each("what is recorded", act)

    # The record

    def _open(self, state: State) -> None:
        if self._fitting:
            return
        interval = self._interval_of(state)
        refuse_stage(state.model, "a record")
        if self._ranks is not None:
            refuse_unsynchronized(self._ranks, state.model, self._policy)
            if self._sharded and self._mean is None:
                self._mean = self._new_mean(state)
            self._agree(self._mean)
            length = state.max_duration if interval.unit is TimeUnit.DURATION else interval
            if length is not None and length.unit is TimeUnit.SECOND:
                raise RecordError(
                    "a stretch must end at the same batch on all ranks, and their clocks differ (got an interval of "
                    f"{interval}, max_duration={state.max_duration}): use a unit other than seconds"
                )
        self._first(lambda: self._open_record(state))
        self._fitting = True
        if self.num_updates == 0:
            self._open_stretch = _Open(Edge(0, state.timestamp))
        elif self._now(state).batch < self._open_stretch.start.timestamp.batch:
            self._ahead = _distance(state.timestamp, self._open_stretch.start.timestamp)

    def _agree(self, mean: Shadow | None) -> None:
        """Check that all ranks record the same; of a sharded model, also that what is not sharded is equal."""
        assert self._ranks is not None
        count = self._open_stretch.count
        facts = {"recorder": repr(self), "updates": self.num_updates, "updates in the open stretch": count}
        if mean is not None and self._sharded:
            mean.agree(self._ranks, facts)
        else:
            self._ranks.agree("what is recorded", facts)

    def _open_record(self, state: State) -> None:
        self._release()  # what an interrupt left open
        if self._mean is None:
            self._mean = self._new_mean(state)
        writer = self._new_writer(self._mean, state)
        try:
            self._find_place(writer)
            self._appender = Appender(writer)
        except BaseException:
            writer.close()
            raise

    def _new_mean(self, state: State) -> Shadow:
        return Shadow(state.model, policy=self._policy, device=self._device, views=True)

    def _new_writer(self, mean: Shadow, state: State) -> Writer:
        tensors = {
            name: TensorInfo.of(tensor, averaged=averaged, dtype=self._dtype)
            for name, (tensor, averaged) in mean.kinds().items()
        }
        return Writer(
            self.folder,
            tensors,
            per_level=self._per_level,
            max_duration=state.max_duration,
            aliases=_aliases(state.model, mean.averages),
            # A group of their own: what the thread sends must not mix with the messages of training.
            ranks=self._ranks.separate() if self._ranks is not None and self._sharded else None,
            # What is there is of a run that nobody can resume, and that this one must not destroy.
            anew=self.num_updates == 0 and self._loaded is None and getattr(state, "found_no_checkpoint", False),
        )

    def _find_place(self, writer: Writer) -> None:
        """Rewind to the checkpoint; see that the record ends where this recorder continues."""
        if self._loaded is not None:
            writer.rewind(json.loads(self._loaded))
            self._loaded = None
            writer.unpin_gone()
        held = writer.stretches[-1].end.updates if writer.stretches else 0
        before = self._open_stretch.before
        if held != (before.start if before and not before.written else self._open_stretch.start).updates:
            raise RecordError(
                f"{self.folder} has a record of {held} updates already, and this run has made {self.num_updates}: "
                "resume it from its checkpoint, delete the folder, or record to another"
            )

    def _interval_of(self, state: State) -> Time:
        interval = self.interval
        if interval is None:
            interval = Time(1 / 512, TimeUnit.DURATION)
        if interval.unit is TimeUnit.DURATION and state.max_duration is None:
            raise TimeError(
                "the length of a stretch must be known: give Recorder an interval such as '100ba', or the host its "
                f"max_duration (got interval={self.interval})"
            )
        return interval

    def _now(self, state: State) -> Timestamp:
        """Return where the record stands: its clock is never set back."""
        counters = {name: getattr(state.timestamp, name) for name in self._ahead}
        ahead: dict[str, Any] = {name: t + Time(self._ahead[name], t.unit) for name, t in counters.items()}
        return replace(state.timestamp, **ahead)

    def refuse_uncounted(self, state: State, counted: Collection[TimeUnit]) -> None:
        """Refuse an interval that the loop does not count; see ``Algorithm``."""
        if self.interval is not None:
            refuse_uncounted(f"interval='{self.interval}'", self.interval.unit, state, counted)

    def _take_in(self, state: State) -> None:
        if not self._fitting:
            raise RecordError(f"{self!r} must have seen FIT_START before a batch ends; does the host fire it?")
        interval, now, stretch = self._interval_of(state), self._now(state), self._open_stretch
        if now.batch.value <= stretch.start.timestamp.batch.value + stretch.count:
            return  # mixed precision has skipped this step
        stretch.count += 1
        if self._mean is not None:
            self._mean.update_(1 / stretch.count)
        before = stretch.start.timestamp.intervals(interval, state.max_duration)
        if now.intervals(interval, state.max_duration) > before:
            self._end_stretch(now)

    def _end_stretch(self, now: Timestamp) -> None:
        # Waited for before the copy is made, so that at most one is in memory next to the running mean. If it cannot be
        # written, the open stretch stays open.
        self._first(lambda: self._wait(saying=True))
        if self._sharded:
            self._agree(self._mean)
        self._hand_over(now)

    def _hand_over(self, now: Timestamp) -> None:
        """Let the thread write the open stretch."""
        end, ended = Edge(self.num_updates, now), None
        if self._mean is not None and self._appender is not None:
            self._quarantine_warned = self._mean.warn_of_quarantine(self._quarantine_warned)
            tensors = {
                name: beside(tensor, local(tensor).to("cpu", copy=True)) for name, tensor in self._mean.averages.items()
            }
            ended = Ended(tensors, self._open_stretch.start, end)
        self._open_stretch = _Open(end, before=ended)
        if ended is not None and self._appender is not None:
            self._appender.begin(ended)

    def _wait(self, *, saying: bool = False) -> None:
        """Wait until the last stretch is on disk; raise what went wrong. The next call tries that one again."""
        ended = self._open_stretch.before
        if ended is None:
            return
        if self._appender is None:
            raise RecordError(
                f"the stretch up to update {ended.end.updates} must be written to {self.folder}, and that failed when "
                "the run ended: call close() of the Recorder"
            )
        before, began = self._waited_s, time.perf_counter()
        self._appender.wait(ended)
        self._open_stretch.before = None
        self._waited_s += time.perf_counter() - began
        if saying and before <= _PATIENCE_S < self._waited_s:
            warnings.warn(
                f"training has waited {self._waited_s:.1f} s for the disk: a stretch of {self.interval or 'T/512'} "
                f"ends before the last is in {self.folder}; take a longer interval, a faster disk, or a 16-bit dtype",
                PlanWarning,
                stacklevel=3,
            )

    def close(self) -> None:
        """Write all that is not on disk yet, and let the record go. A run that ends does so by itself.

        If that failed, as on a full disk, what was not written is still in memory: make room and call this again, on
        all ranks.

        Raises:
            RecordError: If it cannot be written.
        """
        forked = self._appender is not None and self._appender.forked  # then the run is another process's
        if self._state is None or forked or not (self._fitting or self._has_unwritten):
            self._release()  # what an interrupt left open
            return
        first = self._first if self._fitting else _here
        try:
            if not self._fitting and not self._follows:
                self._open_record(self._state)
            if self._open_stretch.count:
                first(lambda: self._wait(saying=True))
                self._hand_over(self._now(self._state))
            first(self._wait)
        finally:
            self._release()

    @property
    def _has_unwritten(self) -> bool:
        """Whether a run has ended of which not all could be written."""
        return self._fitted and (self._open_stretch.before is not None or self._open_stretch.count > 0)

    def _close_after_an_error(self) -> None:
        """Do the same without the other ranks, which may be elsewhere. The error that ends the run is to be seen."""
        if self._appender is None or self._appender.forked:
            self._release()
            return
        lost: object = None
        stretch = self._open_stretch
        try:
            if self._sharded and stretch.before is not None and stretch.before.failed:
                lost = "other ranks may not try again to write it"
            else:
                self._wait()
            if stretch.count and self._fitting and self._state is not None:
                if self._sharded:
                    lost = f"other ranks may not have got to the last of its {stretch.count} updates"
                else:
                    self._hand_over(self._now(self._state))
                    self._wait()
        except Exception as error:
            lost = f"{error} (it is kept in memory: close() of the Recorder tries again)"
        finally:
            self._release()
        if lost is not None:
            warnings.warn(f"the last stretch was not recorded: {lost}", PlanWarning, stacklevel=2)

    def _release(self) -> None:
        self._fitted, self._fitting = self._fitting or self._fitted, False
        if self._appender is not None:
            self._appender.close()
            self._appender = None

    # State

    def state_dict(self) -> dict[str, Any]:
        """Return all that a resumed run depends on, and keep the files that it refers to; waits for the disk.

        Where ``torch.distributed`` is in use it has the same entries before recording has begun as after. Where several
        ranks have the whole model each, the first rank's state has the open stretch.
        """
        self._wait()
        stretch = self._open_stretch
        state: dict[str, Any] = {"repr": repr(self), "num_updates": self.num_updates, "count": stretch.count}
        if self._state is None or (self._mean is None and not is_initialized()):
            return state
        refuse_unsynchronized(self._ranks, self._state.model, self._policy)
        mean = None if self._follows else self._mean or self._new_mean(self._state)
        if self._sharded:
            self._agree(mean)
        state["start"] = {"updates": stretch.start.updates, **stretch.start.timestamp.state_dict()}
        state["ahead"] = dict(self._ahead)
        if mean is not None:
            state["mean"] = mean.state_dict()
            state["record"] = self._loaded or (self._pinned(mean, self._state) if self._mean else "")
        return state

    def _pinned(self, mean: Shadow, state: State) -> str:
        """Return what the record refers to, and keep it; after the run the record is opened once more for that."""
        own = self._appender.writer if self._appender else None
        writer = own or self._new_writer(mean, state)
        try:
            self._pin(writer)
            return json.dumps(writer.state_dict())
        finally:
            if own is None:
                writer.close()

    def _pin(self, writer: Writer) -> None:
        path = self._state.saving_to if self._state else None
        writer.unpin_gone()
        at = f"{path.name if path else 'state'}@"
        writer.pin(f"{at}{self.num_updates}", path)
        for name in [name for name in writer.pins if name.startswith(at)][:-_PINS_PER_PATH]:
            writer.unpin(name)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from what ``state_dict`` returned; the record is rewound to it when training starts.

        Args:
            state: As saved.

        Raises:
            CheckpointError: If it is no such state, or no model has been met yet.
            MismatchError: If names or shapes differ from the model's.
        """
        if "num_updates" not in state or "count" not in state:
            raise CheckpointError(f"the state must be that of a Recorder (got the keys {sorted(state)})")
        if self._state is None:
            raise CheckpointError("a Recorder must be in its Trainer, or attached, before a state is loaded")
        if "start" not in state:
            return
        if not self._follows and state["record"]:
            self._mean = self._new_mean(self._state)
            self._mean.load_state_dict(state["mean"])
            self._quarantine_warned = self._mean.num_quarantined
            self._loaded = state["record"]
        self._ahead = dict(state.get("ahead", {}))
        self._fitted = False
        start = dict(state["start"])
        edge = Edge(int(start.pop("updates")), Timestamp.from_state_dict(start))
        self._open_stretch = _Open(edge, int(state["count"]))


def _here(act: Callable[[], None]) -> None:
    act()


def _distance(now: Timestamp, later: Timestamp) -> dict[str, float]:
    """Return how far counters are ahead of others; of epochs with their fraction."""
    counters = {"iteration", "epoch", "batch", "sample", "token", "total_wct"}
    units = {name: getattr(now, name).unit for name in sorted(counters)}
    return {name: later.elapsed(unit) - now.elapsed(unit) for name, unit in units.items()}


def _aliases(model: nn.Module, kept: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the further names of tied tensors, and the name that each is kept under."""
    persistent = {slot.name for slot in all_slots(model) if slot.persistent}
    tied = views_of(model, tied=True)
    return {name: own.name for name, (own, _) in tied.items() if own.name in kept and name in persistent}
