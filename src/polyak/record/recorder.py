"""``Recorder``: keeps a record of the weights while training, for averages under any profile afterwards."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from polyak.algorithm import Algorithm, MetricLogger, check_event, check_pickles
from polyak.averaging.habits import explained, kind_of
from polyak.errors import ArgumentError, CheckpointError, CopyError, MismatchError, RecordError
from polyak.events import Event, State, refuse_uncounted
from polyak.record.manifest import MANIFEST
from polyak.record.reader import Record
from polyak.record.recording import Recording
from polyak.record.settings import Settings, check_arguments
from polyak.record.temporary import TemporaryFolder
from polyak.tensors.slots import PolicyRule, default_policy, unwrap
from polyak.time import Time, TimeUnit, as_span

_OFTEN = "interval='100 steps' is the time between two segments"
_ARGUMENTS = {
    **dict.fromkeys(("every", "every_n_steps", "update_interval", "update_every", "freq"), _OFTEN),
    **dict.fromkeys(("path", "dir", "directory", "out"), "the folder is folder=, the first argument"),
    **dict.fromkeys(("model", "optimizer"), "it goes to attach: attach(Recorder('my-run'), model, optimizer)"),
    "force": "overwrite=True replaces a record",
}


class Recorder(Algorithm):
    """Record the means of the weights over segments of the run, and merge them as they age.

    Afterwards ``Record(folder)`` gives the average under any profile, half-life or window. While training this costs
    what an ``EMA`` does: one running mean in memory, one update a step. A background thread writes and merges files.
    Training waits for it only if a segment ends before the one before is on disk, and warns if that takes long.

    If a segment cannot be written, for example because the disk is full, the error is raised at the end of the next
    one, and the segment stays in memory. If you catch the error, make room and continue, nothing is lost: the segment
    is written then, and the open one gets longer meanwhile. After the last update, call ``close``. At most one such
    segment is in memory.

    A checkpoint has what is needed to resume: the open segment, and the names of the files that it needs. These stay
    on disk until the checkpoint is deleted or, if its path is not known, until two newer states were taken. A record
    that is ahead of a resumed checkpoint is rewound to it.

    Ranks that train one model together write one record. Of a sharded model each rank writes its shards, and any number
    of ranks can resume the record; all must then take the state together, as ``torch.distributed.checkpoint`` does. Of
    a model in ``DistributedDataParallel`` rank 0 records alone. After an error on a rank the open segment of a sharded
    model is lost, since the other ranks may be at another batch.

    Args:
        folder: Where the record is kept, on a disk that all ranks see. None, for short runs in one process, takes a
            temporary folder, which is deleted with this object and the records that ``record`` has returned: files in
            the folder for temporary files, so that all that reads a record reads this one. A checkpoint of such a run
            can be resumed only while this object exists. A record that exists is continued from a
            checkpoint, replaced with ``overwrite``, and otherwise an error. Under ``Trainer(autoresume=True)``, if
            there is no checkpoint yet, such a record is moved to ``backup-1`` in the folder, with a warning, and a new
            one begins.
        interval: Length of a segment, in any unit. The record resolves half-lives of two intervals or more, and of one
            where it is a whole number of updates. None takes a 1024th of the run, for which the trainer must know
            ``max_duration``: half-lives of a 512th of the run or more.
        per_level: How many segments of one length are kept: 4 is exact to about 0.5 %, 8 to 0.2 % with half as many
            files again. None merges nothing, for averages that end anywhere in the run.
        dtype: The dtype of the files: float32, float16, bfloat16 or int8. None takes float64 for tensors of that dtype,
            and float16 for the others. A tensor is kept in float32 in a segment in which float16 would lose more than
            an eighth of its distance from the segment before, or a value is beyond its range. ``torch.int8`` takes less
            space, for nearly the same error: the differences from the segment before are kept in 8 bits, or a tensor in
            float32 where that may lose more than the eighth. Most files are then no models by themselves, and earlier
            versions of polyak cannot read the record. Complex tensors keep their dtype.
        device: Where the running mean is kept; None for the device of the model.
        policy: Which tensors are averaged and which keep the last value of each segment; the rest are not recorded.
        overwrite: Whether a record that exists in ``folder`` is replaced when a run begins: it is deleted, with the
            files that its checkpoints refer to. A run that resumes from a checkpoint continues its record instead.

    Raises:
        TimeError: If ``interval`` is not a time, or not above 0.
        RecordError: If ``per_level`` is below 1.
        ArgumentError: If another argument has a wrong type or value; it names it.

    Attributes:
        folder: As given, made absolute: the program may change its directory.

    Example:
        >>> from torch import nn
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

    @explained("Recorder('my-run', interval='100 steps')", _ARGUMENTS)
    def __init__(
        self,
        folder: str | Path | None = None,
        interval: str | Time | int | None = None,
        per_level: int | None = 4,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        policy: PolicyRule = default_policy,
        overwrite: bool = False,
    ) -> None:
        if folder is not None and not isinstance(folder, str | Path):
            raise ArgumentError(
                f"folder must be a path (got {kind_of(folder)}); the model goes to attach: "
                "attach(Recorder('my-run'), model, optimizer)"
            )
        check_arguments(per_level=per_level, dtype=dtype, device=device, policy=policy, overwrite=overwrite)
        self._temporary = TemporaryFolder() if folder is None else None
        self.folder = self._temporary.path if self._temporary is not None else Path(str(folder)).absolute()
        self.interval = None if interval is None else as_span("interval", interval, above=0, steps=True)
        where = None if folder is None else str(folder)
        shown = f"Recorder({where!r}, interval={self.interval}, per_level={per_level})"
        temporary = self._temporary is not None
        self._settings = Settings(
            self.folder, self.interval, per_level, dtype, device, policy, shown, overwrite, temporary
        )
        self._recording: Recording | None = None

    @property
    def num_updates(self) -> int:
        """How many updates were recorded."""
        return self._recording.queue.num_updates if self._recording else 0

    @property
    def record(self) -> Record:
        """The record as it is on disk now. Waits for a segment that has ended and is being written.

        Raises:
            RecordError: If no run has begun, if rank 0 has the record and this is another rank, or if the segment
                cannot be written.
        """
        if self._recording is None:
            raise RecordError(f"a run must have begun before it has a record, and {self!r} has seen none: train first")
        self._recording.flush()
        record = Record(self.folder)
        record.owner = self._temporary
        return record

    def __repr__(self) -> str:
        return self._settings.shown

    def __getstate__(self) -> dict[str, Any]:
        """Return what is copied or pickled. Once it is attached it cannot be: it owns its folder, and a thread.

        Raises:
            CopyError: If it is attached.
        """
        if self._recording is not None:
            raise CopyError(
                f"a Recorder must be copied or pickled before it is attached, and {self!r} writes to its folder "
                "already; make a new Recorder with another folder"
            )
        check_pickles("policy", self._settings.policy)
        return {**vars(self), "_temporary": None}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        """Take what was copied; a record in a temporary folder gets another folder."""
        vars(self).update(state)
        if self._settings.temporary:
            self._temporary = TemporaryFolder()
            self.folder = self._temporary.path
            self._settings = replace(self._settings, folder=self.folder)

    def match(self, event: Event, state: State) -> bool:
        """Return whether to act: at set-up, after each batch, and at the end of the run."""
        del state
        check_event(event, "Recorder")
        return event in {Event.INIT, Event.FIT_START, Event.BATCH_END, Event.FIT_END, Event.EXCEPTION}

    def apply(self, event: Event, state: State, logger: MetricLogger) -> None:
        """Add the weights to the open segment; write it when it ends."""
        del logger
        recording = self._bound(event, state)
        if event is Event.FIT_START:
            recording.begin()
        elif event is Event.BATCH_END:
            recording.update(state)
        elif event is Event.FIT_END:
            recording.end()
        elif event is Event.EXCEPTION:
            recording.close_after_an_error()

    def _bound(self, event: Event, state: State) -> Recording:
        if self._recording is None:
            self._recording = Recording(self._settings, state)
        elif event in {Event.INIT, Event.FIT_START}:
            if unwrap(self._recording.state.model) is not unwrap(state.model):
                raise MismatchError(
                    "a Recorder records one model, and this one has another already; make a new Recorder"
                )
            self._recording.bind(state)
        return self._recording

    def refuse_uncounted(self, state: State, counted: Collection[TimeUnit]) -> None:
        """Refuse an interval that the loop does not count; see ``Algorithm``."""
        settings = self._settings if self._recording is None else self._recording.settings
        if settings.interval is None and state.max_duration is None and (self.folder / MANIFEST).exists():
            return  # a state that is loaded later has the interval of that record; without one, the run does not begin
        interval = settings.interval_of(state) if settings.interval is None else settings.interval
        refuse_uncounted(f"interval='{interval}'", interval.unit, state, counted)

    def close(self) -> None:
        """Write all that is not on disk yet, and release the record. The end of a run calls this.

        If that failed, as on a full disk, what was not written is still in memory: make room and call this again, on
        all ranks.

        Raises:
            RecordError: If it cannot be written.
        """
        if self._recording is not None:
            self._recording.close()

    def state_dict(self) -> dict[str, Any]:
        """Return all that a resumed run depends on, and keep the files that it refers to; wait for the disk.

        Where ``torch.distributed`` is in use it has the same entries before recording has begun as after. Where several
        ranks have the full model each, the state of rank 0 has the open segment.
        """
        if self._recording is None:
            return {"repr": repr(self), "num_updates": 0, "count": 0}
        return self._recording.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from what ``state_dict`` returned; the record is rewound to it when training starts.

        Args:
            state: The saved state.

        Raises:
            CheckpointError: If it is not such a state, or this is not attached to a model yet.
            MismatchError: If names or shapes differ from the model's.
        """
        if "num_updates" not in state or "count" not in state:
            raise CheckpointError(f"the state must be that of a Recorder (got the keys {sorted(state)})")
        if self._recording is None:
            raise CheckpointError("a Recorder must be in its Trainer, or attached, before a state is loaded")
        self._recording.load_state_dict(state)
