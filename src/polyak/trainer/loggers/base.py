"""``Destination``, which takes metrics, and ``Logger``, which passes them to all destinations."""

from collections.abc import Mapping, Sequence

from polyak.trainer.callback import Callback
from polyak.trainer.state import TrainerState


class Destination(Callback):
    """A callback that receives metrics. Destinations run after all other callbacks."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Log metrics.

        Args:
            metrics: Values by name.
            step: The number of batches so far.
        """
        raise NotImplementedError


class Logger:
    """Passes metrics to all destinations.

    Args:
        state: The state of the trainer, for the default of ``step``.
        destinations: The destinations, in order.
    """

    def __init__(self, state: TrainerState, destinations: Sequence[Destination] = ()) -> None:
        self.destinations = tuple(destinations)
        self._state = state

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log metrics.

        Args:
            metrics: Values by name.
            step: Batches so far; the number now by default.
        """
        now = self._state.timestamp.batch.value if step is None else step
        for destination in self.destinations:
            destination.log_metrics(metrics, int(now))
