"""``Fitting``: the training loop, epochs of batches until the run has reached its duration."""

import time
import warnings
from typing import Any

from polyak.errors import PlanWarning
from polyak.events import Event
from polyak.trainer.context import Context
from polyak.trainer.epochs import Epochs
from polyak.trainer.evaluation import Evaluation
from polyak.trainer.interrupts import Rollback, signals_held
from polyak.trainer.options import Checked
from polyak.trainer.polish import Polish
from polyak.trainer.step import Step
from polyak.training.moved import BetweenSteps


class Fitting:
    """Trains, and evaluates and logs when that is due.

    A batch is either complete (counted, averaged, and in later checkpoints) or has not begun. If an exception or an
    interrupt stops it, its changes are undone, and a later ``run`` or a resumed run repeats it.

    Args:
        context: The context of the trainer.
        epochs: Draws the batches.
        step: Trains on a batch.
        evaluation: Evaluates.
        polish: The last phase of the run.
        checked: The arguments of the trainer.
    """

    def __init__(  # noqa: PLR0917  the parts of a trainer
        self,
        context: Context,
        epochs: Epochs,
        step: Step,
        evaluation: Evaluation,
        polish: Polish,
        checked: Checked,
    ) -> None:
        self._context = context
        self._state = context.state
        self._loop = context.loop
        self._epochs = epochs
        self._step = step
        self._evaluation = evaluation
        self._polish = polish
        self._log_due = checked.log_due
        self._num_samples = checked.given.num_samples
        self._num_tokens = checked.given.num_tokens
        self._loaded = checked.given.load_path is not None and not checked.given.autoresume
        self._has_run = False
        instead = "do it in optimizer.register_step_post_hook, inside the step"
        self._between = BetweenSteps(context.state.model, lambda _: bool(context.state.algorithms), instead)

    def run(self) -> None:
        """Train until the state's ``max_duration``, and run the evaluators that are due at the end."""
        state, fire = self._state, self._loop.fire
        state.stopping = False
        self._warn_if_over()
        self._has_run = True
        rollback = Rollback(state.model, self._context.stream)
        self._between.forget()
        try:
            self._polish.start_run()
            fire(Event.FIT_START)
            state.model.train()
            state.dataloader, state.dataloader_label = state.train_dataloader, "train"
            while not state.finished:
                self._run_epoch(rollback)
            fire(Event.FIT_END)
            self._evaluate_if_due(Event.FIT_END, rollback)
            rollback.begin()
            self._polish.measure_after()
            rollback.done()
        except BaseException:
            try:
                fire(Event.EXCEPTION)
            finally:
                self._step.abandon()
                rollback.restore()
            raise

    def _warn_if_over(self) -> None:
        """Warn if the run has reached its end, or the run that was loaded has gone further than this one will."""
        state, length = self._state, self._state.max_duration
        beyond = self._loaded and length is not None and state.timestamp.get(length.unit) > length
        if beyond or (self._has_run and state.finished):
            warnings.warn(
                f"fit() has nothing to train: the run has reached its max_duration, {length}; give fit(duration=) to "
                "train longer, or reset_time=True to start the clock again",
                PlanWarning,
                stacklevel=4,
            )

    def reset_time(self) -> None:
        """Set the clock back to the start."""
        self._state.reset_clock()
        self._epochs.completed = 0
        self._evaluation.evaluated_at = {}
        self._polish.reset()

    def _run_epoch(self, rollback: Rollback) -> None:
        state, fire = self._state, self._loop.fire
        self._polish_if_due(rollback)
        rollback.begin()
        if self._epochs.completed == 0:
            if state.timestamp.epoch_in_iteration == 0:
                fire(Event.ITERATION_START)
            fire(Event.EPOCH_START)
        began = time.perf_counter()
        for batch in self._epochs.remaining():
            state.batch = batch
            fire(Event.AFTER_DATALOADER)
            fire(Event.BATCH_START)
            self._polish.set_rates()
            self._step.compute_gradients()
            # An interrupt, and a checkpoint that its handler saves, must not see weights that have moved and were not
            # counted, or were counted and not averaged.
            if self._between.noted:
                self._between.check()
            with signals_held():
                self._move_and_count(batch, began)
                rollback.done()
                self._loop.dispatch(Event.BATCH_END)
            self._between.wait -= 1
            if not self._between.wait:
                self._between.note()
            self._log_if_due(Event.BATCH_END)
            self._loop.notify(Event.BATCH_END)
            self._evaluate_if_due(Event.BATCH_END, rollback)
            fire(Event.BATCH_CHECKPOINT)
            self._polish_if_due(rollback)
            rollback.begin()
            began = time.perf_counter()
            if state.finished:
                break
        if not state.finished or self._epochs.completed == state.timestamp.epoch_length:
            self._end_epoch(rollback)
        rollback.done()

    def _move_and_count(self, batch: Any, began: float) -> None:
        """Make the optimizer step and count it. All ranks count the same, with the seconds of rank 0."""
        stepped = self._step.move()
        samples = self._num_samples(batch)
        tokens = self._num_tokens(batch) if self._num_tokens else 0
        seconds = time.perf_counter() - began
        group = self._context.group
        if group.size > 1:
            first = group.rank == 0
            own = (samples, tokens) if first or self._epochs.own_batches else (0, 0)
            samples, tokens, seconds = group.ranks.totals(*own, seconds if first else 0.0)
        self._loop.count_batch(int(samples), int(tokens), seconds=seconds, steps=int(stepped))
        self._epochs.completed += 1

    def _end_epoch(self, rollback: Rollback) -> None:
        with signals_held():
            self._step.end_epoch()
            self._loop.count_epoch()
            self._epochs.completed = 0
            rollback.done()
            self._loop.dispatch(Event.EPOCH_END)
        self._log_if_due(Event.EPOCH_END)
        self._loop.notify(Event.EPOCH_END)
        self._evaluate_if_due(Event.EPOCH_END, rollback)
        self._loop.fire(Event.EPOCH_CHECKPOINT)

    def _evaluate_if_due(self, event: Event, rollback: Rollback) -> None:
        due = self._evaluation.due_at(event)
        if due:
            rollback.begin()  # an evaluation that is stopped early has drawn random numbers too
            self._evaluation.run_in_training(due)
            rollback.done()

    def _polish_if_due(self, rollback: Rollback) -> None:
        """Begin the polish between two batches, where a resumed run would begin it too."""
        if self._state.finished:
            return
        if self._polish.is_due:
            self._between.forget()
            with signals_held():
                self._polish.begin()
        if self._polish.wants_figures:
            rollback.begin()
            self._polish.measure_before()
            rollback.done()

    def _log_if_due(self, event: Event) -> None:
        """Log the loss, the learning rates and the training metrics of the last batch."""
        state, logger = self._state, self._context.logger
        if not self._log_due(state, event) or not (logger.destinations or self._step.metrics):
            return
        rates = {f"lr{i or ''}": float(one.param_groups[0]["lr"]) for i, one in enumerate(state.optimizers)}
        state.train_metrics = {f"train/{name}": value for name, value in self._step.metrics.compute().items()}
        logger.log_metrics({"train/loss": float(state.loss), **state.train_metrics, **rates})
