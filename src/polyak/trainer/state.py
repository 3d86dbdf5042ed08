"""What the trainer's algorithms and callbacks see of it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch import nn
from torch.optim import Optimizer

from polyak.algorithm import Algorithm
from polyak.errors import TimeError
from polyak.events import Event, elapsed_duration
from polyak.time import Time, Timestamp, TimeUnit, as_span

if TYPE_CHECKING:
    from polyak.trainer.callback import Callback
    from polyak.trainer.evaluation import Evaluator


class Scheduler(Protocol):
    """The members of a learning rate scheduler that are used: those of torch's."""

    def step(self) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


@dataclass
class TrainerState:
    """Where the trainer stands and what it works with; an ``events.State`` and more, by the names of Composer's state.

    Args:
        model: In training, wrapped or not.
        max_duration: How long to train.
        optimizers: As given to the trainer.
        schedulers: As given to the trainer.
        algorithms: At work; those that are appended are too.
        save_checkpoint: Writes a checkpoint of the run to a path. Where several ranks train, all must call it.
        callbacks: With the loggers last; those that are appended are called too.
        timestamp: Now.
        previous_timestamp: Before the last batch or epoch ended.
        train_dataloader: As given to the trainer.
        dataloader: That is being used: of training, or of an evaluator.
        dataloader_label: ``"train"``, or that of the evaluator.
        evaluators: What is evaluated, each with its label.
        batch: That is being used, on the CPU until ``BEFORE_TRAIN_BATCH``, then each microbatch on the device.
        outputs: Of the model for ``batch``.
        loss: Of the last batch, over all ranks, detached; from ``AFTER_LOSS`` to ``AFTER_BACKWARD`` of the microbatch.
        eval_metrics: The last evaluation's, by name.
        train_metrics: Those of training that were logged last, by name.
        counted: The units of time that are counted.
        saving_to: Where a checkpoint is being written, between ``SAVE_START`` and ``SAVE_END``.
        rank: The number of this process among those that train the model. Only rank 0 should write and print.
        sharded: Whether the model or an average is divided over ranks, so that checkpoints are folders.
        run_name: Of this run.
        seed: Of this run.
        stopping: Whether ``stop_training`` was called.
        found_no_checkpoint: Whether the run was to resume by itself and found no checkpoint, so that it begins.
    """

    model: nn.Module
    max_duration: Time | None
    optimizers: list[Optimizer]
    schedulers: list[Scheduler]
    algorithms: list[Algorithm]
    save_checkpoint: Callable[[Path], None]
    callbacks: "list[Callback]" = field(default_factory=list)
    timestamp: Timestamp = field(default_factory=Timestamp)
    previous_timestamp: Timestamp = field(default_factory=Timestamp)
    train_dataloader: Iterable[Any] | None = None
    dataloader: Iterable[Any] | None = None
    dataloader_label: str | None = None
    evaluators: "list[Evaluator]" = field(default_factory=list)
    batch: Any = None
    outputs: Any = None
    loss: Any = None
    eval_metrics: dict[str, float] = field(default_factory=dict)
    train_metrics: dict[str, float] = field(default_factory=dict)
    counted: frozenset[TimeUnit] = frozenset(TimeUnit)
    saving_to: Path | None = None
    rank: int = 0
    sharded: bool = False
    run_name: str = ""
    seed: int = 0
    stopping: bool = False
    found_no_checkpoint: bool = False

    def get_elapsed_duration(self) -> Time | None:
        """Return the elapsed share of the run as ``dur``; None if ``max_duration`` is not known."""
        return elapsed_duration(self.timestamp, self.max_duration)

    def stop_training(self) -> None:
        """Let this batch be the last of the run, with its events. A later ``fit`` continues."""
        self.stopping = True

    @property
    def dataloader_len(self) -> Time | None:
        """Batches in an epoch of training, if that is known."""
        length = self.timestamp.epoch_length
        return None if length is None else Time(length, TimeUnit.BATCH)

    @property
    def finished(self) -> bool:
        """Whether the run has reached ``max_duration``, or is to stop."""
        if self.stopping or self.max_duration is None:
            return self.stopping
        return self.timestamp.get(self.max_duration.unit) >= self.max_duration

    @property
    def ends_epoch(self) -> bool:
        """Whether the last batch of an epoch of known length has ended, and the epoch has not."""
        return self.timestamp.batch_in_epoch.value == self.timestamp.epoch_length


# Whether something is due at an event.
Question = Callable[[TrainerState, Event], Any]


def countable(name: str, time: Time, *, tokens: bool = True) -> Time:
    """Return a time that a trainer can count up to.

    Args:
        name: Of the argument, for errors.
        time: In any unit.
        tokens: Whether tokens are counted.

    Raises:
        TimeError: If it is in a unit that is not counted.
    """
    if time.unit is TimeUnit.ITERATION:
        raise TimeError(f"{name} must be in ep, ba, sp, tok or sec (got {time}): a trainer counts no iterations")
    if time.unit is TimeUnit.TOKEN and not tokens:
        raise TimeError(f"{name} must be in a unit that is counted (got {time}); give Trainer num_tokens= for tok")
    return time


def question(
    name: str, interval: str | Time | float, *, at: tuple[Event, Event], counted: frozenset[TimeUnit] | None = None
) -> Question:
    """Return a question that is true once each ``interval``.

    Args:
        name: Of the argument, for errors.
        interval: A time, or epochs as a number; above 0 and whole.
        at: As for ``every``.
        counted: The units that are counted, if that is known.

    Raises:
        TimeError: If it is no such time.
    """
    span = as_span(name, interval, above=0, whole=True, unit=TimeUnit.EPOCH)
    return every(countable(name, span, tokens=counted is None or TimeUnit.TOKEN in counted), at=at)


def every(interval: Time, *, at: tuple[Event, Event]) -> Callable[[TrainerState, Event], bool]:
    """Return a question that is true once each ``interval``.

    Args:
        interval: In any unit; whole.
        at: The event for intervals in other units than ``ep``, and the one for those in ``ep``.
    """
    on_batch, on_epoch = at
    countable("the interval", interval)

    def due(state: TrainerState, event: Event) -> bool:
        before, now = state.previous_timestamp, state.timestamp
        if interval.unit is TimeUnit.EPOCH:
            return event is on_epoch and now.epoch.value // interval.value > before.epoch.value // interval.value
        if event is not on_batch:
            return False
        countable("the interval", interval, tokens=now.token.value > 0 or now.batch.value == 0)
        return now.intervals(interval, state.max_duration) > before.intervals(interval, state.max_duration)

    return due


def ends_run(state: TrainerState, event: Event) -> bool:
    """Return whether a checkpoint event is the last one of the run.

    Args:
        state: Of the trainer.
        event: ``BATCH_CHECKPOINT`` or ``EPOCH_CHECKPOINT``.
    """
    # Where the last batch ends an epoch, that epoch's end comes after it.
    return state.finished and (event is Event.EPOCH_CHECKPOINT or not state.ends_epoch)


def or_at_the_end(due: Question) -> Question:
    """Return a question that is true where another is and at the end of the run, at each moment once.

    Args:
        due: The other.
    """

    def asked(state: TrainerState, event: Event) -> bool:
        if event not in (Event.BATCH_CHECKPOINT, Event.EPOCH_CHECKPOINT):
            return False
        if state.finished:
            return ends_run(state, event)
        return due(state, event)

    return asked
