"""``TrainerState``: the state that the trainer's algorithms and callbacks read."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch.optim import Optimizer

from polyak.algorithm import Algorithm
from polyak.time import Time, TimeUnit
from polyak.training.state import LoopState

if TYPE_CHECKING:
    from polyak.trainer.callback import Callback
    from polyak.trainer.evaluators import Evaluator


class Scheduler(Protocol):
    """The members of a learning rate scheduler that are used: those of torch's schedulers."""

    def step(self) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


@dataclass(kw_only=True)
class TrainerState(LoopState):
    """The state of a trainer, with the names of Composer's state.

    Args:
        optimizers: As given to the trainer.
        schedulers: As given to the trainer.
        algorithms: The algorithms, in order; a callback may append more.
        callbacks: The callbacks, in order, with the loggers last; more may be appended.
        train_dataloader: As given to the trainer.
        dataloader: The current data loader: that of training, or of an evaluator.
        dataloader_label: ``"train"``, or the label of the evaluator.
        evaluators: The data to evaluate, each with its label.
        batch: The current batch: on the CPU until ``BEFORE_TRAIN_BATCH``, then each microbatch on the device.
        outputs: The outputs of the model for ``batch``.
        loss: The loss of the last batch, over all ranks, detached; from ``AFTER_LOSS`` to ``AFTER_BACKWARD`` of the
            microbatch.
        eval_metrics: The metrics of the last evaluation, by name.
        train_metrics: The metrics of the last batch whose training metrics were logged, by name.
        counted: The units of time that are counted.
        rank: The rank of this process among those that train the model. Only rank 0 should write and print.
        sharded: Whether the model or an average is sharded over ranks, so that checkpoints are folders.
        run_name: The name of this run.
        seed: The seed of this run.
        stopping: Whether ``stop_training`` was called.
        found_no_checkpoint: Whether the run begins because ``autoresume`` found no checkpoint.

    Attributes:
        save_checkpoint: Writes a checkpoint of the run to a path. A collective: all ranks must call it.
    """

    optimizers: list[Optimizer]
    schedulers: list[Scheduler]
    algorithms: list[Algorithm]
    callbacks: "list[Callback]" = field(default_factory=list)
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
    rank: int = 0
    sharded: bool = False
    run_name: str = ""
    seed: int = 0
    stopping: bool = False
    found_no_checkpoint: bool = False
    save_checkpoint: Callable[[str | Path], None] = field(init=False)

    def stop_training(self) -> None:
        """End the run after this batch, with the events of its end. A later ``fit`` continues."""
        self.stopping = True

    @property
    def dataloader_len(self) -> Time | None:
        """The number of batches in an epoch of training; None if it is not known."""
        length = self.timestamp.epoch_length
        return None if length is None else Time(length, TimeUnit.BATCH)

    @property
    def finished(self) -> bool:
        """Whether the run has reached ``max_duration``, or was asked to stop."""
        if self.stopping or self.max_duration is None:
            return self.stopping
        return self.timestamp.get(self.max_duration.unit) >= self.max_duration
