"""Events: who is told of them, and in which order."""

from collections.abc import Callable

from polyak.algorithm import dispatch
from polyak.events import Event
from polyak.trainer.loggers import Logger
from polyak.trainer.signals import signals_held
from polyak.trainer.state import TrainerState


class Engine:
    """Fires events at the algorithms, then the callbacks, then the loggers of a trainer.

    Args:
        state: What they see; its ``algorithms`` and ``callbacks`` are told.
        logger: Where they log.
    """

    def __init__(self, state: TrainerState, logger: Logger) -> None:
        self._state = state
        self._logger = logger

    def fire(self, event: Event) -> None:
        """Tell all of an event.

        Args:
            event: What happened.
        """
        dispatch(event, self._state, self._state.algorithms, self._logger)
        self.tell_callbacks(event)

    def fire_after(self, event: Event, change: Callable[[], None]) -> None:
        """Change the weights or the clock and let the algorithms act on it, in one step that signals do not interrupt.

        What an interrupt, and a checkpoint saved in its handler, finds is a moment before or after: never weights that
        have moved without being counted, or been counted without being averaged.

        Args:
            event: Fired after the change.
            change: Called first.
        """
        with signals_held():
            change()
            dispatch(event, self._state, self._state.algorithms, self._logger)

    def tell_callbacks(self, event: Event) -> None:
        """Tell the callbacks and the loggers of an event that the algorithms have acted on.

        Args:
            event: What happened.
        """
        for callback in list(self._state.callbacks):
            callback.run_event(event, self._state, self._logger)
