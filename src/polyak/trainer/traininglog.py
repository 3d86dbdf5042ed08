"""What of training goes to the loggers, and when."""

from polyak.events import Event
from polyak.trainer.loggers import Logger
from polyak.trainer.metrics import Metrics
from polyak.trainer.state import Question, TrainerState


class TrainingLog:
    """Logs the loss, the learning rates and the training metrics of the last batch.

    Args:
        state: Has them.
        logger: Gets them.
        due: When.
        metrics: Of training.
    """

    def __init__(self, state: TrainerState, logger: Logger, due: Question, metrics: Metrics) -> None:
        self._state = state
        self._logger = logger
        self._due = due
        self._metrics = metrics

    def log_if_due(self, event: Event) -> None:
        """Log if it is time to. All ranks must call this.

        Args:
            event: ``BATCH_END`` or ``EPOCH_END``.
        """
        if not self._due(self._state, event) or not (self._logger.destinations or self._metrics):
            return
        rates = {
            f"lr{i or ''}": float(optimizer.param_groups[0]["lr"]) for i, optimizer in enumerate(self._state.optimizers)
        }
        metrics = {f"train/{name}": value for name, value in self._metrics.compute().items()}
        self._state.train_metrics = metrics
        self._logger.log_metrics({"train/loss": float(self._state.loss), **metrics, **rates})
