"""The training loop: epochs of batches until the run has reached its duration."""

import time
from collections.abc import Callable
from typing import Any

from polyak.events import Event
from polyak.trainer.engine import Engine
from polyak.trainer.epochs import Epochs
from polyak.trainer.evaluation import Evaluation
from polyak.trainer.parallel import Group
from polyak.trainer.rollback import Rollback
from polyak.trainer.state import TrainerState
from polyak.trainer.step import Step
from polyak.trainer.traininglog import TrainingLog
from polyak.training.rng import Stream


class Fitting:
    """Trains, evaluates where that is due, and fires the events.

    A batch is either counted, averaged and part of what is saved, or has not begun: when an exception or an interrupt
    leaves it early, what it has changed is put back, and a later ``run`` or a resumed run repeats it.

    Args:
        engine: Fires the events.
        state: What there is.
        epochs: Gives the batches.
        stream: What the batches are drawn from.
        step: Trains on a batch.
        evaluation: Runs where it is due.
        log: Of training.
        group: Who trains together.
        num_samples: Returns how many samples a batch has.
        num_tokens: Returns how many tokens a batch has, if they are counted.
    """

    def __init__(
        self,
        engine: Engine,
        state: TrainerState,
        *,
        epochs: Epochs,
        stream: Stream,
        step: Step,
        evaluation: Evaluation,
        log: TrainingLog,
        group: Group,
        num_samples: Callable[[Any], int],
        num_tokens: Callable[[Any], int] | None,
    ) -> None:
        self._engine = engine
        self._state = state
        self._epochs = epochs
        self._stream = stream
        self._step = step
        self._evaluation = evaluation
        self._log = log
        self._group = group
        self._num_samples = num_samples
        self._num_tokens = num_tokens

    def run(self) -> None:
        """Train until the state's ``max_duration``, and evaluate at the end what has not been evaluated there."""
        state, fire = self._state, self._engine.fire
        state.stopping = False
        rollback = Rollback(state.model, self._stream)
        try:
            fire(Event.FIT_START)
            state.model.train()
            state.dataloader, state.dataloader_label = state.train_dataloader, "train"
            while not state.finished:
                self._run_epoch(rollback)
            fire(Event.FIT_END)
            self._evaluate_if_due(Event.FIT_END, rollback)
        except BaseException:
            try:
                fire(Event.EXCEPTION)
            finally:
                self._step.abandon()
                rollback.restore()
            raise

    def _run_epoch(self, rollback: Rollback) -> None:
        state, fire = self._state, self._engine.fire
        rollback.begin()
        if self._epochs.completed == 0:
            if state.timestamp.epoch_in_iteration == 0:
                fire(Event.ITERATION_START)
            fire(Event.EPOCH_START)
        began = time.perf_counter()
        for batch in self._epochs.rest():
            state.batch = batch
            fire(Event.AFTER_DATALOADER)
            fire(Event.BATCH_START)
            self._step.compute_gradients()
            self._engine.fire_after(Event.BATCH_END, lambda: self._move_and_count(batch, began, rollback))  # noqa: B023
            self._log.log_if_due(Event.BATCH_END)
            self._engine.tell_callbacks(Event.BATCH_END)
            self._evaluate_if_due(Event.BATCH_END, rollback)
            fire(Event.BATCH_CHECKPOINT)
            rollback.begin()
            began = time.perf_counter()
            if state.finished:
                break
        if not state.finished or self._epochs.completed == state.timestamp.epoch_length:
            self._end_epoch(rollback)
        rollback.done()

    def _move_and_count(self, batch: Any, began: float, rollback: Rollback) -> None:
        """Make the optimizer step and count it: on all ranks the same, by rank 0's clock."""
        stepped = self._step.move()
        samples = self._num_samples(batch)
        tokens = self._num_tokens(batch) if self._num_tokens else 0
        seconds = time.perf_counter() - began
        if self._group.size > 1:
            first = self._group.rank == 0
            own = (samples, tokens) if first or self._epochs.own_batches else (0, 0)
            samples, tokens, seconds = self._group.ranks.totals(*own, seconds if first else 0.0)
        state = self._state
        state.previous_timestamp = state.timestamp
        state.timestamp = state.timestamp.to_next_batch(int(samples), int(tokens), seconds=seconds, steps=int(stepped))
        self._epochs.completed += 1
        rollback.done()

    def _evaluate_if_due(self, event: Event, rollback: Rollback) -> None:
        due = self._evaluation.due_at(event)
        if due:
            rollback.begin()  # an evaluation that is left early has drawn random numbers too
            self._evaluation.run_in_training(due)
            rollback.done()

    def _end_epoch(self, rollback: Rollback) -> None:
        def count() -> None:
            self._step.end_epoch()
            self._state.previous_timestamp = self._state.timestamp
            self._state.timestamp = self._state.timestamp.to_next_epoch()
            self._epochs.completed = 0
            rollback.done()

        self._engine.fire_after(Event.EPOCH_END, count)
        self._log.log_if_due(Event.EPOCH_END)
        self._engine.tell_callbacks(Event.EPOCH_END)
        self._evaluate_if_due(Event.EPOCH_END, rollback)
        self._engine.fire(Event.EPOCH_CHECKPOINT)
