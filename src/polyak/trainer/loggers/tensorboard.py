"""Metrics for TensorBoard."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polyak.algorithm import MetricLogger
from polyak.trainer.loggers.base import Destination
from polyak.trainer.state import TrainerState


class TensorBoardLogger(Destination):
    """Writes metrics for TensorBoard; it needs ``pip install polyak[tensorboard]``.

    Args:
        folder: The folder for the event files.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = folder if "://" in str(folder) else Path(folder).absolute()  # a URL may be that of a bucket
        self._writer: Any = None

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Write scalars.

        Args:
            metrics: Values by name.
            step: The number of batches so far.
        """
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415  an extra

            # Steps that an earlier run wrote after the checkpoint that this run resumed from are not shown.
            self._writer = SummaryWriter(str(self._folder), purge_step=step)
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def fit_end(self, state: TrainerState, logger: MetricLogger) -> None:
        """Flush the event file.

        Args:
            state: Not used.
            logger: Not used.
        """
        del state, logger
        if self._writer is not None:
            self._writer.flush()

    exception = eval_after_all = fit_end
