"""What the trainer's algorithms and callbacks see of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from polyak.algorithm import Algorithm
from polyak.errors import TimeError
from polyak.events import Event, elapsed_duration
from polyak.time import Time, Timestamp, TimeUnit


class Scheduler(Protocol):
    """The members of a learning rate scheduler that are used: those of torch's."""

    def step(self) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


@dataclass
class TrainerState:
    """Where the trainer stands and what it works with; an ``events.State`` and more.

    Args:
        model: In training, wrapped or not.
        max_duration: How long to train.
        optimizers: As given to the trainer.
        schedulers: As given to the trainer.
        algorithms: As given to the trainer.
        timestamp: Now.
        previous_timestamp: Before the last batch or epoch ended.
        loss: Of the last batch, over all ranks, detached.
        eval_metrics: The last evaluation's, by name.
        saving_to: Where a checkpoint is being written, between ``SAVE_START`` and ``SAVE_END``.
        save_checkpoint: Writes a checkpoint of the run to a path. Where several ranks train, all must call it.
        rank: The number of this process among those that train the model. Only the first, 0, should write and print.
        sharded: Whether the model or an average is divided over ranks, so that checkpoints are folders.
        found_no_checkpoint: Whether the run was to resume by itself and found no checkpoint, so that it begins.
    """

    model: nn.Module
    max_duration: Time | None
    optimizers: Sequence[Optimizer]
    schedulers: Sequence[Scheduler]
    algorithms: Sequence[Algorithm]
    save_checkpoint: Callable[[Path], None]
    timestamp: Timestamp = field(default_factory=Timestamp)
    previous_timestamp: Timestamp = field(default_factory=Timestamp)
    loss: Tensor | None = None
    eval_metrics: dict[str, float] = field(default_factory=dict)
    saving_to: Path | None = None
    rank: int = 0
    sharded: bool = False
    found_no_checkpoint: bool = False

    def get_elapsed_duration(self) -> Time | None:
        """Return the elapsed share of the run as ``dur``; None if ``max_duration`` is not known."""
        return elapsed_duration(self.timestamp, self.max_duration)

    @property
    def finished(self) -> bool:
        """Whether the run has reached ``max_duration``."""
        if self.max_duration is None:
            return False
        return self.timestamp.get(self.max_duration.unit) >= self.max_duration


def countable(time: Time, *, tokens: bool = True) -> Time:
    """Return a time that a trainer can count up to.

    Args:
        time: In any unit.
        tokens: Whether tokens are counted.

    Raises:
        TimeError: If it is in a unit that is not counted.
    """
    if time.unit is TimeUnit.ITERATION:
        raise TimeError(f"a trainer counts ep, ba, sp, tok and sec, and no iterations (got {time})")
    if time.unit is TimeUnit.TOKEN and not tokens:
        raise TimeError(f"times in tok need tokens to be counted: give Trainer num_tokens= (got {time})")
    return time


def every(interval: Time, *, at: tuple[Event, Event]) -> Callable[[TrainerState, Event], bool]:
    """Return a question that is true once each ``interval``.

    Args:
        interval: In any unit; whole.
        at: The event for intervals in other units than ``ep``, and the one for those in ``ep``.
    """
    on_batch, on_epoch = at
    countable(interval)

    def due(state: TrainerState, event: Event) -> bool:
        before, now = state.previous_timestamp, state.timestamp
        if interval.unit is TimeUnit.EPOCH:
            return event is on_epoch and now.epoch.value // interval.value > before.epoch.value // interval.value
        if event is not on_batch:
            return False
        countable(interval, tokens=now.token.value > 0 or now.batch.value == 0)
        return now.intervals(interval, state.max_duration) > before.intervals(interval, state.max_duration)

    return due
