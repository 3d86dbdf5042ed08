"""What an algorithm gets from a training loop: the ``Event`` that has happened, and the ``State`` of the loop."""

from collections.abc import Collection
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from torch import nn

from polyak.errors import TimeError
from polyak.time import Time, Timestamp, TimeUnit


class Event(StrEnum):
    """A point in the training loop. The names and their order are MosaicML Composer's.

    ::

        INIT, BEFORE_LOAD, AFTER_LOAD
        FIT_START
          ITERATION_START
          EPOCH_START
            BEFORE_DATALOADER, next batch, AFTER_DATALOADER
            BATCH_START
            BEFORE_TRAIN_BATCH
              { BEFORE_FORWARD, outputs, AFTER_FORWARD, BEFORE_LOSS, loss, AFTER_LOSS,
                BEFORE_BACKWARD, backward, AFTER_BACKWARD } per microbatch
            AFTER_TRAIN_BATCH, optimizer step, timestamp -> next batch
            BATCH_END, [evaluation if due], BATCH_CHECKPOINT, [save if due]
          timestamp -> next epoch
          EPOCH_END, [evaluation if due], EPOCH_CHECKPOINT, [save if due]
          timestamp -> next iteration, ITERATION_END, ITERATION_CHECKPOINT: in loops with iterations of several epochs
        FIT_END
        evaluation: EVAL_BEFORE_ALL, {EVAL_START .. EVAL_END} per data set, EVAL_AFTER_ALL
        alone:      EVAL_STANDALONE_START, {EVAL_START .. EVAL_END} per data set, EVAL_STANDALONE_END
        in each:    {EVAL_BATCH_START, EVAL_BEFORE_FORWARD, EVAL_AFTER_FORWARD, EVAL_BATCH_END} per batch
        prediction: PREDICT_START, {PREDICT_BATCH_START .. PREDICT_BATCH_END} per batch, PREDICT_END
        save:       SAVE_START .. SAVE_END

    At ``AFTER_TRAIN_BATCH`` the gradients of the whole batch are complete and unscaled: this is where they are clipped.
    Integrations fire the events that their framework has; those inside a batch (``is_inner``) only ``Trainer`` fires.

    There is no EPOCH_END where the run ends inside an epoch. A run of ``Trainer`` is one iteration, as by default in
    Composer: it begins before the first epoch and does not end. Three events are not Composer's: ``SAVE_START`` and
    ``SAVE_END`` surround the saving of any checkpoint, so that an algorithm need not guess whether a saver is due, and
    ``EXCEPTION`` is fired when any exception ends the loop, so that algorithms restore the training weights.
    """

    INIT = "init"
    BEFORE_LOAD = "before_load"
    AFTER_LOAD = "after_load"
    FIT_START = "fit_start"
    ITERATION_START = "iteration_start"
    EPOCH_START = "epoch_start"
    BEFORE_DATALOADER = "before_dataloader"
    AFTER_DATALOADER = "after_dataloader"
    BATCH_START = "batch_start"
    BEFORE_TRAIN_BATCH = "before_train_batch"
    BEFORE_FORWARD = "before_forward"
    AFTER_FORWARD = "after_forward"
    BEFORE_LOSS = "before_loss"
    AFTER_LOSS = "after_loss"
    BEFORE_BACKWARD = "before_backward"
    AFTER_BACKWARD = "after_backward"
    AFTER_TRAIN_BATCH = "after_train_batch"
    BATCH_END = "batch_end"
    BATCH_CHECKPOINT = "batch_checkpoint"
    EPOCH_END = "epoch_end"
    EPOCH_CHECKPOINT = "epoch_checkpoint"
    ITERATION_END = "iteration_end"
    ITERATION_CHECKPOINT = "iteration_checkpoint"
    FIT_END = "fit_end"
    EVAL_BEFORE_ALL = "eval_before_all"
    EVAL_START = "eval_start"
    EVAL_BATCH_START = "eval_batch_start"
    EVAL_BEFORE_FORWARD = "eval_before_forward"
    EVAL_AFTER_FORWARD = "eval_after_forward"
    EVAL_BATCH_END = "eval_batch_end"
    EVAL_END = "eval_end"
    EVAL_AFTER_ALL = "eval_after_all"
    EVAL_STANDALONE_START = "eval_standalone_start"
    EVAL_STANDALONE_END = "eval_standalone_end"
    PREDICT_START = "predict_start"
    PREDICT_BATCH_START = "predict_batch_start"
    PREDICT_BEFORE_FORWARD = "predict_before_forward"
    PREDICT_AFTER_FORWARD = "predict_after_forward"
    PREDICT_BATCH_END = "predict_batch_end"
    PREDICT_END = "predict_end"
    SAVE_START = "save_start"
    SAVE_END = "save_end"
    EXCEPTION = "exception"

    @property
    def is_inner(self) -> bool:
        """Whether it is fired within a batch, between its start and its end."""
        return self in _INNER

    @property
    def is_before_event(self) -> bool:
        """Whether it begins something."""
        return "before_" in self.value or self.value.endswith("_start")

    @property
    def is_after_event(self) -> bool:
        """Whether it ends something."""
        return "after_" in self.value or self.value.endswith("_end")

    @property
    def is_eval(self) -> bool:
        """Whether it belongs to an evaluation."""
        return self.value.startswith("eval")

    @property
    def is_predict(self) -> bool:
        """Whether it belongs to a prediction."""
        return self.value.startswith("predict")

    @property
    def canonical_name(self) -> str:
        """The name without ``before`` and ``after``, ``start`` and ``end``: ``"batch"`` for ``BATCH_START``."""
        name = self.value.replace("before_", "").replace("after_", "")
        return name.removesuffix("_start").removesuffix("_end")


