"""What a training loop tells an algorithm: ``Event`` says where it is, ``State`` what there is."""

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
          EPOCH_START
            BATCH_START, forward, backward, optimizer step, timestamp -> next batch
            BATCH_END, [evaluation if due], BATCH_CHECKPOINT, [save if due]
          timestamp -> next epoch
          EPOCH_END, [evaluation if due], EPOCH_CHECKPOINT, [save if due]
        FIT_END
        evaluation: EVAL_BEFORE_ALL, {EVAL_START .. EVAL_END} per data set, EVAL_AFTER_ALL
        by itself:  EVAL_STANDALONE_START, {EVAL_START .. EVAL_END} per data set, EVAL_STANDALONE_END
        prediction: PREDICT_START .. PREDICT_END
        save:       SAVE_START .. SAVE_END

    There is no EPOCH_END where the run ends inside an epoch. Three are ours. ``SAVE_START`` and ``SAVE_END``
    surround the taking of any checkpoint, so that an algorithm need not guess whether a saver is due. ``EXCEPTION``
    is fired when the loop is left by an exception of any kind: whoever has lent something takes it back.
    """

    INIT = "init"
    BEFORE_LOAD = "before_load"
    AFTER_LOAD = "after_load"
    FIT_START = "fit_start"
    EPOCH_START = "epoch_start"
    BATCH_START = "batch_start"
    BATCH_END = "batch_end"
    BATCH_CHECKPOINT = "batch_checkpoint"
    EPOCH_END = "epoch_end"
    EPOCH_CHECKPOINT = "epoch_checkpoint"
    FIT_END = "fit_end"
    EVAL_BEFORE_ALL = "eval_before_all"
    EVAL_START = "eval_start"
    EVAL_END = "eval_end"
    EVAL_AFTER_ALL = "eval_after_all"
    EVAL_STANDALONE_START = "eval_standalone_start"
    EVAL_STANDALONE_END = "eval_standalone_end"
    PREDICT_START = "predict_start"
    PREDICT_END = "predict_end"
    SAVE_START = "save_start"
    SAVE_END = "save_end"
    EXCEPTION = "exception"


class State(Protocol):
    """The members of a host's state that an algorithm may read."""

    @property
    def model(self) -> nn.Module:
        """The model in training, wrapped or not."""
        ...

    @property
    def timestamp(self) -> Timestamp:
        """Where training stands."""
        ...

    @property
    def max_duration(self) -> Time | None:
        """How long it will go on, if that is known."""
        ...

    @property
    def saving_to(self) -> Path | None:
        """Where a checkpoint is being written, if one is and that is known."""
        ...

    def get_elapsed_duration(self) -> Time | None:
        """Return the elapsed share of the run as ``dur``, epochs counted with their fraction; None if not known."""
        ...


def elapsed_duration(timestamp: Timestamp, max_duration: Time | None) -> Time | None:
    """Return what a state's ``get_elapsed_duration`` should.

    Args:
        timestamp: Where training stands.
        max_duration: How long it will go on, if that is known.
    """
    if max_duration is None:
        return None
    return Time(timestamp.elapsed(TimeUnit.DURATION, max_duration), TimeUnit.DURATION)


_HOW_TO_COUNT = {
    TimeUnit.TOKEN: "say how many tokens a batch has (tokens_per_step= or num_tokens=)",
    TimeUnit.SAMPLE: "say how many samples a batch has (samples_per_step= or num_samples=)",
    TimeUnit.EPOCH: "say how many batches an epoch has (steps_per_epoch=, or a loader of known length)",
    TimeUnit.SECOND: "train in polyak.Trainer, which counts seconds",
    TimeUnit.ITERATION: "train in Composer, which counts iterations",
}


def refuse_uncounted(
    argument: str, unit: TimeUnit, state: State, counted: Collection[TimeUnit], *, fractions: bool = False
) -> None:
    """Refuse a unit of time that a loop does not count.

    Args:
        argument: What is in this unit, as it was given, to name it in errors.
        unit: Any.
        state: What is known of the run.
        counted: Units that the loop counts.
        fractions: Whether fractions of epochs matter.

    Raises:
        TimeError: If the loop does not count the unit.
    """
    if unit is TimeUnit.DURATION:
        if state.max_duration is None:
            raise TimeError(
                "times in dur need a run of known length: give max_duration, or another unit than dur "
                f"(got {argument}, max_duration=None)"
            )
        argument, unit = f"{argument}, max_duration='{state.max_duration}'", state.max_duration.unit
    partial = fractions and unit is TimeUnit.EPOCH and state.timestamp.epoch_length is None
    if unit not in counted or partial:
        raise TimeError(
            f"the loop must count {unit} for {argument}, and it counts {'only whole ' if partial else ''}"
            f"{', '.join(sorted(counted))}; {_HOW_TO_COUNT.get(unit, 'use another unit')}, or use ba"
        )
