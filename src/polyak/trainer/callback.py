"""``Callback``, which observes training without changing it."""

from collections.abc import Mapping
from typing import Any

from polyak.algorithm import MetricLogger
from polyak.events import Event
from polyak.trainer.state import TrainerState


class Callback:
    """Observes training. A method with the name of an event is called at that event.

    The methods take ``(state, logger)``, and run after the algorithms of the same event. ``Trainer.close`` calls
    ``close(state, logger)`` and ``post_close()``.

    Example:
        >>> class SayHello(Callback):
        ...     def fit_start(self, state, logger):
        ...         logger.log_metrics({"hello": 1.0})
    """

    def run_event(self, event: Event, state: TrainerState, logger: MetricLogger) -> None:
        """Call the method with the name of the event, if there is one.

        Args:
            event: The event that has happened.
            state: The state of the trainer.
            logger: Where to log.
        """
        method = getattr(self, event.value, None)
        if method is not None:
            method(state, logger)

    def close(self, state: TrainerState, logger: MetricLogger) -> None:
        """Release resources, when the trainer is closed.

        Args:
            state: The state of the trainer.
            logger: Where to log.
        """

    def post_close(self) -> None:
        """Release resources that other callbacks may have used in ``close``."""

    def state_dict(self) -> dict[str, Any]:
        """Return everything that a resumed run depends on, as tensors and plain containers."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from what ``state_dict`` returned.

        Args:
            state: The saved state.
        """
