"""``Recorder``: keeps a record of the weights while training, for averages of any profile to be taken afterwards."""

import json
import time
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from polyak.algorithm import Algorithm, MetricLogger
from polyak.errors import CheckpointError, MismatchError, PlanWarning, TimeError
from polyak.events import Event, State
from polyak.record import Edge, RecordError, TensorInfo, Writer
from polyak.select import PolicyRule, all_slots, default_policy, unwrap, views_of
from polyak.shadow import Shadow
from polyak.sharding import Ranks, beside, is_initialized, local
from polyak.time import Time, Timestamp, TimeUnit, as_span

# A state may be the one that is being written over the last, and then the last is still needed if that fails.
_PINS_PER_PATH = 2
# How long training may wait for the disk, all in all, before that is worth a warning.
_PATIENCE_S = 5.0


class Recorder(Algorithm):
    """Record the means of the weights over stretches of the run, merged as they age.

    Afterwards ``Record(folder)`` gives the average under any profile, half-life or window. While training this costs
    what an ``EMA`` does: one running mean in memory, one update a step; files are written and merged by a thread of
    its own. Training waits for it only if a stretch ends before the one before it is on disk, and then says so.

    A checkpoint holds what is needed to go on: the open stretch, and which files it refers to. They stay on disk until
    that checkpoint is gone, or, where its path is not known, until two newer states were taken. A record that is ahead
    of a resumed checkpoint is rewound to it.

    Ranks that train one model together write one record. Of a sharded model each writes its shards, and the record can
    be gone on with on any number of ranks; all must then take the state together, as
    ``torch.distributed.checkpoint`` does. Of a model in ``DistributedDataParallel`` the first rank records alone. After
    an error on a rank the open stretch of a sharded model is lost, since the other ranks are elsewhere.

    Args:
        folder: Where the record is kept, on a disk that all ranks see. A record that is there already is gone on with
            only from a checkpoint.
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
        folder: As given.
        num_updates: How many updates were recorded.

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
        self.folder = Path(folder)
        self.interval = None if interval is None else as_span("interval", interval, above=0)
        self.num_updates = 0
        self._per_level = per_level
        self._dtype = dtype
        self._device = device
        self._policy = policy
        self._state: State | None = None
        self._ranks: Ranks | None = None
        self._mean: Shadow | None = None
        self._count = 0  # updates in the open stretch
        self._start = Edge(0, Timestamp())
        self._loaded: str | None = None
        self._writer: Writer | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._fitting = False
        self._pending: Future[object] | None = None
        self._waited_s = 0.0
        self._quarantine_warned = 0

    def __repr__(self) -> str:
        return f"Recorder('{self.folder}', interval={self.interval}, per_level={self._per_level})"

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
            self._close()
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
        """Let what fails where there is a record fail on the ranks that follow too."""
        if self._ranks is not None and self._ranks.replicas:
            self._ranks.first(act)
        else:
            act()

    # The record

    def _open(self, state: State) -> None:
        if self._fitting:
            return
        interval = self._interval_of(state)
        if self._ranks is not None:
            self._agree()
            length = state.max_duration if interval.unit is TimeUnit.DURATION else interval
            if length is not None and length.unit is TimeUnit.SECOND:
                raise RecordError(
                    "a stretch must end at the same batch on all ranks, and their clocks differ (got an interval of "
                    f"{interval}, max_duration={state.max_duration}): use a unit other than seconds"
                )
        self._first(lambda: self._open_record(state))
        self._fitting = True
        if self.num_updates == 0:
            self._start = Edge(0, state.timestamp)

    def _agree(self) -> None:
        assert self._ranks is not None
        facts = {"recorder": repr(self), "updates": self.num_updates, "updates in the open stretch": self._count}
        self._ranks.agree("what is recorded", facts)

    def _open_record(self, state: State) -> None:
        if self._mean is None:
            self._mean = self._new_mean(state)
        self._writer = self._new_writer(self._mean, state)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="polyak-record")
        try:
            self._find_place()
        except BaseException:
            self._release()
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
            ranks=self._ranks.apart() if self._ranks is not None and self._sharded else None,
        )

    def _find_place(self) -> None:
        """Go on where the checkpoint says, or from the start in an empty record, or where this recorder stopped."""
        assert self._writer is not None
        if self._loaded is not None:
            self._writer.rewind(json.loads(self._loaded))
            self._loaded = None
            self._writer.unpin_gone()
        held = self._writer.stretches[-1].end.updates if self._writer.stretches else 0
        if held != self.num_updates - self._count:
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

    def _take_in(self, state: State) -> None:
        if not self._fitting:
            raise RecordError(f"{self!r} must have seen FIT_START before a batch ends; does the host fire it?")
        interval, now = self._interval_of(state), state.timestamp
        if now.batch.value <= self._start.timestamp.batch.value + self._count:
            return  # mixed precision has skipped this step
        self._count += 1
        self.num_updates += 1
        if self._mean is not None:
            self._mean.update_(1 / self._count)
        before = self._start.timestamp.intervals(interval, state.max_duration)
        if now.intervals(interval, state.max_duration) > before:
            self._end_stretch(now)

    def _end_stretch(self, now: Timestamp) -> None:
        # Waited for before the copy is made, so that at most one is in memory beside the running mean.
        self._first(lambda: self._wait(saying=True))
        self._hand_over(now)

    def _hand_over(self, now: Timestamp) -> None:
        """Let the thread write the open stretch."""
        end = Edge(self.num_updates, now)
        if self._mean is not None and self._writer is not None and self._thread is not None:
            self._quarantine_warned = self._mean.warn_of_quarantine(self._quarantine_warned)
            tensors = {
                name: beside(tensor, local(tensor).to("cpu", copy=True)) for name, tensor in self._mean.averages.items()
            }
            self._pending = self._thread.submit(self._writer.append, tensors, self._start, end)
        self._start, self._count = end, 0

    def _wait(self, *, saying: bool = False) -> None:
        """Wait until the last stretch is on disk; raise what went wrong."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        before, began = self._waited_s, time.perf_counter()
        pending.result()
        self._waited_s += time.perf_counter() - began
        if saying and before <= _PATIENCE_S < self._waited_s:
            warnings.warn(
                f"training has waited {self._waited_s:.1f} s for the disk: a stretch of {self.interval or 'T/512'} "
                f"ends before the last is in {self.folder}; take a longer interval, a faster disk, or a 16-bit dtype",
                PlanWarning,
                stacklevel=3,
            )

    def _close(self) -> None:
        """Write the open stretch, wait until it is on disk, let the record go."""
        if not self._fitting:
            return
        try:
            if self._count and self._state is not None:
                self._end_stretch(self._state.timestamp)
            self._first(self._wait)
        finally:
            self._release()

    def _close_after_an_error(self) -> None:
        """Do the same without the other ranks, which may be elsewhere. The error that ends the run is to be seen."""
        lost: object = None
        try:
            self._wait()
            if self._count and self._fitting and self._state is not None:
                if self._sharded:
                    lost = f"other ranks may not have got to the last of its {self._count} updates"
                else:
                    self._hand_over(self._state.timestamp)
                    self._wait()
        except Exception as error:
            lost = error
        finally:
            self._release()
        if lost is not None:
            warnings.warn(f"the last stretch was not recorded: {lost}", PlanWarning, stacklevel=2)

    def _release(self) -> None:
        self._fitting = False
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    # State

    def state_dict(self) -> dict[str, Any]:
        """Return all that going on depends on, and keep the files that it refers to; waits for the disk.

        Where ``torch.distributed`` is in use it has the same entries before recording has begun as after. Where several
        ranks have the whole model each, the first rank's state has the open stretch.
        """
        self._wait()
        state: dict[str, Any] = {"repr": repr(self), "num_updates": self.num_updates, "count": self._count}
        if self._state is None or (self._mean is None and not is_initialized()):
            return state
        if self._sharded:
            self._agree()
        state["start"] = {"updates": self._start.updates, **self._start.timestamp.state_dict()}
        if not self._follows:
            mean = self._mean or self._new_mean(self._state)
            state["mean"] = mean.state_dict()
            state["record"] = self._loaded or (self._pinned(mean, self._state) if self._mean else "")
        return state

    def _pinned(self, mean: Shadow, state: State) -> str:
        """Return what the record refers to, and keep it; after the run the record is opened once more for that."""
        writer = self._writer or self._new_writer(mean, state)
        try:
            self._pin(writer)
            return json.dumps(writer.state_dict())
        finally:
            if writer is not self._writer:
                writer.close()

    def _pin(self, writer: Writer) -> None:
        path = self._state.saving_to if self._state else None
        writer.unpin_gone()
        at = f"{path.name if path else 'state'}@"
        writer.pin(f"{at}{self.num_updates}", path)
        for name in [name for name in writer.pins if name.startswith(at)][:-_PINS_PER_PATH]:
            writer.unpin(name)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` returned; the record is rewound to it when training starts.

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
        self.num_updates, self._count = int(state["num_updates"]), int(state["count"])
        start = dict(state["start"])
        self._start = Edge(int(start.pop("updates")), Timestamp.from_state_dict(start))


def _aliases(model: nn.Module, kept: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the further names of tied tensors, and the name that each is kept under."""
    persistent = {slot.name for slot in all_slots(model) if slot.persistent}
    tied = views_of(model, tied=True)
    return {name: owner for name, (owner, _, _) in tied.items() if owner in kept and name in persistent}