_INNER = frozenset(
    {
        Event.BEFORE_DATALOADER,
        Event.AFTER_DATALOADER,
        Event.BEFORE_TRAIN_BATCH,
        Event.BEFORE_FORWARD,
        Event.AFTER_FORWARD,
        Event.BEFORE_LOSS,
        Event.AFTER_LOSS,
        Event.BEFORE_BACKWARD,
        Event.AFTER_BACKWARD,
        Event.AFTER_TRAIN_BATCH,
        Event.EVAL_BATCH_START,
        Event.EVAL_BEFORE_FORWARD,
        Event.EVAL_AFTER_FORWARD,
        Event.EVAL_BATCH_END,
        Event.PREDICT_BATCH_START,
        Event.PREDICT_BEFORE_FORWARD,
        Event.PREDICT_AFTER_FORWARD,
        Event.PREDICT_BATCH_END,
    }
)


class State(Protocol):
    """The members of a loop's state that an algorithm may read."""

    @property
    def model(self) -> nn.Module:
        """The model in training, wrapped or not."""
        ...

    @property
    def timestamp(self) -> Timestamp:
        """The clock: what training has counted so far."""
        ...

    @property
    def max_duration(self) -> Time | None:
        """The length of the run, if it is known."""
        ...

    @property
    def saving_to(self) -> Path | None:
        """The path of the checkpoint that is being written, if one is and its path is known."""
        ...

    def get_elapsed_duration(self) -> Time | None:
        """Return the elapsed share of the run as ``dur``, epochs counted with their fraction; None if not known."""
        ...


def elapsed_duration(timestamp: Timestamp, max_duration: Time | None) -> Time | None:
    """Return the elapsed share of a run as ``dur``; None if its length is not known.

    Args:
        timestamp: The clock.
        max_duration: The length of the run, if it is known.
    """
    if max_duration is None:
        return None
    return Time(timestamp.elapsed(TimeUnit.DURATION, max_duration), TimeUnit.DURATION)


_HOW_TO_COUNT = {
    TimeUnit.TOKEN: "say how many tokens a batch has (tokens_per_step= or num_tokens=; in Transformers "
    "include_num_input_tokens_seen, in Composer get_num_tokens_in_batch of a DataSpec)",
    TimeUnit.SAMPLE: "say how many samples a batch has (samples_per_step= or num_samples=)",
    TimeUnit.EPOCH: "say how many batches an epoch has (steps_per_epoch=, or a loader with a length; "
    "steps_per_epoch='by hand' if you call end_epoch())",
    TimeUnit.SECOND: "train in polyak.Trainer, which counts seconds",
    TimeUnit.ITERATION: "train in Composer, which counts iterations",
}


def refuse_uncounted(
    argument: str, unit: TimeUnit, state: State, counted: Collection[TimeUnit], *, fractions: bool = False
) -> None:
    """Refuse a unit of time that a loop does not count.

    Args:
        argument: The argument in this unit, as it was given, to name it in errors.
        unit: Any unit.
        state: The state of the run.
        counted: Units that the loop counts.
        fractions: Whether fractions of epochs matter.

    Raises:
        TimeError: If the loop does not count the unit.
    """
    if unit is TimeUnit.DURATION:
        if state.max_duration is None:
            raise TimeError(
                "times in dur need a run whose max_duration is known: give max_duration, or use another unit "
                f"(got {argument}, max_duration=None)"
            )
        argument, unit = f"{argument}, max_duration='{state.max_duration}'", state.max_duration.unit
    partial = fractions and unit is TimeUnit.EPOCH and state.timestamp.epoch_length is None
    if unit not in counted or partial:
        raise TimeError(
            f"the loop must count {unit} for {argument}, and it counts {'only whole ' if partial else ''}"
            f"{', '.join(sorted(counted))}; {_HOW_TO_COUNT.get(unit, 'use another unit')}, or use ba"
        )
