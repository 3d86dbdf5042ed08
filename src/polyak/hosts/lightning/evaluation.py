"""``Evaluation``: swaps the average in and out while Lightning evaluates."""

from collections.abc import Sequence
from typing import Any

from polyak.errors import ArgumentError
from polyak.events import Event
from polyak.training.evalweights import EvalWeights, eval_weights_of, refuse_raw_of_averaged
from polyak.training.loop import Loop

Weights = EvalWeights | Sequence[EvalWeights]


def weights_of(given: object) -> Weights:
    """Return the value of the argument ``eval_weights``: one for all dataloaders, or one for each.

    Args:
        given: As given to ``Averaging``.

    Raises:
        ArgumentError: If it is not one of its values, or a list has ``"both"``.
    """
    if not isinstance(given, (list, tuple)):
        return eval_weights_of(given, stacklevel=4)
    weights = [eval_weights_of(one, stacklevel=4) for one in given]
    if "both" in weights:
        raise ArgumentError(
            f"a list eval_weights must have 'averaged' or 'raw' for each dataloader (got {given!r}); give 'both' alone"
        )
    return weights


class Evaluation:
    """Fires the events around validation, test and prediction, and those that change the weights between dataloaders.

    Attributes:
        loop: The loop of the model; None before it is known.
    """

    def __init__(self) -> None:
        self.loop: Loop | None = None
        self._ends: list[Event] = []  # that end what has begun

    def has_average(self, trainer: Any) -> bool:
        """Return whether the average of this run is evaluated, and not the weights of a checkpoint.

        Args:
            trainer: Lightning's.
        """
        return self.loop is not None and (trainer.state.fn.value == "fit" or trainer.ckpt_path is None)

    def begin(self, trainer: Any, start: Event, end: Event) -> None:
        """Fire the first event, unless a checkpoint is evaluated, whose weights are then in the model.

        Args:
            trainer: Lightning's.
            start: The event to fire.
            end: The event that ``end`` will fire.
        """
        if self.has_average(trainer):
            assert self.loop is not None
            self._ends = [end]
            self.loop.fire(start)

    def begin_dataloaders(self, trainer: Any, weights: Weights, dataloaders: int) -> None:
        """Begin a validation or a test.

        Args:
            trainer: Lightning's.
            weights: For all dataloaders, or for each.
            dataloaders: How many there are.

        Raises:
            ArgumentError: If a list has another length.
            LoanError: If it has "raw", and the model holds an average.
        """
        if not isinstance(weights, str) and len(weights) != dataloaders:
            raise ArgumentError(
                f"a list eval_weights must have an entry for each of the {dataloaders} dataloaders (got "
                f"{weights!r}); or give it one value for all"
            )
        if "raw" in weights and not isinstance(weights, str) and self.loop is not None:
            refuse_raw_of_averaged(self.loop.state.model)
        if trainer.state.fn.value == "fit":
            self.begin(trainer, Event.EVAL_BEFORE_ALL, Event.EVAL_AFTER_ALL)
        else:
            self.begin(trainer, Event.EVAL_STANDALONE_START, Event.EVAL_STANDALONE_END)
        self.choose(weights, 0)

    def choose(self, weights: Weights, dataloader: int) -> None:
        """Swap the average in or restore the training weights, as a dataloader needs it.

        Args:
            weights: For all dataloaders, or for each.
            dataloader: Its number.
        """
        averaged = (weights if isinstance(weights, str) else weights[dataloader]) != "raw"
        if self.loop is None or not self._ends or averaged == (Event.EVAL_END in self._ends):
            return
        if averaged:
            self._ends.insert(0, Event.EVAL_END)
            self.loop.fire(Event.EVAL_START)
        else:
            self.loop.fire(self._ends.pop(0))

    def end(self) -> None:
        """Fire the end events of all that has begun."""
        while self._ends:
            assert self.loop is not None
            self.loop.fire(self._ends.pop(0))

    def abandon(self) -> None:
        """Forget what has begun, after an exception."""
        self._ends = []
