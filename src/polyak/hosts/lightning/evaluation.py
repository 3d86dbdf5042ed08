"""``Evaluation``: which weights the model has while Lightning evaluates it."""

from collections.abc import Sequence
from typing import Any, Literal

from polyak.errors import ArgumentError
from polyak.events import Event
from polyak.training.loop import Loop

Weights = Literal["averaged", "training"]


def check_weights(eval_weights: Weights | Sequence[Weights]) -> None:
    """Check the argument ``eval_weights``.

    Args:
        eval_weights: As given to ``Averaging``.

    Raises:
        ArgumentError: If it is none of its values.
    """
    if not {"averaged", "training"}.issuperset([eval_weights] if isinstance(eval_weights, str) else eval_weights):
        raise ArgumentError(f"eval_weights must be 'averaged' or 'training', or a list of them (got {eval_weights!r})")


class Evaluation:
    """Fires the events around validation, test and prediction, and those that change the weights between dataloaders.

    Attributes:
        loop: Of the model; None before it is known.
    """

    def __init__(self) -> None:
        self.loop: Loop | None = None
        self._ends: list[Event] = []  # that end what has begun

    def begin(self, trainer: Any, start: Event, end: Event) -> None:
        """Fire the first event, unless a checkpoint is evaluated: then the model has its weights.

        Args:
            trainer: Lightning's.
            start: To be fired.
            end: That ``end`` will fire.
        """
        if self.loop is not None and (trainer.state.fn.value == "fit" or trainer.ckpt_path is None):
            self._ends = [end]
            self.loop.fire(start)

    def begin_dataloaders(self, trainer: Any, weights: Weights | Sequence[Weights], dataloaders: int) -> None:
        """Begin a validation or a test.

        Args:
            trainer: Lightning's.
            weights: For all dataloaders, or for each.
            dataloaders: How many there are.

        Raises:
            ArgumentError: If a list has another length.
        """
        if not isinstance(weights, str) and len(weights) != dataloaders:
            raise ArgumentError(
                f"a list eval_weights must have an entry for each of the {dataloaders} dataloaders (got "
                f"{weights!r}); or give it one value for all"
            )
        if trainer.state.fn.value == "fit":
            self.begin(trainer, Event.EVAL_BEFORE_ALL, Event.EVAL_AFTER_ALL)
        else:
            self.begin(trainer, Event.EVAL_STANDALONE_START, Event.EVAL_STANDALONE_END)
        self.choose(weights, 0)

    def choose(self, weights: Weights | Sequence[Weights], dataloader: int) -> None:
        """Swap the average in or restore the training weights, as a dataloader needs it.

        Args:
            weights: For all dataloaders, or for each.
            dataloader: Its number.
        """
        chosen = weights if isinstance(weights, str) else weights[dataloader]
        if self.loop is None or not self._ends or (chosen == "averaged") == (Event.EVAL_END in self._ends):
            return
        if chosen == "averaged":
            self._ends.insert(0, Event.EVAL_END)
            self.loop.fire(Event.EVAL_START)
        else:
            self.loop.fire(self._ends.pop(0))

    def end(self) -> None:
        """Fire the events that end what has begun."""
        while self._ends:
            assert self.loop is not None
            self.loop.fire(self._ends.pop(0))

    def abandon(self) -> None:
        """Forget what has begun, after an exception."""
        self._ends = []
