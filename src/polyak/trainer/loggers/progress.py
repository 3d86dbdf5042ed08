"""A progress bar for the terminal."""

from collections.abc import Mapping
from typing import Any

from polyak.algorithm import MetricLogger
from polyak.time import Time, Timestamp
from polyak.trainer.loggers.base import Destination
from polyak.trainer.state import TrainerState


class ProgressBar(Destination):
    """Shows the progress of training, the loss and the last evaluation; it needs ``pip install polyak[cli]``.

    Args:
        console: A ``rich.console.Console``; standard error by default.
    """

    def __init__(self, console: Any = None) -> None:
        self._console = console
        self._progress: Any = None
        self._task: Any = None
        self._shown: dict[str, float] = {}

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Show the metrics next to the bar.

        Args:
            metrics: Values by name.
            step: Not used.
        """
        del step
        self._shown |= metrics

    def fit_start(self, state: TrainerState, logger: MetricLogger) -> None:
        """Start the bar.

        Args:
            state: The state of the trainer.
            logger: Not used.
        """
        del logger
        from rich.console import Console  # noqa: PLC0415  an extra
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn  # noqa: PLC0415

        assert state.max_duration is not None
        self._progress = Progress(
            TextColumn("train"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn(str(state.max_duration.unit)),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
            console=self._console or Console(stderr=True),
        )
        self._task = self._progress.add_task("", total=float(state.max_duration))
        self._progress.start()
        self._advance(state.timestamp, state.max_duration)

    def _advance(self, now: Timestamp, end: Time) -> None:
        text = "  ".join(f"{name} {value:.4g}" for name, value in self._shown.items())
        self._progress.update(self._task, completed=round(now.elapsed(end.unit), 2), description=text)

    def batch_end(self, state: TrainerState, logger: MetricLogger) -> None:
        """Move the bar.

        Args:
            state: The state of the trainer.
            logger: Not used.
        """
        del logger
        if self._progress is not None and state.max_duration is not None:
            self._advance(state.timestamp, state.max_duration)

    epoch_end = batch_end

    def fit_end(self, state: TrainerState, logger: MetricLogger) -> None:
        """Stop the bar.

        Args:
            state: The state of the trainer.
            logger: Not used.
        """
        self.batch_end(state, logger)
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    exception = fit_end
